import contextlib
import functools

import pytest
from client import Client
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
