"""Calls: many by h2load, evenly spaced ones by `even`, one by curl to see that it is answered
rightly, and idle connections."""

import json
import re
import socket
import struct
import subprocess
import time

from contestants import BASE, EVEN, RUN, Failed

DATASET = "5c8c3c555033b814b69f947f"
BATCH_ID = b"5d01230fc78a4e4f8c0c6b387b4b8d1c"

# A gRPC message: 5 bytes of frame, then dataset_id, which is field 1.
MESSAGE = b"\0\0\0\0\x1a\x0a\x18" + DATASET.encode()
JSON = b'{"datasetId":"%s"}' % DATASET.encode()
CREDENTIALS = [
    ("authorization", "Bearer load"), ("x-api-key", "load"),
    ("x-gw-ims-org-id", "load@AdobeOrg"), ("x-sandbox-name", "prod"),
]
GRPC = [("content-type", "application/grpc"), ("te", "trailers"), *CREDENTIALS]


def write_messages():
    (RUN / "message").write_bytes(MESSAGE)
    (RUN / "json").write_bytes(JSON)


def flags(headers):
    return [flag for name, value in headers for flag in ("-H", f"{name}: {value}")]


def url(program):
    return f"http://127.0.0.1:{program.port}{program.call}"


def size_of_answer(program):
    """Makes one call, sees that it is answered rightly, and says how long the message is."""
    message, head = RUN / "answer", RUN / "answer-head"
    subprocess.run(
        ["curl", "-sS", "--max-time", "30", "--http2-prior-knowledge", "-o", message, "-D", head,
         "--data-binary", f"@{RUN / 'message'}", *flags(GRPC), url(program)],
        check=True,
    )
    content = message.read_bytes()
    if not re.search(r"^grpc-status: 0\r?$", head.read_text(), re.M) or BATCH_ID not in content:
        raise Failed(f"{program.name} answers wrongly: {head.read_text()}{content[:200]}")
    return len(content)


class Load:
    """h2load. What it says is in `said`."""

    def __init__(self, target, connections, streams, arguments, body="message", headers=GRPC):
        self.target = target
        self.log = RUN / "h2load.log"
        self.log.unlink(missing_ok=True)
        self.process = subprocess.Popen(
            ["h2load", "-c", str(connections), "-m", str(streams), "-d", RUN / body,
             *flags(headers), *arguments, target],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )

    def ends(self):
        self.said = self.process.communicate()[0]
        if self.process.returncode != 0:
            raise Failed(f"h2load failed: {self.said}")
        return self

    def stop(self):
        self.process.kill()
        self.process.wait()

    def number(self, pattern):
        found = re.search(pattern, self.said)
        if not found:
            raise Failed(f"h2load said something else: {self.said}")
        return float(found.group(1))

    def check(self, answer_size, creates, in_flight=0):
        """Every create's whole answer came, but for those in flight at the end: an error would
        have been shorter."""
        failed = self.number(r"(\d+) failed") + self.number(r"(\d+) timeout")
        data = self.number(r"traffic: .*\((\d+)\) data")
        if failed or not (creates - in_flight) * answer_size <= data <= creates * answer_size:
            raise Failed(f"{self.target}: {data} bytes for {creates} creates: {self.said}")

    def per_second(self):
        return self.number(r"finished in .*, ([\d.]+) req/s")

    def latencies(self):
        """Microseconds, sorted."""
        lines = self.log.read_text().splitlines()
        if not lines:
            raise Failed(f"{self.target}: no call began and ended while it was measured")
        return sorted(int(line.split("\t")[2]) for line in lines)


class EvenLoad:
    """So many calls per second in all, evenly spaced, on connections that take turns."""

    def __init__(self, target, connections, rate, seconds, warm_up):
        self.target, self.seconds = target, seconds
        numbers = (connections, rate, round(warm_up * 1000), round(seconds * 1000))
        self.process = subprocess.Popen(
            [EVEN, target, *map(str, numbers), RUN / "message",
             *(f"{name}:{value}" for name, value in GRPC)],
            stdout=subprocess.PIPE, text=True,
        )
        if self.process.stdout.readline() != "open\n":
            raise Failed(f"{target} takes no {connections} connections")

    def ends(self):
        said = self.process.communicate()[0]
        if self.process.returncode != 0:
            raise Failed(f"{self.target}: evenly spaced calls ended early")
        self.seen = json.loads(said)
        return self

    def check(self, answer_size, creates, in_flight=0):
        """Every create's whole answer came."""
        seen = self.seen
        if seen["failed"] or seen["calls"] != creates or seen["bytes"] != creates * answer_size:
            raise Failed(f"{self.target}: {seen['failed']} of {seen['calls']} calls failed, "
                         f"{seen['bytes']} bytes for {creates} creates")

    def per_second(self):
        return len(self.seen["latencies_us"]) / self.seconds

    def latencies(self):
        """Microseconds, sorted."""
        return sorted(self.seen["latencies_us"])


