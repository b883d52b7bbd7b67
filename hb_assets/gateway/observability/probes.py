"""Probes of Redis and disks, cached, that neither a slow answer nor a flood of requests multiplies.

A probe runs in a thread, once at a time, and its answer counts for a while. Which probes there are
is in `backend`, and what an answer means in `health` and `metrics`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

FRESH_SECONDS = 1.0
"""Seconds that an answer counts: callers within it share one check."""
LONGEST_SECONDS = 600.0
"""Most seconds that an answer of a costly check counts."""
LIMIT_SECONDS = 3.0
"""Seconds that a check may take before its callers get a TimeoutError."""

T = TypeVar("T")


class Probe(Generic[T]):
    """One check, cached. It never runs twice at once, even if its thread hangs for ever.

    Args:
        ask: runs in a thread.
        fresh: seconds that an answer, or an error, counts.
        limit: seconds from its start that an answer is waited for.
        share: the check takes at most this share of a core: its answer counts longer, up to
            LONGEST_SECONDS.
    """

    def __init__(
        self,
        ask: Callable[[], T],
        *,
        fresh: float = FRESH_SECONDS,
        limit: float = LIMIT_SECONDS,
        share: float = 1.0,
    ) -> None:
        self._ask = ask
        self._fresh = fresh
        self._limit = limit
        self._share = share
        self._asked: asyncio.Future[T] | None = None
        self._began = 0.0
        self._counts_until = 0.0

    async def answer(self, threads: Executor) -> T:
        """The answer, at most `fresh` seconds old.

        Raises:
            TimeoutError: none within the limit.
            Exception: what the check raised.
        """
        asked = self._asked
        if asked is None or (asked.done() and time.monotonic() >= self._counts_until):
            self._began = time.monotonic()
            asked = asyncio.get_running_loop().run_in_executor(threads, self._work)
            asked.add_done_callback(_looked_at)
            self._asked = asked
        if not asked.done():
            left = self._began + self._limit - time.monotonic()
            await asyncio.wait((asked,), timeout=max(0.0, left))
        if not asked.done():
            raise TimeoutError
        return asked.result()

    def _work(self) -> T:
        began = time.thread_time()
        try:
            return self._ask()
        finally:
            # in the thread: the answer must not be there before it is known how long it counts
            dear = min((time.thread_time() - began) / self._share, LONGEST_SECONDS)
            self._counts_until = time.monotonic() + max(self._fresh, dear)


def _looked_at(asked: asyncio.Future[T]) -> None:
    """Retrieve an error that nobody waits for, so that asyncio doesn't warn of it."""
    if not asked.cancelled():
        asked.exception()
