"""Receipts: what Redis has confirmed, remembered where Redis can't lose it.

Belongs here: one small file under HB_HOME, with the highest count of appended heartbeats that each
shard's ledger was ever seen to have by a producer whose append was confirmed. Doesn't belong here:
what follows from a ledger that has less (`scripts/append.lua`, `audit`).

A count in that ledger only grows. One that is below its receipt was set back: bytes of the
append-only file are gone that were on disk once, a replica took over that didn't have them, or
somebody emptied the server. How many heartbeats that is, is the difference, exactly.

The file is shared memory of this home's processes. A receipt costs two system calls, outlives any
kill, and is not fsynced: after a power cut it may be behind what Redis has on disk, never ahead.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import threading
import weakref

from hb_assets.errors import SettingsError
from hb_assets.settings import Settings

_COUNT = struct.Struct("<Q")


class Receipts:
    """The receipts of one HB_HOME, for any number of threads and processes.

    Raises:
        SettingsError: HB_HOME can't be written.
    """

    def __init__(self, settings: Settings) -> None:
        path = settings.home_dir / "receipts"
        size = settings.shards * _COUNT.size
        try:
            settings.home_dir.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            weakref.finalize(self, os.close, self._file)
            if os.fstat(self._file).st_size < size:
                os.ftruncate(self._file, size)
            self._counts = mmap.mmap(self._file, size)
        except OSError as error:
            raise SettingsError(
                f"HB_HOME: can't write to {path} ({error.strerror}): set HB_HOME to a folder that "
                "can be written"
            ) from None
        self._lock = threading.Lock()

    def of(self, shard: int) -> int:
        """The most heartbeats that the shard's ledger was seen to have appended."""
        count: int = _COUNT.unpack_from(self._counts, shard * _COUNT.size)[0]
        return count

    def enter(self, shard: int, appended: int) -> None:
        """Remember a count that a confirmed append was answered with."""
        with self._lock:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                if appended > self.of(shard):
                    _COUNT.pack_into(self._counts, shard * _COUNT.size, appended)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
