"""The application: which path leads to which handler.

Belongs here: routes and how the parts are put together. Doesn't belong here: what a route does.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, request_response
from starlette.types import ASGIApp, Receive, Scope, Send

from hb_assets.gateway import problems
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.edge import Edge
from hb_assets.gateway.health import Health
from hb_assets.gateway.heartbeats import Batch, One
from hb_assets.gateway.metrics import Exposition, Metrics
from hb_assets.gateway.readings import Readings
from hb_assets.settings import Settings

HEART_RATE = "/metrics/heart-rate"
BATCH = "/metrics/heart-rate/batch"
HEALTH = "/health"
METRICS = "/metrics"


class Methods:
    """One path, a handler for each method; 405 names all of them."""

    def __init__(self, handlers: Mapping[str, ASGIApp]) -> None:
        self._handlers = handlers
        self._allow = {"allow": ", ".join(sorted(handlers))}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand the request to its method's handler."""
        handler = self._handlers.get(scope["method"])
        if handler is None:
            raise HTTPException(405, headers=self._allow)
        await handler(scope, receive, send)


def create_app(settings: Settings) -> Starlette:
    """The gateway as an ASGI application; its lifespan opens and closes the backend.

    The lifespan raises BufferUnavailableError, LakeMismatchError and SettingsError.
    """
    backend = Backend(settings)
    metrics = Metrics()
    get_readings = request_response(Readings(settings, backend).get)
    get_health = request_response(Health(backend).get)
    get_metrics = request_response(Exposition(backend, metrics).get)
    handlers: dict[str, dict[str, ASGIApp]] = {
        HEART_RATE: {
            "POST": One(settings, backend, metrics),
            "GET": get_readings,
            "HEAD": get_readings,
        },
        BATCH: {"POST": Batch(settings, backend, metrics)},
        HEALTH: {"GET": get_health, "HEAD": get_health},
        METRICS: {"GET": get_metrics, "HEAD": get_metrics},
    }

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with backend.opened():
            yield

    return Starlette(
        routes=[Route(path, Methods(by_method)) for path, by_method in handlers.items()],
        middleware=[Middleware(Edge, metrics=metrics, routes=frozenset(handlers))],
        exception_handlers={HTTPException: _problem},
        lifespan=lifespan,
    )


async def _problem(_request: Request, error: Exception) -> Response:
    return problems.of(error).response()
