"""Health: GET /health, whether this gateway can do its work, and which part can't.

Belongs here: the parts that are looked at and the shape of the answer. Doesn't belong here: how
a part is probed (`backend`).
"""

from __future__ import annotations

import asyncio

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hb_assets.buffer import depth
from hb_assets.errors import BufferUnavailableError
from hb_assets.gateway.backend import Backend


class Health:
    """GET /health: 200 `{"status": "ok"}`, or 503 `{"status": "failing"}`; with a line a part.

    It names the durability mode in force; a server that doesn't keep its promise fails the part.
    An alarm stands beside them and fails nothing: above its high-water mark the buffer still
    takes heartbeats, and who waits for the gateway before starting the drain would wait for ever.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    async def get(self, _request: Request) -> Response:
        """Look at all parts at once; each is "ok" or says what is wrong."""
        (redis, alarms), lake = await asyncio.gather(self._redis(), self._lake())
        parts = {"redis": redis, "lake": lake}
        ok = all(part == "ok" for part in parts.values())
        body = {
            "status": "ok" if ok else "failing",
            "parts": parts,
            "durability": self._backend.settings.durability,
            "alarms": alarms,
        }
        return Response(
            msgspec.json.encode(body),
            status_code=200 if ok else 503,
            headers={"cache-control": "no-store"},
            media_type="application/json",
        )

    async def _redis(self) -> tuple[str, list[str]]:
        try:
            depths = await self._backend.depths()
            standing = await self._backend.standing()
        except BufferUnavailableError as error:
            return str(error), []
        alarms = depth.high_water(depths, self._backend.settings) + depth.losses(depths)
        return standing.fault or "ok", [
            *alarms,
            *standing.warnings,
            *self._backend.clock_warnings(),
        ]

    async def _lake(self) -> str:
        try:
            await self._backend.probe_lake()
        except TimeoutError:
            return "the lake's folder doesn't answer"
        except OSError as error:
            return f"the lake's folder can't be written: {error.strerror}"
        return "ok"
