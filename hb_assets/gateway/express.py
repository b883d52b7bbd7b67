"""The express way: a single heartbeat behind a head that is known, byte for byte.

Belongs here: which heads are known, and a connection on which such a request is taken as soon as
its bytes are there, and answered once it is stored. Doesn't belong here: what is valid, limited and
stored (`heartbeats`), and anything unusual: that is left to the ordinary way, before anything has
been done about it.

A device that keeps its connection sends the same head again and again. The same bytes from the same
address mean the same path, key, content type and length, so a head that the ordinary way took a
heartbeat with needs no parser, no ASGI and no task any more. Decision 24 says what that saves, and
how both ways are kept alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
from starlette.types import Scope
from typing_extensions import override
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from hb_assets.gateway import problems
from hb_assets.gateway.access import Access, Admission
from hb_assets.gateway.connections import Guard, GuardedProtocol
from hb_assets.gateway.edge import REQUEST_ID, Edge, id_given
from hb_assets.gateway.heartbeats import ACCEPTED, ACCEPTED_HEADERS, TAKEN, InFlight, One
from hb_assets.gateway.keyring import INGEST
from hb_assets.gateway.limits import Identity, identity
from hb_assets.gateway.metrics import Metrics
from hb_assets.gateway.problems import ProblemError

_END = b"\r\n\r\n"
_REQUEST_BYTES = 4096
"""Longest request whose head is remembered: several times that of one heartbeat."""
_HEADS = 4096
"""Most heads that are remembered: 16 MB at worst, 2 MB of usual ones."""
_UNUSUAL = frozenset({b"content-encoding", b"transfer-encoding", b"expect", b"upgrade", b"trailer"})
"""Headers by which more happens than that a body of so many bytes is read."""


class _Head(msgspec.Struct, frozen=True, gc=False):
    """What a head says; `request_id` where the client gave one."""

    body_bytes: int
    admission: Admission
    sender: Identity
    request_id: bytes | None


class Express:
    """The heads that one gateway process knows.

    They are looked up by a hash that is keyed anew in each process, so that the time of a look says
    nothing about the keys in them.
    """

    def __init__(self, one: One, access: Access, metrics: Metrics, edge: Edge, route: str) -> None:
        """`route` is the path that `one` serves, as metrics show it."""
        self.one = one
        self.metrics = metrics
        self.edge = edge
        self.route = route
        self._access = access
        self._heads: dict[tuple[str, bytes], _Head] = {}

    def known(self, address: str, head: bytes) -> _Head | None:
        """What this head says when it comes from this address, as long as its key may do that."""
        found = self._heads.get((address, head))
        return found if found is not None and self._access.stands(found.admission) else None

    def learn(self, address: str, request: bytes, scope: Scope) -> None:
        """Remember the head of a request that came as these bytes alone, and was answered 200."""
        head, _, body = request.partition(_END)
        headers = dict(scope["headers"])
        if headers.get(b"content-length") != b"%d" % len(body) or not _UNUSUAL.isdisjoint(headers):
            return
        try:
            admission = self._access.admission(scope, INGEST)
        except ProblemError:  # its key was revoked meanwhile
            return
        if len(self._heads) >= _HEADS:
            self._heads.clear()
        self._heads[address, head] = _Head(len(body), admission, identity(scope), id_given(scope))


class ExpressProtocol(GuardedProtocol):
    """A connection on which heartbeats go by express where they can, one at a time.

    What comes while one is under way waits for its answer, as it does behind any other request.
    """

    def __init__(self, express: Express, guard: Guard, *args: Any, **options: Any) -> None:
        super().__init__(guard, *args, **options)
        self._express = express
        self._address = ""
        self._request_bytes: bytes | None = None
        self._ride: _Ride | None = None
        self._behind = bytearray()
        self._ending = False
        self._answered_at = 0.0

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self.client:
            self._address = self.client[0]

    @override
    def data_received(self, data: bytes) -> None:
        if self._ride is not None:
            self._behind += data
            self.flow.pause_reading()
            return
        self._request_bytes = None
        if len(data) <= _REQUEST_BYTES and self._is_at_rest():
            if self._take(data):
                return
            self._request_bytes = data
        super().data_received(data)

    def _is_at_rest(self) -> bool:
        """Whether all that came was answered, and what comes next begins a request."""
        if self._closed or self.flow.write_paused or self.transport.is_closing():
            return False
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request
        if cycle is None:
            return self.scope is None
        # the watch runs from an answer to the first byte after it
        return self.timeout_keep_alive_task is not None and not cycle.more_body

    def _take(self, data: bytes) -> bool:
        end = data.find(_END)
        if end < 0:
            return False
        head = self._express.known(self._address, data[:end])
        end += len(_END)
        if head is None or len(data) != end + head.body_bytes:
            return False
        began = time.perf_counter()
        taken = self._express.one.begin(data[end:], head.sender)
        if taken is None:
            return False
        self._ride = _Ride(taken, head.request_id or self._express.edge.new_id(), began)
        taken.outcomes.add_done_callback(self._arrived)
        if self.timeout_keep_alive_task is None:  # the first request of its connection
            self._watch(self.timeout_keep_alive)
        return True

    def _arrived(self, _: object) -> None:
        ride = self._ride
        assert ride is not None
        if self._express.one.is_stored(ride.taken):
            self._accept(ride)
        else:
            task = self.loop.create_task(self._settle(ride), name="express-settle")
            self.tasks.add(task)  # uvicorn's: it waits for them before it ends
            task.add_done_callback(self.tasks.discard)

    async def _settle(self, ride: _Ride) -> None:
        try:
            await self._express.one.settle(ride.taken)
        except Exception as error:  # noqa: BLE001  # whatever it is, a client gets an answer
            request_id = ride.request_id.decode()
            problem = problems.of(error, request_id).response(request_id)
            self._answer(ride, problem.status_code, problem.raw_headers, bytes(problem.body))
        else:
            self._accept(ride)

    def _accept(self, ride: _Ride) -> None:
        self._answer(ride, 200, (*ACCEPTED_HEADERS, *ride.taken.warnings), ACCEPTED)

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
        if self._ending:
            lines.append(b"connection: close\r\n")
        self.transport.write(b"".join((STATUS_LINE[status], *lines, b"\r\n", body)))
        self._answered_at = self.loop.time()
        if self._ending:
            self.transport.close()
        elif self._behind:
            behind, self._behind = bytes(self._behind), bytearray()
            self.flow.resume_reading()
            self.data_received(behind)

    @override
    def on_response_complete(self) -> None:
        super().on_response_complete()
        request, self._request_bytes = self._request_bytes, None
        if request is not None and TAKEN in self.cycle.scope and self._is_at_rest():
            self._express.learn(self._address, request, dict(self.cycle.scope))

    @override
    def timeout_keep_alive_handler(self) -> None:
        # What went by express meanwhile left the timer as it was.
        rest = self._answered_at + self.timeout_keep_alive - self.loop.time()
        if self._ride is None and rest <= 0:
            super().timeout_keep_alive_handler()
            return
        self._watch(self.timeout_keep_alive if self._ride else rest)

    def _watch(self, seconds: float) -> None:
        """End this connection when nothing comes until then, as uvicorn does behind an answer."""
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    @override
    def shutdown(self) -> None:
        if self._ride is None:
            super().shutdown()
        else:
            self._ending = True


class _Ride(NamedTuple):
    """A heartbeat under way, its request's id, and when it came (`perf_counter`)."""

    taken: InFlight
    request_id: bytes
    began: float


_REQUEST_ID = REQUEST_ID.encode()
