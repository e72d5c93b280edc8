"""A client's program `interop`, which makes the calls that it is told to: a line of JSON in, a line
out."""

import json
import os
import subprocess
import threading

CREDENTIALS = [
    ["authorization", "Bearer demo"],
    ["x-api-key", "demo"],
    ["x-gw-ims-org-id", "demo@AdobeOrg"],
    ["x-sandbox-name", "prod"],
]
SLACK = 30  # seconds that a call may take beyond its deadline


class Player:
    def __init__(self, programs, command, folder, address, environment):
        self.address = address
        self.log = programs.folder / "player.log"
        with self.log.open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **environment}, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8",
            )  # fmt: skip
        programs.started.append(self)

    def do(self, what, **order):
        order = {"do": what, "address": self.address, "seconds": 10, **order}
        timer = threading.Timer(order["seconds"] + SLACK, self.process.kill)
        timer.start()
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        assert line, f"the client's program ended: {self.log.read_text()[-2000:]}"
        return json.loads(line)

    def call(self, method, request, **order):
        return self.do("call", method=method, request=request, **{"metadata": CREDENTIALS, **order})

    def create(self, request=None, **order):
        return self.call("CreateBatch", request or {"datasetId": "a"}, **order)

    def close(self):
        self.process.kill()
        self.process.wait()
