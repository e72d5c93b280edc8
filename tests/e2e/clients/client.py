"""The clients. Each has a small program `interop` in its own language, which `Player` tells what to
do; the checks are written once, in test_calls.py, and run for each client."""

import functools
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import wire
from harness.process import ROOT, RUN, HarnessError, run
from player import Player
from samples import RESPONSES, REST_BATCH

CLIENTS = ROOT / "clients"
TOOLS = RUN / "clients"
PYTHON = {"PYTHONPATH": str(RUN / "proto")}  # where the generated code is
PINGS_EVERY = 10  # seconds: the shortest interval that all the libraries allow


@dataclass
class Language:
    interop: str  # the programs, as they are started in `home`; {} is TOOLS
    example: str
    home: str = ""  # below CLIENTS; the client's name by default
    flags: tuple[str, ...] = ()  # of the gateway
    service_config: str | None = "service-config.json"
    reflection: tuple[str, ...] = ("v1", "v1alpha")  # the versions that the library has
    loads_descriptors: bool = False  # at run time, beside those of its code
    # Where the documented program is put, and what builds and runs it, from the repository's root.
    documented: tuple[str, ...] = ()


JARS = "target/classes:target/lib/*"
LANGUAGES = {
    "python": Language(
        f"{sys.executable} interop.py", f"{sys.executable} create_batch.py",
        reflection=("v1alpha",), loads_descriptors=True,
        documented=(
            "clients/python/.documented/main.py",
            f"{sys.executable} clients/python/.documented/main.py",
        ),
    ),
    "node": Language(
        "node interop.js", "node create_batch.js",
        documented=(
            "clients/node/.documented/main.js", "node clients/node/.documented/main.js"
        ),
    ),
    "go": Language(
        "{}/bin/interop", "{}/bin/create-batch", loads_descriptors=True,
        documented=(
            "clients/go/documented/main.go",
            "go -C clients/go build -buildvcs=false -o {}/bin/documented ./documented",
            "{}/bin/documented",
        ),
    ),
    "java": Language(
        f"java -cp target/test-classes:{JARS} example.Interop", "java -jar target/create-batch.jar",
        service_config="src/main/resources/service-config.json",
        documented=(
            "clients/java/target/documented/Main.java",
            f"sh -c \"cd clients/java && exec java -cp '{JARS}' target/documented/Main.java\"",
        ),
    ),
    "cpp": Language("build/interop", "build/create-batch"),
    "rust": Language(
        "{}/rust/debug/examples/interop", "{}/rust/debug/create-batch", service_config=None
    ),
    "connect": Language("node interop.js grpc", "node create_batch.js", service_config=None),
    "connect-web": Language(
        "node interop.js grpc-web", "", home="connect", flags=("--grpc-web",), service_config=None,
        reflection=(),  # streams both ways, which gRPC-Web cannot
    ),
    "ruby": Language("ruby interop.rb", "ruby create_batch.rb"),
}  # fmt: skip


def each_client(has=None):
    """Runs a test, which takes the fixture `client`, for all clients, or for those that have
    something, like `example`."""
    names = [name for name, language in LANGUAGES.items() if not has or getattr(language, has)]
    return pytest.mark.parametrize("client", names, indirect=True)


def install(client):
    """The folder with the programs."""
    if problem := try_install(client):
        raise HarnessError(f"{client} was not installed: {problem}")
    return TOOLS


@functools.cache
def try_install(client):
    code, out, problem = run(Path(__file__).with_name("install.sh"), client, timeout=1800)
    return code and f"{out[-1000:]}{problem[-3000:]}"


class Client:
    """A client's programs, and the gateways that they call: `gateway` with the simulated API, and
    `api_gateway` with an API that answers what it is told to."""

    def __init__(self, programs, name):
        self.name, self.language = name, LANGUAGES[name]
        self.home = CLIENTS / (self.language.home or name)
        self.environment = PYTHON if name == "python" else {}
        if name != "python":
            install(self.language.home or name)
        self.programs, self.binary = programs, programs.binary
        self.simulator, self.gateway = self.start_gateway()
        self.api = wire.Api(RESPONSES, {REST_BATCH["id"]: REST_BATCH})
        programs.started.append(self.api)
        self.api_gateway = programs.gateway(self.api, *self.language.flags, request_timeout=20)
        self.player = Player(
            programs, self.command(self.language.interop), self.home, self.gateway.address,
            self.environment,
        )  # fmt: skip
        # A connection that is idle while other tests run.
        self.relay = wire.Relay(self.gateway.address)
        programs.started.append(self.relay)
        self.first_call = self.call_through_relay()
        self.idle_since = time.monotonic()

    def start_gateway(self):
        simulator = self.programs.simulator()
        flags = self.language.flags
        return simulator, self.programs.gateway(simulator, *flags, request_timeout=20)

    def command(self, text):
        return shlex.split(text.replace("{}", str(TOOLS)))

    def call_through_relay(self):
        return self.player.create(address=self.relay.address, keepalive=PINGS_EVERY)
