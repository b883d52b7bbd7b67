"""CPU time of one request, without sockets: `python -m bench.request`.

A single POST from the bytes of its connection to the bytes of its answer, through the whole gateway
to a real Redis and back, against a no-op app on uvicorn's protocol. `gateway` measures requests per
second, in which kernel, network, load and Redis have their share. CPU time is what a noisy machine
disturbs least, and the best of many short runs less than their median.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from bench import host, load, noop, posting, servers
from hb_assets.core.settings import Settings
from hb_assets.gateway.app import Gateway
from hb_assets.gateway.http.connections import Guard, GuardedProtocol

CONNECTIONS = 32
ROUNDS = 20
RUNS = 45


class _Wire(asyncio.Transport):
    """A connection that takes all that is written to it, and tells when an answer is whole."""

    def __init__(self, answered: Callable[[], None]) -> None:
        super().__init__()
        self._answered = answered

    def write(self, data: Any) -> None:
        """Taken; an answer's body comes last, whether by itself or not."""
        if data.endswith(noop.BODY):
            self._answered()

    def is_closing(self) -> bool:
        """Never."""
        return False

    def close(self) -> None:
        """Nothing is open."""

    def pause_reading(self) -> None:
        """Nothing more comes anyway."""

    def resume_reading(self) -> None:
        """The next request comes when it is sent."""

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Both ends are on this machine."""
        return ("127.0.0.1", 8000) if name in ("peername", "sockname") else default


def _requests(count: int) -> list[bytes]:
    bodies = load.heartbeats(count, count)
    heads = posting.heads("/metrics/heart-rate")
    return [
        b"%b%d\r\n\r\n%b" % (head, len(body), body.encode())
        for head, body in zip(heads, bodies, strict=False)
    ]


async def _measure(app: Any, protocol: Any) -> list[float]:
    """Microseconds of CPU time a request, of each run."""
    config = uvicorn.Config(
        app, http=protocol, interface="asgi3", proxy_headers=False, **host.OPTIONS
    )
    config.load()
    state = ServerState()
    requests = itertools.cycle(_requests(1000))
    missing = 0
    all_answered = asyncio.Event()

    def answered() -> None:
        nonlocal missing
        missing -= 1
        if not missing:
            all_answered.set()

    connections: list[HttpToolsProtocol] = []
    for _ in range(CONNECTIONS):
        connections.append(config.http_protocol_class(config, state, {}))  # type: ignore[call-arg, arg-type]  # uvicorn's protocols are called so
        connections[-1].connection_made(_Wire(answered))

    async def rounds(count: int) -> None:
        nonlocal missing
        for _ in range(count):
            missing = len(connections)
            all_answered.clear()
            for connection in connections:
                connection.data_received(next(requests))
            await all_answered.wait()

    await rounds(20)
    gc.collect()
    gc.freeze()  # as the server does
    found = []
    for _ in range(RUNS):
        began = time.process_time()
        await rounds(ROUNDS)
        found.append((time.process_time() - began) / (ROUNDS * CONNECTIONS) * 1e6)
    gc.unfreeze()
    return found


async def _compare(settings: Settings) -> dict[str, list[float]]:
    gateway = Gateway(settings)
    guard = Guard(settings, gateway.metrics.connection_refused)
    async with gateway.opened():
        return {
            "hb_assets": await _measure(gateway, partial(GuardedProtocol, guard)),
            "no-op app": await _measure(noop.app, HttpToolsProtocol),
        }


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as name:
        folder = Path(name)
        with servers.buffer(folder / "redis") as buffer:
            settings = Settings(home=folder / "gateway", redis_url=buffer.url)
            found = uvloop.run(_compare(settings))
    print("| single POST without sockets | us of CPU time, median | best |")
    print("|---|---|---|")
    for what, times in found.items():
        print(f"| {what} | {statistics.median(times):.1f} | {min(times):.1f} |")


if __name__ == "__main__":
    main()
