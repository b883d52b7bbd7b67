"""The application: which path and method lead to which handler.

Belongs here: routes and how the parts are put together. Doesn't belong here: what a route does.
A table of paths does instead of Starlette's router and middleware, which cost as much as all else
that we do for a heartbeat.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from starlette.exceptions import HTTPException
from starlette.routing import Router, request_response
from starlette.types import ASGIApp, Receive, Scope, Send

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
LIVE = "/health/live"
READY = "/health/ready"
METRICS = "/metrics"


class Gateway:
    """The gateway as an ASGI application; its lifespan opens and closes the backend."""

    def __init__(self, settings: Settings) -> None:
        self._backend = Backend(settings)
        self._metrics = Metrics(settings)
        routes = _routes(settings, self._backend, self._metrics)
        self._edge = Edge(_Table(routes), self._metrics, frozenset(routes))
        self._events = Router(lifespan=lambda _app: self.opened())

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Ready to serve for the time of the block.

        Raises BufferUnavailableError, LakeMismatchError and SettingsError.
        """
        async with self._backend.opened():
            with self._metrics.kept():
                yield

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the server's start and end."""
        app = self._edge if scope["type"] == "http" else self._events
        await app(scope, receive, send)


def _routes(
    settings: Settings, backend: Backend, metrics: Metrics
) -> dict[str, dict[str, ASGIApp]]:
    get_readings = request_response(Readings(settings, backend).get)
    health = Health(backend)
    get_live, get_ready = request_response(health.live), request_response(health.ready)
    get_metrics = request_response(Exposition(backend, metrics, health).get)
    return {
        HEART_RATE: {
            "POST": One(settings, backend, metrics),
            "GET": get_readings,
            "HEAD": get_readings,
        },
        BATCH: {"POST": Batch(settings, backend, metrics)},
        HEALTH: {"GET": get_ready, "HEAD": get_ready},
        READY: {"GET": get_ready, "HEAD": get_ready},
        LIVE: {"GET": get_live, "HEAD": get_live},
        METRICS: {"GET": get_metrics, "HEAD": get_metrics},
    }


class _Table:
    """Finds the handler by path and method: 404 without a path, 405 names its methods."""

    def __init__(self, routes: Mapping[str, Mapping[str, ASGIApp]]) -> None:
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handlers = self._routes.get(scope["path"])
        if handlers is None:
            raise HTTPException(404)
        handler = handlers.get(scope["method"])
        if handler is None:
            raise HTTPException(405, headers={"allow": ", ".join(sorted(handlers))})
        await handler(scope, receive, send)
