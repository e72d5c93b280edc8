"""A gateway that runs, the API behind it, and the calls that a client makes."""

import json
import os
import re
import subprocess
import threading
import urllib.request
from pathlib import Path

START = 30  # seconds in which a process must be there
SLACK = 30  # seconds that a call may take beyond its deadline
PROCESSES: list[subprocess.Popen] = []  # all that were started

CREDENTIALS = [
    ["authorization", "Bearer demo"],
    ["x-api-key", "demo"],
    ["x-gw-ims-org-id", "demo@AdobeOrg"],
    ["x-sandbox-name", "prod"],
]


def fetch(url: str, method: str = "GET", data: str | None = None) -> str:
    body = None if data is None else data.encode()
    request = urllib.request.Request(url, method=method, data=body)
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


class Gateway:
    """`aep-batch-gateway demo`, with its simulated API; or `serve` with another API."""

    def __init__(self, program: str, log: Path, upstream: str | None = None, flags: tuple[str, ...] = ()) -> None:
        listen = ["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", *flags]
        command = ["demo", *listen]
        if upstream:
            urls = ["--upstream-url", f"{upstream}/import", "--catalog-url", f"{upstream}/catalog"]
            command = ["serve", *listen, *urls]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [program, *command], stdout=subprocess.PIPE, stderr=errors, text=True
            )
        PROCESSES.append(self.process)
        with time_limit(self.process, START):
            first = self.process.stdout.readline()
            said = first
            while first and not upstream and "Serving" not in said:
                line = self.process.stdout.readline()
                said += line
                if not line:
                    break
        if not first.startswith("{"):
            raise RuntimeError(f"the gateway did not start: {log.read_text()}")
        self.address = json.loads(first)["listen"]
        self.admin = "http://" + json.loads(first)["admin"]
        found = re.search(r"http://\S+/_simulator", said)
        self.simulator = found.group() if found else None

    def order(self, *faults: str) -> None:
        """The next creates meet these faults."""
        fetch(f"{self.simulator}/faults", "POST", "\n".join(faults))

    def forget_faults(self) -> None:
        fetch(f"{self.simulator}/faults", "DELETE")

    def batches(self) -> list[dict]:
        """The ledger of the simulated API."""
        return json.loads(fetch(f"{self.simulator}/batches"))

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples with these labels."""
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        lines = fetch(f"{self.admin}/metrics").splitlines()
        return sum(
            float(line.split()[1])
            for line in lines
            if re.match(rf"{name}[{{ ]", line) and all(label in line for label in wanted)
        )

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Player:
    """A client's program `interop`, which makes the calls that it is told to."""

    def __init__(self, command: list[str], directory: Path, log: Path, address: str) -> None:
        self.address = address
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
            )
        PROCESSES.append(self.process)
        self.log = log

    def tell(self, do: str, **order) -> dict:
        order = {"do": do, "address": self.address, "seconds": 10, **order}
        with time_limit(self.process, order["seconds"] + SLACK):
            try:
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            except BrokenPipeError:
                pass
            line = self.process.stdout.readline()
        if not line:
            raise AssertionError(f"the client's program ended: {self.log.read_text()[-2000:]}")
        return json.loads(line)

    def create(self, request: dict | None = None, **order) -> dict:
        order = {"metadata": CREDENTIALS, **order}
        return self.tell("create", request=request or {"datasetId": "a"}, **order)

    def stop(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()


class time_limit:
    """Kills a process that does not come to an end of what it is doing."""

    def __init__(self, process: subprocess.Popen, seconds: float) -> None:
        self.timer = threading.Timer(seconds, process.kill)

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_) -> None:
        self.timer.cancel()


def clean_environment() -> None:
    """Everything here is on 127.0.0.1, and nothing else configures gateway or clients."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("AEP_", "OTEL_")):
            del os.environ[name]
