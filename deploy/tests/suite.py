"""The Helm chart and the examples: rendered, checked against schemas and against the real
gateway and Envoy. Started by test.sh."""

import json
import sys
import tempfile
from pathlib import Path

import report
import schemas
import yaml
from envoy import check_envoy
from gateway import check_gateway
from memory import check_memory
from renderings import EVERY_RENDERING, Rendered, helm, template
from report import CHART, CRDS, EXAMPLES, KUBECONFORM, OLDER_HELMS, TOOLS, check, run
from values import BAD_VALUES, VALUE_SETS

KUBERNETES = ["1.29.0", "1.31.0", "1.33.0", "1.35.0", "1.37.0"]


def check_chart():
    rendered = [Rendered(*row) for row in VALUE_SETS]
    for r, row in zip(rendered, VALUE_SETS, strict=True):
        code, out, err = helm(["lint", "--strict"], row[1])
        check(f"lint and render: {r.name}", [out, err] if code else [] if r.documents else [r.error])
    rendered = [r for r in rendered if r.documents]
    for wrong, what in EVERY_RENDERING:
        found = [f"{r.name}: {problem}" for r in rendered for problem in wrong(r)]
        check(f"{what} ({len(rendered)} renderings)", found)
    for values, message in BAD_VALUES:
        code, _, err = template(values)
        wrong = code == 0 or message not in err
        check(f"refused: {json.dumps(values)}", [f"not {message!r}, but exit {code}: {err}"] if wrong else [])
    code, _, err = template({}, "--kube-version", "1.28.0")
    check("refused: Kubernetes 1.28", code == 0 or "incompatible with Kubernetes" not in err)
    check_older_helms(rendered)
    return rendered + check_monitoring()


def check_older_helms(rendered):
    """Each has another version of what reads the schema: 3.21.4 and 4.2.4 take `1` and `"1"` in an
    enum for the same value twice, and then refuse the chart."""
    # Built without its makefile, Helm 3 takes itself for one of Kubernetes 1.20.
    kubernetes = "--kube-version", KUBERNETES[-1]
    for program in OLDER_HELMS:
        found = []
        for r in rendered:
            code, out, err = helm(["lint", "--strict"], r.values, *kubernetes, program=program)
            found += [f"{r.name}: {out} {err}"] if code else []
            code, out, err = template(r.values, *kubernetes, *r.flags, program=program)
            if code or [d for d in yaml.safe_load_all(out) if d] != r.documents:
                found.append(f"{r.name}: {err or 'another rendering'}")
        check(f"{program.name} renders the same ({len(rendered)} renderings)", found)
        found = []
        for values, message in BAD_VALUES:
            code, _, err = template(values, *kubernetes, program=program)
            if code == 0 or message not in err:
                found.append(f"{json.dumps(values)}: not {message!r}, but exit {code}: {err}")
        check(f"{program.name} refuses what is wrong ({len(BAD_VALUES)} sets of values)", found)


def check_monitoring():
    """Alerts and dashboard are in the chart, or helm says that they are not."""
    rendered = []
    for value, file, kind in [
        ("prometheusRule", "alerts.yaml", "PrometheusRule"),
        ("dashboard", "dashboard.json", "ConfigMap"),
    ]:
        r = Rendered(value, {"monitoring": {value: {"enabled": True}}})
        if (CHART / "files" / file).exists():
            content = yaml.safe_load((CHART / "files" / file).read_text())
            found = [d.get("spec") or json.loads(*d["data"].values()) for d in r.all(kind)]
            check(f"{kind} has {file}", [r.error] if found != [content] else [])
            rendered.append(r)
        else:
            check(f"{kind}: helm says that there is no {file}", f"no files/{file}" not in r.error)
    return rendered


def kubeconform(version, locations, folder):
    """What does not fit, as `file kind/name: why`, and how many documents there were."""
    flags = [flag for location in locations[version] for flag in ("-schema-location", location)]
    _, out, err = run(
        KUBECONFORM, "-strict", "-summary", "-output", "json", "-n", 2,
        "-kubernetes-version", version, *flags, folder,
    )  # fmt: skip
    if not out:
        return [err], 0
    said = json.loads(out)
    found = [
        f"{Path(r['filename']).name} {r['kind']}/{r['name']}: {r['msg']}" for r in said["resources"]
    ]
    return found, sum(said["summary"].values()) - said["summary"]["skipped"]


# A misspelling that each schema must find: file, what to replace, by what
MISSPELT = [
    ("defaults", "maxUnavailable: 0", "maxUnavailabel: 0"),
    ("defaults", "appProtocol:", "appProtokoll:"),
    ("defaults", "automountServiceAccountToken: false", "automountServiceAccountToken: never"),
    ("everything", "podMetricsEndpoints:", "podMetricEndpoints:"),
    ("istio", "retryOn:", "retryWhen:"),
    ("istio", "mode: STRICT", "mode: STRONG"),
    ("gateway-api", "gatewayClassName:", "className:"),
    ("linkerd", "timeout.linkerd.io/request: 75s", "timeout.linkerd.io/request: 75"),
    ("linkerd", "identities:", "identity:"),
    ("linkerd", "backendRefs:", "backendReference:"),
]  # fmt: skip


def check_schemas(rendered):
    locations = schemas.write(TOOLS / "schemas", KUBERNETES, CRDS)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / "right").mkdir()
        for r in rendered:
            (folder / "right" / f"chart {r.name}.yaml").write_text(r.text)
        for example in EXAMPLES:
            if example.stem != "envoy":
                (folder / "right" / f"example {example.name}").write_text(example.read_text())
        documents = sum(len(r.documents) for r in rendered) + sum(
            len(list(yaml.safe_load_all(e.read_text()))) for e in EXAMPLES if e.stem != "envoy"
        )
        for version in KUBERNETES:
            found, count = kubeconform(version, locations, folder / "right")
            if count != documents:
                found.append(f"{count} documents were checked, not {documents}")
            check(f"schemas of Kubernetes {version}, meshes and monitoring: {count} documents", found)
        for number, (name, right, wrong) in enumerate(MISSPELT):
            (wrong_folder := folder / str(number)).mkdir()
            source = "chart" if name in ("defaults", "everything") else "example"
            text = (folder / "right" / f"{source} {name}.yaml").read_text()
            assert right in text, (name, right)
            (wrong_folder / "wrong.yaml").write_text(text.replace(right, wrong))
            found, _ = kubeconform(KUBERNETES[-1], locations, wrong_folder)
            check(f"the schema finds `{wrong}`", not found)


def check_names(rendered):
    """Annotations and labels have no schema; Istio lists its own."""
    (folder,) = (source.parent for source in CRDS if "istio.io" in source.parts)
    known = {
        entry["name"]
        for file, key in [("annotation/annotations.yaml", "annotations"), ("label/labels.yaml", "labels")]
        for entry in yaml.safe_load((folder / file).read_text())[key]
    }
    used = set()
    for r in rendered:
        for pod in [r.pod, *r.all("Pod")]:
            used |= pod["metadata"]["annotations"].keys() | pod["metadata"]["labels"].keys()
    used = {name for name in used if "istio.io/" in name}
    check(f"Istio knows {', '.join(sorted(used))}", sorted(used - known) or not used)


def main():
    rendered = check_chart()
    check_schemas(rendered)
    check_names(rendered)
    check_gateway(rendered)
    check_envoy()
    check_memory(rendered)
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
