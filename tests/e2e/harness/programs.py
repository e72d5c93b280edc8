"""All kinds of programs that a test can start."""

import re
import shutil

from harness.envoy import Envoy, Sidecar
from harness.gateway import Gateway, Simulator
from harness.process import RUN, Program


class Programs:
    """`with Programs(binary, name) as programs`: they write to the folder .run/logs/name, and end
    with the block."""

    def __init__(self, binary, name, keep_logs=True):
        self.binary, self.keep_logs = binary, keep_logs
        self.folder = RUN / "logs" / re.sub(r"[^\w.-]+", "_", name)
        self.started = []  # whatever has `close()`

    def __enter__(self):
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return self

    def __exit__(self, *_):
        for program in reversed(self.started):
            program.close()

    def program(self, name, *command, env=None):
        return Program(self, name, *command, env=env)

    def simulator(self, *flags, faults=(), share=0.4):
        return Simulator(self, *flags, faults=faults, share=share)

    def gateway(self, upstream, *flags, request_timeout=10.0, env=None):
        return Gateway(self, upstream, *flags, request_timeout=request_timeout, env=env)

    def gateways(self, count, upstream, *flags, **options):
        return [self.gateway(upstream, *flags, **options) for _ in range(count)]

    def envoy(self, hosts, retry_policy, **changes):
        return Envoy(self, hosts, retry_policy, **changes)

    def sidecar(self, gateway):
        return Sidecar(self, gateway)
