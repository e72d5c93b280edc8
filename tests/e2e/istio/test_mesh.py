"""The gateway in a real Istio, with its defaults and with deploy/examples/istio.yaml. Started by
run.sh, inside of namespaces."""

import os
import random
import time
from pathlib import Path

import pytest
from caller import HEALTH, REFLECTION
from mesh import EXAMPLE, Mesh

from harness.faults import AFTERWARDS, FAULTS, HURRY
from harness.kubernetes import BIN
from harness.load import assert_all_ok, assert_safe
from harness.process import HarnessError, run
from harness.programs import Programs

IDS, RETRIES = "--ids", "--retries"

rules = pytest.mark.parametrize("rules", ["istio-defaults", "istio-example"], scope="module")


@pytest.fixture(scope="module")
def mesh(binary):
    if "ISTIO" not in os.environ:
        raise HarnessError("cannot run: this suite is started by tests/e2e/istio/run.sh")
    with Programs(binary, "istio") as programs:
        mesh = Mesh(programs, Path(os.environ["ISTIO"]))
        print(mesh.version())
        yield mesh
        mesh.node.over = True


@pytest.fixture
def new_caller(mesh):
    """Makes a pod that makes calls: `new_caller(proxyless=False)`."""
    callers = []

    def new(**options):
        callers.append(mesh.caller(**options))
        return callers[-1]

    yield new
    for caller in callers:
        mesh.api.delete(caller.pod.path)


def assert_truth(calls):
    """The gateway says UNAVAILABLE only if there is no batch. A proxy or a library may say it of
    any call, and then there is no outcome."""
    assert_safe(calls)
    found = [c for c in calls if c.code == "UNAVAILABLE" and c.batches]
    print(len(found), "UNAVAILABLE from others, though the batch exists")
    assert not [c for c in found if c.outcome]


def random_faults(mesh, caller, count, *arguments):
    """40 % of the creates meet a fault."""
    mesh.simulate("--catalog-lag", "200ms", faults=FAULTS)
    printed = caller.run("--count", count, "--hurry", HURRY, "--wait", *arguments)
    time.sleep(AFTERWARDS)
    assert_truth(mesh.counted(printed))


def kill(mesh, caller, *arguments, after=0.0, whole=False):
    """A gateway is killed while its calls are upstream and their batches exist."""
    victim, _ = mesh.gateways()
    mesh.simulate("--catalog-lag", "200ms", faults=["silence-after-create"], share=1)
    load = caller.start("--count", 40, "--at-once", 40, "--wait", *arguments)
    # Not when the calls were made, but when most have arrived; with external ids before the
    # headers of the first ones leave.
    enough = 10 if IDS in arguments else 30
    while len(mesh.simulator.ledger()) < enough and load.poll() is None:
        time.sleep(0.001)
    time.sleep(after)
    for container in [*(victim.sidecars if whole else []), *victim.containers]:
        container.kill()
    printed = caller.output(load)
    time.sleep(AFTERWARDS)
    calls = mesh.counted(printed)
    assert_truth(calls)
    origins = {"FOUND", "RECOVERED"}
    met = [c for c in calls if not c.outcome or c.origin in origins or c.is_duplicate()]
    assert len(met) >= 5, "the kill met calls"
    mesh.gateways()


@rules
@pytest.mark.parametrize(
    "arguments", [pytest.param([], id="faults"), pytest.param([IDS], id="faults-ids")]
)
def test_random_faults_in_istio_make_no_duplicate(mesh, new_caller, calls, rules, arguments):
    mesh.use(rules)
    random_faults(mesh, new_caller(), calls, *arguments)


@rules
@pytest.mark.parametrize(
    "arguments, options",
    [
        pytest.param([], {}, id="killed"),
        pytest.param([IDS], {}, id="killed-ids"),
        pytest.param([RETRIES], {}, id="killed-retries"),
        pytest.param([RETRIES, IDS], {}, id="killed-retries-ids"),
        pytest.param([], {"after": 0.3}, id="killed-later"),
        pytest.param([], {"whole": True}, id="killed-pod"),
    ],
)
def test_a_gateway_killed_in_istio_leaves_no_duplicate(mesh, new_caller, rules, arguments, options):
    mesh.use(rules)
    kill(mesh, new_caller(), *arguments, **options)


