"""Health endpoints: whether this gateway and what stands behind it work, and which part doesn't.

A part fails when it keeps this gateway from accepting heartbeats and answering queries. Whatever
else is wrong is an alarm: it is listed beside the parts, and `ready` stays 200. The state of a part
is read by `backend`; `pipeline.vitals` decides when something is late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hb_assets.buffer import depth
from hb_assets.buffer.depth import Depths
from hb_assets.buffer.durability import Standing
from hb_assets.buffer.liveness import DAGSTER, Liveness
from hb_assets.core.errors import HbError
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.spool.queue import Holdings
from hb_assets.lake.integrity.known_faults import Fault
from hb_assets.lake.survey import Survey
from hb_assets.pipeline import vitals

OK = "ok"
OFF = "off"
"""Text of a part that doesn't exist, or that the settings don't watch."""
MOST_FAULTS = 20
"""Most faults of the lake that are listed; `hb status` lists all."""
_UNSEEN = "not seen yet"
_RETRY_AFTER = "5"
"""Retry-After in seconds: nothing that fails here recovers sooner."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Part:
    """The state of one part: `text` is "ok" or says in a line what is wrong.

    A part that isn't `healthy` fails, or its fault is among its `alarms`.
    """

    text: str
    healthy: bool = True
    failing: bool = False
    alarms: Sequence[str] = ()

    @classmethod
    def of(cls, fault: str | None, otherwise: str = OK, alarms: Sequence[str] = ()) -> Part:
        """A healthy part; a fault is an alarm."""
        if fault is None:
            return cls(otherwise, alarms=alarms)
        return cls(fault, healthy=False, alarms=[fault, *alarms])

    @classmethod
    def failed(cls, fault: str, alarms: Sequence[str] = ()) -> Part:
        """A part that fails by this fault."""
        return cls(fault, healthy=False, failing=True, alarms=alarms)


class Health:
    """Handlers of the health endpoints; all but `live` answer what `parts` finds."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def live(self, _request: Request) -> Response:
        """GET /health/live: 200. Nothing is looked at: this process and its event loop answer.

        Restart a gateway by this alone. A restart mends nothing of what `ready` looks at.
        """
        return _answer(200, {"status": OK})

    async def ready(self, _request: Request) -> Response:
        """GET /health/ready, /health: 200 `{"status": "ok"}`, or 503 `{"status": "failing"}`.

        With a line for each part, the names of those that fail, and all alarms.
        """
        parts = await self.parts()
        failing = [name for name, part in parts.items() if part.failing]
        return _answer(
            503 if failing else 200,
            {
                "status": "failing" if failing else OK,
                "failing": failing,
                "parts": {name: part.text for name, part in parts.items()},
                "durability": self._backend.settings.durability,
                "alarms": [
                    *(alarm for part in parts.values() for alarm in part.alarms),
                    *self._backend.access.alarms(),
                ],
            },
        )

    async def parts(self) -> dict[str, Part]:
        """The state of all parts, looked at side by side."""
        backend = self._backend
        depths, signs, standing, held, survey = await asyncio.gather(
            _known(backend.depths()),
            _known(backend.signs()),
            _known(backend.standing()),
            _known(backend.holdings()),
            backend.survey(),
        )
        takes = isinstance(held, Holdings) and not held.full
        return {
            "redis": self._redis(depths, signs, spooling=takes),
            **self._drained(depths, signs),
            "aof": _aof(standing),
            **await self._disk(survey),
            "spool": _spool(held, alone=isinstance(depths, HbError)),
            "consolidation": self._consolidation(survey),
        }

    def _redis(
        self, depths: Depths | HbError, signs: Liveness | HbError, *, spooling: bool
    ) -> Part:
        """Failing where nothing takes heartbeats: neither a shard of Redis nor the spool."""
        if isinstance(depths, HbError):
            fault = str(depths)
            return (
                Part.of(f"{fault}; the spool takes heartbeats") if spooling else Part.failed(fault)
            )
        settings = self._backend.settings
        alarms = [
            *depths.faults.values(),
            *([str(signs)] if isinstance(signs, HbError) else []),
            *depth.high_water(depths.states, settings),
            *depth.losses(depths.states),
            *self._backend.clock_warnings(),
        ]
        if depths.states or spooling:
            return Part(OK, alarms=alarms)
        return Part.failed("no shard of the buffer can be used", alarms)

    def _drained(self, depths: Depths | HbError, signs: Liveness | HbError) -> dict[str, Part]:
        """The parts of drains and Dagster: alarms where they don't keep up, never failures."""
        settings = self._backend.settings
        for unknown in (depths, signs):
            if isinstance(unknown, HbError):
                names = ("drain", "backlog", "consumers", "dagster")
                return dict.fromkeys(names, Part(f"unknown: {unknown}"))
        assert isinstance(depths, Depths)
        assert isinstance(signs, Liveness)
        states = depths.states
        return {
            "drain": _watched(settings.health_drain_age, vitals.drain(states, signs, settings)),
            "backlog": _watched(settings.health_entry_age, vitals.backlog(states, signs, settings)),
            "consumers": _watched(
                settings.health_consumer_idle, vitals.consumers(states, signs, settings)
            ),
            "dagster": _watched(
                settings.health_dagster_age,
                vitals.dagster(signs, settings),
                OK if DAGSTER in signs.seen_ms else _UNSEEN,
            ),
        }

    async def _disk(self, survey: Survey | None) -> dict[str, Part]:
        settings = self._backend.settings
        try:
            disk = await self._backend.disk()
        except TimeoutError:
            fault = "the lake's folder doesn't answer"
        except OSError as error:
            fault = f"the lake's folder can't be read: {error.strerror}"
        else:
            space = _watched(settings.health_free_space, vitals.space(disk.free, settings))
            alarms = _of_lake(survey.faults) if survey else ()
            return {"lake": Part.of(disk.unwritable, alarms=alarms), "space": space}
        return {"lake": Part.failed(fault), "space": Part(f"unknown: {fault}")}

    def _consolidation(self, survey: Survey | None) -> Part:
        settings = self._backend.settings
        if survey is None:
            return Part(_UNSEEN)
        return Part.of(
            vitals.consolidation(survey.overdue, survey.overdue_seconds, settings),
            OK if settings.health_consolidation_delay else OFF,
        )


