"""Heartbeats: the POST handlers.

Belongs here: what is valid and what isn't of a request, and the answer about what was stored and
what was not. Doesn't belong here: reading a body (`bodies`), what makes a heartbeat valid
(`record`), how it gets to Redis (`intake`). These are plain ASGI callables, to keep the way of one
heartbeat short.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import NoReturn

import msgspec
from starlette.types import Receive, Scope, Send

from hb_assets import record
from hb_assets.errors import HbError
from hb_assets.gateway import problems
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.bodies import media_type, read_body, split
from hb_assets.gateway.metrics import Metrics
from hb_assets.gateway.problems import ProblemError
from hb_assets.settings import Settings

SLICE = 500
"""Records of a batch that are read in one go, before other requests get their turn."""

_encode = msgspec.json.Encoder().encode


class Refused(msgspec.Struct, frozen=True, gc=False):
    """A heartbeat of a batch that was not stored. `field` is null when it wasn't its fault."""

    index: int
    field: str | None
    reason: str
    message: str
    retry: bool


class One:
    """POST /metrics/heart-rate: one heartbeat."""

    def __init__(self, settings: Settings, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._bounds = settings.time_bounds
        self._shards = settings.shards
        self._body_max = settings.body_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 only when Redis or the spool has it; 422 names the field.

        The field `record` means: not one JSON object.

        Raises:
            ProblemError: 413, 422.
            HbError: neither buffer nor spool took it.
        """
        body = await read_body(scope, receive, self._body_max)
        heartbeat, unknown = record.parse(body, self._backend.now_ms(), self._bounds)
        if unknown:
            self._metrics.unknown_fields.inc(unknown)
        if isinstance(heartbeat, record.Refusal):
            self._refuse(heartbeat)
        shard = record.shard_of(heartbeat.user_id, self._shards)
        outcome = await self._backend.append({shard: (record.encode(heartbeat),)})
        error = outcome[shard]
        if error is not None:
            self._metrics.refused(problems.storage_reason(error))
            raise error
        self._metrics.accepted.inc()
        await send(_ACCEPTED_START)
        await send(_ACCEPTED_BODY)

    def _refuse(self, refusal: record.Refusal) -> NoReturn:
        self._metrics.refused(refusal.reason)
        fault = {"field": refusal.field, "reason": refusal.reason, "message": refusal.message}
        raise ProblemError(
            422,
            "invalid-heartbeat",
            "The heartbeat is not valid",
            refusal.message,
            members={"errors": [fault]},
        )


_ACCEPTED = b'{"status":"accepted"}'
_ACCEPTED_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(_ACCEPTED)).encode()),
    ],
}
_ACCEPTED_BODY = {"type": "http.response.body", "body": _ACCEPTED}


@dataclass(slots=True)
class _Sorted:
    """A batch's records: the valid ones by shard, each with its index; the others refused."""

    lines: dict[int, list[bytes]] = field(default_factory=dict)
    indexes: dict[int, list[int]] = field(default_factory=dict)
    refused: list[Refused] = field(default_factory=list)
    unknown_fields: int = 0

    def members(self, accepted: int) -> dict[str, object]:
        """What every answer to a batch says, whatever its status."""
        return {
            "accepted": accepted,
            "refused": self.refused,
            "unknown_fields": self.unknown_fields,
        }


class Batch:
    """POST /metrics/heart-rate/batch: a JSON array, or NDJSON."""

    def __init__(self, settings: Settings, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._bounds = settings.time_bounds
        self._shards = settings.shards
        self._body_max = settings.body_max_bytes
        self._most = settings.batch_max_heartbeats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 when any heartbeat was taken; the others are listed with index and reason.

        Raises:
            ProblemError: 413; 422 when none is valid; 503 when none could be stored.
        """
        body = await read_body(scope, receive, self._body_max)
        records = split(body, media_type(scope), self._most)
        batch = await self._sort(records)
        accepted, errors = await self._store(batch)
        self._count(batch, accepted)
        if not accepted:
            self._fail(batch, errors)
        answer = _encode(batch.members(accepted))
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(answer)).encode()),
        ]
        if errors:
            wait = max(problems.retry_after(error) for error in errors)
            headers.append((b"retry-after", problems.seconds(wait).encode()))
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})

    async def _sort(self, records: list[tuple[int, bytes]]) -> _Sorted:
        batch = _Sorted()
        now_ms = self._backend.now_ms()
        for start in range(0, len(records), SLICE):
            if start:
                await asyncio.sleep(0)
            for index, text in records[start : start + SLICE]:
                heartbeat, unknown = record.parse(text, now_ms, self._bounds)
                batch.unknown_fields += unknown
                if isinstance(heartbeat, record.Refusal):
                    batch.refused.append(
                        Refused(
                            index, heartbeat.field, heartbeat.reason, heartbeat.message, retry=False
                        )
                    )
                    continue
                shard = record.shard_of(heartbeat.user_id, self._shards)
                batch.lines.setdefault(shard, []).append(record.encode(heartbeat))
                batch.indexes.setdefault(shard, []).append(index)
        return batch

    async def _store(self, batch: _Sorted) -> tuple[int, list[HbError]]:
        """Append what is valid: how much was stored, and the errors of shards that were not."""
        if not batch.lines:
            return 0, []
        outcome = await self._backend.append(batch.lines)
        accepted = 0
        errors: list[HbError] = []
        for shard, indexes in batch.indexes.items():
            error = outcome[shard]
            if error is None:
                accepted += len(indexes)
                continue
            errors.append(error)
            reason, message = problems.storage_reason(error), problems.storage_message(error)
            batch.refused.extend(
                Refused(index, None, reason, message, retry=True) for index in indexes
            )
        if errors:
            batch.refused.sort(key=lambda refused: refused.index)
        return accepted, errors

    def _count(self, batch: _Sorted, accepted: int) -> None:
        self._metrics.accepted.inc(accepted)
        self._metrics.unknown_fields.inc(batch.unknown_fields)
        for reason, count in Counter(refused.reason for refused in batch.refused).items():
            self._metrics.refused(reason, count)

    def _fail(self, batch: _Sorted, errors: list[HbError]) -> NoReturn:
        members = batch.members(0)
        if errors:
            raise problems.of_storage(max(errors, key=problems.retry_after), members)
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
