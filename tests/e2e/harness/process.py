"""A program that a test starts and ends, and what tests wait for."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
E2E = ROOT / "tests" / "e2e"
RUN = E2E / ".run"


class HarnessError(Exception):
    """What a test needs is not there, or did not happen in time."""


def get(url, data=None, method=None, headers=()):
    request = urllib.request.Request(url, data, dict(headers), method=method)
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.read().decode()


def wait_until(what, condition, seconds=30):
    """Waits until the condition is true, and returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise HarnessError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
    return value


def free_port(host="127.0.0.1"):
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def run(*command, text=None, timeout=180, **options):
    """Runs a program to its end: exit code, standard output, standard error."""
    done = subprocess.run(
        [str(part) for part in command], input=text, capture_output=True, text=True,
        timeout=timeout, **options,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def go_build(module, folder):
    """Builds all programs of a Go module into this folder, and returns it."""
    if not shutil.which("go"):
        raise HarnessError("cannot run: Go is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    # One package at a time: other tests may run at the same time.
    command = ["go", "build", "-p", "1", "-ldflags", "-s -w", "-o", f"{folder}/", "./..."]
    code, _, problem = run(
        *command, cwd=module, env={**os.environ, "CGO_ENABLED": "0"}, timeout=900
    )
    if code:
        raise HarnessError(f"cannot run: {module} was not built: {problem}")
    return folder


class Program:
    """A program that runs. `out` and `log` are the files of its standard output and error."""

    def __init__(self, programs, name, *command, env=None):
        self.programs, self.name = programs, name
        if command:
            self.launch(*command, env=env)

    def launch(self, *command, env=None):
        folder = self.programs.folder
        number = len(self.programs.started)
        self.out, self.log = folder / f"{self.name}-{number}.out", folder / f"{self.name}-{number}.log"
        if not self.programs.keep_logs:
            self.log = Path(os.devnull)
        with open(self.out, "w") as stdout, open(self.log, "w") as stderr:
            self.process = subprocess.Popen(
                [str(part) for part in command], stdin=subprocess.DEVNULL, stdout=stdout,
                stderr=stderr, env={**os.environ, **(env or {})}, start_new_session=True,
            )  # fmt: skip
        self.is_ending = False
        self.programs.started.append(self)

    def check_alive(self):
        if self.process.poll() is not None:
            last = "".join(self.log.read_text().splitlines(keepends=True)[-3:]).strip()
            raise HarnessError(f"{' '.join(self.process.args)} ended: {last}")

    def first_line(self):
        """The JSON that the gateway's commands print when they listen."""

        def printed():
            self.check_alive()
            return self.out.read_text().endswith("\n")

        wait_until(f"start of {self.name}", printed)
        return json.loads(self.out.read_text().splitlines()[0])

    def log_lines(self, target=None):
        """The log's lines of this target, or all, if it is JSON."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if target in (None, line.get("target"))]

    def terminate(self):
        self.process.terminate()
        self.is_ending = True

    def end(self, how=signal.SIGTERM):
        """Ends it with a signal, and returns its exit code."""
        if not self.is_ending:  # a second SIGTERM would end the gateway at once
            self.process.send_signal(how)
        return self.process.wait(timeout=60)

    def kill(self):
        self.process.kill()
        self.process.wait()

    close = kill
