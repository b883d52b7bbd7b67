"""Supervisor of the gateway's worker processes: starts them, replaces what dies, ends them all.

What a worker does is in `server`. They share the listening socket, and the kernel gives a
connection to whichever accepts first. A worker that was killed loses no heartbeat that was
answered, as a single gateway doesn't, and the others go on.
"""

from __future__ import annotations

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
from multiprocessing.context import SpawnProcess
from types import FrameType
from typing import TypeAlias

from hb_assets.core.errors import HbError, WorkerError
from hb_assets.core.settings import Settings
from hb_assets.gateway.observability.tallies import Tallies

Serving: TypeAlias = Callable[[socket.socket, Settings, Callable[[], None], Tallies], None]
"""`server.serve_on`: serves until SIGTERM, and calls its third argument when it does."""

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
    process: SpawnProcess
    news: Connection
    """It says None when it serves, or the error that keeps it from that."""

    def error(self) -> HbError | None:
        """Why it doesn't serve, by its own word or by its end; for one that has news."""
        try:
            told: HbError | None = self.news.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}; its log above says more"
            return WorkerError(f"a worker of the gateway ended ({how})")
        return told

    def end(self, deadline: float) -> None:
        """Wait for its end until then, and kill it."""
        self.process.join(max(0.0, deadline - time.monotonic()))
        self.process.kill()
        self.process.join()
        self.news.close()


class Workers:
    """The workers of one gateway. Its own process only watches."""

    def __init__(self, settings: Settings, listener: socket.socket, serving: Serving) -> None:
        self._settings = settings
        self._listener = listener
        self._serving = serving
        self._tallies = Tallies(settings.gateway_workers)
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
            for place in range(self._settings.gateway_workers):
                self._workers.append(self._start(place))
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

    def _start(self, place: int) -> _Worker:
        news, tell = _spawn.Pipe(duplex=False)
        arguments = (self._serving, self._listener, self._settings, tell, self._tallies.of(place))
        process = _spawn.Process(target=_work, args=arguments, name="hb-gateway-worker")
        process.start()
        tell.close()
        return _Worker(process, news)

    def _await_serving(self, worker: _Worker) -> None:
        if not wait([worker.news, self._wake], timeout=_START_SECONDS):
            raise WorkerError(f"a worker of the gateway didn't serve within {_START_SECONDS:g} s")
        if not self._stopping and (error := worker.error()) is not None:
            raise error

    def _watch(self) -> None:
        """Wait for news, and start anew whoever has died."""
        wait([self._wake, *(worker.news for worker in self._workers)])
        for place, worker in enumerate(self._workers):
            if self._stopping or not worker.news.poll() or (error := worker.error()) is None:
                continue
            _log.error("%s; another worker takes its place", error)
            worker.end(time.monotonic() + _END_SECONDS)
            wait([self._wake], timeout=_PAUSE_SECONDS)
            if not self._stopping:
                self._workers[place] = self._start(place)

    def _end(self) -> None:
        deadline = time.monotonic() + _END_SECONDS
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.end(deadline)


def _work(
    serving: Serving,
    listener: socket.socket,
    settings: Settings,
    tell: Connection,
    tallies: Tallies,
) -> None:
    """The whole life of a worker; what ends it at its start is told to its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C: the parent says when
    logging.basicConfig(level=settings.log_level.upper(), format=LOG_FORMAT)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        serving(listener, settings, lambda: tell.send(None), tallies)
    except HbError as error:
        tell.send(error)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
