"""A Kubernetes control plane on this machine: etcd, API server and controller manager; and a client
of its API. There are no nodes: each suite has its own stand-in for kubelet and the scheduler."""

import http.client
import json
import secrets
import ssl
import threading
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import yaml

from harness.process import E2E, RUN, HarnessError, Program, free_port, run, wait_until

BIN = RUN / "kubernetes" / "bin"

# An operator's definition has the string `=` bare, which YAML 1.1 had a type for.
yaml.CSafeLoader.add_constructor(
    "tag:yaml.org,2002:value", yaml.constructor.SafeConstructor.construct_yaml_str
)


def install(*names):
    """Builds these programs into BIN. The first time that takes many minutes."""
    code, _, problem = run(E2E / "kubernetes" / "tools" / "install.sh", *names, timeout=7200)
    if code != 0:
        raise HarnessError(problem[-3000:])


class Refused(Exception):
    """The API server's response is an error."""

    def __init__(self, status, message):
        super().__init__(f"{status} {message}")
        self.status, self.message = status, message


class Api:
    """A client of the API server. Each thread has a connection of its own."""

    def __init__(self, url, token, authority):
        self.url, self.token = url, token
        self.context = ssl.create_default_context(cafile=str(authority))
        self.local = threading.local()
        self.resources = {}

    def request(self, method, path, body=None, content="application/json", **query):
        """The response, and the warnings that came with it."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": content}
        data = json.dumps(body) if body is not None else None
        target = f"{path}?{urlencode(query)}" if query else path
        try:
            response, text = self.send(method, target, data, headers)
        except (http.client.HTTPException, ConnectionError):
            self.local.connection = None  # an idle connection was closed: once more, on another
            response, text = self.send(method, target, data, headers)
        parsed = json.loads(text) if text[:1] == b"{" else text.decode()
        if response.status >= 300:
            message = parsed.get("message") if isinstance(parsed, dict) else parsed
            raise Refused(response.status, message)
        return parsed, response.headers.get_all("Warning") or []

    def send(self, method, target, data, headers):
        connection = getattr(self.local, "connection", None)
        if connection is None:
            host = urlsplit(self.url).netloc
            connection = http.client.HTTPSConnection(host, context=self.context, timeout=30)
            self.local.connection = connection
        connection.request(method, target, data, headers)
        response = connection.getresponse()
        return response, response.read()

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


class Cluster:
    """`api` is its client, `kubeconfig` a file."""

    def __init__(self, programs, host="127.0.0.1"):
        folder = programs.folder
        store, peers, port = f"http://{host}:{free_port(host)}", free_port(host), free_port(host)
        Program(
            programs, "etcd", BIN / "etcd", "--data-dir", folder / "etcd",
            "--listen-client-urls", store, "--advertise-client-urls", store,
            "--listen-peer-urls", f"http://{host}:{peers}",
        )  # fmt: skip
        key = folder / "service-accounts.key"
        run("openssl", "genpkey", "-algorithm", "RSA", "-out", key)
        token, tokens = secrets.token_hex(), folder / "tokens.csv"
        tokens.write_text(f"{token},suite,suite,system:masters\n")
        self.url = f"https://{host}:{port}"
        server = Program(
            programs, "kube-apiserver", BIN / "kube-apiserver", "--etcd-servers", store,
            "--bind-address", host, "--secure-port", port,
            # Nobody asks for the Service `kubernetes`; the default would be the machine's address.
            "--advertise-address", "192.0.2.1", "--endpoint-reconciler-type", "none",
            "--cert-dir", folder, "--token-auth-file", tokens,
            "--authorization-mode", "Node,RBAC", "--service-cluster-ip-range", "10.96.0.0/16",
            "--service-account-issuer", "https://kubernetes.default.svc",
            "--service-account-key-file", key, "--service-account-signing-key-file", key,
            # Webhooks are called at their EndpointSlices: there is no kube-proxy.
            "--enable-aggregator-routing",
        )  # fmt: skip
        authority = folder / "apiserver.crt"

        def ready():
            server.check_alive()
            try:
                return self.api.get("/readyz") == "ok"
            except (OSError, Refused):
                return False

        wait_until("the API server's certificate", authority.exists, 60)
        self.api = Api(self.url, token, authority)
        wait_until("the API server is ready", ready, 60)
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps(kubeconfig(self.url, token, authority)))
        self.kubeconfig.chmod(0o600)
        Program(
            programs, "kube-controller-manager", BIN / "kube-controller-manager",
            "--kubeconfig", self.kubeconfig, "--leader-elect=false", "--secure-port", 0,
            "--service-account-private-key-file", key, "--root-ca-file", authority,
            "--horizontal-pod-autoscaler-sync-period", "1s",
            # Without those that would miss kubelet's sign of life.
            "--controllers", "*,-node-lifecycle-controller,-taint-eviction-controller,"
            "-pod-garbage-collector-controller",
        )  # fmt: skip

    def define(self, files):
        """Applies the definitions of kinds (CRDs) in these files, and waits until they hold."""
        names = set()
        for file in files:
            for definition in yaml.load_all(Path(file).read_text(), yaml.CSafeLoader):
                if definition and definition["kind"] == "CustomResourceDefinition":
                    self.api.apply(definition)
                    names.add(definition["metadata"]["name"])

        def established(name):
            path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
            conditions = self.api.get(path)["status"].get("conditions") or []
            return any((c["type"], c["status"]) == ("Established", "True") for c in conditions)

        for name in names:
            wait_until(f"{name} is established", lambda: established(name), 60)

    def version(self):
        return self.api.get("/version")["gitVersion"]


def kubeconfig(url, token, authority):
    return {
        "apiVersion": "v1", "kind": "Config", "current-context": "suite",
        "clusters": [{
            "name": "suite",
            "cluster": {"server": url, "certificate-authority": str(authority)},
        }],
        "users": [{"name": "suite", "user": {"token": token}}],
        "contexts": [{"name": "suite", "context": {"cluster": "suite", "user": "suite"}}],
    }  # fmt: skip
