"""The gateway's server, from binding its socket to its graceful shutdown.

Binding, uvicorn's settings and signals. Several processes on one port are in `workers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import resource
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from typing_extensions import override

from hb_assets.core.errors import AlreadyRunningError, SettingsError
from hb_assets.core.settings import Settings
from hb_assets.gateway.app import Gateway
from hb_assets.gateway.auth.access import Access
from hb_assets.gateway.http import tls
from hb_assets.gateway.http.connections import Guard, GuardedProtocol
from hb_assets.gateway.observability.tallies import Tallies
from hb_assets.gateway.workers import Workers

BACKLOG = 2048
GRACE_SECONDS = 10
"""How long requests that are under way may take to end, once we were asked to stop."""
KEEP_ALIVE_SECONDS = 30
_OTHER_FILES = 1024
"""Files of the lake, connections to Redis and the like."""


def serve(settings: Settings, ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is under way and return.

    The buffer must be there already: the embedded server isn't started here.

    Args:
        settings: address, limits, workers, buffer and lake.
        ready: called once, when requests are being answered.

    Raises:
        AlreadyRunningError: the port is taken.
        SettingsError: the address can't be bound or needs an API key, a certificate or the keys
            can't be read, or the lake can't be used.
        BufferUnavailableError: Redis doesn't answer, and the spool doesn't know it.
        LakeMismatchError: the lake has another shard count or format.
        WorkerError: a worker ended before it served.
    """
    Access(settings).load()
    tls.server_context(settings)
    _allow_files(settings.max_connections)
    with bound(settings.gateway_host, settings.gateway_port) as listener:
        if settings.gateway_workers > 1:
            Workers(settings, listener, serve_on).run(ready)
        else:
            serve_on(listener, settings, ready)


def serve_on(
    listener: socket.socket,
    settings: Settings,
    ready: Callable[[], None] | None = None,
    tallies: Tallies | None = None,
) -> None:
    """Serve a listening socket with this process, and count in `tallies`.

    Raises what `serve` does.
    """

    def begun() -> None:
        # What was made up to here stays: the collector would go through half a million objects of
        # libraries again and again, for 50 ms each time, while requests wait.
        gc.collect()
        gc.freeze()
        if ready is not None:
            ready()

    try:
        Server(settings, begun, tallies).serve_on(listener)
    finally:
        gc.unfreeze()


class Server(uvicorn.Server):
    """uvicorn serving a gateway, with a callback when it is ready; `should_exit` ends it."""

    def __init__(
        self,
        settings: Settings,
        ready: Callable[[], None] | None = None,
        tallies: Tallies | None = None,
    ) -> None:
        self._app = Gateway(settings, tallies)
        self._guard = Guard(settings, self._app.metrics.connection_refused)
        self._ready = ready
        context = tls.server_context(settings)
        config = uvicorn.Config(
            self._app,
            http=partial(GuardedProtocol, self._guard),  # type: ignore[arg-type]  # whatever makes protocols
            interface="asgi3",
            ws="none",
            # Run by ourselves, below: uvicorn would turn a clear error into a traceback.
            lifespan="off",
            log_config=None,
            # Its lines hold query strings, and those hold user ids.
            access_log=False,
            proxy_headers=bool(settings.trusted_proxies),
            forwarded_allow_ips=list(settings.trusted_proxies),
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=GRACE_SECONDS,
            backlog=BACKLOG,
            ssl_context_factory=None if context is None else lambda *_: context,
        )
        super().__init__(config)

    def serve_on(self, listener: socket.socket) -> None:
        """Serve a listening socket until SIGINT or SIGTERM. Raises what `serve` does."""

        async def serve_requests() -> None:
            async with self._app.opened(), self._guard.sweeping():
                await self.serve(sockets=[listener])

        with (
            _stopped_by_signals(self),
            asyncio.Runner(loop_factory=lambda: _Loop(self._guard.head_seconds)) as runner,
        ):
            runner.run(serve_requests())

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()


class _Loop(uvloop.Loop):
    """A loop whose servers wait so many seconds for a TLS handshake, not 60.

    Nobody knows of the connection before it is made, and uvicorn hands no such option on.
    """

    def __init__(self, handshake_seconds: float) -> None:
        super().__init__()
        self._handshake_seconds = handshake_seconds

    @override
    async def create_server(self, *args: Any, **options: Any) -> Any:
        if options.get("ssl") is not None:
            options["ssl_handshake_timeout"] = self._handshake_seconds
        return await super().create_server(*args, **options)


def _allow_files(connections: int) -> None:
    """Raise this process's limit of open files, as far as it may, to what connections need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


@contextlib.contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; closed at the end. Listening from here on keeps the port ours.

    Raises:
        AlreadyRunningError: the port is taken.
        SettingsError: no such address, or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise SettingsError(
            f"the gateway can't bind to {host}: {error.strerror}; set HB_GATEWAY_HOST"
        ) from None
    with listener:
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise AlreadyRunningError(
                    f"port {port} on {host} is taken; end what uses it, or set HB_GATEWAY_PORT"
                ) from None
            raise SettingsError(
                f"the gateway can't bind to {host} port {port}: {error.strerror}; "
                "set HB_GATEWAY_HOST or HB_GATEWAY_PORT"
            ) from None
        yield listener


@contextlib.contextmanager
def _stopped_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """Let SIGINT and SIGTERM end `server` from here on, and nothing else.

    uvicorn handles them only while it serves, and raises them anew at its end: the default
    handler would then end the process before the last appends are flushed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        server.should_exit = True

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
