"""The programs that a user copies: the example of a language, and its lines in the README."""

import json
import os
import re
import subprocess
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import wire
from gateway import Gateway
from report import Report, patiently

LIMIT = 60  # seconds that a program may take
CREATED = r"^[0-9a-f]{32} BATCH_STATUS_LOADING$"
NOBODY = "127.0.0.1:1"
UNPROVEN = r"^UNAVAILABLE {reason} UNKNOWN: .*\nA batch may exist: look for it"


@dataclass
class Run:
    """A program that ran: what it said, and what it did to the ledger."""

    code: int
    said: str
    batches: int


def run(gateway: Gateway, faults: list[str], command: list[str], cwd: Path, **environment) -> Run:
    gateway.order(*faults)
    before = len(gateway.batches())
    try:
        program = start(command, cwd, **environment)
        said, _ = program.communicate(timeout=LIMIT)
    finally:
        program.kill()
        gateway.forget_faults()
    return Run(program.returncode, said.strip(), len(gateway.batches()) - before)


def start(command: list[str], cwd: Path, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def assert_run(ran: Run, code: int, batches: int, pattern: str) -> None:
    got = f"exit {ran.code}, {ran.batches} new batches, it said:\n{ran.said}"
    wanted = f"exit {code}, {batches} new batches, words like {pattern}"
    good = ran.code == code and ran.batches == batches and re.search(pattern, ran.said, re.S)
    assert good, f"got {got}\nnot {wanted}"


def play(report: Report, gateway: Gateway, example: list[str], cwd: Path) -> None:
    program, example = example, [*example, gateway.address]
    with report.check("example: a batch is created"):
        assert_run(run(gateway, [], example, cwd), 0, 1, CREATED)
    with report.check("example: UNAVAILABLE is retried"):
        patiently(lambda: retried(gateway, example, cwd))
    with report.check("example: a lost answer is reported and not retried"):
        said = r"^UNKNOWN CONNECTION_LOST UNKNOWN: .*\nA batch may exist: look for it"
        assert_run(run(gateway, ["reset-after-create"], example, cwd), 1, 1, said)
    with report.check("example: a missing token is reported, with its field"):
        said = r"^INVALID_ARGUMENT INVALID_REQUEST NOT_APPLIED: .*\n  authorization: .*may be repeated"
        assert_run(run(gateway, [], example, cwd, AEP_TOKEN=""), 1, 0, said)
    with report.check("example: an API that is overloaded is reported, and when to come back"):
        said = r"^UNAVAILABLE API_UNAVAILABLE NOT_APPLIED: .*\n  try again in 1s\n.*may be repeated"
        assert_run(run(gateway, ["status-503"] * 9, example, cwd), 1, 0, said)

    with report.check("example: UNAVAILABLE is UNKNOWN if nobody listens"):
        said = UNPROVEN.format(reason="")
        assert_run(run(gateway, [], [*program, NOBODY], cwd), 1, 0, said)
    with report.check("example: UNAVAILABLE is UNKNOWN if a proxy says it"):
        proxy, said = wire.Proxy(), UNPROVEN.format(reason=wire.Proxy.REASON)
        assert_run(run(gateway, [], [*program, proxy.address], cwd), 1, 0, said)
        proxy.stop()


def retried(gateway: Gateway, example: list[str], cwd: Path) -> None:
    """Only with an external id: other calls get their headers before anything is sent."""
    example = [*example, "a", str(uuid.uuid4())]
    assert_run(run(gateway, ["status-503"] * 2, example, cwd), 0, 1, CREATED)


def play_killed(report: Report, gateway: Gateway, example: list[str], cwd: Path) -> None:
    """Ends the gateway."""
    with report.check("example: whatever it says if the gateway is killed is UNKNOWN"):
        gateway.order("silence-after-create")
        program = start([*example, gateway.address], cwd)
        try:
            until = time.monotonic() + LIMIT
            while not gateway.batches() and time.monotonic() < until:
                time.sleep(0.05)
            batches = len(gateway.batches())
            time.sleep(1)  # By then the call has its headers.
            gateway.process.kill()
            said, _ = program.communicate(timeout=LIMIT)
        finally:
            program.kill()
        ran = Run(program.returncode, said.strip(), batches)
        assert_run(ran, 1, 1, UNPROVEN.format(reason="").replace("UNAVAILABLE", r"\w+"))


def service_config(report: Report, gateway_program: str, file: Path) -> None:
    with report.check("example: its service config is what the gateway prints"):
        command = [gateway_program, "descriptor", "--service-config"]
        printed = subprocess.run(command, check=True, capture_output=True, timeout=LIMIT)
        assert json.loads(printed.stdout) == json.loads(file.read_text()), (
            f"they differ: {' '.join(command)} >{file}"
        )


def of_readme(readme: Path, language: str, has: str, gateway: Gateway) -> str:
    """The page's first program in that language that has these words, for this gateway."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```$", readme.read_text(), re.M | re.S)
    program = next((block for block in blocks if has in block), "")
    assert "127.0.0.1:50051" in program, f"the README has no program in {language}"
    return program.replace("127.0.0.1:50051", gateway.address)


LANGUAGES = {".py": "python", ".js": "js", ".go": "go", ".java": "java"}


def play_readme(
    report: Report, gateway: Gateway, program: Path, commands: list[list[str]], root: Path
) -> None:
    """Builds and runs the README's program: the last command says the batch's id."""
    with report.check("README"):
        program.parent.mkdir(parents=True, exist_ok=True)
        language = LANGUAGES[program.suffix]
        program.write_text(of_readme(root / "clients/README.md", language, "atchService", gateway))
        for command in commands[:-1]:
            assert_run(run(gateway, [], command, root), 0, 0, "")
        assert_run(run(gateway, [], commands[-1], root), 0, 1, r"^[0-9a-f]{32}$")
