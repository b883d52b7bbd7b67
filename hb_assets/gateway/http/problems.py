"""Error answers of the gateway, as RFC 9457 problem details.

The shape of an error answer, and which exception becomes which answer. No answer holds a stack
trace, a heart rate, or more about our machines than a client needs: what an operator needs is
logged instead.
"""

from __future__ import annotations

import logging
import math
import secrets
import traceback
from collections.abc import Mapping
from http import HTTPStatus

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from hb_assets.core.errors import (
    BufferFullError,
    BufferUnavailableError,
    DamagedFileError,
    HbError,
    SpoolFullError,
    SpoolUnavailableError,
    UnconfirmedError,
)

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:problem-type:hb:"
UNAVAILABLE_RETRY_SECONDS = 2.0
"""When to ask again while Redis is away: about what the embedded server needs to come back."""

_log = logging.getLogger(__name__)


class ProblemError(Exception):
    """An error answer: raise it anywhere below the edge, or make a response of it.

    Args:
        status: HTTP status.
        kind: last part of the problem's type URI; clients may rely on it.
        title: what this kind of problem is, the same each time.
        detail: what was wrong this time and what to do; never a value out of a heartbeat.
        retry_after: seconds; becomes a Retry-After header (whole seconds, at least 1).
        headers: further headers.
        members: further members of the answer's object.
    """

    def __init__(
        self,
        status: int,
        kind: str,
        title: str,
        detail: str,
        *,
        retry_after: float | None = None,
        headers: Mapping[str, str] | None = None,
        members: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.kind = kind
        self.title = title
        self.detail = detail
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = seconds(retry_after)
        self.members = dict(members or {})

    def response(self, request_id: str) -> Response:
        """The answer to the request with this id."""
        body = {
            "type": TYPE_PREFIX + self.kind,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "request_id": request_id,
            **self.members,
        }
        return Response(
            msgspec.json.encode(body),
            status_code=self.status,
            headers=self.headers,
            media_type=MEDIA_TYPE,
        )


def raw_answer(problem: ProblemError) -> bytes:
    """The last answer on an HTTP/1.1 connection, in bytes, where a request reaches no handler."""
    request_id = secrets.token_hex(8)
    response = problem.response(request_id)
    head = [f"HTTP/1.1 {problem.status} {HTTPStatus(problem.status).phrase}".encode()]
    ours = (b"x-request-id", request_id.encode()), (b"connection", b"close")
    head += [b"%s: %s" % header for header in (*response.raw_headers, *ours)]
    return b"\r\n".join([*head, b"", bytes(response.body)])


def seconds(retry_after: float) -> str:
    """Value of a Retry-After header: whole seconds, at least 1."""
    return str(max(1, math.ceil(retry_after)))


_KINDS: dict[type[HbError], tuple[str, str]] = {
    BufferFullError: ("buffer-full", "The buffer is full"),
    BufferUnavailableError: ("buffer-unavailable", "The buffer can't be reached"),
    UnconfirmedError: ("unconfirmed", "Replicas haven't confirmed it"),
    SpoolFullError: ("spool-full", "The buffer can't be reached, and the spool is full"),
    SpoolUnavailableError: ("spool-unavailable", "The spool can't be used"),
}
"""Kind and title of each reason why a heartbeat isn't stored."""


STORAGE_REASONS = tuple(kind.replace("-", "_") for kind, _ in _KINDS.values())


def of_storage(error: HbError, members: Mapping[str, object] | None = None) -> ProblemError:
    """The 503 of a heartbeat (or a whole batch) that neither buffer nor spool took."""
    kind, title = _KINDS[type(error)]
    return ProblemError(
        503,
        kind,
        title,
        storage_message(error),
        retry_after=retry_after(error),
        members=members,
    )


def storage_reason(error: HbError) -> str:
    """Reason code of a heartbeat that was not stored."""
    kind, _ = _KINDS[type(error)]
    return kind.replace("-", "_")


def storage_message(error: HbError) -> str:
    """Message about a heartbeat that was not stored; paths and causes are for the log alone."""
    if isinstance(error, BufferFullError | SpoolFullError):
        return str(error)
    return "not confirmed, the storage doesn't answer: send it again later (twice is harmless)"


def retry_after(error: HbError) -> float:
    """Seconds after which another try makes sense."""
    if isinstance(error, BufferFullError | SpoolFullError):
        return error.retry_after
    return UNAVAILABLE_RETRY_SECONDS


def of(error: Exception, request_id: str) -> ProblemError:
    """The problem to answer an exception with; what only an operator may see is logged."""
    if isinstance(error, ProblemError):
        return error
    if isinstance(error, HbError) and type(error) in _KINDS:
        return of_storage(error)
    if isinstance(error, HTTPException):
        phrase = HTTPStatus(error.status_code).phrase
        return ProblemError(
            error.status_code,
            phrase.lower().replace(" ", "-"),
            phrase,
            error.detail,
            headers=error.headers,
        )
    if isinstance(error, DamagedFileError):
        _log.error("%s (request %s)", error, request_id)
        where = "the lake" if error.day is None else f"day {error.day}, shard {error.shard:02d}"
        return ProblemError(
            500,
            "damaged-file",
            "A file of the lake is damaged",
            f"{where}: a file that the answer needs isn't what was written; "
            "`hb damaged list` on the server names it and says what to do",
            members={} if error.day is None else {"day": str(error.day), "shard": error.shard},
        )
    if isinstance(error, HbError):
        _log.error("%s (request %s)", error, request_id)
    else:
        # An unforeseen message may quote a heartbeat: where it happened has to do.
        frames = "".join(traceback.format_tb(error.__traceback__))
        _log.error("unexpected %s (request %s)\n%s", type(error).__name__, request_id, frames)
    return ProblemError(
        500,
        "internal-error",
        "The gateway failed",
        "something went wrong here, not in the request; the gateway's log says where",
    )
