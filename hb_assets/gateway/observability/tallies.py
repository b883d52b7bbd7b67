"""Tallies: what the workers of a gateway count, in memory that they share.

Prometheus reads one worker, whichever takes its connection, and wants the sum of all. Each worker
has a row of numbers that nobody else writes. The row stays when its worker is killed, and the
worker that takes its place counts on: no counter falls, and none that was counted is lost, as long
as the gateway runs.
"""

from __future__ import annotations

import copy
import multiprocessing

_ROOM = 1 << 14
"""Numbers of a row; memory that nobody writes to costs nothing."""


class Tallies:
    """The rows of one gateway, as one of its workers has them; handed on when that is started."""

    def __init__(self, workers: int = 1) -> None:
        self._memory = multiprocessing.get_context("spawn").RawArray("d", workers * _ROOM)
        self._workers = workers
        self.worker = 0

    def of(self, worker: int) -> Tallies:
        """The same rows, as another worker has them."""
        other = copy.copy(self)
        other.worker = worker
        return other

    def mine(self) -> memoryview[float]:
        """The row of this worker, to be written."""
        return self.rows()[self.worker]

    def rows(self) -> list[memoryview[float]]:
        """The rows of all workers, those that were killed included."""
        numbers = memoryview(self._memory).cast("B").cast("d")
        return [numbers[n * _ROOM : (n + 1) * _ROOM] for n in range(self._workers)]
