"""Health: GET /health, whether this gateway can do its work, and which part can't.

Belongs here: the parts that are looked at and the shape of the answer. Doesn't belong here: how
a part is probed (`backend`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hb_assets.buffer import depth
from hb_assets.errors import BufferUnavailableError, SpoolUnavailableError
from hb_assets.gateway.backend import Backend


class Health:
    """GET /health: 200 `{"status": "ok"}`, or 503 `{"status": "failing"}`; with a line a part.

    It names the durability mode in force; a server that doesn't keep its promise fails the part.
    An alarm stands beside them and fails nothing: above its high-water mark the buffer still
    takes heartbeats, and who waits for the gateway before starting the drain would wait for ever.
    So does a spool that holds heartbeats: what it waits for may be the drain.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def get(self, _request: Request) -> Response:
        """Look at all parts at once; each is "ok", or says what is wrong or how it stands."""
        redis, lake, spool = await asyncio.gather(self._redis(), self._lake(), self._spool())
        parts = {"redis": redis.text, "lake": lake.text, "spool": spool.text}
        ok = not (redis.failing or lake.failing or spool.failing)
        body = {
            "status": "ok" if ok else "failing",
            "parts": parts,
            "durability": self._backend.settings.durability,
            "alarms": [*redis.alarms, *spool.alarms, *self._backend.access.alarms()],
        }
        return Response(
            msgspec.json.encode(body),
            status_code=200 if ok else 503,
            headers={"cache-control": "no-store"},
            media_type="application/json",
        )

    async def _redis(self) -> _Part:
        try:
            depths = await self._backend.depths()
            standing = await self._backend.standing()
        except BufferUnavailableError as error:
            return _Part(str(error), failing=True)
        alarms = [
            *depth.high_water(depths, self._backend.settings),
            *depth.losses(depths),
            *standing.warnings,
            *self._backend.clock_warnings(),
        ]
        return _Part(standing.fault or "ok", failing=bool(standing.fault), alarms=alarms)

    async def _lake(self) -> _Part:
        try:
            await self._backend.probe_lake()
        except TimeoutError:
            return _Part("the lake's folder doesn't answer", failing=True)
        except OSError as error:
            return _Part(f"the lake's folder can't be written: {error.strerror}", failing=True)
        return _Part("ok")

    async def _spool(self) -> _Part:
        try:
            held = await self._backend.holdings()
        except SpoolUnavailableError as error:
            return _Part(str(error), failing=True)
        if held is None:
            return _Part("off")
        size = f"{held.heartbeats:,} heartbeats, {held.bytes:,} of {held.most_bytes:,} bytes"
        if held.full:
            return _Part(f"full: holds {size}", failing=True, alarms=held.alarms())
        text = f"holds {size}" if held.heartbeats else "ok"
        return _Part(text, alarms=held.alarms())


@dataclass(frozen=True, slots=True)
class _Part:
    text: str
    failing: bool = False
    alarms: list[str] = field(default_factory=list)
