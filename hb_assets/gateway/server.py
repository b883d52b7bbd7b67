"""The server: one gateway process, from its socket to its graceful end.

Belongs here: binding, uvicorn's settings, signals. Doesn't belong here: routes, and the keeping
alive of the process (`hb up` does that).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
import uvloop

from hb_assets.errors import AlreadyRunningError, SettingsError
from hb_assets.gateway import tls
from hb_assets.gateway.access import Access
from hb_assets.gateway.app import Gateway
from hb_assets.settings import Settings

BACKLOG = 2048
GRACE_SECONDS = 10
"""How long requests that are under way may take to end, once we were asked to stop."""
KEEP_ALIVE_SECONDS = 30


def serve(settings: Settings, ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGINT or SIGTERM; then finish what is under way and return.

    The buffer must be there already: the embedded server isn't started here.

    Args:
        settings: address, limits, buffer and lake.
        ready: called once, when requests are being answered.

    Raises:
        AlreadyRunningError: the port is taken.
        SettingsError: the address can't be bound or needs an API key, a certificate or the keys
            can't be read, or the lake can't be used.
        BufferUnavailableError: Redis doesn't answer, and the spool doesn't know it.
        LakeMismatchError: the lake has another shard count or format.
    """
    Access(settings).load()
    context = tls.server_context(settings)
    with bound(settings.gateway_host, settings.gateway_port) as listener:
        app = Gateway(settings)
        server = _Server(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                # Run by ourselves, below: uvicorn would turn a clear error into a traceback.
                lifespan="off",
                log_config=None,
                # Its lines hold query strings, and those hold user ids.
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=GRACE_SECONDS,
                backlog=BACKLOG,
                ssl_context_factory=None if context is None else lambda *_: context,
            ),
            ready,
        )

        async def serve_requests() -> None:
            async with app.opened():
                await server.serve(sockets=[listener])

        with (
            _stopped_by_signals(server),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            runner.run(serve_requests())


class _Server(uvicorn.Server):
    """uvicorn, which says when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()


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
