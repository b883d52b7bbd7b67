"""Handler of GET /metrics/heart-rate: heart rate of one user over time.

The query's parameters and the answer's headers. Points and device priority are computed in
`lake.query`, and encoded in `formats`.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Collection
from urllib.parse import urlencode

from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from hb_assets.core import record
from hb_assets.core.days import EPOCH
from hb_assets.core.errors import BufferTooLargeError, BufferUnavailableError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth.access import check_user
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.http.problems import UNAVAILABLE_RETRY_SECONDS, ProblemError
from hb_assets.gateway.ingest.heartbeats import IGNORED, shown
from hb_assets.gateway.reads import formats
from hb_assets.gateway.reads.readers import Asked
from hb_assets.lake.query.aggregate import GRANULARITIES
from hb_assets.lake.query.series import Query

EXAMPLE = "2025-01-15T10:00:00Z"
PARAMETERS = ("user_id", "device_id", "start", "end", "granularity", "fresh", "limit")
YES = ("true", "1", "yes", "on", "t", "y")
NO = ("false", "0", "no", "off", "f", "n")


class Readings:
    """GET /metrics/heart-rate?user_id&start&end[&device_id][&granularity][&fresh][&limit]."""

    def __init__(self, settings: Settings, backend: Backend) -> None:
        self._backend = backend
        self._settings = settings

    async def get(self, request: Request) -> Response:
        """Points of the buckets that [start, end) touches: of every device by priority, or of one.

        Raises:
            ProblemError: 422, a parameter is missing or can't be used; 400, a time can't be read,
                or both make no range; 403, the key is for another user; 406, no format of ours is
                accepted; 503, the buffer can't be read, or holds too much.
            DamagedFileError: the first day can't be answered without a damaged file.
        """
        media_type = formats.chosen(request.headers.getlist("accept"))
        given = request.query_params
        query, fresh = _read(given, self._settings)
        check_user(request.scope, query.user_id)

        def page_at(start_ms: int) -> str:
            others = [(name, value) for name, value in given.multi_items() if name != "start"]
            return f"{request.url.path}?{urlencode([*others, ('start', _text(start_ms))])}"

        try:
            reply = await self._backend.reply(Asked(query, media_type, fresh, page_at))
        except BufferUnavailableError:
            raise _no_buffer(
                "buffer-unavailable",
                "The buffer can't be reached",
                "what isn't in the lake yet can't be read now",
            ) from None
        except BufferTooLargeError as error:
            raise _no_buffer(
                "buffer-too-large", "The buffer holds too much for a query", str(error)
            ) from None
        headers = {"vary": "Accept"}
        if reply.next is not None:
            headers["link"] = f'<{reply.next}>; rel="next"'
        if unknown := [name for name in given if name not in PARAMETERS]:
            headers[IGNORED.decode()] = shown(unknown).decode()
        if reply.warnings:
            headers["hb-warnings"] = json.dumps(reply.warnings)  # escapes what isn't ASCII
        return Response(reply.body, headers=headers, media_type=media_type)


def _no_buffer(kind: str, title: str, why: str) -> ProblemError:
    return ProblemError(
        503,
        kind,
        title,
        f"{why}; ask again later, or without fresh=true for what is in the lake",
        retry_after=UNAVAILABLE_RETRY_SECONDS,
    )


def _read(given: QueryParams, settings: Settings) -> tuple[Query, bool]:
    """Parse the query, and whether the buffer belongs to it.

    As in the system before us a parameter that is missing or of the wrong type is a 422, and a time
    that can't be used is a 400.
    """
    read = _Parameters(given)
    most = settings.query_max_points
    user_id = read.identifier("user_id")
    # An empty device_id is what a form with nothing chosen sends: no device asked for.
    device_id = read.identifier("device_id") if given.get("device_id") else None
    granularity = read.choice("granularity", GRANULARITIES, "1m")
    fresh = read.flag("fresh")
    limit = read.count("limit", most, "HB_QUERY_MAX_POINTS")
    start = read.required("start", f"a time like {EXAMPLE}")
    end = read.required("end", f"a time like {EXAMPLE}")
    read.refuse(422, "invalid-parameter", "The query's parameters can't be used")
    start_ms, end_ms = read.instant("start", start), read.instant("end", end)
    longest = settings.query_max_range
    longest_ms = longest // dt.timedelta(milliseconds=1)
    if not read.faults and start_ms >= end_ms:
        read.fault("start", "start must be before end")
    elif not read.faults and end_ms - start_ms > longest_ms:
        most_ms = start_ms + longest_ms
        read.fault(
            "end",
            f"the range from start to end may be at most {longest.total_seconds() / 86_400:g} days "
            f"(HB_QUERY_MAX_RANGE): ask for it in parts, first with end={_text(most_ms)}, then "
            "with that as start, and so on; or raise that setting",
        )
    read.refuse(400, "invalid-time", "The query's times can't be used")
    return Query(user_id, start_ms, end_ms, device_id, granularity, limit), fresh


class _Parameters:
    """Parameters of a query, read one by one; their errors are collected."""

    def __init__(self, given: QueryParams) -> None:
        self._given = given
        # which one counts differs between servers and proxies
        self.faults = [
            (name, f"{name} is given more than once")
            for name in PARAMETERS
            if len(given.getlist(name)) > 1
        ]

    def fault(self, name: str, message: str) -> None:
        self.faults.append((name, message))

    def refuse(self, status: int, kind: str, title: str) -> None:
        """Raises ProblemError when anything was wrong so far."""
        if self.faults:
            raise ProblemError(
                status,
                kind,
                title,
                "; ".join(message for _, message in self.faults),
                members={
                    "errors": [{"field": name, "message": message} for name, message in self.faults]
                },
            )

    def required(self, name: str, what: str) -> str:
        text = self._given.get(name)
        if text is None:
            self.fault(name, f"{name} is required, {what}")
        return text or ""

    def identifier(self, name: str) -> str:
        least, most = record.ID_LENGTH
        rule = f"{least} to {most} characters"
        text = self.required(name, rule)
        if name in self._given and not least <= len(text) <= most:
            self.fault(name, f"{name} must have {rule}")
        return text

    def choice(self, name: str, choices: Collection[str], default: str) -> str:
        text = self._given.get(name, default)
        if text not in choices:
            self.fault(name, f"{name} must be one of {', '.join(choices)}")
        return text

    def flag(self, name: str) -> bool:
        text = self._given.get(name, "false").lower()
        if text not in (*YES, *NO):
            self.fault(name, f"{name} must be true or false")
        return text in YES

    def count(self, name: str, most: int, setting: str) -> int:
        text = self._given.get(name, str(most))
        if not (text.isascii() and text.isdigit() and len(text) < 20 and 1 <= int(text) <= most):
            self.fault(name, f"{name} must be an integer from 1 to {most} ({setting})")
            return most
        return int(text)

    def instant(self, name: str, text: str) -> int:
        try:
            return record.parse_instant(with_offset(text))
        except ValueError:
            self.fault(name, f"{name} must be ISO 8601 with date and time, like {EXAMPLE}")
            return 0


def with_offset(text: str) -> str:
    """Mend an offset whose `+` was not escaped in the URL and so came as a space.

    `2025-01-15T10:00:00 05:30` becomes `2025-01-15T10:00:00+05:30`; `2025-01-15 10:00` stays.
    """
    time, gap, offset = text.rpartition(" ")
    if gap and (":" in time or "T" in time.upper()):
        return f"{time}+{offset}"
    return text


def _text(epoch_ms: int) -> str:
    moment = EPOCH + dt.timedelta(milliseconds=epoch_ms)
    return moment.isoformat().replace("+00:00", "Z")