@rules
@pytest.mark.parametrize(
    "arguments",
    [pytest.param([RETRIES], id="killed-often"), pytest.param([RETRIES, IDS], id="killed-often-ids")],
)
def test_gateways_killed_often_in_istio_leave_no_duplicate(mesh, new_caller, calls, rules, arguments):
    """At random, under load."""
    mesh.use(rules)
    caller, chance = new_caller(), random.Random(1)
    mesh.gateways()
    mesh.simulate("--latency", "50ms", "--catalog-lag", "200ms")
    load = caller.start("--count", calls, "--per-second", 50, "--wait", *arguments)
    kills = 0
    while load.poll() is None and kills < 20:
        time.sleep(chance.uniform(0.3, 1.5))
        (gateway,) = chance.choice(mesh.node.all("ingestion", "aep")).containers
        gateway.kill()
        kills += 1
    printed = caller.output(load)
    time.sleep(AFTERWARDS)
    ended = mesh.counted(printed)
    assert_truth(ended)
    met = [c for c in ended if c.code != "OK" or c.origin != "CREATED"]
    assert len(met) > kills / 2, "the kills met calls"
    mesh.gateways()


@pytest.mark.parametrize(
    "arguments", [pytest.param([], id="proxyless"), pytest.param([IDS], id="proxyless-ids")]
)
def test_random_faults_and_proxyless_clients_make_no_duplicate(mesh, new_caller, calls, arguments):
    mesh.use("istio-example")
    random_faults(mesh, new_caller(proxyless=True), calls, *arguments)


@pytest.mark.parametrize(
    "arguments",
    [pytest.param([], id="proxyless-killed"), pytest.param([IDS], id="proxyless-killed-ids")],
)
def test_a_killed_gateway_and_proxyless_clients_make_no_duplicate(mesh, new_caller, arguments):
    mesh.use("istio-example")
    kill(mesh, new_caller(proxyless=True), *arguments)


def test_the_istio_example_retries_only_what_is_marked(mesh, new_caller):
    """What carries aep-batch-retry; and nothing without the request header that the VirtualService
    sets."""
    mesh.use("istio-example")
    caller = new_caller()

    def make_call(fault, *arguments):
        mesh.simulate()
        mesh.simulator.inject(fault)
        time.sleep(1.5)  # a gateway retries by itself within a second of a success
        before = mesh.tries()
        (call,) = mesh.counted(caller.run(*arguments))
        return call.code, len(call.batches), mesh.tries() - before

    assert make_call("lost-502") == ("UNKNOWN", 1, 1)
    assert make_call("status-400") == ("INVALID_ARGUMENT", 0, 1)
    assert make_call("lookup-503", IDS) == ("OK", 1, 2)
    mesh.use("unmarked")
    assert make_call("lookup-503", IDS) == ("UNAVAILABLE", 0, 1)


def test_no_call_fails_while_a_pod_is_deleted(mesh, new_caller):
    """As a rollout does it."""
    mesh.use("istio-example")
    caller = new_caller()
    mesh.gateways()
    mesh.simulate("--latency", "300ms")
    load = caller.start("--count", 1000, "--per-second", 50, "--wait")
    while len(mesh.simulator.ledger()) < 200 and load.poll() is None:
        time.sleep(0.1)
    leaving, _ = mesh.gateways()
    mesh.api.delete(leaving.path)
    printed = caller.output(load)
    assert leaving.uid not in mesh.node.pods, "the pod had gone before the load ended"
    assert_all_ok(mesh.counted(printed))
    mesh.gateways()


def test_strict_mtls_and_the_authorization_policy_hold(mesh, new_caller):
    mesh.use("istio-example")
    mesh.simulate()

    def call(account):
        caller = new_caller(account=account)
        (call,) = mesh.counted(caller.run())
        return call.code, caller.run("--paths")

    assert call("exporter") == ("OK", {HEALTH: "OK", REFLECTION: "PERMISSION_DENIED"})
    code, paths = call("stranger")
    assert code == "PERMISSION_DENIED"
    assert paths[HEALTH] == "OK"
    before = len(mesh.simulator.ledger())
    outside = new_caller(labels={"sidecar.istio.io/inject": "false"})
    outside.address = f"{mesh.gateways()[0].address}:50051"  # there is no kube-proxy
    assert outside.run()[0]["code"] == "UNAVAILABLE"
    assert len(mesh.simulator.ledger()) == before


def test_istioctl_analyze_finds_nothing(mesh):
    mesh.use("istio-example")
    config = mesh.cluster.kubeconfig
    command = [BIN / "istioctl", "analyze", "--kubeconfig", config, "--namespace", "ingestion"]
    code, out, problem = run(*command)
    assert code == 0, problem
    assert not [line for line in out.splitlines() if line.startswith(("Error", "Warning"))]
    # What it must find.
    wrong = mesh.folder / "wrong.yaml"
    wrong.write_text(EXAMPLE.read_text().replace("host: aep-batch-gateway", "host: nobody"))
    code, out, problem = run(*command, wrong)
    assert "IST0101" in out + problem
