"""The express way: a single heartbeat behind a head that is known, byte for byte.

Belongs here: a connection that remembers heads, takes what comes behind one as soon as its bytes
are there, and answers once it is stored. Doesn't belong here: what is valid, limited and stored
(`heartbeats`), and anything unusual: that is left to the ordinary way, before anything has been
done about it.

A device that keeps its connection sends the same head again and again. The same bytes on the same
connection mean the same path, key, content type and length, so a head that the ordinary way took a
heartbeat with needs no parser, no ASGI and no task any more. Decision 24 says what that saves, and
how both ways are kept alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import msgspec
from starlette.types import Scope
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from hb_assets.gateway import problems
from hb_assets.gateway.access import ADMISSION, Access, Admission
from hb_assets.gateway.connections import Guard, GuardedProtocol
from hb_assets.gateway.edge import REQUEST_ID, id_given
from hb_assets.gateway.heartbeats import ACCEPTED, TAKEN, InFlight, One
from hb_assets.gateway.limits import Identity, identity
from hb_assets.gateway.metrics import Metrics

_END = b"\r\n\r\n"
_REQUEST_BYTES = 2048
"""Longest request whose head is remembered: several times that of one heartbeat."""
_HEADS = 4
"""Heads that a connection remembers: a heart rate of two digits, of three, and room for more."""
_UNUSUAL = frozenset({b"content-encoding", b"transfer-encoding", b"expect", b"upgrade", b"trailer"})
"""Headers by which more happens than that a body of so many bytes is read."""
_REQUEST_ID = REQUEST_ID.encode()


class Express(NamedTuple):
    """What all connections of a gateway share; `route` is the path that `one` serves."""

    route: str
    one: One
    access: Access
    metrics: Metrics
    new_id: Callable[[], bytes]


class _Head(msgspec.Struct, frozen=True, gc=False):
    """What a head says; `request_id` where the client gave one."""

    body_bytes: int
    admission: Admission
    sender: Identity
    request_id: bytes | None


class _Ride(NamedTuple):
    """A heartbeat under way, its request's id, and when it came (`perf_counter`)."""

    taken: InFlight
    request_id: bytes
    began: float


