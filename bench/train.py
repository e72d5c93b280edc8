"""Records the profile by which the image's program is built. Started by `run.sh --profile`.

The compiler takes the paths that are used here for the usual ones. So all kinds of calls are made:
over each kind of connection, with answers of each size, and those that fail. What is never reached
is left out of the profile, and built as without one.
"""

import subprocess
import sys

import contestants
import load
from contestants import GATEWAY, RUN, Api, Failed, Program, free_port

COUNTERS = RUN / "counters"
KEY, CERTIFICATE = RUN / "server-key.pem", RUN / "server.pem"
FAULTS = ["status-400", "status-429", "status-503", "lost-502", "reset-after-create", "html-answer"]


class Simulator(Program):
    """The simulated API, whose own code is in no profile."""

    def __init__(self, *arguments):
        command = [GATEWAY, "simulate", "--listen", "127.0.0.1:0", *arguments]
        super().__init__("simulator", command, LLVM_PROFILE_FILE="/dev/null")
        self.said = self.first_line()

    def url(self, _kind):
        return f"http://{self.said['listen']}"


def gateway(api, kind, *arguments):
    port = free_port()
    command = contestants.gateway_command(GATEWAY, api, kind, port, free_port())
    counters = str(COUNTERS / "%p.profraw")
    return Program("trained", [*command, *arguments], LLVM_PROFILE_FILE=counters).serves(port)


def calls(program, connections, streams, count, message=load.MESSAGE, scheme="http", headers=()):
    (RUN / "training-message").write_bytes(message)
    target = load.url(program).replace("http", scheme, 1)
    arguments = ["-n", str(count), *load.flags(headers)]
    done = load.Load(target, connections, streams, arguments, body="training-message").ends()
    if done.number(r"(\d+) succeeded") != count:
        raise Failed(done.said)


def end(program):
    """Gracefully: the counters are written at the end."""
    program.process.terminate()
    program.process.wait()


def usual_calls():
    api = Api()
    for kind in ("http1", "h2c", "tls"):
        program = gateway(api, kind)
        for kilobytes, share in (("0.6", 1), ("6", 0.05), ("60", 0.01)):
            api.set(kilobytes, 0)
            calls(program, 10, 10, int(20_000 * share))
            calls(program, 1, 1, int(5_000 * share))
        api.set("0.6", 0)
        calls(program, 200, 1, 5_000, headers=[("grpc-timeout", "20S")])
        end(program)
    program = gateway(api, "http1", "--tls-cert-file", CERTIFICATE, "--tls-key-file", KEY)
    calls(program, 10, 10, 5_000, scheme="https")
    end(program)
    api.stop()


def looked_up_calls():
    """With an external id: one is created, then found."""
    api = Simulator()
    program = gateway(api, "http1", "--catalog-url", api.said["catalog_url"])
    for number in range(50):
        external_id = f"id-{number:04}".encode()
        field = b"\x12" + bytes([len(external_id)]) + external_id
        message = load.MESSAGE[5:] + field
        calls(program, 2, 2, 40, b"\0" + len(message).to_bytes(4, "big") + message)
    end(program)
    api.stop()


def failing_calls():
    flags = [flag for fault in FAULTS for flag in ("--fault", fault)]
    api = Simulator(*flags, "--share", "0.5")
    program = gateway(api, "http1")
    calls(program, 10, 10, 3_000)
    end(program)
    api.stop()


def main():
    load.write_messages()
    for old in COUNTERS.glob("*"):
        old.unlink()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
         "-subj", "/CN=localhost", "-days", "1", "-keyout", KEY, "-out", CERTIFICATE],
        check=True, capture_output=True,
    )
    usual_calls()
    looked_up_calls()
    failing_calls()


if __name__ == "__main__":
    sys.exit(main())
