"""The gateway in a real Istio: runs the scenarios. Started by run.sh, inside of namespaces."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time

import checks
from api import Refused
from calls import check_calls, check_no_failure, table
from checks import check, show
from cluster import Failed
from faults import AFTERWARDS, CALLS, FAULTS, HURRY
from load import HEALTH, REFLECTION
from mesh import BIN, EXAMPLE, Mesh

AT_ONCE = 40


def report(mesh, calls):
    table(mesh, calls)
    check_calls(calls)
    # The gateway says UNAVAILABLE only if there is no batch. A proxy or a library may say it of any
    # call, and then there is no outcome.
    found = [c for c in calls if c.code == "UNAVAILABLE" and c.batches]
    show(len(found), "UNAVAILABLE from others, though the batch exists")
    lied = [c for c in found if c.outcome]
    check("no call whose batch exists was told UNAVAILABLE in the gateway's words", not lied, *lied)


def random_faults(mesh, caller, *arguments):
    """40 % of the creates meet a fault."""
    mesh.simulate("--catalog-lag", "200ms", faults=FAULTS)
    before = mesh.tries()
    said = caller.said("--count", CALLS, "--hurry", HURRY, "--wait", *arguments)
    time.sleep(AFTERWARDS)
    report(mesh, mesh.calls(said))
    show(mesh.tries() - before, "tries")


def marked(mesh, caller):
    """What carries aep-batch-retry is retried, and nothing else."""

    def ask(fault, *arguments):
        mesh.simulate()
        mesh.order(fault)
        before = mesh.tries()
        (call,) = mesh.calls(caller.said(*arguments))
        return call.code, len(call.batches), mesh.tries() - before

    def expect(fault, *expected, arguments=()):
        said = ask(fault, *arguments)
        code, batches, tries = expected
        check(f"{fault}: {code}, batches: {batches}, tries: {tries}", said == expected, said)

    expect("lost-502", "UNKNOWN", 1, 1)
    expect("status-400", "INVALID_ARGUMENT", 0, 1)
    expect("lookup-503", "OK", 1, 2, arguments=["--ids"])
    mesh.apply_example(mark=False)
    print("  without the request header that the VirtualService sets")
    expect("lookup-503", "UNAVAILABLE", 0, 1, arguments=["--ids"])
    mesh.apply_example()


def killed(mesh, caller, *arguments, after=0.0, whole=False):
    """A gateway is killed while its calls are upstream and their batches exist."""
    victim, _ = mesh.gateways()
    mesh.simulate("--catalog-lag", "200ms", faults=["silence-after-create"], share=1)
    load = caller.start("--count", AT_ONCE, "--at-once", AT_ONCE, "--wait", *arguments)
    # Not when the calls were made, but when most have arrived; with external ids before the
    # headers of the first ones leave.
    enough = 10 if "--ids" in arguments else 30
    while len(mesh.ledger()) < enough and load.poll() is None:
        time.sleep(0.001)
    time.sleep(after)
    for container in [*(victim.sidecars if whole else []), *victim.containers]:
        container.kill()
    said = caller.ended(load)
    time.sleep(AFTERWARDS)
    calls = mesh.calls(said)
    report(mesh, calls)
    origins = {"FOUND", "RECOVERED"}
    met = [c for c in calls if not c.outcome or c.origin in origins or c.is_duplicate()]
    check("the kill met calls", len(met) >= 5, len(met))
    mesh.gateways()


def killed_often(mesh, caller, *arguments):
    """Gateways are killed at random under load."""
    chance = random.Random(1)
    mesh.gateways()
    mesh.simulate("--latency", "50ms", "--catalog-lag", "200ms")
    load = caller.start("--count", CALLS, "--per-second", 50, "--wait", *arguments)
    kills = 0
    while load.poll() is None and kills < 20:
        time.sleep(chance.uniform(0.3, 1.5))
        (gateway,) = chance.choice(mesh.node.all("ingestion", "aep")).containers
        gateway.kill()
        kills += 1
    said = caller.ended(load)
    time.sleep(AFTERWARDS)
    calls = mesh.calls(said)
    report(mesh, calls)
    show(kills, "kills")
    met = [c for c in calls if c.code != "OK" or c.origin != "CREATED"]
    check("kills met calls", len(met) > kills / 2, len(met))
    mesh.gateways()


def drain(mesh, caller):
    """A pod is deleted under load, as a rollout does it."""
    mesh.gateways()
    mesh.simulate("--latency", "300ms")
    load = caller.start("--count", 1000, "--per-second", 50, "--wait")
    while len(mesh.ledger()) < 200 and load.poll() is None:
        time.sleep(0.1)
    leaving, _ = mesh.gateways()
    mesh.api.delete(leaving.path)
    said = caller.ended(load)
    check("the pod had gone before the load ended", leaving.uid not in mesh.node.pods)
    calls = mesh.calls(said)
    table(mesh, calls)
    check_no_failure(calls)
    mesh.gateways()


def policy(mesh):
    """STRICT mTLS and the AuthorizationPolicy of the example."""
    mesh.simulate()

    def answers(name, account):
        caller = mesh.caller(name, account)
        (call,) = mesh.calls(caller.said())
        return call, caller.said("--paths")

    call, paths = answers("named", "exporter")
    check("the named caller is let in", call.code == "OK", call)
    check("health is open", paths[HEALTH] == "OK", paths)
    check("reflection is closed", paths[REFLECTION] == "PERMISSION_DENIED", paths)
    call, paths = answers("stranger", "stranger")
    check("another caller of the mesh is not", call.code == "PERMISSION_DENIED", call)
    check("health is open to it", paths[HEALTH] == "OK", paths)
    before = len(mesh.ledger())
    outside = mesh.caller("outside", labels={"sidecar.istio.io/inject": "false"})
    outside.address = f"{mesh.gateways()[0].address}:50051"  # there is no kube-proxy
    said = outside.said()
    check("a caller outside of the mesh is cut off", said[0]["code"] == "UNAVAILABLE", said)
    check("and makes no batch", len(mesh.ledger()) == before)


def analyze(mesh):
    """What Istio's own checks say of the chart and the example."""
    config = mesh.cluster.kubeconfig
    command = [BIN / "istioctl", "analyze", "--kubeconfig", config, "--namespace", "ingestion"]
    code, out, err = mesh.run(*command)
    found = [line for line in out.splitlines() if line.startswith(("Error", "Warning"))]
    check("istioctl analyze finds nothing", code == 0 and not found, out, err)
    # What it must find.
    wrong = mesh.folder / "wrong.yaml"
    wrong.write_text(EXAMPLE.read_text().replace("host: aep-batch-gateway", "host: nobody"))
    code, out, err = mesh.run(*command, wrong)
    check("istioctl analyze finds a wrong host", "IST0101" in out + err, out, err)


