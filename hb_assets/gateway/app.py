"""The gateway as an ASGI application: its routes, and how its parts are put together.

Each route names the scope that a key needs for it. A table of paths does instead of Starlette's
router and middleware, which cost as much as all else that we do for a heartbeat.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from typing import NamedTuple

from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Router, request_response
from starlette.types import ASGIApp, Receive, Scope, Send

from hb_assets.core.settings import Settings
from hb_assets.gateway.auth.access import Access
from hb_assets.gateway.auth.keyring import ADMIN, INGEST, READ, ScopeName
from hb_assets.gateway.auth.rate_limits import Asking, Limits
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.ingest.heartbeats import Batch, One
from hb_assets.gateway.middleware import Edge
from hb_assets.gateway.observability.health import Health
from hb_assets.gateway.observability.metrics import Exposition, Metrics
from hb_assets.gateway.observability.tallies import Tallies
from hb_assets.gateway.openapi import ASSETS, Documentation
from hb_assets.gateway.reads.readings import Readings

HEART_RATE = "/metrics/heart-rate"
BATCH = "/metrics/heart-rate/batch"
HEALTH = "/health"
LIVE = "/health/live"
READY = "/health/ready"
METRICS = "/metrics"
OPENAPI = "/openapi.json"
DOCS = "/docs"


class Gateway:
    """The gateway as an ASGI application; its lifespan opens and closes the backend."""

    def __init__(self, settings: Settings, tallies: Tallies | None = None) -> None:
        self._backend = Backend(settings)
        self.metrics = Metrics(tallies)
        routes = _routes(settings, self._backend, self.metrics)
        self.metrics.expect(routes)
        self._edge = Edge(_Table(routes, self._backend.access), self.metrics)
        self._events = Router(lifespan=lambda _app: self.opened())

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Context within which the gateway is ready to serve.

        Raises BufferUnavailableError, LakeMismatchError and SettingsError.
        """
        async with self._backend.opened(), self.metrics.measuring():
            yield

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        """Serve one request, or the server's start and end."""
        app: ASGIApp = self._edge if scope["type"] == "http" else self._events
        return app(scope, receive, send)


class Route(NamedTuple):
    """One handler, and the scope that a key needs for it; None: no key is asked for."""

    needed: ScopeName | None
    handler: ASGIApp


def _routes(settings: Settings, backend: Backend, metrics: Metrics) -> dict[str, dict[str, Route]]:
    limits = Limits(settings, backend.limiter, metrics.rate_limited)
    readings = Route(READ, Asking(request_response(Readings(settings, backend).get), limits))
    health = Health(backend)
    # Orchestrators and load balancers ask without a key.
    live = Route(None, request_response(health.live))
    ready = Route(None, request_response(health.ready))
    exposition = Route(ADMIN, request_response(Exposition(backend, metrics, health).get))
    documentation = Documentation(settings)
    openapi = Route(None, request_response(documentation.openapi))
    docs = Route(None, request_response(documentation.docs))
    asset = Route(None, request_response(documentation.asset))
    return {
        HEART_RATE: {
            "POST": Route(INGEST, One(settings, backend, limits, metrics)),
            "GET": readings,
            "HEAD": readings,
        },
        BATCH: {"POST": Route(INGEST, Batch(settings, backend, limits, metrics))},
        HEALTH: {"GET": ready, "HEAD": ready},
        READY: {"GET": ready, "HEAD": ready},
        LIVE: {"GET": live, "HEAD": live},
        METRICS: {"GET": exposition, "HEAD": exposition},
        OPENAPI: {"GET": openapi, "HEAD": openapi},
        DOCS: {"GET": docs, "HEAD": docs},
        **{f"{DOCS}/{name}": {"GET": asset, "HEAD": asset} for name in ASSETS},
    }


class _Table:
    """Routing: finds the handler by path and method, and checks access to it.

    404 without a path, 405 names its methods, and so does OPTIONS, those of all paths for `*` (RFC
    9110, 9.3.7); 401 and 403 as `access` has it.
    """

    def __init__(self, routes: Mapping[str, Mapping[str, Route]], access: Access) -> None:
        self._routes = {**routes, "*": {}}
        self._access = access
        every = {method for methods in routes.values() for method in methods}
        self._methods = {
            path: ", ".join(sorted([*methods, "OPTIONS"]))
            for path, methods in {**routes, "*": every}.items()
        }

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        methods = self._routes.get(scope["path"])
        if methods is None:
            raise HTTPException(404)
        route = methods.get(scope["method"])
        if route is None:
            allow = {"allow": self._methods[scope["path"]]}
            if scope["method"] != "OPTIONS":
                raise HTTPException(405, headers=allow)
            route = Route(None, Response(status_code=204, headers=allow))
        if route.needed is not None:
            self._access.check(scope, route.needed)
        return route.handler(scope, receive, send)
