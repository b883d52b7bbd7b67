"""Handlers of the POST routes: one heartbeat, or a batch.

They tell what is valid of a request, and answer what was stored and what was not. Storing is in
`intake`. These are plain ASGI callables, to keep the path of one heartbeat short.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import NamedTuple, NoReturn, TypeVar
from urllib.parse import quote

import msgspec
from starlette.types import Receive, Scope, Send

from hb_assets.buffer.producer import Joined
from hb_assets.buffer.rate_limit import Denial
from hb_assets.core import record
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import rate_limits
from hb_assets.gateway.auth.rate_limits import Limits
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.http import problems
from hb_assets.gateway.http.bodies import BATCH_TYPES, Records, media_type, read_body, split
from hb_assets.gateway.http.problems import ProblemError
from hb_assets.gateway.observability.metrics import Metrics

SLICE = 500
"""Records of a batch, or users, that are handled in one go; then others get their turn."""

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode


class Refused(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat of a batch that was not stored. `field` is null unless a field is at fault."""

    index: int
    field: str | None
    reason: str
    message: str
    retry: bool


class One:
    """POST /metrics/heart-rate: one heartbeat."""

    def __init__(
        self, settings: Settings, backend: Backend, limits: Limits, metrics: Metrics
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._metrics = metrics
        self._bounds = settings.time_bounds
        self._shards = record.Shards(settings.shards)
        self._body_max = settings.body_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 only when Redis or the spool has it; 422 names the field.

        The field `record` means: not one JSON object.

        Raises:
            ProblemError: 400, 413, 415, 422, 429.
            HbError: neither buffer nor spool took it.
        """
        limits = self._limits
        sender = limits.sender(scope)
        try:
            body = await read_body(scope, receive, self._body_max, room=self._backend.room)
        except ProblemError:
            limits.admit(sender)  # what can't be used costs us as much
            raise
        heartbeat, unknown = record.parse(body, self._backend.now_ms(), self._bounds)
        if unknown:
            self._metrics.unknown_fields(len(unknown))
        if isinstance(heartbeat, record.Refusal):
            limits.admit(sender)
            self._refuse(heartbeat)
        user = heartbeat.user_id
        subjects = limits.with_user(sender, user)
        limits.admit(subjects)
        shard = self._shards[user]
        outcomes = await self._backend.store({shard: (record.encode(heartbeat),)})
        if (error := outcomes[shard]) is not None:
            self._metrics.refused(problems.storage_reason(error))
            raise error
        self._metrics.accepted()
        headers = [*_ACCEPTED_HEADERS, *limits.warnings(subjects)]
        if unknown:
            headers.append((IGNORED, shown(unknown)))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(_ACCEPTED_BODY)

    def _refuse(self, refusal: record.Refusal) -> NoReturn:
        self._metrics.refused(refusal.reason)
        fault = {"field": refusal.field, "reason": refusal.reason, "message": refusal.message}
        # as in the system before us, what isn't a time at all is a 400
        raise ProblemError(
            400 if refusal.reason == "timestamp_not_a_time" else 422,
            "invalid-heartbeat",
            "The heartbeat is not valid",
            refusal.message,
            members={"errors": [fault]},
        )


def shown(names: Iterable[str]) -> bytes:
    """Names for the header IGNORED: percent-encoded, in at most about `_SHOWN_MOST` bytes."""
    found: list[str] = []
    left = _SHOWN_MOST
    ignored = record.Ignored()
    ignored.add(names)
    for name in ignored:
        text = quote(name, safe=record.Ignored.OTHERS) or '""'
        left -= len(text)
        if left < 0:
            found.append(record.Ignored.OTHERS)
            break
        found.append(text)
    return ", ".join(found).encode()


IGNORED = b"hb-ignored"
"""The header of an answer that names what was ignored: unknown fields, unknown parameters."""
_SHOWN_MOST = 1000
"""A proxy bounds all headers of an answer together, at 4 KiB for one."""
_ACCEPTED = b'{"status":"accepted"}'
_ACCEPTED_HEADERS = (
    (b"content-type", b"application/json"),
    (b"content-length", str(len(_ACCEPTED)).encode()),
)
_ACCEPTED_BODY = {"type": "http.response.body", "body": _ACCEPTED}


class _Why(NamedTuple):
    """Why a valid heartbeat is refused, and after how many seconds it might not be."""

    reason: str
    message: str
    wait: float


@dataclass(slots=True)
class _Sorted:
    """A batch's records: the valid ones, beside their indexes, and the refused ones."""

    valid: list[record.Heartbeat] = field(default_factory=list)
    indexes: list[int] = field(default_factory=list)
    refused: list[Refused] = field(default_factory=list)
    ignored: record.Ignored = field(default_factory=record.Ignored)
    retry_after: float = 0.0

    def add(
        self,
        indexes: Sequence[int],
        valid: Sequence[record.Heartbeat],
        refused: Sequence[tuple[int, record.Refusal]],
    ) -> None:
        """Add records; `refused` says which of the `indexes` aren't valid."""
        if refused:
            bad = {at for at, _ in refused}
            self.refused += [
                Refused(indexes[at], why.field, why.reason, why.message, False)
                for at, why in refused
            ]
            indexes = [index for at, index in enumerate(indexes) if at not in bad]
        self.valid += valid
        self.indexes += indexes

    def hold_back(self, of: Iterable[T], whys: Mapping[T, _Why]) -> None:
        """Refuse valid heartbeats for other reasons than their content.

        All of it in one pass, since a batch may be of as many users as it has heartbeats: `of` is
        what each reason is looked up by, the user or shard of each valid one.
        """
        found = [whys.get(one) for one in of]
        self.refused += [
            Refused(index, None, why.reason, why.message, True)
            for index, why in zip(self.indexes, found, strict=True)
            if why is not None
        ]
        stays = [why is None for why in found]
        self.indexes = list(compress(self.indexes, stays))
        self.valid = list(compress(self.valid, stays))
        self.retry_after = max([self.retry_after, *(why.wait for why in whys.values())])

    def members(self, accepted: int) -> dict[str, object]:
        """Members of every answer to a batch, whatever its status."""
        return {
            "accepted": accepted,
            "refused": sorted(self.refused, key=lambda refused: refused.index),
            "unknown_fields": self.ignored.total(),
            "ignored": self.ignored,
        }


class Batch:
    """POST /metrics/heart-rate/batch: a JSON array, or NDJSON."""

    def __init__(
        self, settings: Settings, backend: Backend, limits: Limits, metrics: Metrics
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._metrics = metrics
        self._bounds = settings.time_bounds
        self._shards = record.Shards(settings.shards)
        self._body_max = settings.body_max_bytes
        self._most = settings.batch_max_heartbeats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 when any heartbeat was taken; the others are listed with index and reason.

        Raises:
            ProblemError: 400, 413, 415; 422 when none is valid; 429 when all have to wait; 503
                when none could be stored.
        """
        sender = self._limits.sender(scope)
        room = self._backend.room
        size = 0
        try:
            try:
                body = await read_body(scope, receive, self._body_max, BATCH_TYPES, room)
                size = len(body)
                room.take(size)  # what is made of it takes several times as much
                records = split(body, media_type(scope), self._most)
            except ProblemError:
                self._limits.admit(sender)  # what can't be read costs us as much
                raise
            self._limits.admit(sender, cost=max(1, len(records)))
            batch = await self._sort(records)
            # What is no longer needed goes at once, here and below: the next batch then finds its
            # memory in the processor's cache, which is a tenth of all time.
            del body, records
            await self._hold_back(batch)
            accepted, errors = await self._store(batch)
        finally:
            room.give_back(size)
        self._count(batch, accepted)
        if not accepted:
            self._fail(batch, errors)
        answer = _encode(batch.members(accepted))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(answer)).encode()),
            *self._limits.headers(sender),
        ]
        if batch.retry_after:
            headers.append((b"retry-after", problems.seconds(batch.retry_after).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _sort(self, records: Records) -> _Sorted:
        batch = _Sorted()
        now_ms, bounds = self._backend.now_ms(), self._bounds
        for start in range(0, len(records), SLICE):
            if start:
                await asyncio.sleep(0)
            wires = records.wires[start : start + SLICE]
            if wires:
                batch.add(range(start, start + len(wires)), *record.judge(wires, now_ms, bounds))
            for index, text in records.texts[start : start + SLICE]:
                found, unknown = record.parse(text, now_ms, bounds)
                batch.ignored.add(unknown)
                if isinstance(found, record.Heartbeat):
                    batch.add((index,), (found,), ())
                else:
                    batch.add((index,), (), ((0, found),))
        return batch

    async def _hold_back(self, batch: _Sorted) -> None:
        """Refuse the heartbeats of users who are over their rate limit."""
        owners = [heartbeat.user_id for heartbeat in batch.valid]
        users = Counter(owners)
        denials: dict[str, Denial] = {}
        for start in range(0, len(users), SLICE):
            if start:
                await asyncio.sleep(0)
            denials |= self._limits.over(
                users if len(users) <= SLICE else dict(islice(users.items(), start, start + SLICE))
            )
        if denials:
            whys = {
                user: _Why("rate_limited", rate_limits.denied(denial), denial.seconds)
                for user, denial in denials.items()
            }
            batch.hold_back(owners, whys)

    async def _store(self, batch: _Sorted) -> tuple[int, list[HbError]]:
        """Append the valid heartbeats; returns how many were stored, and the errors by shard."""
        shards = self._shards
        places = [shards[heartbeat.user_id] for heartbeat in batch.valid]
        by_shard: defaultdict[int, list[record.Heartbeat]] = defaultdict(list)
        for shard, heartbeat in zip(places, batch.valid, strict=True):
            by_shard[shard].append(heartbeat)
        lines = {
            shard: Joined(len(found), record.encode_lines(found))
            for shard, found in by_shard.items()
        }
        batch.valid = []
        del by_shard
        outcome = await self._backend.store(lines) if lines else {}
        errors = {shard: error for shard, error in outcome.items() if error is not None}
        if errors:
            batch.hold_back(places, {shard: _why(error) for shard, error in errors.items()})
        return len(batch.indexes), list(errors.values())

    def _count(self, batch: _Sorted, accepted: int) -> None:
        self._metrics.accepted(accepted)
        self._metrics.unknown_fields(batch.ignored.total())
        for reason, count in Counter(refused.reason for refused in batch.refused).items():
            self._metrics.refused(reason, count)

    def _fail(self, batch: _Sorted, errors: list[HbError]) -> NoReturn:
        members = batch.members(0)
        if errors:
            raise problems.of_storage(max(errors, key=problems.retry_after), members)
        if batch.retry_after:
            raise rate_limits.all_denied(batch.retry_after, members)
        sent = len(batch.refused)
        if not sent:
            raise ProblemError(
                422,
                "empty-batch",
                "The batch is empty",
                "send at least one heartbeat, as a JSON array or one a line (NDJSON)",
                members=members,
            )
        raise ProblemError(
            422,
            "no-valid-heartbeat",
            "No heartbeat of the batch is valid",
            f"none of the {sent} heartbeats is valid; `refused` lists each with its reason",
            members=members,
        )


def _why(error: HbError) -> _Why:
    return _Why(
        problems.storage_reason(error),
        problems.storage_message(error),
        problems.retry_after(error),
    )
