"""The edge: the outermost layer, around every request.

Belongs here: measuring a request, and making an answer out of whatever was raised below. Doesn't
belong here: what any route does. Plain ASGI: it adds two calls to a request.
"""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hb_assets.gateway import problems
from hb_assets.gateway.bodies import ClientGoneError
from hb_assets.gateway.metrics import Metrics

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CLIENT_GONE = 499
"""Status that metrics show for a request whose client went away (as nginx has it)."""


class Edge:
    """Measures each request and answers exceptions with problem details."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one HTTP request."""
        started = time.perf_counter()
        status = 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as error:  # noqa: BLE001  # whatever it is, a client gets an answer
            response = problems.of(error).response()
            if status:
                raise RuntimeError("failed in the middle of an answer") from None
            await response(scope, receive, watched)
        finally:
            path, method = scope["path"], scope["method"]
            self._metrics.request(
                path if path in self._routes else "other",
                method if method in METHODS else "other",
                status,
                time.perf_counter() - started,
            )
