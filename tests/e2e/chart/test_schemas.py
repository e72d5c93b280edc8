"""The renderings and the examples, by the schemas of Kubernetes, meshes and monitoring."""

import json
from pathlib import Path

import pytest
import schemas
import yaml
from harness.chart import ALL_NAMES, EXAMPLES, KUBERNETES, definitions, program, rendering
from harness.process import RUN, run


@pytest.fixture(scope="module")
def locations():
    """The schema locations of kubeconform for each version of Kubernetes."""
    return schemas.write(RUN / "chart" / "schemas", KUBERNETES, definitions())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with all that Kubernetes is to take."""
    folder = tmp_path_factory.mktemp("files")
    for name in ALL_NAMES:
        (folder / f"{name}.yaml").write_text(rendering(name).text)
    for example in EXAMPLES:
        if example.stem != "envoy":
            (folder / f"example {example.name}").write_text(example.read_text())
    return folder


def kubeconform(version, locations, folder):
    """What does not fit, as `file kind/name: why`, and how many documents there were."""
    flags = [flag for location in locations[version] for flag in ("-schema-location", location)]
    (kubeconform,) = program("").glob("kubeconform-*")
    _, out, problem = run(
        kubeconform, "-strict", "-summary", "-output", "json", "-n", 2,
        "-kubernetes-version", version, *flags, folder,
    )  # fmt: skip
    assert out, problem
    report = json.loads(out)
    summary = report["summary"]
    found = [
        f"{Path(r['filename']).name} {r['kind']}/{r['name']}: {r['msg']}" for r in report["resources"]
    ]
    return found, sum(summary.values()) - summary["skipped"]


@pytest.mark.parametrize("version", KUBERNETES)
def test_all_documents_fit_the_schemas(locations, files, version):
    documents = [d for file in files.iterdir() for d in yaml.safe_load_all(file.read_text()) if d]
    assert kubeconform(version, locations, files) == ([], len(documents))


# File, what to replace, and by what.
MISSPELT = [
    ("defaults", "maxUnavailable: 0", "maxUnavailabel: 0"),
    ("defaults", "appProtocol:", "appProtokoll:"),
    ("defaults", "automountServiceAccountToken: false", "automountServiceAccountToken: never"),
    ("everything", "podMetricsEndpoints:", "podMetricEndpoints:"),
    ("example istio", "retryOn:", "retryWhen:"),
    ("example istio", "mode: STRICT", "mode: STRONG"),
    ("example gateway-api", "gatewayClassName:", "className:"),
    ("example linkerd", "timeout.linkerd.io/request: 75s", "timeout.linkerd.io/request: 75"),
    ("example linkerd", "identities:", "identity:"),
    ("example linkerd", "backendRefs:", "backendReference:"),
]


@pytest.mark.parametrize("name, right, wrong", MISSPELT, ids=[wrong for *_, wrong in MISSPELT])
def test_the_schemas_find_a_misspelling(locations, files, tmp_path, name, right, wrong):
    text = (files / f"{name}.yaml").read_text()
    assert right in text
    (tmp_path / "wrong.yaml").write_text(text.replace(right, wrong))
    assert kubeconform(KUBERNETES[-1], locations, tmp_path)[0]


def test_istio_knows_its_annotations_and_labels():
    """They have no schema; Istio lists its own."""
    folder = definitions()[0].parent
    lists = [("annotation/annotations.yaml", "annotations"), ("label/labels.yaml", "labels")]
    known = {
        entry["name"] for file, key in lists for entry in yaml.safe_load((folder / file).read_text())[key]
    }
    used = set()
    for name in ALL_NAMES:
        for pod in [rendering(name).pod, *rendering(name).all("Pod")]:
            used |= pod["metadata"]["annotations"].keys() | pod["metadata"]["labels"].keys()
    used = {name for name in used if "istio.io/" in name}
    assert used and used <= known