DEFAULTS, EXAMPLE_IS_THERE = "Istio's defaults", "the example"
IDS, RETRIES = "--ids", "--retries"
SIDECAR, PROXYLESS = "", "xds:///"
# name, function, who calls (None: the scenario says it itself), arguments of load.py, further ones
KILLS = [
    ("killed", killed, SIDECAR, [], {}),
    ("killed-ids", killed, SIDECAR, [IDS], {}),
    ("killed-retries", killed, SIDECAR, [RETRIES], {}),
    ("killed-retries-ids", killed, SIDECAR, [RETRIES, IDS], {}),
    ("killed-later", killed, SIDECAR, [], {"after": 0.3}),
    ("killed-pod", killed, SIDECAR, [], {"whole": True}),
    ("killed-often", killed_often, SIDECAR, [RETRIES], {}),
    ("killed-often-ids", killed_often, SIDECAR, [RETRIES, IDS], {}),
]
FAULTY = [
    ("faults", random_faults, SIDECAR, [], {}),
    ("faults-ids", random_faults, SIDECAR, [IDS], {}),
]
SCENARIOS = {
    DEFAULTS: FAULTY + KILLS,
    EXAMPLE_IS_THERE: [
        ("analyze", analyze, None, [], {}),
        ("policy", policy, None, [], {}),
        ("marked", marked, SIDECAR, [], {}),
        *FAULTY, *KILLS,
        ("drain", drain, SIDECAR, [], {}),
        ("proxyless", random_faults, PROXYLESS, [], {}),
        ("proxyless-ids", random_faults, PROXYLESS, [IDS], {}),
        ("proxyless-killed", killed, PROXYLESS, [], {}),
        ("proxyless-killed-ids", killed, PROXYLESS, [IDS], {}),
    ],
}  # fmt: skip


def run_scenario(mesh, number, function, kind, arguments, further):
    if kind is None:
        function(mesh)
        return
    # A caller that knows nothing of what was before: its sidecar may have ejected a gateway.
    caller = mesh.caller(f"caller-{number}", proxyless=kind == PROXYLESS)
    try:
        function(mesh, caller, *arguments, **further)
    finally:
        mesh.api.delete(caller.pod.path)


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    wanted = set(os.environ.get("SCENARIOS", "").split())
    if missing := wanted - {row[0] for rows in SCENARIOS.values() for row in rows}:
        sys.exit(f"there is no scenario {' '.join(missing)}")
    began, numbers = time.monotonic(), itertools.count()
    with Mesh(*sys.argv[1:]) as mesh:
        mesh.install_istio()
        mesh.install_gateway()
        print(f"Kubernetes {mesh.cluster.version()}, {mesh.version()}; {time.monotonic() - began:.0f} s")
        for state, rows in SCENARIOS.items():
            if state == EXAMPLE_IS_THERE:
                mesh.apply_example()
            for name, function, *row in rows:
                if wanted and name not in wanted:
                    continue
                title = function.__doc__.split(".")[0]
                print(f"\n{name}, {state}: {title}", flush=True)
                try:
                    run_scenario(mesh, next(numbers), function, *row)
                except (Failed, Refused, OSError, ValueError, subprocess.TimeoutExpired) as failure:
                    check("the scenario runs", False, f"{type(failure).__name__} {failure}")
    print(f"\n{checks.passed} passed, {checks.failed} failed; {time.monotonic() - began:.0f} s")
    return checks.failed != 0 or checks.passed == 0


if __name__ == "__main__":
    sys.exit(main())
