"""JSON schemas for kubeconform: Kubernetes' own, from the package kubernetes-validate;
those of the definitions (CRDs) in Go modules; and Linkerd's."""

import json
from importlib.util import find_spec
from pathlib import Path

import yaml

# Not imported: only its data is used.
PACKAGED = Path(find_spec("kubernetes_validate").origin).parent / "kubernetes-json-schema"
# An operator's definition has the string `=` bare, which YAML 1.1 had a type for.
yaml.CSafeLoader.add_constructor(
    "tag:yaml.org,2002:value", yaml.constructor.SafeConstructor.construct_yaml_str
)
KINDS = """
    configmap-v1 deployment-apps-v1 horizontalpodautoscaler-autoscaling-v2
    networkpolicy-networking-v1 pod-v1 poddisruptionbudget-policy-v1 service-v1
    serviceaccount-v1
""".split()

# No package registry has Linkerd's definitions. These say, in our words, what the fields are
# that the example uses; `kubectl apply --dry-run=server` knows the rest.
NAME = {"type": "string", "minLength": 1}


def closed(required, **properties):
    return {
        "type": "object", "additionalProperties": False,
        "required": required, "properties": properties,
    }


STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
TOP = {
    "apiVersion": NAME, "kind": NAME,
    "metadata": closed(["name"], name=NAME, namespace=NAME, labels=STRINGS, annotations=STRINGS),
}
REFERENCE = closed(["kind", "name"], group=NAME, kind=NAME, name=NAME)
LINKERD = {
    "server_v1beta3": closed(
        ["podSelector", "port"],
        podSelector=closed(["matchLabels"], matchLabels={"type": "object"}),
        port={"type": ["string", "integer"]},
        proxyProtocol={"enum": ["unknown", "HTTP/1", "HTTP/2", "gRPC", "opaque", "TLS"]},
        accessPolicy=NAME,
    ),
    "authorizationpolicy_v1alpha1": closed(
        ["targetRef", "requiredAuthenticationRefs"],
        targetRef=REFERENCE,
        requiredAuthenticationRefs={"type": "array", "items": REFERENCE},
    ),
    "meshtlsauthentication_v1alpha1": closed(
        ["identities"],
        identities={"type": "array", "minItems": 1, "items": NAME},
    ),
}


def write(folder, versions, sources):
    """Returns the schema locations of kubeconform for each version of Kubernetes."""
    crds = folder / "crds"
    for source in sources:
        for file in source.glob("*.yaml"):
            for definition in yaml.load_all(file.read_text(), yaml.CSafeLoader):
                write_definition(crds, definition)
    for name, spec in LINKERD.items():
        top = closed(["spec"], spec=spec, **TOP)
        save(crds / "policy.linkerd.io" / f"{name}.json", top)
    for version in versions:
        source = PACKAGED / f"v{version}-local-strict"
        definitions = read(source / "_definitions.json")["$defs"]
        for kind in KINDS:
            schema = read(source / f"{kind}.json")
            del schema["$id"]
            save(folder / version / f"{kind}.json", {**schema, "$defs": definitions})
    return {
        version: [
            f"{folder}/{version}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json",
            f"{crds}/{{{{.Group}}}}/{{{{.ResourceKind}}}}_{{{{.ResourceAPIVersion}}}}.json",
        ]
        for version in versions
    }


def write_definition(crds, definition):
    if not definition or definition["kind"] != "CustomResourceDefinition":
        return
    spec = definition["spec"]
    for version in spec["versions"]:
        schema = version["schema"]["openAPIV3Schema"]
        schema["properties"] |= TOP
        name = f"{spec['names']['kind'].lower()}_{version['name']}.json"
        save(crds / spec["group"] / name, strict(schema))


def strict(schema):
    """The API server drops fields it does not know; here they are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        schema.pop("anyOf", None)
        schema["type"] = ["integer", "string"]
    if (
        schema.get("type") == "object"
        and "properties" in schema
        and not schema.get("x-kubernetes-preserve-unknown-fields")
    ):
        schema.setdefault("additionalProperties", False)
    return schema


def read(file):
    return json.loads(file.read_text().replace('"/api/_definitions.json#', '"#'))


def save(file, schema):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(schema))
