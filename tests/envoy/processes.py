"""The programs that a scenario needs: the simulated API, gateways, and Envoy in front of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import envoy_config

ENVOY = Path(sys.executable).parent / "envoy"
LOGS = Path(__file__).parent / ".run" / "logs"

class Failed(Exception):
    """A program did not do what it must do before anything can be tested."""


def get(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_until(what, condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Failed(f"{what}: not within {seconds} s")
        time.sleep(0.05)


class Gateway:
    """A gateway that runs."""

    def __init__(self, process, said, log):
        self.process = process
        self.address, self.admin = said["listen"], said["admin"]
        self.log = log
        self.is_ending = False

    def metric(self, name, **labels):
        """The sum of the samples of this name that have these labels."""
        total = 0.0
        for line in get(f"http://{self.admin}/metrics").splitlines():
            sample = re.match(r"(\w+)(?:\{(.*?)\})? ([-+.\deE]+)", line)
            if sample and sample[1] == name:
                has = dict(re.findall(r'(\w+)="(.*?)"', sample[2] or ""))
                if all(has.get(label) == value for label, value in labels.items()):
                    total += float(sample[3])
        return total

    def calls(self):
        """How many calls it has ended."""
        return int(self.metric("grpc_server_handled_total", grpc_method="CreateBatch"))

    def status(self, page):
        try:
            with urllib.request.urlopen(f"http://{self.admin}{page}", timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as error:
            return error.code

    def drain(self):
        self.process.terminate()
        self.is_ending = True

    def end(self, how=signal.SIGTERM):
        """Ends it with a signal, and gives its exit code."""
        if not self.is_ending:  # a second signal would end it at once
            self.process.send_signal(how)
        return self.process.wait(timeout=60)


class Stand:
    """Starts programs for one scenario and ends them: `with Stand(...) as stand`."""

    def __init__(self, binary, name):
        self.binary = binary
        self.logs = LOGS / name
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.processes = []
        self.servers = []
        self.gateways = []
        self.admin = None
        self.began = time.monotonic()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()
        for server in self.servers:
            server.close()

    def start(self, name, *args, env=None):
        name = f"{name}-{len(self.processes)}"
        out, log = self.logs / f"{name}.out", self.logs / f"{name}.log"
        with open(out, "w") as stdout, open(log, "w") as stderr:
            process = subprocess.Popen(
                [str(arg) for arg in args], stdout=stdout, stderr=stderr,
                env={**os.environ, **(env or {})},
            )
        self.processes.append(process)
        process.out, process.log = out, log
        return process

    def first_line(self, process):
        """What the gateway's commands say when they listen."""

        def said():
            if process.poll() is not None:
                last = "".join(process.log.read_text().splitlines(keepends=True)[-3:]).strip()
                raise Failed(f"{' '.join(process.args)} ended: {last}")
            return process.out.read_text().endswith("\n")

        wait_until(f"start of {process.args}", said)
        return json.loads(process.out.read_text().splitlines()[0])

    def simulate(self, *flags, faults=(), share=0.4, listen="127.0.0.1:0"):
        """Starts the simulated API, before all gateways from now on."""
        with_faults = [flag for fault in faults for flag in ("--fault", fault)]
        process = self.start(
            "simulator", self.binary, "simulate", "--listen", listen,
            "--share", share, "--seed", 1, *with_faults, *flags,
        )
        self.upstream = self.first_line(process)
        return process

    def serve(self, *flags, listen="127.0.0.1:0", env=None, request_timeout=10.0):
        process = self.start(
            "gateway", self.binary, "serve",
            "--listen", listen, "--admin-listen", "127.0.0.1:0",
            "--upstream-url", self.upstream["upstream_url"],
            "--catalog-url", self.upstream["catalog_url"],
            "--request-timeout", f"{request_timeout}s", *flags, env=env,
        )
        self.gateways.append(Gateway(process, self.first_line(process), process.log))
        return self.gateways[-1]

    def serve_again(self, gateway, *flags):
        """In the place of a gateway that has ended."""
        self.gateways.remove(gateway)
        return self.serve(*flags, listen=gateway.address)

    def ledger(self):
        return json.loads(get(f"http://{self.upstream['listen']}/_simulator/batches"))

    def envoy(self, retry_policy, hosts=None, **changes):
        """Starts Envoy in front of all gateways; `self.address` is where it takes calls. `changes`
        are those of `envoy_config.config`."""
        hosts = hosts or [gateway.address for gateway in self.gateways]
        self.address, self.admin = self.start_envoy(
            envoy_config.config(hosts, retry_policy, **changes)
        )
        if "health_checks" in changes.get("cluster", ()):
            self.wait_for_health()

    def sidecars(self):
        """Starts an Envoy beside each gateway, and gives where they take calls."""
        return [self.start_envoy(envoy_config.beside(g.address))[0] for g in self.gateways]

    def start_envoy(self, content):
        """Where it takes calls, and the URL of its admin page."""
        config = self.logs / f"envoy-{len(self.processes)}.json"
        config.write_text(json.dumps(content, indent=1))
        checked = subprocess.run(
            [ENVOY, "--mode", "validate", "-c", config], capture_output=True, text=True
        )
        if checked.returncode != 0:
            raise Failed(f"Envoy refuses {config}: {checked.stderr.strip().splitlines()[-1]}")
        where = self.logs / f"envoy-{len(self.processes)}-admin"
        process = self.start(
            "envoy", ENVOY, "-c", config, "--concurrency", 1, "--use-dynamic-base-id",
            "--admin-address-path", where, "--log-level", "warning",
        )

        def ready():
            if process.poll() is not None:
                raise Failed(f"Envoy ended; see {process.log}")
            try:
                return get(f"http://{where.read_text()}/ready").strip() == "LIVE"
            except OSError:
                return False

        wait_until("Envoy is ready", ready)
        admin = f"http://{where.read_text()}"
        listeners = json.loads(get(f"{admin}/listeners?format=json"))
        socket = listeners["listener_statuses"][0]["local_address"]["socket_address"]
        return f"{socket['address']}:{socket['port_value']}", admin

    def wait_for_health(self):
        def healthy():
            return self.stat("membership_healthy") == len(self.gateways)

        wait_until("Envoy finds every gateway healthy", healthy)

    def stats(self, *names):
        """Counters and gauges of Envoy for the cluster of the gateways, of one moment."""
        pattern = f"^cluster.gateways.({'|'.join(names)})$"
        found = dict(re.findall(r"([\w.]+): (\d+)", get(f"{self.admin}/stats?filter={pattern}")))
        return [int(found.get(f"cluster.gateways.{name}", 0)) for name in names]

    def stat(self, name):
        return self.stats(name)[0]
