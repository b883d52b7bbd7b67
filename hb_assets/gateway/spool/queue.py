"""The spool's queue on disk: heartbeats that were accepted while Redis was away, in order.

What lies under HB_HOME/spool (0700, its files 0600), shared by all gateways of one HB_HOME, and who
may touch it when:

    spool-<number>.sqlite   the records: SQLite, WAL, synchronous=FULL. The highest number counts;
                            lower ones are those that SQLite could no longer read
    queued                  one byte a shard: FREE, QUEUED or CLOSING
    access.lock             held by whoever has a transaction under way
    replay.lock             held by the one process that replays

Its tables are in `database`. Health data: what is deleted is overwritten, and an empty
spool shrinks to a few pages.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from filelock import FileLock, Timeout

from hb_assets.buffer.producer import Bound, Lines, Outcomes
from hb_assets.core import private_files
from hb_assets.core.errors import SpoolFullError, SpoolUnavailableError
from hb_assets.core.settings import Settings
from hb_assets.gateway.spool import database
from hb_assets.gateway.spool.database import Record

FREE, QUEUED, CLOSING = 0, 1, 2
"""Marks of a shard: the spool holds nothing of it; new heartbeats go behind what it holds; the
last ones are on their way to Redis, so that it is better to wait a moment than to queue."""
ALL_FREE = bytes(100)
"""The marks while the spool is empty; HB_SHARDS is at most 100."""
FULL_RETRY_SECONDS = 10.0
"""When to ask again while the spool is full: Redis has to come back and take some of it first."""

_FULL_BYTES = 2048
"""With less room than this, which any heartbeat fits into, it is called full."""
_READ_BYTES = 4 * 2**20
"""About what one `read` returns, in bytes of NDJSON: what one round trip of a replay carries."""
_LOCK_SECONDS = 10.0
_LOCK_POLL_SECONDS = 0.005
_NAME = re.compile(r"spool-(\d{16,})\.sqlite")
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What the spool holds; `bytes` and `most_bytes` in bytes of NDJSON.

    `replayed` counts heartbeats that Redis has taken over since the spool was made;
    `damaged_records` were set aside, `damaged_files` are databases that SQLite can't read.
    """

    heartbeats: int = 0
    bytes: int = 0
    most_bytes: int = 0
    replayed: int = 0
    damaged_records: int = 0
    damaged_files: int = 0

    @property
    def full(self) -> bool:
        """Whether the spool may have no room for another heartbeat."""
        return self.bytes + _FULL_BYTES > self.most_bytes

    def alarms(self) -> list[str]:
        """One line for each thing that is wrong."""
        lines = []
        if self.heartbeats:
            lines.append(
                f"spool: {self.heartbeats:,} heartbeats ({self.bytes:,} of {self.most_bytes:,} "
                "bytes) wait for Redis; a running gateway brings them there"
            )
        if self.damaged_records or self.damaged_files:
            lines.append(
                f"spool: {self.damaged_records:,} records and {self.damaged_files:,} files are "
                "damaged; docs/http.md says what to do with them"
            )
        return lines


