"""Posts as real clients do, over a number of connections, each as soon as it has its answer.

No two heads are alike. Each request has a `traceparent` of its own (W3C Trace Context); every other
connection sends head and body in two segments, as http.client does; every tenth request opens a
connection anew; behind a proxy each request comes for another client. Loads at a fixed rate are
in `pace`.
"""

from __future__ import annotations

import heapq
import itertools
import random
import select
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.load import JSON, FailedLoadError, percentile
from bench.servers import Served

PROXIED_CLIENTS = 64
"""Clients that share the connections of a proxy."""
_FRESH = 10
"""One request in so many opens a connection anew."""
_PATIENCE_SECONDS = 30


@dataclass(frozen=True, slots=True)
class Posts:
    """Answers, the seconds they took together, and the times to each in ms.

    `load_share` is what of a core the load itself took: near 1 it was what held the answers up.
    """

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    load_share: float

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds


def heads(
    path: str, content_type: str = JSON, api_key: str | None = None, *, proxied: bool = False
) -> Iterator[bytes]:
    """Heads of POSTs without end, up to the value of Content-Length."""
    chance = random.Random(7)
    start = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\nAccept: */*\r\n"
    if api_key is not None:
        start += f"Authorization: Bearer {api_key}\r\n"
    start += f"Content-Type: {content_type}\r\ntraceparent: 00-"
    fixed = start.encode()
    for number in itertools.count():
        head = b"%b%032x-%016x-01\r\n" % (fixed, chance.getrandbits(128), chance.getrandbits(64))
        if proxied:
            head += b"X-Forwarded-For: 203.0.113.%d\r\n" % (number % PROXIED_CLIENTS)
        yield head + b"Content-Length: "


def post(
    served: Served,
    path: str,
    bodies: Sequence[str],
    seconds: float,
    *,
    connections: int = 64,
    content_type: str = JSON,
    pause_ms: int = 0,
    proxied: bool = False,
) -> Posts:
    """Post the bodies in turn; each connection pauses `pause_ms` on average before each request.

    Raises:
        FailedLoadError: an answer was not a 2xx, or a connection broke.
    """
    load = _Load(served, path, bodies, content_type, proxied=proxied)
    try:
        return load.run(connections, seconds, pause_ms / 1000)
    except OSError as error:
        raise FailedLoadError(f"{path}: a connection broke: {error}") from None
    finally:
        load.close()


class _Connection:
    """One client's connection, and when it sent what it waits for the answer to."""

    def __init__(self, *, in_two: bool) -> None:
        self.in_two = in_two
        self.socket = socket.socket()
        self.answer = b""
        self.began = 0.0


class _Load:
    """All connections of one load, driven by one thread."""

    def __init__(
        self,
        served: Served,
        path: str,
        bodies: Sequence[str],
        content_type: str,
        *,
        proxied: bool,
    ) -> None:
        self._address = ("127.0.0.1", served.port)
        self._heads = heads(path, content_type, served.api_key, proxied=proxied)
        self._bodies = itertools.cycle([body.encode() for body in bodies])
        self._fresh = itertools.cycle([False] * (_FRESH - 1) + [True])
        self._poll = select.epoll()
        self._by_fd: dict[int, _Connection] = {}

    def run(self, connections: int, seconds: float, pause: float) -> Posts:
        """Keep so many connections busy for so long."""
        chance = random.Random(7)
        times: list[float] = []
        began, busy_before = time.perf_counter(), time.thread_time()
        end = began + seconds
        due: list[tuple[float, int]] = []  # when which connection sends again
        for number in range(connections):
            connection = _Connection(in_two=number % 2 == 1)
            self._open(connection)
            heapq.heappush(due, (began + chance.uniform(0, 2 * pause), connection.socket.fileno()))
        while (now := time.perf_counter()) < end:
            while due and due[0][0] <= now:
                self._send(self._by_fd[heapq.heappop(due)[1]])
            wait = min(end, due[0][0]) - now if due else _PATIENCE_SECONDS
            ready = self._poll.poll(max(0.0, wait))
            if not ready and not due:
                raise FailedLoadError(f"no answer for {_PATIENCE_SECONDS} s")
            for fd, _ in ready:
                connection = self._by_fd[fd]
                if not self._receive(connection):
                    continue
                now = time.perf_counter()
                times.append(now - connection.began)
                if pause:
                    heapq.heappush(due, (now + chance.uniform(0, 2 * pause), fd))
                else:
                    self._send(connection)
        if not times:
            raise FailedLoadError("no answer at all")
        taken = time.perf_counter() - began
        return Posts(
            requests=len(times),
            seconds=taken,
            p50_ms=percentile(times, 0.5) * 1000,
            p99_ms=percentile(times, 0.99) * 1000,
            load_share=(time.thread_time() - busy_before) / taken,
        )

    def close(self) -> None:
        """Close all connections, whatever is under way."""
        for connection in self._by_fd.values():
            connection.socket.close()
        self._poll.close()

    def _open(self, connection: _Connection) -> None:
        self._by_fd.pop(connection.socket.fileno(), None)
        connection.socket.close()
        connection.socket = socket.create_connection(self._address)
        connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fd = connection.socket.fileno()
        self._by_fd[fd] = connection
        self._poll.register(fd, select.EPOLLIN)

    def _send(self, connection: _Connection) -> None:
        connection.began = time.perf_counter()
        if next(self._fresh):
            self._open(connection)
        body = next(self._bodies)
        head = b"%b%d\r\n\r\n" % (next(self._heads), len(body))
        if connection.in_two:
            connection.socket.sendall(head)
            connection.socket.sendall(body)
        else:
            connection.socket.sendall(head + body)

    def _receive(self, connection: _Connection) -> bool:
        """Take what has come; whether the answer is whole.

        Raises:
            FailedLoadError: it isn't a 2xx, or the connection was closed.
        """
        part = connection.socket.recv(65536)
        if not part:
            raise FailedLoadError("a connection was closed instead of an answer")
        connection.answer += part
        head, end, body = connection.answer.partition(b"\r\n\r\n")
        if not end:
            return False
        length = head.lower().partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]
        if not head.startswith(b"HTTP/1.1 2") or not length:
            raise FailedLoadError(f"an answer was {connection.answer[:300]!r}")
        if len(body) < int(length):
            return False
        connection.answer = b""
        return True
