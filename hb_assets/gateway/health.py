"""Health: whether this gateway and what stands behind it do their work, and which part doesn't.

Belongs here: the parts that are looked at and the shape of the answers. Doesn't belong here: how
a part is probed (`backend`), and when something is late (`vitals`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hb_assets import vitals
from hb_assets.buffer import depth
from hb_assets.buffer.beats import DAGSTER
from hb_assets.errors import BufferUnavailableError, SpoolUnavailableError
from hb_assets.gateway.backend import Backend

OK = "ok"
OFF = "off"
"""A part that there isn't, or that the settings don't watch."""
UNKNOWN = "unknown: Redis doesn't answer"
_UNSEEN = "not seen yet"
_RETRY_AFTER = "5"
"""Seconds until another look is worth it: nothing that fails here mends itself sooner."""


@dataclass(frozen=True, slots=True)
class Part:
    """How one part stands: `text` is "ok" or says it in a line; `alarms` fail nothing."""

    text: str
    failing: bool = False
    alarms: Sequence[str] = ()

    @classmethod
    def of(cls, fault: str | None, otherwise: str = OK, alarms: Sequence[str] = ()) -> Part:
        """Failing by this fault, or not at all."""
        return cls(fault or otherwise, failing=bool(fault), alarms=alarms)


class Health:
    """The answers about health; `look` is what all but `live` tell."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def live(self, _request: Request) -> Response:
        """GET /health/live: 200. Nothing is looked at: this process and its event loop answer.

        Restart a gateway by this alone. A restart mends nothing of what `ready` looks at.
        """
        return _answer(200, {"status": OK})

    async def ready(self, _request: Request) -> Response:
        """GET /health/ready, /health: 200 `{"status": "ok"}`, or 503 `{"status": "failing"}`.

        With a line for each part, and the names of those that fail. A part that isn't known while
        Redis is away doesn't fail besides it. Alarms stand beside them and fail nothing: above its
        high-water mark the buffer still takes heartbeats, and so does a spool that holds some.
        """
        parts = await self.look()
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

    async def look(self) -> dict[str, Part]:
        """Look at all parts at once."""
        redis, aof, disk, spool, consolidation = await asyncio.gather(
            self._redis(), self._aof(), self._disk(), self._spool(), self._consolidation()
        )
        return {**redis, "aof": aof, **disk, "spool": spool, "consolidation": consolidation}

    async def _redis(self) -> dict[str, Part]:
        settings = self._backend.settings
        try:
            depths, signs = await asyncio.gather(self._backend.depths(), self._backend.signs())
        except BufferUnavailableError as error:
            unknown = Part(UNKNOWN)
            away = Part(str(error), failing=True)
            return {"redis": away} | dict.fromkeys(
                ("drain", "backlog", "consumers", "dagster"), unknown
            )
        alarms = [
            *depth.high_water(depths, settings),
            *depth.losses(depths),
            *self._backend.clock_warnings(),
        ]
        seen = DAGSTER in signs.beats
        return {
            "redis": Part(OK, alarms=alarms),
            "drain": _watched(settings.health_drain_age, vitals.drain(depths, signs, settings)),
            "backlog": _watched(settings.health_entry_age, vitals.backlog(depths, signs, settings)),
            "consumers": _watched(
                settings.health_consumer_idle, vitals.consumers(depths, settings)
            ),
            "dagster": _watched(
                settings.health_dagster_age,
                vitals.dagster(signs, settings),
                OK if seen else _UNSEEN,
            ),
        }

    async def _aof(self) -> Part:
        try:
            standing = await self._backend.standing()
        except BufferUnavailableError:
            return Part(UNKNOWN)
        return Part.of(standing.fault, alarms=standing.warnings)

    async def _disk(self) -> dict[str, Part]:
        settings = self._backend.settings
        try:
            free = await self._backend.free_space()
        except TimeoutError:
            lake = Part("the lake's folder doesn't answer", failing=True)
        except OSError as error:
            lake = Part(f"the lake's folder can't be written: {error.strerror}", failing=True)
        else:
            space = _watched(settings.health_free_space, vitals.space(free, settings))
            return {"lake": Part(OK), "space": space}
        return {"lake": lake, "space": Part("unknown: the lake can't be used")}

    async def _spool(self) -> Part:
        try:
            held = await self._backend.holdings()
        except SpoolUnavailableError as error:
            return Part(str(error), failing=True)
        if held is None:
            return Part(OFF)
        size = f"{held.heartbeats:,} heartbeats, {held.bytes:,} of {held.most_bytes:,} bytes"
        if held.full:
            return Part(f"full: holds {size}", failing=True, alarms=held.alarms())
        text = f"holds {size}" if held.heartbeats else OK
        return Part(text, alarms=held.alarms())

    async def _consolidation(self) -> Part:
        settings = self._backend.settings
        try:
            survey = await self._backend.survey()
        except OSError as error:
            return Part(f"unknown: the lake can't be read: {error.strerror}")
        if survey is None:
            return Part(_UNSEEN)
        return Part.of(
            vitals.consolidation(survey.overdue, survey.overdue_seconds, settings),
            OK if settings.health_consolidation_delay else OFF,
            alarms=survey.damaged,
        )


def _watched(threshold: object, fault: str | None, otherwise: str = OK) -> Part:
    return Part.of(fault, otherwise if threshold else OFF)


def _answer(status: int, body: dict[str, object]) -> Response:
    return Response(
        msgspec.json.encode(body),
        status_code=status,
        headers={} if status == 200 else {"retry-after": _RETRY_AFTER},
        media_type="application/json",
    )
