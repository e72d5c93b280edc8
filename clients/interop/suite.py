"""Plays clients against the gateway: suite.py GATEWAY FOLDER CLIENT...

FOLDER is where test.sh has installed things. Each client has gateways of its own,
so many play at the same time."""

import os
import signal
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import calls
import descriptors
import examples
import samples
import tools
import wire
from gateway import PROCESSES, Gateway, Player, clean_environment
from report import Report

CLIENTS = Path(__file__).resolve().parent.parent
ROOT = CLIENTS.parent
AT_ONCE = threading.Semaphore(6)  # more would keep two cores so busy that answers come late


@dataclass
class Language:
    interop: list[str]  # the programs; {} is the folder
    example: list[str] = field(default_factory=list)
    home: str = ""  # where they run, below CLIENTS; the client's name by default
    flags: tuple[str, ...] = ()  # of the gateway
    readme_program: str = ""  # where the README's program is put, below CLIENTS
    readme_commands: tuple[list[str], ...] = ()  # what builds and runs it
    service_config: str | None = "service-config.json"
    reflection: tuple[str, ...] = ("v1", "v1alpha")  # the versions that the library has
    loads_descriptors: bool = False  # at run time, beside those of its code


JARS = "target/classes:target/lib/*"
LANGUAGES = {
    "python": Language(
        interop=["{}/venv/bin/python", "interop.py"],
        example=["{}/venv/bin/python", "create_batch.py"],
        readme_program="python/.readme/main.py",
        readme_commands=(
            ["env", "PYTHONPATH=clients/python", "{}/venv/bin/python", "clients/python/.readme/main.py"],
        ),
        reflection=("v1alpha",),
        loads_descriptors=True,
    ),
    "node": Language(
        interop=["node", "interop.js"],
        example=["node", "create_batch.js"],
        readme_program="node/.readme/main.js",
        readme_commands=(["node", "clients/node/.readme/main.js"],),
    ),
    "go": Language(
        interop=["{}/bin/interop"],
        example=["{}/bin/create-batch"],
        readme_program="go/readme/main.go",
        readme_commands=(
            ["go", "-C", "clients/go", "build", "-buildvcs=false", "-o", "{}/bin/readme", "./readme"],
            ["{}/bin/readme"],
        ),
        loads_descriptors=True,
    ),
    "java": Language(
        interop=["java", "-cp", f"target/test-classes:{JARS}", "example.Interop"],
        example=["java", "-jar", "target/create-batch.jar"],
        readme_program="java/target/readme/Main.java",
        readme_commands=(
            ["sh", "-c", f"cd clients/java && exec java -cp '{JARS}' target/readme/Main.java"],
        ),
        service_config="src/main/resources/service-config.json",
    ),
    "cpp": Language(
        interop=["build/interop"],
        example=["build/create-batch"],
    ),
    "rust": Language(
        interop=["{}/rust/debug/examples/interop"],
        example=["{}/rust/debug/create-batch"],
        service_config=None,
    ),
    "connect": Language(
        interop=["node", "interop.js", "grpc"],
        example=["node", "create_batch.js"],
        service_config=None,
    ),
    "connect-web": Language(
        interop=["node", "interop.js", "grpc-web"],
        home="connect",
        flags=("--grpc-web",),
        service_config=None,
        reflection=(),  # streams both ways, which gRPC-Web cannot
    ),
    "ruby": Language(
        interop=["ruby", "interop.rb"],
        example=["ruby", "create_batch.rb"],
    ),
}


def main() -> int:
    program, folder, *names = sys.argv[1:]
    clean_environment()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
    with Report("suite").check("the samples have every field of the proto"):
        missing = samples.missing_fields(ROOT / "proto/aep/ingestion/v1/batch_service.proto")
        assert not missing, ", ".join(missing)
    plays = []
    for name in names:
        play = play_language if name in LANGUAGES else play_tool
        plays.append(threading.Thread(target=guarded, args=(play, program, Path(folder), name)))
        plays[-1].start()
    for play in plays:
        play.join()
    print(f"{Report.passed} passed, {Report.failed} failed")
    return int(Report.failed > 0)


def leave(*_) -> None:
    for process in PROCESSES:
        process.kill()
    os._exit(1)


def guarded(play, program: str, folder: Path, name: str) -> None:
    """What ends all the checks of a client is a failure too."""
    report, running = Report(name), []
    try:
        with AT_ONCE:
            play(report, running, program, folder, name)
    except Exception as error:
        with report.check("the client could be played"):
            raise error
    finally:
        for thing in reversed(running):
            thing.stop()


def play_language(report: Report, running: list, program: str, folder: Path, name: str) -> None:
    def start(thing):
        running.append(thing)
        return thing

    def words(command: list[str]) -> list[str]:
        return [word.replace("{}", str(folder)) for word in command]

    language = LANGUAGES[name]
    home = CLIENTS / (language.home or name)
    api = start(wire.Api(calls.ANSWERS))
    flags = language.flags
    gateway = start(Gateway(program, folder / f"{name}-gateway.log", flags=flags))
    api_gateway = start(Gateway(program, folder / f"{name}-api-gateway.log", api.url, flags))
    log = folder / f"{name}.log"
    player = start(Player(words(language.interop), home, log, gateway.address))
    player.reflection = language.reflection

    keepalive = calls.Keepalive(gateway, player)
    calls.play(report, gateway, api_gateway, api, player)
    if language.loads_descriptors:
        descriptors.play(report, player, descriptors.write(program, folder / f"{name}.binpb"))
    if language.service_config:
        examples.service_config(report, program, home / language.service_config)
    if language.example:
        examples.play(report, gateway, words(language.example), home)
        killed = start(Gateway(program, folder / f"{name}-killed-gateway.log"))
        examples.play_killed(report, killed, words(language.example), home)
    if language.readme_program:
        commands = [words(command) for command in language.readme_commands]
        examples.play_readme(report, gateway, CLIENTS / language.readme_program, commands, ROOT)
    keepalive.end(report)


def play_tool(report: Report, running: list, program: str, folder: Path, name: str) -> None:
    gateway = Gateway(program, folder / f"{name}-gateway.log")
    running.append(gateway)
    file = descriptors.write(program, folder / f"{name}.binpb")
    if name == "grpcurl":
        tools.grpcurl(report, gateway, f"{folder}/bin/grpcurl", ROOT, file)
    elif name == "grpcui":
        tools.grpcui(report, gateway, f"{folder}/bin/grpcui", file)
    elif name == "buf":
        tools.buf_curl(report, gateway, f"{folder}/node_modules/.bin/buf", ROOT, file)
    else:
        python = folder / "venv/bin/python"
        [google] = (folder / "venv/lib").glob("*/site-packages")
        descriptors.protoc(report, [str(python), "-m", "grpc_tools.protoc"], google, ROOT, file)


if __name__ == "__main__":
    sys.exit(main())