def timing(seconds, warm_up):
    return ["-D", f"{seconds * 1000:.0f}ms", f"--warm-up-time={warm_up * 1000:.0f}ms"]


def measure(program, api, connections, streams, seconds, warm_up, rate=None):
    """One turn of one contestant. `rate`: calls per second in all, evenly spaced."""
    size, before = size_of_answer(program), api.creates()
    if rate:
        load, most = EvenLoad(url(program), connections, rate, seconds, warm_up), 0
    else:
        arguments = [*timing(seconds, warm_up), f"--log-file={RUN / 'h2load.log'}"]
        load, most = Load(url(program), connections, streams, arguments), connections * streams
    # Without the beginning, when connections are opened, and the end, when calls are left.
    time.sleep(warm_up)
    first = program.processor_seconds(), api.creates()
    time.sleep(seconds - 0.1)
    last = program.processor_seconds(), api.creates()
    load.ends()
    load.check(size, settled(api) - before, most)
    program.log.open("a").truncate(0)
    if last[1] == first[1]:
        raise Failed(f"{program.name} made no call within {seconds} s")
    return {
        "cpu_us": (last[0] - first[0]) / (last[1] - first[1]) * 1e6,
        "per_second": load.per_second(),
        **percentiles(load.latencies()),
    }


def settled(api):
    """Creates, when those are done that load has left behind: the next turn must not count them."""
    creates = api.creates()
    while True:
        time.sleep(0.2)
        before, creates = creates, api.creates()
        if creates == before:
            return creates


def measure_api(api, seconds, warm_up):
    """The API alone, one call at a time: what no gateway can be faster than."""
    load = Load(
        f"{api.url('http1')}/{BASE}/batches", 1, 1,
        ["--h1", *timing(seconds, warm_up), f"--log-file={RUN / 'h2load.log'}"],
        "json", [("content-type", "application/json"), *CREDENTIALS],
    ).ends()
    return {
        "per_second": load.per_second(),
        **percentiles(load.latencies()),
    }


def percentiles(sorted_us):
    def at(share):
        return sorted_us[min(len(sorted_us) - 1, int(len(sorted_us) * share))]

    return {"p50_us": at(0.5), "p99_us": at(0.99), "p999_us": at(0.999)}


def frame(kind, frame_flags, stream, payload):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, frame_flags, stream) + payload


def literal(text):
    return bytes([len(text)]) + text.encode()


def first_call(program):
    """The bytes of a new connection with one call on it (RFC 9113, and RFC 7541 without tables)."""
    pseudo = [(":method", "POST"), (":scheme", "http"), (":path", program.call),
              (":authority", f"127.0.0.1:{program.port}")]
    block = b"".join(b"\0" + literal(name) + literal(value) for name, value in pseudo + GRPC)
    settings = frame(4, 0, 0, b"") + frame(4, 1, 0, b"")  # SETTINGS, and the other's acknowledged
    call = frame(1, 4, 1, block) + frame(0, 1, 1, MESSAGE)
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + call


class IdleConnections:
    """Connections that have made a call each, and are idle since."""

    def __init__(self, program, count):
        begin = first_call(program)
        self.sockets = []
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", program.port), timeout=30)
            self.sockets.append(connection)
            connection.sendall(begin)
            wait_for_trailers(connection)

    def close(self):
        for connection in self.sockets:
            connection.close()


def wait_for_trailers(connection):
    received = b""
    while True:
        while len(received) >= 9:
            length = int.from_bytes(received[:3], "big")
            if len(received) < 9 + length:
                break
            kind, frame_flags = received[3], received[4]
            stream = int.from_bytes(received[5:9], "big")
            if kind in (3, 7):
                raise Failed("a connection was refused (RST_STREAM or GOAWAY)")
            if stream == 1 and frame_flags & 1 and kind in (0, 1):
                return
            received = received[9 + length :]
        more = connection.recv(65536)
        if not more:
            raise Failed("a connection was closed")
        received += more
