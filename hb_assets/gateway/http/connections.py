"""HTTP/1.1 connections as RFC 9112 has them, within bounds that hold before a request is whole.

uvicorn's protocol hands on what its parser lets through, which is more than the RFC does, and it
bounds neither connections nor heads nor time. A slow client (slow loris) costs nothing on the path
of a request: a sweep twice a second looks at what each connection is waiting for, and since when.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import lru_cache
from typing import Any, Literal, NoReturn, TypeAlias, cast, get_args

import httptools
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from hb_assets.core.settings import Settings
from hb_assets.gateway.http import background
from hb_assets.gateway.http.bodies import GONE
from hb_assets.gateway.http.problems import ProblemError, raw_answer

_SWEEP_SECONDS = 0.5
_HEAD_BYTES = 64 * 2**10
"""Longest request line and headers."""

_HEADERS = 256
_FRAMING_BYTES = 64 * 2**10
"""Chunk sizes, their extensions and trailers of a body: so much, and as much as it carries."""
_AHEAD = 64
"""Requests that wait on a connection for the answers to others (pipelining)."""
_STEP_BYTES = 16 * 2**10
"""Bytes that are taken apart before these bounds are looked at."""

_Kind: TypeAlias = Literal[
    "too-many-connections",
    "too-many-requests-ahead",
    "malformed-request",
    "unsupported-version",
    "method-not-implemented",
    "transfer-coding-not-implemented",
    "upgrade-with-a-body",
    "bytes-behind-upgrade",
    "head-timeout",
    "body-timeout",
    "head-too-large",
    "target-too-long",
    "framing-too-large",
]
REASONS = tuple(kind.replace("-", "_") for kind in get_args(_Kind))
"""Why connections are refused, as `count` is told."""

_Part: TypeAlias = Literal["first byte", "head", "body", "rest", "reader"]
"""What a connection may be waiting for."""


_HOST = re.compile(
    rb"(?:\[[0-9A-Za-z:.%~_-]+\]|(?:[0-9A-Za-z._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*)(?::[0-9]*)?"
).fullmatch
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]*)(.*)", re.DOTALL).fullmatch


class Guard:
    """The bounds of one gateway process, and all its connections."""

    def __init__(self, settings: Settings, count: Callable[[str], None]) -> None:
        """`count` is called for each refusal, by reason."""
        self.count = count
        # Its warnings say that somebody sent what isn't HTTP, a line each: counted is enough.
        self.log = logging.getLogger("uvicorn.error").getChild("connections")
        self.log.setLevel(logging.ERROR)
        self.most = settings.max_connections
        self.head_seconds = settings.head_timeout.total_seconds()
        self.body_seconds = settings.body_timeout.total_seconds()
        self.connections: set[GuardedProtocol] = set()

    def sweeping(self) -> AbstractAsyncContextManager[None]:
        """Context within which connections that are waited for too long are closed."""
        return background.running(self._sweep_on())

    async def _sweep_on(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            for connection in list(self.connections):
                connection.sweep()


class _Faulty(Exception):  # noqa: N818  # it only ends the parser's work
    """Stops the parser: what came was refused already."""


class _Transport:
    """A transport that drops what is written after its end, where uvloop's would raise.

    A client may go at any moment, and a handler learns of it only when it is its turn.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self.is_closing():
            self._transport.write(data)


