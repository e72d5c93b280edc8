import contextlib
import functools

import pytest
from client import Client
from harness.process import run
from harness.programs import Programs


@pytest.fixture(scope="session")
def start_client(binary):
    """Clients start with their first test, and end with the session."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(name):
            return Client(stack.enter_context(Programs(binary, name)), name)

        yield start


@pytest.fixture
def client(request, start_client):
    """A client's programs and its gateways; see `each_client`."""
    return start_client(request.param)


@pytest.fixture(scope="session")
def descriptors(binary, tmp_path_factory):
    """The file of the descriptor set that the gateway writes."""
    file = tmp_path_factory.mktemp("descriptors") / "gateway.binpb"
    assert run(binary, "descriptor", "--output", file)[0] == 0
    return file
