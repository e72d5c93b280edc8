"""The gateway and the simulated API behind it."""

import json
import re
import urllib.error
import urllib.request

from harness.process import Program, get


class Simulator(Program):
    """The simulated API. `start` starts it again at the same address, with other faults."""

    def __init__(self, programs, *flags, faults=(), share=0.4, listen="127.0.0.1:0"):
        super().__init__(programs, "simulator")
        self.address = listen
        self.start(*flags, faults=faults, share=share)

    def start(self, *flags, faults=(), share=0.4):
        with_faults = [flag for fault in faults for flag in ("--fault", fault)]
        self.launch(
            self.programs.binary, "simulate", "--listen", self.address, "--share", share,
            "--seed", 1, *with_faults, *flags,
        )  # fmt: skip
        listening = self.first_line()
        self.address = listening["listen"]
        self.upstream_url, self.catalog_url = listening["upstream_url"], listening["catalog_url"]

    def ledger(self):
        """The batches that it has made."""
        return json.loads(get(f"http://{self.address}/_simulator/batches"))

    def inject(self, *faults):
        """Each of the next requests meets one of them."""
        get(f"http://{self.address}/_simulator/faults", "\n".join(faults).encode())

    def clear_faults(self):
        get(f"http://{self.address}/_simulator/faults", method="DELETE")


class Gateway(Program):
    """`aep-batch-gateway serve`. `upstream` has the URLs of the API."""

    def __init__(self, programs, upstream, *flags, request_timeout=10.0, env=None):
        super().__init__(programs, "gateway")
        self.address = self.admin = "127.0.0.1:0"
        self.flags = [
            "--upstream-url", upstream.upstream_url, "--catalog-url", upstream.catalog_url,
            "--request-timeout", f"{request_timeout}s", *flags,
        ]  # fmt: skip
        self.env = env
        self.start()

    def start(self):
        """Starts it, after its end at the same addresses."""
        self.launch(
            self.programs.binary, "serve", "--listen", self.address, "--admin-listen", self.admin,
            *self.flags, env=self.env,
        )  # fmt: skip
        listening = self.first_line()
        self.address, self.admin = listening["listen"], listening["admin"]

    def metrics(self, accept="text/plain"):
        return get(f"http://{self.admin}/metrics", headers={"accept": accept})

    def metric(self, name, **labels):
        """The sum of the samples of this name that have these labels."""
        total = 0.0
        for line in self.metrics().splitlines():
            sample = re.match(r"(\w+)(?:\{(.*?)\})? ([-+.\deE]+)", line)
            if sample and sample[1] == name:
                has = dict(re.findall(r'(\w+)="(.*?)"', sample[2] or ""))
                if all(has.get(label) == value for label, value in labels.items()):
                    total += float(sample[3])
        return total

    def calls(self):
        """How many creates it has completed."""
        return int(self.metric("grpc_server_handled_total", grpc_method="CreateBatch"))

    def status(self, page):
        """The HTTP status of a page of the admin port."""
        try:
            with urllib.request.urlopen(f"http://{self.admin}{page}", timeout=10) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