class GuardedProtocol(HttpToolsProtocol):
    """One connection, within bounds; one that exceeds a bound is answered if possible, and closed.

    Requests that were sent ahead (pipelining) are answered in order: a refusal stands behind the
    answers to what came before it, in the place of the answer to what is refused.
    """

    def __init__(self, guard: Guard, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._guard = guard
        self.logger = guard.log
        self._closed = False
        self._refusal: bytes | None = None
        self._running: RequestResponseCycle | None = None
        self._upgrade: RequestResponseCycle | None = None
        self._step_bytes = 0
        self._head_bytes = 0
        self._in_body = False
        self._fed_bytes = 0
        self._body_bytes = 0
        self._part: _Part | None = None
        self._request: object = None
        self._since = 0.0

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast("asyncio.Transport", _Transport(transport)))
        self._guard.connections.add(self)
        if len(self._guard.connections) > self._guard.most:
            self._refuse(
                503, "too-many-connections", "too many connections are open here", retry_after=1
            )

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.connections.discard(self)
        self._closed = True
        self.pipeline.clear()
        # uvicorn tells the newest request alone
        if self._running is not None:
            _disconnect(self._running)
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
        if self._upgrade is not None:
            if not self._upgrade.response_complete:
                self._refuse(
                    400,
                    "bytes-behind-upgrade",
                    "only HTTP/1.1 is spoken here: wait for the answer to a request with an "
                    "Upgrade before you send more",
                )
                return
            self._upgrade = None
        self._step_bytes = len(data)
        self._fed_bytes += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(400, "malformed-request", "the request isn't well-formed HTTP/1.1")
        except httptools.HttpParserUpgrade as upgrade:
            self._upgrade = self.cycle
            if behind := data[upgrade.args[0] :]:
                self._feed(behind)
        else:
            self._check_bounds(data)

    def _check_bounds(self, data: bytes) -> None:
        if len(self.pipeline) > _AHEAD:
            self._refuse(
                503,
                "too-many-requests-ahead",
                f"at most {_AHEAD} requests may be sent ahead of their answers",
                retry_after=1,
            )
        if self._head_is_incomplete():
            self._head_bytes += len(data)
            if self._head_bytes > _HEAD_BYTES or len(self.headers) > _HEADERS:
                self._refuse_head()
        elif self._in_body and self._fed_bytes > _FRAMING_BYTES + 2 * self._body_bytes:
            self._refuse(
                400,
                "framing-too-large",
                "chunk extensions and trailers have to be shorter than the body, or "
                f"{_FRAMING_BYTES} bytes",
            )

    @override
    def on_headers_complete(self) -> None:
        self._check_head()
        super().on_headers_complete()
        self.scope[GONE] = self.transport.is_closing  # type: ignore[literal-required]  # ours
        self._in_body = True
        self._head_bytes = self._fed_bytes = self._body_bytes = 0
        # Trailers come as headers do. They may say nothing that counts (RFC 9110, 6.5.1).
        self.headers = []

    @override
    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    @override
    def on_response_complete(self) -> None:
        was_last = not self.pipeline
        super().on_response_complete()
        if was_last and self._refusal is not None:
            self._end()

    @override
    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _check_head(self) -> None:
        """Refuse a head that the parser lets through and RFC 9112 doesn't; raises _Faulty then."""
        # a head that came in one step of the parser's is shorter than a step
        if self._head_bytes + self._step_bytes > _HEAD_BYTES:
            size = sum(len(name) + len(value) + 4 for name, value in self.headers)
            if len(self.url) + size > _HEAD_BYTES:
                self._refuse_head()
                raise _Faulty
        if len(self.headers) > _HEADERS:
            self._refuse_head()
            raise _Faulty
        hosts = []
        has_body = False
        for name, value in self.headers:
            if name == b"host":
                hosts.append(value)
            elif name == b"content-length":
                has_body = has_body or value.strip(b"0") != b""
            elif name == b"transfer-encoding":
                has_body = True
                self._check_coding(value)
        self._check_version(hosts)
        self._check_target()
        if has_body and self.parser.should_upgrade():
            self._refuse(
                400,
                "upgrade-with-a-body",
                "a body can't come with an Upgrade: only HTTP/1.1 is spoken here "
                "(Java: HttpClient.newBuilder().version(Version.HTTP_1_1))",
            )
            raise _Faulty

    def _check_coding(self, coding: bytes) -> None:
        if coding.strip().lower() != b"chunked":
            self._refuse(
                501,
                "transfer-coding-not-implemented",
                "of the transfer codings chunked alone is known here; how a body is compressed is "
                "said by Content-Encoding",
            )
            raise _Faulty

    def _check_version(self, hosts: list[bytes]) -> None:
        """Refuse other versions of HTTP, and a Host header that the version doesn't allow."""
        version = self.parser.get_http_version()
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1
        elif version == "0.9":
            self._malformed("its first line names no version, or HTTP/0.9")
        elif version != "1.1":
            self._refuse(505, "unsupported-version", "HTTP/1.1 and HTTP/1.0 are spoken here")
            raise _Faulty
        elif not hosts:
            self._malformed("it has no Host")
        if len(hosts) > 1:
            self._malformed("it has more than one Host")
        if hosts and not _is_host(hosts[0]):
            self._malformed("its Host isn't a host")

    def _check_target(self) -> None:
        """Take the host from an absolute target; refuse a malformed one."""
        target, method = self.url, self.parser.get_method()
        if method == b"CONNECT":
            self._refuse(
                501, "method-not-implemented", "this is no proxy: CONNECT isn't known here"
            )
            raise _Faulty
        if b"#" in target or (target == b"*" and method != b"OPTIONS"):
            self._malformed("its target isn't one")
        if target.startswith(b"/") or target == b"*":
            return
        # absolute-form: its host counts, and the header Host doesn't (RFC 9112, 3.2.2)
        found = _ABSOLUTE(target)
        if found is None or not found[1] or not _is_host(found[1]):
            self._malformed("its target isn't one")
        else:
            path: bytes = found[2]
            self.url = path if path.startswith(b"/") else b"/" + path
            self.headers[:] = [
                (name, found[1] if name == b"host" else value) for name, value in self.headers
            ]

    def _malformed(self, why: str) -> NoReturn:
        self._refuse(400, "malformed-request", f"the request isn't well-formed HTTP/1.1: {why}")
        raise _Faulty

    def sweep(self) -> None:
        """Close the connection when its client has kept us waiting for too long."""
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
        """What the client has to send next, and for which request.

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
        if len(self.url) > _HEAD_BYTES // 2:
            self._refuse(
                414,
                "target-too-long",
                f"a request may have a head of {_HEAD_BYTES} bytes at most; its target takes most of "
                "them",
            )
            return
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
        """Answer the request that is at fault, or else the next one, and close."""
        if self._closed:
            return
        self._closed = True
        self._guard.count(kind.replace("-", "_"))
        title = "The connection was closed"
        problem = ProblemError(status, kind, title, detail, retry_after=retry_after)
        self._refusal = raw_answer(problem)
        running = self._running
        if running is None or running.response_complete:
            # a body that goes on behind the answer to it has had its own
            self._end(told=self._in_body and running is self.cycle)
        elif self._in_body and running is self.cycle:
            self._end(told=running.response_started)
            _disconnect(running)
        elif self._in_body:
            self.pipeline.popleft()  # what waits with half of its body

    def _end(self, *, told: bool = False) -> None:
        if self._refusal is not None and not told:
            self.transport.write(self._refusal)
        self.transport.close()


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tell the handler of a request that its client has gone."""
    cycle.disconnected = True
    cycle.message_event.set()


@lru_cache(maxsize=256)
def _is_host(value: bytes) -> bool:
    """Whether a value is a host, with or without a port (RFC 9110, 7.2)."""
    return _HOST(value) is not None
