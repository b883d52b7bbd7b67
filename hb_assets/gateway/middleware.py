"""The outermost ASGI layer, around every request: measurement, request ids, common headers, errors.

It makes an answer out of whatever was raised below. Plain ASGI: it adds two calls to a request.
"""

from __future__ import annotations

import itertools
import re
import secrets
import time
from collections.abc import Awaitable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hb_assets.gateway.http import problems
from hb_assets.gateway.http.bodies import ClientGoneError
from hb_assets.gateway.observability.metrics import CLIENT_GONE, Metrics

REQUEST_ID = "x-request-id"
ID_PATTERN = "[A-Za-z0-9._~+/=:@-]{1,128}"
"""Ids of clients that are taken over: safe in a log line, whatever reads it."""
HEADERS = (
    # What is read here is health data, or out of date a second later. (Answers to POST are neither
    # kept nor shown by anybody, and each header costs uvicorn 0.8 us.)
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)

_REQUEST_ID = REQUEST_ID.encode()
_sane = re.compile(ID_PATTERN.encode()).fullmatch


class Edge:
    """Measures each request and answers exceptions with problem details."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        # Ids of several processes differ by the first half, those of one by the second.
        self._prefix = secrets.token_hex(8).encode()
        self._numbers = itertools.count(1)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        started = time.perf_counter()
        status = 0
        counted = False
        request_id = self._id_of(scope)

        def count() -> None:
            nonlocal counted
            if not counted:
                elapsed = time.perf_counter() - started
                self._metrics.request(scope["path"], scope["method"], status, elapsed)
                counted = True

        def watched(message: Message) -> Awaitable[None]:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], (_REQUEST_ID, request_id)]
                if scope["method"] != "POST":
                    headers += HEADERS
                # not in place: a handler may send the same message each time
                message = {"type": "http.response.start", "status": status, "headers": headers}
            elif not message.get("more_body"):
                count()  # before the client has it: we may be killed at any moment
            return send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as error:  # noqa: BLE001  # whatever it is, a client gets an answer
            response = problems.of(error, request_id.decode()).response(request_id.decode())
            if status:
                raise RuntimeError("failed in the middle of an answer") from None
            await response(scope, receive, watched)
        finally:
            count()

    def _id_of(self, scope: Scope) -> bytes:
        """The client's id of a request, or one of ours."""
        request_id = b""
        for name, value in scope["headers"]:
            if name == _REQUEST_ID:
                request_id = value
        if not request_id or not _sane(request_id):
            request_id = b"%s-%x" % (self._prefix, next(self._numbers))
        return request_id
