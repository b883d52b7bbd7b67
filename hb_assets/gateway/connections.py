"""Connections: how many there may be, how long each may keep us waiting, how much they may hold.

Belongs here: bounds that hold before any request is whole: connections, the size of a head, the
time that a head and a body may take, the bytes of unfinished bodies. Doesn't belong here: what a
request says, and the size of one body (`bodies`).

uvicorn's protocol bounds none of these. A slow client (slow loris) costs nothing on the way of a
request: one sweep a second looks at all connections.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hb_assets.gateway.problems import ProblemError, raw_answer
from hb_assets.settings import Settings

_SWEEP_SECONDS = 1.0
_HEAD_BYTES = 64 * 2**10
"""Longest request line and headers."""


class Guard:
    """The bounds of one gateway process, and all its connections."""

    def __init__(self, settings: Settings) -> None:
        self.most = settings.max_connections
        self.head_seconds = settings.head_timeout.total_seconds()
        self.body_seconds = settings.body_timeout.total_seconds()
        self.most_body_bytes = settings.bodies_max_bytes
        self.body_bytes = 0
        self.connections: set[GuardedProtocol] = set()

    def protocol(self, *args: Any, **options: Any) -> GuardedProtocol:
        """A new connection, as uvicorn makes them."""
        return GuardedProtocol(self, *args, **options)

    @contextlib.asynccontextmanager
    async def sweeping(self) -> AsyncIterator[None]:
        """End what keeps us waiting for too long, for the time of the block."""
        sweeper = asyncio.create_task(self._sweep_on(), name="connections-sweep")
        try:
            yield
        finally:
            sweeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sweeper

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for connection in list(self.connections):
                connection.sweep()


class GuardedProtocol(HttpToolsProtocol):
    """One connection, within bounds; what passes one gets an answer where it can, and is closed."""

    def __init__(self, guard: Guard, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = guard
        self._closed = False
        self._head_since: float | None = None
        self._head_bytes = 0
        self._body_since: float | None = None
        self._body_bytes = 0
        self._stuck_since: float | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._guard.connections.add(self)
        self._head_since = self.loop.time()
        if len(self._guard.connections) > self._guard.most:
            self._refuse(
                503, "too-many-connections", "too many connections are open here", retry_after=1
            )

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._release()
        self._guard.connections.discard(self)
        self._closed = True
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._closed:
            return
        super().data_received(data)
        if self._head_since is None:
            self._head_bytes = 0
        else:
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES:
                self._refuse(
                    431, "head-too-large", f"the headers may have at most {_HEAD_BYTES} bytes"
                )

    @override
    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "malformed-request", "the request isn't well-formed HTTP/1.1")

    @override
    def on_message_begin(self) -> None:
        self._head_since = self.loop.time()
        super().on_message_begin()

    @override
    def on_headers_complete(self) -> None:
        self._body_since, self._head_since = self._head_since, None
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        self._guard.body_bytes += len(body)
        if self._guard.body_bytes > self._guard.most_body_bytes:
            self._refuse(
                503,
                "too-many-bodies",
                "too many requests are being received at once (HB_BODIES_MAX_BYTES)",
                retry_after=1,
            )
            return
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._body_since = None
        if not self._closed:  # else a part of the body was left out
            super().on_message_complete()

    @override
    def on_response_complete(self) -> None:
        self._release()
        super().on_response_complete()

    def sweep(self) -> None:
        """Close it when its client has kept us waiting for too long."""
        now = self.loop.time()
        if self._head_since is not None and now - self._head_since > self._guard.head_seconds:
            if self._head_bytes:
                self._refuse(
                    408, "head-timeout", "the headers took too long to come (HB_HEAD_TIMEOUT)"
                )
            else:
                self.transport.close()
        elif self._body_since is not None and now - self._body_since > self._guard.body_seconds:
            self._refuse(408, "body-timeout", "the body took too long to come (HB_BODY_TIMEOUT)")
        elif not self.flow.write_paused:
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > self._guard.body_seconds:
            self.transport.abort()  # it doesn't read its answer

    def _refuse(
        self, status: int, kind: str, detail: str, retry_after: float | None = None
    ) -> None:
        """Answer in the place of whoever is waiting for the request, and close."""
        if self._closed:
            return
        self._closed = True
        title = "The connection was closed"
        problem = ProblemError(status, kind, title, detail, retry_after=retry_after)
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        if cycle is None or not cycle.response_started or cycle.response_complete:
            self.transport.write(raw_answer(problem))
        self.transport.close()

    def _release(self) -> None:
        self._guard.body_bytes -= self._body_bytes
        self._body_bytes = 0
