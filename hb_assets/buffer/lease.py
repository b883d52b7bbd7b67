"""Leases on a (day, shard) in Redis, for consolidators on several machines.

They save duplicate work and aren't needed for safety: two consolidators at once lose nothing. Lock
files, for one machine, are in `lake.storage.locks`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import redis.exceptions as failures
from redis.lock import Lock

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client
from hb_assets.core.settings import Settings

SECONDS = 900
"""A lease of somebody who died ends by itself; a longer work goes on without it."""


class Leases:
    """Makes leases: call it with a day and a shard for a context manager that holds theirs."""

    def __init__(self, client: Client, settings: Settings) -> None:
        self._client = client
        self._wait = settings.lock_wait.total_seconds()

    @contextmanager
    def __call__(self, day: dt.date, shard: int) -> Iterator[bool]:
        """Hold the lease; whether it is held.

        After HB_LOCK_WAIT, or while Redis doesn't answer, the work goes on without.
        """
        lock = Lock(self._client, keys.lease(shard, day), timeout=SECONDS)
        try:
            held = lock.acquire(blocking_timeout=self._wait)
        except (failures.RedisError, OSError):
            held = False
        try:
            yield held
        finally:
            if held:
                # It may have ended meanwhile, or Redis be away: it ends by itself.
                with suppress(failures.RedisError, OSError):
                    lock.release()
