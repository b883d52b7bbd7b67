"""Workers: several processes that serve one port.

Belongs here: starting them, starting anew what dies, ending them all. Doesn't belong here: what one
of them does (`server`). They share the listening socket, and the kernel gives a connection to
whichever accepts first. A worker that was killed loses no heartbeat that was answered, as a single
gateway doesn't, and the others go on.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, TypeAlias

from hb_assets.core import errors
from hb_assets.core.errors import HbError, WorkerError
from hb_assets.core.settings import Settings

Serving: TypeAlias = Callable[[socket.socket, Settings, Callable[[], None]], None]
"""`server.serve_on`: serves until SIGTERM, and calls its last argument when it does."""

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_START_SECONDS = 60.0
_END_SECONDS = 15.0
"""Longer than a worker's own grace for requests that are under way."""
_PAUSE_SECONDS = 1.0
"""Between two starts of one that keeps dying."""

_log = logging.getLogger(__name__)
_spawn = multiprocessing.get_context("spawn")


@dataclass(slots=True)
class _Worker:
    process: Any
    news: Connection
    serving: bool = False


class Workers:
    """The workers of one gateway. Its own process only watches."""

    def __init__(self, settings: Settings, listener: socket.socket, serving: Serving) -> None:
        self._settings = settings
        self._listener = listener
        self._serving = serving
        self._workers: list[_Worker] = []
        self._stopping = False
        self._wake, self._woken = os.pipe()

    def run(self, ready: Callable[[], None] | None = None) -> None:
        """Serve until SIGINT or SIGTERM; `ready` is called when all of them serve.

        Raises:
            HbError: a worker couldn't start, as it said itself.
            WorkerError: one ended without a word before it served.
        """
        previous = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._workers = [self._start() for _ in range(self._settings.gateway_workers)]
            for worker in self._workers:
                self._await_serving(worker)
            if ready is not None and not self._stopping:
                ready()
            while not self._stopping:
                self._watch()
        finally:
            self._end()
            for number, handler in previous.items():
                signal.signal(number, handler)
            os.close(self._wake)
            os.close(self._woken)

    def _stop(self, _signal: int, _frame: FrameType | None) -> None:
        self._stopping = True
        os.write(self._woken, b"\0")

    def _start(self) -> _Worker:
        news, tell = _spawn.Pipe(duplex=False)
        arguments = (self._serving, self._listener, self._settings, tell)
        process = _spawn.Process(target=_work, args=arguments, name="hb-gateway-worker")
        process.start()
        tell.close()
        return _Worker(process, news)

    def _await_serving(self, worker: _Worker) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not worker.serving and not self._stopping:
            wait([worker.news, self._wake], timeout=max(0.0, deadline - time.monotonic()))
            if not worker.news.poll():
                if time.monotonic() < deadline:
                    continue
                raise WorkerError(
                    f"a worker of the gateway didn't serve within {_START_SECONDS:g} s"
                )
            try:
                told = worker.news.recv()
            except EOFError:
                worker.process.join()
                raise WorkerError(
                    f"a worker of the gateway ended at once ({_how(worker.process.exitcode)}); its "
                    "log above says more"
                ) from None
            if told is not None:
                kind, message = told
                raise getattr(errors, kind)(message)
            worker.serving = True

    def _watch(self) -> None:
        """Wait for something to happen, and start anew whoever has died."""
        wait([self._wake, *(worker.process.sentinel for worker in self._workers)])
        for place, worker in enumerate(self._workers):
            if self._stopping or worker.process.exitcode is None:
                continue
            why = _last_words(worker) or _how(worker.process.exitcode)
            _log.error("a worker of the gateway died (%s); another one takes its place", why)
            worker.news.close()
            wait([self._wake], timeout=_PAUSE_SECONDS)
            if not self._stopping:
                self._workers[place] = self._start()

    def _end(self) -> None:
        for worker in self._workers:
            if worker.process.exitcode is None:
                worker.process.terminate()
        deadline = time.monotonic() + _END_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.news.close()


def _last_words(worker: _Worker) -> str:
    """What kept it from serving, by itself; nothing where it didn't say."""
    with contextlib.suppress(EOFError):
        while worker.news.poll():
            told = worker.news.recv()
            if told is not None:
                return str(told[1])
    return ""


def _how(code: int | None) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _work(serving: Serving, listener: socket.socket, settings: Settings, tell: Connection) -> None:
    """The whole life of a worker; what ends it at its start is told to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: the parent says when
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serving(listener, settings, lambda: tell.send(None))
    except HbError as error:
        tell.send((type(error).__name__, str(error)))
    finally:
        tell.close()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
