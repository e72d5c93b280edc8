"""The example for Envoy: checked by Envoy, and run in front of the real gateway."""

import pytest
import yaml
from harness.envoy import BINARY, Envoy
from harness.load import Load
from harness.process import ROOT, Program, get, run

EXAMPLE = ROOT / "deploy/examples/envoy.yaml"


class Example(Envoy):
    """Envoy with the example, in front of a gateway, with other addresses."""

    def __init__(self, programs, gateway):
        Program.__init__(self, programs, "envoy")
        config = yaml.safe_load(EXAMPLE.read_text())
        static = config["static_resources"]
        (endpoint,) = static["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
        host, port = gateway.address.split(":")
        address = {"address": host, "port_value": int(port)}
        endpoint["endpoint"]["address"]["socket_address"].update(address)
        static["listeners"][0]["address"]["socket_address"]["port_value"] = 0
        config["admin"]["address"]["socket_address"]["port_value"] = 0
        self.start(config)
        self.wait_for_health(1)

    def stat(self, name):
        page = get(f"{self.admin}/stats?filter=^cluster.aep-batch-gateway.{name}$")
        return int(page.split()[-1]) if page else 0


def test_envoy_takes_the_example():
    code, _, problem = run(BINARY, "--mode", "validate", "-c", EXAMPLE)
    assert code == 0, problem


def test_envoy_finds_a_misspelling():
    wrong = EXAMPLE.read_text().replace("retry_on:", "retry_when:")
    code, _, problem = run(BINARY, "--mode", "validate", "--config-yaml", wrong)
    assert code != 0 and "retry_when" in problem


@pytest.mark.parametrize(
    "faults, external_ids, result, retried",
    [
        ([], False, ("OK", "APPLIED"), False),
        (["reset-after-create"], False, ("UNKNOWN", "UNKNOWN"), False),
        (["lookup-503"], True, ("OK", "APPLIED"), True),
    ],
    ids=["no fault", "reset-after-create", "lookup-503"],
)
async def test_envoy_retries_what_made_no_batch(programs, faults, external_ids, result, retried):
    simulator = programs.simulator()
    envoy = Example(programs, programs.gateway(simulator))
    simulator.inject(*faults)
    load = Load(envoy.address, external_ids)
    load.call()
    (call,) = await load.counted(simulator)
    assert (call.code, call.outcome) == result
    assert len(call.batches) == 1
    assert bool(envoy.stat("upstream_rq_retry")) == retried
