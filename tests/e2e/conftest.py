"""The end-to-end tests: the real gateway binary between real clients, proxies and a simulated API.

Run them with `run.sh`, which installs what they need and hands its arguments to pytest.

- Each folder is a suite, and its tests carry the folder's name as their marker: `-m envoy`. To add
  one, make a folder with `test_….py` files, and name the marker in pyproject.toml. Names of modules
  must differ over all suites. A suite's own helpers and fixtures lie beside its tests (plain
  `import helper`, `conftest.py`); what two suites need goes to `harness/`.
- A test's name is a sentence. Tests may be coroutines. Each starts what it needs with the fixture
  `programs`; everything ends with the test, and its logs are in `.run/logs/<test>`:
  `simulator = programs.simulator("--latency", "50ms"); gateway = programs.gateway(simulator)`.
  What a whole module shares is a module fixture that yields from `with Programs(binary, name)`. A
  program of another kind is a subclass of `harness.process.Program`, as `harness.envoy.Envoy`.
- What a suite needs besides Python packages is found or built by a session fixture, which raises
  `HarnessError("cannot run: …")` if it is not there. Nothing is skipped.
"""

import signal
from pathlib import Path

import pytest

pytest.register_assert_rewrite("harness")

from harness.process import ROOT, HarnessError, run  # noqa: E402
from harness.programs import Programs  # noqa: E402


def pytest_configure(config):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends what was started


def pytest_itemcollected(item):
    item.add_marker(item.path.relative_to(Path(__file__).parent).parts[0])


@pytest.fixture(scope="session")
def binary(request):
    """The path of the gateway's binary."""
    path = ROOT / (request.config.getoption("gateway") or "target/debug/aep-batch-gateway")
    if not path.is_file():
        raise HarnessError(f"cannot run: no gateway at {path}: run cargo build, or give --gateway")
    return path


@pytest.fixture(scope="session")
def descriptors(binary, tmp_path_factory):
    """The file of the descriptor set that the gateway writes."""
    file = tmp_path_factory.mktemp("descriptors") / "gateway.binpb"
    assert run(binary, "descriptor", "--output", file)[0] == 0
    return file


@pytest.fixture(scope="session")
def calls(request):
    """How many calls a test with random faults makes."""
    return request.config.getoption("calls")


@pytest.fixture
def programs(request, binary):
    """Starts the programs of this test: `programs.gateway(…)`, `programs.envoy(…)`; see Programs."""
    with Programs(binary, request.node.name) as programs:
        yield programs
