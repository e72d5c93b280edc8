"""The programs that a user copies: each language's example, and those in the documentation."""

import json
import threading
import time
import uuid

import wire
from client import each_client
from commands import documented, run
from harness import process
from harness.process import ROOT, wait_until
from test_calls import patiently

CREATED = r"^[0-9a-f]{32} BATCH_STATUS_LOADING$"
NOBODY = "127.0.0.1:1"
UNPROVEN = r"^{code} {reason} UNKNOWN: .*\nA batch may exist: look for it"
LANGUAGES = {".py": "python", ".js": "js", ".go": "go", ".java": "java"}  # as Markdown names them


def run_example(client, *arguments, faults=(), **environment):
    command = client.command(client.language.example)
    arguments = arguments or [client.gateway.address]
    return run(
        client.simulator, [*command, *arguments], client.home, faults,
        **client.environment, **environment,
    )  # fmt: skip


@each_client("example")
def test_the_example_creates_a_batch(client):
    run_example(client).check(0, 1, CREATED)


@each_client("example")
@patiently
def test_the_example_retries_unavailable(client):
    """Only with an external id: other calls get their headers before anything is sent."""
    arguments = [client.gateway.address, "a", str(uuid.uuid4())]
    run_example(client, *arguments, faults=["status-503"] * 2).check(0, 1, CREATED)


@each_client("example")
def test_the_example_reports_a_lost_response_and_does_not_retry(client):
    printed = r"^UNKNOWN CONNECTION_LOST UNKNOWN: .*\nA batch may exist: look for it"
    run_example(client, faults=["reset-after-create"]).check(1, 1, printed)


@each_client("example")
def test_the_example_reports_a_missing_token_with_its_field(client):
    printed = r"^INVALID_ARGUMENT INVALID_REQUEST NOT_APPLIED: .*\n  authorization: .*may be repeated"
    run_example(client, AEP_TOKEN="").check(1, 0, printed)


@each_client("example")
def test_the_example_reports_when_an_overloaded_api_wants_to_be_called_again(client):
    printed = r"^UNAVAILABLE API_UNAVAILABLE NOT_APPLIED: .*\n  try again in 1s\n.*may be repeated"
    run_example(client, faults=["status-503"] * 9).check(1, 0, printed)


@each_client("example")
def test_to_the_example_unavailable_is_unknown_if_nobody_listens(client):
    run_example(client, NOBODY).check(1, 0, UNPROVEN.format(code="UNAVAILABLE", reason=""))


@each_client("example")
def test_to_the_example_unavailable_is_unknown_if_a_proxy_says_it(client):
    proxy = wire.Proxy()
    printed = UNPROVEN.format(code="UNAVAILABLE", reason=wire.Proxy.REASON)
    run_example(client, proxy.address).check(1, 0, printed)
    proxy.close()


@each_client("example")
def test_to_the_example_any_code_is_unknown_if_the_gateway_is_killed(client):
    simulator, gateway = client.start_gateway()

    def kill():
        wait_until("the batch", simulator.ledger)
        time.sleep(1)  # by then the call has its headers
        gateway.close()

    killer = threading.Thread(target=kill)
    killer.start()
    command = [*client.command(client.language.example), gateway.address]
    ran = run(simulator, command, client.home, ["silence-after-create"], **client.environment)
    killer.join()
    ran.check(1, 1, UNPROVEN.format(code=r"\w+", reason=""))


@each_client("service_config")
def test_the_service_config_is_what_the_gateway_prints(client):
    code, printed, _ = process.run(client.binary, "descriptor", "--service-config")
    assert code == 0
    assert json.loads(printed) == json.loads((client.home / client.language.service_config).read_text())


@each_client("documented")
def test_the_documented_program_creates_a_batch(client):
    """The last command prints the batch's id."""
    place, *commands = client.language.documented
    place = ROOT / place
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(documented(LANGUAGES[place.suffix], "atchService", client.gateway))
    for command in commands[:-1]:
        run(client.simulator, client.command(command)).check(0, 0, "")
    last = client.command(commands[-1])
    run(client.simulator, last, **client.environment).check(0, 1, r"^[0-9a-f]{32}$")
