"""A client of the API server: what the suites need of it."""

import http.client
import json
import ssl
import threading
from urllib.parse import urlencode, urlsplit


class Refused(Exception):
    """The API server's answer was an error."""

    def __init__(self, status, message):
        super().__init__(f"{status} {message}")
        self.status, self.message = status, message


class Api:
    """Each thread has a connection of its own."""

    def __init__(self, url, token, authority):
        self.url, self.token = url, token
        self.context = ssl.create_default_context(cafile=str(authority))
        self.local = threading.local()
        self.resources = {}

    def request(self, method, path, body=None, content="application/json", **query):
        """The answer, and the warnings that came with it."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": content}
        data = json.dumps(body) if body is not None else None
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            answer, text = self.send(method, target, data, headers)
        except (http.client.HTTPException, ConnectionError):
            self.local.connection = None  # an idle connection was closed: once more, on another
            answer, text = self.send(method, target, data, headers)
        said = json.loads(text) if text[:1] == b"{" else text.decode()
        if answer.status >= 300:
            raise Refused(answer.status, said.get("message") if isinstance(said, dict) else said)
        return said, answer.headers.get_all("Warning") or []

    def send(self, method, target, data, headers):
        connection = getattr(self.local, "connection", None)
        if connection is None:
            host = urlsplit(self.url).netloc
            connection = http.client.HTTPSConnection(host, context=self.context, timeout=30)
            self.local.connection = connection
        connection.request(method, target, data, headers)
        answer = connection.getresponse()
        return answer, answer.read()

    def get(self, path, **query):
        return self.request("GET", path, **query)[0]

    def items(self, path, **query):
        return self.get(path, **query)["items"]

    def patch(self, path, changes):
        return self.request("PATCH", path, changes, "application/merge-patch+json")[0]

    def delete(self, path, **query):
        return self.request("DELETE", path, **query)[0]

    def path(self, document, namespace):
        """Where this object is, by what the API server says of its kind."""
        version, kind = document["apiVersion"], document["kind"]
        base = f"/apis/{version}" if "/" in version else f"/api/{version}"
        if (version, kind) not in self.resources:
            for resource in self.get(base)["resources"]:
                if "/" not in resource["name"]:
                    self.resources[version, resource["kind"]] = resource
        resource = self.resources[version, kind]
        if resource["namespaced"]:
            base += f"/namespaces/{document['metadata'].get('namespace', namespace)}"
        return f"{base}/{resource['name']}/{document['metadata']['name']}"

    def apply(self, document, namespace="default", **query):
        """Server-side apply with strict validation: the object, and warnings."""
        return self.request(
            "PATCH", self.path(document, namespace), document, "application/apply-patch+yaml",
            fieldManager="suite", fieldValidation="Strict", force="true", **query,
        )  # fmt: skip

    def namespace(self, name, **labels):
        metadata = {"name": name, "labels": labels}
        return self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata})


def restricted(mode="enforce"):
    """The label of a namespace whose pods must meet the Pod Security Standard `restricted`."""
    return {f"pod-security.kubernetes.io/{mode}": "restricted"}
