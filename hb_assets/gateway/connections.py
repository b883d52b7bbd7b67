"""Connections: how many there may be, and how long each may keep us waiting.

Belongs here: bounds that hold before any request is whole: connections, the size of a head, the
time that a head and a body may take. Doesn't belong here: what a request says, and the bytes of
bodies (`bodies`).

uvicorn's protocol bounds none of these. A slow client (slow loris) costs nothing on the way of a
request: a sweep twice a second looks at what each connection is waiting for, and since when.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal, TypeAlias, get_args

from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hb_assets.gateway.problems import ProblemError, raw_answer
from hb_assets.settings import Settings

_SWEEP_SECONDS = 0.5
_HEAD_BYTES = 64 * 2**10
"""Longest request line and headers."""

_HEADERS = 256
_AHEAD = 64
"""Requests that wait on a connection for the answers to others (pipelining)."""
_STEP_BYTES = 16 * 2**10
"""Bytes that are taken apart before these bounds are looked at."""

_Kind: TypeAlias = Literal[
    "too-many-connections",
    "too-many-requests-ahead",
    "malformed-request",
    "upgrade-with-a-body",
    "head-timeout",
    "body-timeout",
    "head-too-large",
]
REASONS = tuple(kind.replace("-", "_") for kind in get_args(_Kind))
"""Why connections are refused, as `count` is told."""

_Part: TypeAlias = Literal["first byte", "head", "body", "rest", "reader"]
"""What a connection is waiting for."""


class Guard:
    """The bounds of one gateway process, and all its connections."""

    def __init__(self, settings: Settings, count: Callable[[str], None]) -> None:
        """`count` is told of each refusal, by reason."""
        self.count = count
        # Its warnings say that somebody sent what isn't HTTP, a line each: counted is enough.
        self.log = logging.getLogger("uvicorn.error").getChild("connections")
        self.log.setLevel(logging.ERROR)
        self.most = settings.max_connections
        self.head_seconds = settings.head_timeout.total_seconds()
        self.body_seconds = settings.body_timeout.total_seconds()
        self.connections: set[GuardedProtocol] = set()

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
        self.logger = guard.log
        self._closed = False
        self._head_bytes = 0
        self._part: _Part | None = None
        self._request: object = None
        self._since = 0.0

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._guard.connections.add(self)
        if len(self._guard.connections) > self._guard.most:
            self._refuse(
                503, "too-many-connections", "too many connections are open here", retry_after=1
            )

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.connections.discard(self)
        self._closed = True
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if len(data) <= _STEP_BYTES:
            self._feed(data)
            return
        for start in range(0, len(data), _STEP_BYTES):
            self._feed(data[start : start + _STEP_BYTES])

    def _feed(self, data: bytes) -> None:
        if self._closed:
            return
        before: object = self.scope
        super().data_received(data)
        if len(self.pipeline) > _AHEAD:
            self._refuse(
                503,
                "too-many-requests-ahead",
                f"at most {_AHEAD} requests may be sent ahead of their answers",
                retry_after=1,
            )
        if self._head_is_incomplete():
            # a head that begins here counts with what came before it, a step at most
            known = self._head_bytes if self.scope is before else 0
            self._head_bytes = known + len(data)
            if self._head_bytes > _HEAD_BYTES or len(self.headers) > _HEADERS:
                self._refuse_head()

    @override
    def on_headers_complete(self) -> None:
        if len(self.headers) > _HEADERS:
            self._refuse_head()
            raise ValueError("too many headers")  # so that the parser goes no further
        super().on_headers_complete()

    @override
    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "malformed-request", "the request isn't well-formed HTTP/1.1")

    @override
    def _unsupported_upgrade_warning(self) -> None:
        """Nothing in the log, which anybody could fill; but the parser has lost what follows."""
        if any(
            name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
            for name, value in self.headers
        ):
            self._refuse(
                400,
                "upgrade-with-a-body",
                "a body can't come with an Upgrade: only HTTP/1.1 is spoken here "
                "(Java: HttpClient.newBuilder().version(Version.HTTP_1_1))",
            )

    def sweep(self) -> None:
        """Close it when its client has kept us waiting for too long."""
        now = self.loop.time()
        part, request = self._waiting()
        if part != self._part or request is not self._request:
            self._part, self._request, self._since = part, request, now
        seconds = now - self._since
        if part in ("first byte", "head"):
            if seconds <= self._guard.head_seconds:
                return
            if part == "head":
                detail = "the headers took too long to come (HB_HEAD_TIMEOUT)"
                self._refuse(408, "head-timeout", detail)
            else:
                self.transport.close()
        elif part is not None and seconds > self._guard.body_seconds:
            if part == "body":
                detail = "the body took too long to come (HB_BODY_TIMEOUT)"
                self._refuse(408, "body-timeout", detail)
            elif part == "rest":
                self.transport.close()
            else:
                self.transport.abort()

    def _waiting(self) -> tuple[_Part | None, object]:
        """What its client has to do next, of which request.

        None: it is our turn, or uvicorn watches a connection that rests.
        """
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        if self.flow.write_paused or self.transport.is_closing():  # closed once all is sent
            return "reader", cycle
        if self._head_is_incomplete():
            return "head", self.scope
        if cycle is None:
            return "first byte", None
        if not cycle.response_complete:
            return ("body" if cycle.more_body else None), cycle
        # What the parser gets ends uvicorn's watch: a blank line, a body that was answered early.
        return ("rest" if self.timeout_keep_alive_task is None else None), cycle

    def _refuse_head(self) -> None:
        self._refuse(
            431,
            "head-too-large",
            f"a request may have {_HEADERS} headers with {_HEAD_BYTES} bytes at most",
        )

    def _head_is_incomplete(self) -> bool:
        """Whether a request has begun to come whose headers aren't all there."""
        # uvicorn makes a scope when a request begins, and puts its path there when they are
        scope: Any = self.scope
        return scope is not None and "path" not in scope

    def _refuse(
        self, status: int, kind: _Kind, detail: str, retry_after: float | None = None
    ) -> None:
        """Answer in the place of whoever is waiting for the request, and close."""
        if self._closed:
            return
        self._closed = True
        self._guard.count(kind.replace("-", "_"))
        title = "The connection was closed"
        problem = ProblemError(status, kind, title, detail, retry_after=retry_after)
        cycle: RequestResponseCycle | None = self.cycle
        if cycle is None or not cycle.response_started or cycle.response_complete:
            self.transport.write(raw_answer(problem))
        self.transport.close()