class ExpressProtocol(GuardedProtocol):
    """A connection on which heartbeats go by express where they can, one at a time.

    What comes while one is under way waits for its answer, as it does behind any other request.
    """

    def __init__(self, express: Express, guard: Guard, *args: Any, **options: Any) -> None:
        super().__init__(guard, *args, **options)
        self._express = express
        self._heads: dict[bytes, _Head] = {}
        self._candidate: bytes | None = None
        self._ride: _Ride | None = None
        self._behind = bytearray()
        self._ending = False
        self._answered_at = 0.0

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._ride is not None:
            self._wait_for(self._ride.taken.outcomes)
        self._heads.clear()
        self._unset_keepalive_if_required()  # which would hold on to all of this until then
        super().connection_lost(exc)

    @override
    def data_received(self, data: bytes) -> None:
        if self._ride is not None:
            self._behind += data
            self.flow.pause_reading()
            return
        self._candidate = None
        if len(data) <= _REQUEST_BYTES and self._is_at_rest():
            if self._take(data):
                return
            self._candidate = data
        super().data_received(data)

    def _is_at_rest(self) -> bool:
        """Whether all that came was whole and is answered: what comes next begins a request."""
        if self._closed or self.flow.write_paused or self.transport.is_closing():
            return False
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        if cycle is None:
            return self.scope is None
        # uvicorn has a scope of its own for a head that has begun to come, and watches from an
        # answer on until something comes behind it
        watched = self.timeout_keep_alive_task is not None
        return watched and not cycle.more_body and self.scope is cycle.scope

    def _take(self, data: bytes) -> bool:
        """Take a request by express; False: nothing was done about it."""
        end = data.find(_END)
        head = self._heads.get(data[:end]) if end >= 0 else None
        end += len(_END)
        if head is None or len(data) != end + head.body_bytes:
            return False
        if not self._express.access.stands(head.admission):
            return False
        began = time.perf_counter()
        try:
            taken = self._express.one.begin(data[end:], head.sender)
        except Exception:  # noqa: BLE001  # the ordinary way meets it too, and answers
            return False
        if taken is None:
            return False
        self._ride = _Ride(taken, head.request_id or self._express.new_id(), began)
        taken.outcomes.add_done_callback(self._arrived)
        return True

    def _arrived(self, outcomes: asyncio.Future[Any]) -> None:
        ride = self._ride
        assert ride is not None
        if outcomes.cancelled():  # at our end, and its client has gone
            return
        if self._express.one.is_settled(ride.taken):
            self._accept(ride)
        else:
            self._wait_for(self.loop.create_task(self._settle(ride), name="express-settle"))

    def _wait_for(self, work: asyncio.Future[Any]) -> None:
        """Let uvicorn wait for it before it ends, as it does for its own tasks."""
        tasks: set[Any] = self.tasks
        tasks.add(work)
        work.add_done_callback(tasks.discard)

    async def _settle(self, ride: _Ride) -> None:
        try:
            await self._express.one.settle(ride.taken)
        except asyncio.CancelledError:  # at our end: the grace is over
            self.transport.close()
            raise
        except Exception as error:  # noqa: BLE001  # whatever it is, a client gets an answer
            self._fail(ride, error)
        else:
            self._accept(ride)

    def _accept(self, ride: _Ride) -> None:
        try:
            headers = self._express.one.accept(ride.taken.subjects)
        except Exception as error:  # noqa: BLE001  # as above
            self._fail(ride, error)
        else:
            self._answer(ride, 200, headers, ACCEPTED)

    def _fail(self, ride: _Ride, error: Exception) -> None:
        request_id = ride.request_id.decode()
        problem = problems.of(error, request_id).response(request_id)
        self._answer(ride, problem.status_code, problem.raw_headers, bytes(problem.body))

    def _answer(
        self, ride: _Ride, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes
    ) -> None:
        """The bytes that uvicorn makes of the same answer, in one write."""
        self._ride = None
        express = self._express
        express.metrics.request(express.route, "POST", status, time.perf_counter() - ride.began)
        if self._closed:  # nobody is there any more
            return
        every = (*self.server_state.default_headers, *headers, (_REQUEST_ID, ride.request_id))
        lines = [b"%s: %s\r\n" % header for header in every]
        last = self._ending and _END not in self._behind
        if last:
            lines.append(b"connection: close\r\n")
        self.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", body)))
        self._answered_at = self.loop.time()
        if last:
            self.transport.close()
        elif self._behind:
            behind, self._behind = bytes(self._behind), bytearray()
            if not self._ending:
                self.flow.resume_reading()
            self.data_received(behind)
            if self._ending:
                self.shutdown()

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        request, self._candidate = self._candidate, None
        if request is not None and TAKEN in self.cycle.scope and self._is_at_rest():
            self._learn(request)

    def _learn(self, request: bytes) -> None:
        """Remember the head of a request that came as these bytes alone, and was answered 200."""
        scope = cast("Scope", self.cycle.scope)
        head, _, body = request.partition(_END)
        headers = dict(scope["headers"])
        if headers.get(b"content-length") != b"%d" % len(body) or not _UNUSUAL.isdisjoint(headers):
            return
        if head not in self._heads and len(self._heads) >= _HEADS:
            del self._heads[next(iter(self._heads))]
        self._heads[head] = _Head(len(body), scope[ADMISSION], identity(scope), id_given(scope))

    @override
    def timeout_keep_alive_handler(self) -> None:
        # What went by express meanwhile left the timer as it was.
        rest = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if self._ride is None and rest <= 0:
            super().timeout_keep_alive_handler()
            return
        again = self.timeout_keep_alive if self._ride else rest
        self.timeout_keep_alive_task = self.loop.call_later(again, self.timeout_keep_alive_handler)

    @override
    def shutdown(self) -> None:
        if self._ride is None:
            super().shutdown()
        else:
            self._ending = True
            self.flow.pause_reading()