async def _known(asked: Awaitable[T]) -> T | HbError:
    """The result of a probe, or why it isn't known."""
    try:
        return await asked
    except HbError as error:
        return error


def _of_lake(faults: Sequence[Fault]) -> list[str]:
    """A line for each of the first faults, without paths: no key is needed to see them."""
    lines = list(dict.fromkeys(fault.summary for fault in faults))
    more = len(lines) - MOST_FAULTS
    return [*lines[:MOST_FAULTS], *([f"the lake: {more:,} more faults"] if more > 0 else [])]


def _aof(standing: Standing | HbError) -> Part:
    """The part of durability: fails where a 2xx would promise more than the server keeps."""
    if isinstance(standing, HbError):
        return Part(f"unknown: {standing}")
    if standing.fault:
        return Part.failed(standing.fault, standing.warnings)
    return Part(OK, alarms=standing.warnings)


def _spool(held: Holdings | HbError | None, *, alone: bool) -> Part:
    """The part of the spool; `alone`: Redis is away, so that a spool that takes nothing fails."""
    if held is None:
        return Part(OFF)
    alarms: Sequence[str] = ()
    if isinstance(held, HbError):
        fault = str(held)
    else:
        size = f"{held.heartbeats:,} heartbeats, {held.bytes:,} of {held.most_bytes:,} bytes"
        alarms = held.alarms()
        if not held.full:
            return Part(f"holds {size}" if held.heartbeats else OK, alarms=alarms)
        fault = f"full: holds {size}"
    return Part.failed(fault, alarms) if alone else Part.of(fault, alarms=alarms)


def _watched(threshold: object, fault: str | None, otherwise: str = OK) -> Part:
    return Part.of(fault, otherwise if threshold else OFF)


def _answer(status: int, body: dict[str, object]) -> Response:
    return Response(
        msgspec.json.encode(body),
        status_code=status,
        headers={} if status == 200 else {"retry-after": _RETRY_AFTER},
        media_type="application/json",
    )
