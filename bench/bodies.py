"""What compressed bodies cost a gateway, beside an uncompressed one of the same length.

`python -m bench.bodies [--size BYTES]` sends bodies that are made to cost much: empty members and
frames, blocks of nothing, bombs. Each is compared with heartbeats, uncompressed, as long as the
longer of what was sent and what it unpacks to: CPU time of the gateway's process for each request,
in turns. Then 40 clients send each body at once, and another one asks /health/live meanwhile: the
longest time that it waited.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import random
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.servers import Buffer, Served, buffer, gateway

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

SIZE = 2_000_000
CLIENTS = 40
ROUNDS = 5
TICKS_SECONDS = 0.25
"""CPU time comes in steps of 10 ms: so much of it is gathered for a figure."""
PATIENCE_SECONDS = 120
BATCH = "/metrics/heart-rate/batch"
FACTOR = 3.0


@dataclass(frozen=True, slots=True)
class Body:
    """A body, its coding, and how long it is expanded."""

    name: str
    coding: str
    sent: bytes
    unpacked: int

    @property
    def longer(self) -> int:
        """Length of the uncompressed body that it is compared with."""
        return max(len(self.sent), self.unpacked)


def heartbeats(size: int) -> bytes:
    """NDJSON of about so many bytes: valid heartbeats, at most as many as a batch may have."""
    random_ = random.Random(1)
    lines: list[str] = []
    length = 0
    while length < size and len(lines) < 50_000:
        at = random_.randrange(86_400)
        line = (
            f'{{"user_id":"user-{random_.randrange(1000):04d}","device_id":"device_a","timestamp":'
            f'"2025-01-15T{at // 3600:02d}:{at // 60 % 60:02d}:{at % 60:02d}Z",'
            f'"heart_rate":{random_.randrange(50, 150)}}}'
        )
        lines.append(line)
        length += len(line) + 1
    return "\n".join(lines).encode().ljust(size)


def bodies(size: int) -> Iterator[Body]:
    """What is sent: compressors' own output first, and then what none of them makes."""
    text = heartbeats(size)
    yield Body("heartbeats", "", text, len(text))
    yield Body("heartbeats", "gzip", gzip.compress(text), len(text))
    yield Body("heartbeats", "zstd", zstd.compress(text), len(text))
    noise = random.Random(2).randbytes(size)
    yield Body("noise, not compressed", "gzip", gzip.compress(noise, 1), size)
    yield Body("a member each KiB", "gzip", _members(gzip.compress, text, 1024), len(text))
    yield Body("a frame each KiB", "zstd", _members(zstd.compress, text, 1024), len(text))
    yield Body("blanks: a bomb", "gzip", gzip.compress(bytes([32]) * 8 * size), 8 * size)
    yield Body("blanks: a bomb", "zstd", zstd.compress(bytes([32]) * 8 * size), 8 * size)
    skippable = b"\x50\x2a\x4d\x18" + bytes(4)
    for name, coding, unit in (
        ("skippable frames", "zstd", skippable),
        ("empty frames", "zstd", zstd.compress(b"")),
        ("frames of 1 byte", "zstd", zstd.compress(b" ")),
        ("empty members", "gzip", gzip.compress(b"")),
        ("members of 1 byte", "gzip", gzip.compress(b" ")),
        ("members with long names", "gzip", _member(flags=8, fields=b"n" * 240 + b"\0")),
        ("members with long comments", "gzip", _member(flags=16, fields=b"n" * 240 + b"\0")),
        ("members with long extra fields", "gzip", _member(4, struct.pack("<H", 240) + bytes(240))),
    ):
        yield Body(name, coding, unit * (size // len(unit)), size // len(unit))
    yield Body("a name without end", "gzip", _member(8, b"n" * size + b"\0"), 0)
    stored = b"\0\0\0\xff\xff"
    yield Body("stored blocks of length 0", "gzip", _member(0, b"", stored * (size // 5)), 0)
    huffman = _empty_huffman_blocks()
    yield Body("Huffman tables for nothing", "gzip", _member(0, b"", huffman * (size // 92)), 0)
    for name, block, unpacked in (
        ("raw blocks of length 0", bytes(3), 0),
        ("blocks of 1 byte, repeated", struct.pack("<I", 1 << 3 | 1 << 1)[:3] + b" ", size // 4),
        ("Huffman tables for a byte each", _block_with_tables(), size // 15),
    ):
        frame = b"\x28\xb5\x2f\xfd\x00\x58" + block * (size // len(block)) + b"\x01\0\0"
        yield Body(name, "zstd", frame, unpacked)


def _members(compress: Callable[[bytes], bytes], text: bytes, each: int) -> bytes:
    return b"".join(compress(text[at : at + each]) for at in range(0, len(text), each))


def _member(flags: int = 0, fields: bytes = b"", blocks: bytes = b"") -> bytes:
    """A gzip member of nothing, with header fields, and with blocks before its last one."""
    return (
        b"\x1f\x8b\x08"
        + bytes([flags])
        + bytes(5)
        + b"\xff"
        + fields
        + blocks
        + b"\x03\0"
        + bytes(8)
    )


def _empty_huffman_blocks() -> bytes:
    """Eight deflate blocks in 92 bytes: each brings tables of its own, and nothing else."""
    # last, type, 257 + 1 lengths, 18 lengths of lengths: 18, 1 and 0 are coded by 0, 11 and 10
    bits = "0" + "01" + "00000" + "00000" + "0111"
    lengths = {18: "100", 1: "010", 0: "010"}
    order = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1)
    bits += "".join(lengths.get(one, "000") for one in order)
    # 138 and 118 zeros, the end's length 1, the distance's 0; then the end
    bits += "0" + "1111111" + "0" + "1101011" + "11" + "10" + "0"
    assert len(bits) == 92
    every = bits * 8
    return bytes(int(every[at : at + 8][::-1], 2) for at in range(0, len(every), 8))


def _block_with_tables() -> bytes:
    """A zstd block that carries one byte, and a Huffman table of 2,048 entries for it."""
    weights = (11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)
    table = bytes(
        [127 + 11, *(a << 4 | b for a, b in zip(weights[::2], weights[1::2], strict=True))]
    )
    literals = table + b"\x03"
    head = (2 | 1 << 4 | len(literals) << 14).to_bytes(3, "little")
    block = head + literals + b"\0"
    return (2 << 1 | len(block) << 3).to_bytes(3, "little") + block


class Client:
    """One kept-alive connection."""

    def __init__(self, served: Served) -> None:
        self._connection = http.client.HTTPConnection(
            "127.0.0.1", served.port, timeout=PATIENCE_SECONDS
        )
        self._key = served.api_key or ""

    def post(self, sent: bytes, coding: str = "") -> int:
        """The status of the answer; 0 where the connection was closed instead."""
        headers = {"Content-Type": "application/x-ndjson", "X-API-Key": self._key}
        if coding:
            headers["Content-Encoding"] = coding
        try:
            self._connection.request("POST", BATCH, sent, headers)
            answer = self._connection.getresponse()
            answer.read()
        except OSError:
            self._connection.close()
            return 0
        return answer.status

    def live(self) -> float:
        """How long an answer to GET /health/live took, in seconds."""
        began = time.perf_counter()
        self._connection.request("GET", "/health/live")
        self._connection.getresponse().read()
        return time.perf_counter() - began


def cpu_seconds(served: Served, times: int, send: Callable[[], object]) -> float:
    """CPU time of the gateway's process for one call."""
    before = served.process.cpu_times()
    for _ in range(times):
        send()
    after = served.process.cpu_times()
    return (after.user + after.system - before.user - before.system) / times


def enough(served: Served, send: Callable[[], object]) -> int:
    """How often it has to be sent for a figure."""
    times = 1
    while (taken := cpu_seconds(served, times, send) * times) < TICKS_SECONDS / 4 and times < 2000:
        times *= 4
    return max(1, round(times * TICKS_SECONDS / max(taken, 0.01)))


def held_up(served: Served, body: Body) -> float:
    """The longest that another client waits while 40 send this body at once, in seconds."""
    clients = [Client(served) for _ in range(CLIENTS)]
    threads = [
        threading.Thread(target=client.post, args=(body.sent, body.coding)) for client in clients
    ]
    other = Client(served)
    other.live()
    for thread in threads:
        thread.start()
    longest = 0.0
    while any(thread.is_alive() for thread in threads):
        longest = max(longest, other.live())
    return longest


def main() -> int:
    """Measure each body; exit code 1 where one costs too much."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=SIZE, help="bytes of each body")
    parser.add_argument("--only", default="", help="bodies with this in their name")
    size = parser.parse_args().size
    only = parser.parse_args().only
    worst = 0.0
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        redis = stack.enter_context(buffer(folder / "redis"))
        served = stack.enter_context(gateway(folder / "home", redis))
        print("body | coding | sent | longer | status | CPU ms | plain ms | ratio | held up ms")
        for body in bodies(size):
            if only in body.name:
                worst = max(worst, measure(served, redis, body))
    print(f"the most: {worst:.2f} x; may be {FACTOR:g} x")
    return 0 if worst <= FACTOR else 1


def measure(served: Served, redis: Buffer, body: Body) -> float:
    """Print the line of one body; how many times what an uncompressed one costs it cost."""
    client, plain = Client(served), heartbeats(body.longer)

    def send() -> int:
        return client.post(body.sent, body.coding)

    def send_plain() -> int:
        return client.post(plain)

    times, plain_times = enough(served, send), enough(served, send_plain)
    costs, references = [], []
    for _ in range(ROUNDS):
        costs.append(cpu_seconds(served, times, send))
        references.append(cpu_seconds(served, plain_times, send_plain))
        redis.clear()
    ratio = statistics.median(a / b for a, b in zip(costs, references, strict=True))
    figures = (
        *(body.name, body.coding, len(body.sent), body.longer, send()),
        *(f"{statistics.median(found) * 1000:.2f}" for found in (costs, references)),
        *(f"{ratio:.2f}", f"{held_up(served, body) * 1000:.0f}"),
    )
    print(" | ".join(map(str, figures)), flush=True)
    redis.clear()
    return ratio


if __name__ == "__main__":
    sys.exit(main())