class Spool:
    """The spool of one HB_HOME, for the threads of one process.

    Every method takes access.lock, so that no two connections ever write or checkpoint at once
    (before 3.51.3, SQLite can lose a commit then), and raises SpoolUnavailableError: the disk is
    full, the folder can't be written, or the lock isn't to be had. Nothing was changed then.
    """

    def __init__(self, settings: Settings) -> None:
        self._folder = settings.spool_dir
        self._shards = settings.shards
        self._most_bytes = settings.spool_max_bytes
        bound = Bound.of(settings)
        # Never more than Redis could take at once.
        self._record_lines = min(bound.entry_heartbeats, bound.heartbeats)
        self._mutex = threading.Lock()
        self._access = _lock(self._folder / "access.lock")
        self._db: sqlite3.Connection | None = None
        self._number = 0
        self._marks: int | None = None
        self._seen: mmap.mmap | None = None

    def open(self) -> None:
        """Make or open it. Any other method does the same when it has to.

        Raises:
            SettingsError: it holds heartbeats of another HB_SHARDS, or has another format.
        """
        self._do(lambda _: None)

    def close(self) -> None:
        """Close it; what it holds stays."""
        with self._mutex:
            self._close()
            if self._marks is not None:
                os.close(self._marks)
                self._marks = self._seen = None

    def queued(self) -> bytes:
        """The marks of all shards; takes a tenth of a microsecond, in any thread.

        A mark is set before a commit and cleared after one: whoever asks after a `put` has
        returned, in whatever process, sees that it isn't FREE.
        """
        seen = self._seen
        return ALL_FREE if seen is None else seen[: len(ALL_FREE)]

    def put(self, calls: Sequence[Lines]) -> list[Outcomes]:
        """Store the lines of many calls in one transaction; all of a call's shard or none.

        Returns:
            For each call and shard None, once it is on the disk, or SpoolFullError.
        """
        return self._do(lambda db: self._put(db, calls))

    def read(self, after: int, skipping: frozenset[int]) -> list[Record]:
        """The next records behind `after`, in order, without those of the shards `skipping`.

        When these are the last ones, their shards are CLOSING: append and `remove` them, or
        `reopen` their shards. Records that don't match their checksum are set aside, with an
        alarm in the log.
        """
        return self._do(lambda db: self._read(db, after, skipping))

    def reopen(self, shards: Iterable[int]) -> None:
        """Let new heartbeats of shards that were CLOSING queue again: their last ones stay."""
        self._do(lambda _: self._mark(dict.fromkeys(shards, QUEUED)))

    def remove(self, found: Sequence[Record]) -> None:
        """Delete records that Redis has."""
        self._do(lambda db: database.remove(db, found))

    def recount(self) -> None:
        """Recount what the spool holds, from the records themselves."""
        self._do(database.recount)

    def compact(self) -> None:
        """Give the pages that hold nothing back to the file system."""
        self._do(database.compact, transaction=False)

    def rewrite(self, keep: Callable[[bytes], bool]) -> int:
        """Delete the lines that `keep` says no to, wherever they lie in it, for good.

        Safe beside running gateways: none of them replays meanwhile, so that nothing of it is on
        its way to Redis when this returns. Databases that SQLite can't read aren't rewritten.

        Returns:
            How many lines were deleted.
        """
        with self.replaying(_LOCK_SECONDS) as ours:
            if not ours:
                raise SpoolUnavailableError(
                    f"spool: a gateway has been replaying {self._folder} for {_LOCK_SECONDS:g} s: "
                    "try again when it is done"
                )
            deleted = self._do(lambda db: database.rewrite(db, keep))
            self.compact()
        return deleted

    def holdings(self) -> Holdings:
        """What it holds now."""
        return self._do(lambda db: _holdings(db, self._folder, self._most_bytes))

    def fact(self, name: str) -> str | None:
        """The value that was stored under this name."""
        value = self._do(lambda db: database.fact(db, name))
        return None if value is None else str(value)

    def remember(self, name: str, value: str) -> None:
        """Store a fact, which survives restarts."""
        self._do(lambda db: database.remember(db, name, value))

    @contextlib.contextmanager
    def replaying(self, timeout: float = 0) -> Iterator[bool]:
        """Context that makes this process the only one that replays; False: another one does.

        The lock is the kernel's, and goes with the process that holds it.
        """
        lock = _lock(self._folder / "replay.lock")  # a new one: threads exclude each other too
        try:
            private_files.make_folder(self._folder)
            lock.acquire(timeout=timeout)
        except Timeout:
            yield False
            return
        except OSError as error:
            raise self._unavailable(error) from None
        try:
            yield True
        finally:
            lock.release()

    # -- transactions

    def _do(self, work: Callable[[sqlite3.Connection], T], *, transaction: bool = True) -> T:
        """Run `work` on the live database; one that SQLite can't read is replaced first."""
        with self._mutex:
            try:
                private_files.make_folder(self._folder)
                with self._access:
                    try:
                        return self._attempt(work, transaction=transaction)
                    except sqlite3.DatabaseError as error:
                        if _code(error) not in _DAMAGE:
                            raise
                        self._replace(error)
                        return self._attempt(work, transaction=transaction)
            except (sqlite3.Error, OSError) as error:
                if _code(error) in (*_DAMAGE, sqlite3.SQLITE_ERROR):
                    self._close()
                raise self._unavailable(error) from None

    def _attempt(self, work: Callable[[sqlite3.Connection], T], *, transaction: bool) -> T:
        db = self._live()
        with database.transaction(db) if transaction else contextlib.nullcontext():
            result = work(db)
        self._mark_held(db)
        return result

    def _live(self) -> sqlite3.Connection:
        """The connection, to the database with the highest number."""
        numbers = _numbers(self._folder)
        if self._db is not None and numbers and numbers[-1] == self._number:
            return self._db
        self._close()
        self._open_marks()
        number = numbers[-1] if numbers else _new_number(0)
        return self._connect(number, numbers[:-1])

    def _connect(self, number: int, older: Sequence[int]) -> sqlite3.Connection:
        path = _path(self._folder, number)
        with contextlib.ExitStack() as undo:
            # SQLite gives the files beside it the same mode.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            undo.callback(db.close)
            db.execute("PRAGMA auto_vacuum = INCREMENTAL")
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise OSError(f"the file system has no shared memory, journal_mode is {mode}")
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA secure_delete = ON")
            db.execute(f"PRAGMA journal_size_limit = {_READ_BYTES}")
            with contextlib.ExitStack() as stack:
                damaged = None
                if older:
                    damaged = _open_read_only(_path(self._folder, older[-1]))
                    stack.callback(damaged.close)
                with database.transaction(db):
                    saved = database.prepare(db, self._shards, damaged)
            if saved:
                _log.error("spool: %d heartbeats were saved into %s", saved, path)
            for folder in (self._folder, self._folder.parent):
                _fsync_folder(folder)
            undo.pop_all()
        self._db, self._number = db, number
        return db

    def _replace(self, error: sqlite3.DatabaseError) -> None:
        """Start a new database, with all that can be read of the one that `error` is about."""
        self._close()
        numbers = _numbers(self._folder)
        _log.error(
            "alarm spool (error): SQLite can't read %s (%s): it stays there, a new one is begun "
            "with what can be saved of it; docs/http.md says what to do with it",
            _path(self._folder, numbers[-1]),
            error,
        )
        self._connect(_new_number(numbers[-1]), numbers)

    def _close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _unavailable(self, error: Exception) -> SpoolUnavailableError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, Timeout):
            reason = f"another process has been using it for {_LOCK_SECONDS:g} s"
        return SpoolUnavailableError(
            f"spool: can't use {self._folder} ({reason}): see to that disk and its permissions"
        )

    # -- marks

    def _open_marks(self) -> None:
        fresh = os.open(self._folder / "queued", os.O_RDWR | os.O_CREAT, 0o600)
        size = os.fstat(fresh).st_size
        if size < len(ALL_FREE):
            os.pwrite(fresh, ALL_FREE[size:], size)
        if self._marks is None:
            self._marks = fresh
        else:  # in one step: the event loop may read it at any moment
            os.dup2(fresh, self._marks, inheritable=False)
            os.close(fresh)
        # Its bytes were written above, and nobody makes it shorter: reading it can't fail.
        self._seen = mmap.mmap(self._marks, len(ALL_FREE), prot=mmap.PROT_READ)

    def _mark(self, changes: Mapping[int, int]) -> None:
        """Change the marks of some shards; only with access.lock."""
        assert self._marks is not None
        marks = self.queued()
        wanted = bytes(changes.get(shard, mark) for shard, mark in enumerate(marks))
        if wanted != marks:
            os.pwrite(self._marks, wanted, 0)

    def _mark_held(self, db: sqlite3.Connection) -> None:
        """Make the marks agree with what was committed."""
        held = database.held_shards(db)
        marks = enumerate(self.queued())
        self._mark({s: (mark or QUEUED) if s in held else FREE for s, mark in marks})

    # -- inside a transaction

    def _put(self, db: sqlite3.Connection, calls: Sequence[Lines]) -> list[Outcomes]:
        _, held, _ = database.sums(db)
        by_shard: dict[int, list[bytes]] = {}
        outcomes: list[Outcomes] = []
        for call in calls:
            outcome: Outcomes = {}
            for shard, lines in call.items():
                size = sum(map(len, lines)) + len(lines)
                if held + size > self._most_bytes:
                    outcome[shard] = self._full(held)
                    continue
                outcome[shard] = None
                held += size
                by_shard.setdefault(shard, []).extend(lines)
            outcomes.append(outcome)
        marks = self.queued()
        self._mark({shard: marks[shard] or QUEUED for shard in by_shard})
        database.add(db, by_shard, self._record_lines)
        return outcomes

    def _full(self, held: int) -> SpoolFullError:
        return SpoolFullError(
            f"the spool is full: it holds {held:,} of {self._most_bytes:,} bytes "
            "(HB_SPOOL_MAX_BYTES) until Redis is back: send it again later",
            retry_after=FULL_RETRY_SECONDS,
        )

    def _read(self, db: sqlite3.Connection, after: int, skipping: frozenset[int]) -> list[Record]:
        found, damaged, last = database.read(db, after, skipping, _READ_BYTES)
        if damaged:
            database.set_aside(db, damaged)
            _log.error(
                "alarm spool (error): %d records of %s don't match their checksum: set aside in its "
                "table `damaged`; docs/http.md says what to do with them",
                len(damaged),
                _path(self._folder, self._number),
            )
        self._mark({record.shard: CLOSING if last else QUEUED for record in found})
        return found


