"""Locks on a (day, shard) by lock files in the lake, for processes of one machine.

They save duplicate work and aren't needed for safety: two consolidators at once lose nothing
(`compaction.consolidation`). Leases, for several machines, are in `buffer.lease`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager

import filelock

from hb_assets.core.settings import Settings
from hb_assets.lake.storage import permissions
from hb_assets.lake.storage.durable_files import make_folder
from hb_assets.lake.storage.store import Lake

FOLDER = "locks"


class FileLocks:
    """Makes locks: call it with a day and a shard for a context manager that holds theirs."""

    def __init__(self, lake: Lake, settings: Settings) -> None:
        self._folder = lake.root / FOLDER
        self._wait = settings.lock_wait.total_seconds()
        make_folder(self._folder, lake.root)
        self._mode = permissions.of_locks(lake.root)

    @contextmanager
    def __call__(self, day: dt.date, shard: int) -> Iterator[bool]:
        """Hold the lock; whether it is held.

        After HB_LOCK_WAIT the work goes on without: whoever has it may be asleep for good.
        """
        path = self._folder / f"day={day.isoformat()}-shard={shard:02d}.lock"
        lock = filelock.FileLock(path, timeout=self._wait, mode=self._mode)
        try:
            lock.acquire()
        except (filelock.Timeout, OSError, NotImplementedError):
            yield False
            return
        try:
            yield True
        finally:
            lock.release()
