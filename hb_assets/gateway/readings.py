"""Readings: the GET handler, minute-level heart rate of one user.

Belongs here: the query's parameters and the shape of the answer. Doesn't belong here: how minutes
are computed and which device wins (`lake.query`).
"""

from __future__ import annotations

import datetime as dt
from typing import NoReturn

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from hb_assets import record
from hb_assets.days import EPOCH
from hb_assets.gateway.access import check_user
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.problems import ProblemError
from hb_assets.lake.query import Point
from hb_assets.settings import Settings

EXAMPLE = "2025-01-15T10:00:00Z"


class Reading(msgspec.Struct, frozen=True, gc=False):
    """One minute of one device; `timestamp` is the minute's start, UTC; `heart_rate` its mean."""

    timestamp: dt.datetime
    heart_rate: int
    device_id: str


class Answer(msgspec.Struct, frozen=True, gc=False):
    """What GET /metrics/heart-rate answers."""

    user_id: str
    data: list[Reading]
    count: int


class Readings:
    """GET /metrics/heart-rate?user_id&start&end[&device_id]."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self._backend = backend
        self._longest = settings.query_max_range

    async def get(self, request: Request) -> Response:
        """Minutes that [start, end) touches: of every device, as its priority says, or of one.

        Raises:
            ProblemError: 400, a parameter is missing or can't be used; 403, the key is for another
                user.
            DamagedFileError: a file of the lake can't be read.
        """
        given = request.query_params
        user_id = _identifier("user_id", given.get("user_id"))
        check_user(request.scope, user_id)
        # An empty device_id is what a form with nothing chosen sends: no device asked for.
        device = given.get("device_id")
        device_id = _identifier("device_id", device) if device else None
        start_ms = _instant("start", given.get("start"))
        end_ms = _instant("end", given.get("end"))
        if start_ms >= end_ms:
            _refuse("start", "start must be before end")
        longest_ms = self._longest // dt.timedelta(milliseconds=1)
        if end_ms - start_ms > longest_ms:
            _refuse(
                "end",
                f"the range from start to end may be at most {self._longest} (HB_QUERY_MAX_RANGE); "
                "ask for it in parts",
            )
        points = await self._backend.minute_points(user_id, start_ms, end_ms, device_id)
        body = await run_in_threadpool(_encode, user_id, points)
        return Response(body, media_type="application/json")


def _encode(user_id: str, points: list[Point]) -> bytes:
    data = [
        Reading(
            EPOCH + dt.timedelta(milliseconds=point.minute_ms), point.heart_rate, point.device_id
        )
        for point in points
    ]
    return msgspec.json.encode(Answer(user_id, data, len(data)))


def _identifier(name: str, text: str | None) -> str:
    if not text:
        _refuse(name, f"{name} is required")
    if len(text) > record.ID_LENGTH[1]:
        _refuse(name, f"{name} must have 1 to {record.ID_LENGTH[1]} characters")
    return text


def _instant(name: str, text: str | None) -> int:
    if not text:
        _refuse(name, f"{name} is required, a time like {EXAMPLE}")
    try:
        return record.parse_instant(with_offset(text))
    except ValueError:
        _refuse(name, f"{name} must be ISO 8601 with date and time, like {EXAMPLE}")


def with_offset(text: str) -> str:
    """Mend an offset whose `+` was not escaped in the URL and so came as a space.

    `2025-01-15T10:00:00 05:30` becomes `2025-01-15T10:00:00+05:30`; `2025-01-15 10:00` stays.
    """
    time, gap, offset = text.rpartition(" ")
    if gap and (":" in time or "T" in time.upper()):
        return f"{time}+{offset}"
    return text


def _refuse(name: str, reason: str) -> NoReturn:
    raise ProblemError(
        400,
        "invalid-query",
        "The query can't be answered",
        reason,
        members={"errors": [{"field": name, "message": reason}]},
    )