def holdings(settings: Settings) -> Holdings | None:
    """What the spool of an HB_HOME holds, without making one; None when there is none.

    Raises:
        SpoolUnavailableError: it can't be read.
    """
    folder = settings.spool_dir
    try:
        numbers = _numbers(folder)
        if not numbers:
            return None
        with contextlib.closing(_open_read_only(_path(folder, numbers[-1]))) as db:
            return _holdings(db, folder, settings.spool_max_bytes)
    except (sqlite3.Error, OSError) as error:
        raise SpoolUnavailableError(f"spool: can't read {folder} ({error})") from None


def _holdings(db: sqlite3.Connection, folder: Path, most_bytes: int) -> Holdings:
    heartbeats, size, damaged = database.sums(db)
    replayed = database.fact(db, "replayed") or 0
    older = max(0, len(_numbers(folder)) - 1)
    return Holdings(heartbeats, size, most_bytes, replayed, damaged, older)


def _lock(path: Path) -> FileLock:
    return FileLock(
        path,
        timeout=_LOCK_SECONDS,
        poll_interval=_LOCK_POLL_SECONDS,
        mode=0o600,
        thread_local=False,
    )


def _numbers(folder: Path) -> list[int]:
    """Numbers of the databases in the folder, in order."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def _new_number(last: int) -> int:
    # The clock, so that a name never comes again: SQLite deletes files beside a database by name.
    return max(time.time_ns() // 1000, last + 1)


def _path(folder: Path, number: int) -> Path:
    return folder / f"spool-{number:016d}.sqlite"


def _open_read_only(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _code(error: Exception) -> int:
    """SQLite's primary result code; 0 for another error."""
    return int(getattr(error, "sqlite_errorcode", 0)) & 0xFF
