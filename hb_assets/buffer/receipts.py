"""Receipts of confirmed appends, kept in a file where Redis can't lose them.

One small file under HB_HOME holds the highest count of appended heartbeats that each shard's ledger
was ever seen to have by a producer whose append was confirmed. `scripts/append.lua` and the audit
act on a ledger that has less.

A count in that ledger only grows. One that is below its receipt was set back: bytes of the
append-only file are gone that were on disk once, a replica took over that didn't have them, or
somebody emptied the server. How many heartbeats that is, is the difference, exactly.

The file is read and written in place (a mapping would end the process with SIGBUS on a full disk).
It outlives any kill, and is not fsynced: after a power cut it may be behind what Redis has on disk,
never ahead. Nor does an append wait for it: a full disk, or a process that was stopped while it
held the lock, leaves it behind until a later append of that shard can enter its count.
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import threading
import time
import weakref
from collections.abc import Mapping

from hb_assets.core import private_files
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings

_COUNT = 8
"""Bytes of a count: little-endian, without a sign."""
_TRIES = 50
_PAUSE_SECONDS = 0.0001
"""Another process holds the lock for microseconds; one that holds it for longer isn't running."""

_log = logging.getLogger(__name__)


class Receipts:
    """The receipts of one HB_HOME, for any number of threads and processes.

    Raises:
        SettingsError: HB_HOME can't be written.
    """

    def __init__(self, settings: Settings) -> None:
        self._path = settings.home_dir / "receipts"
        try:
            private_files.make_folder(settings.home_dir)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            weakref.finalize(self, os.close, self._file)
            os.pread(self._file, 1, 0)
        except OSError as error:
            raise SettingsError(
                f"HB_HOME: can't write to {self._path} ({error.strerror}): set HB_HOME to a folder "
                "that can be written"
            ) from None
        self._counts = struct.Struct(f"<{settings.shards}Q")
        self._highest = [0] * settings.shards
        self._lock = threading.Lock()
        self._behind = False

    def known(self) -> list[int]:
        """For each shard the most heartbeats that its ledger was seen to have appended."""
        size = self._counts.size
        try:
            found = os.pread(self._file, size, 0)
        except OSError:
            found = b""
        if len(found) < size:  # new, or cut in the middle of a count
            found = found[: len(found) // _COUNT * _COUNT].ljust(size, b"\0")
        return list(map(max, self._counts.unpack(found), self._highest))

    def enter(self, appended: Mapping[int, int]) -> None:
        """Store the counts, by shard, that confirmed appends were answered with.

        Never waits for long.
        """
        with self._lock:
            for shard, count in appended.items():
                self._highest[shard] = max(self._highest[shard], count)
            try:
                self._lock_file()
                try:
                    os.pwrite(self._file, self._counts.pack(*self.known()), 0)
                finally:
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            except OSError as error:
                if not self._behind:
                    _log.error(
                        "%s is behind, a loss in Redis may go unseen (%s): see to that disk, or to "
                        "a stopped process of this HB_HOME",
                        *(self._path, error.strerror),
                    )
                self._behind = True
            else:
                self._behind = False

    def _lock_file(self) -> None:
        for _ in range(1 if self._behind else _TRIES):
            try:
                return fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                held = error
                time.sleep(_PAUSE_SECONDS)
        raise held
