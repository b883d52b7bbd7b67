"""Tables of the spool's SQLite database, and the statements of one transaction on them.

    records   id: the place in the order, never used twice; shard; n: heartbeats; checksum (of
              shard, n and lines); lines: NDJSON
    damaged   records that don't match their checksum, as they were found
    held      records, heartbeats and bytes of each shard, kept by triggers
    facts     name and value: `shards`, `replayed` (heartbeats), and what is to be remembered

Files, locks and the marks of shards are in `queue`.
"""

from __future__ import annotations

import contextlib
import hashlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from hb_assets.core.errors import SettingsError

FORMAT = 1

_ENTER = """INSERT INTO held VALUES (new.shard, 1, new.n, length(new.lines))
    ON CONFLICT (shard) DO UPDATE SET records = records + 1, heartbeats = heartbeats + new.n,
    bytes = bytes + length(new.lines);"""
_LEAVE = """UPDATE held SET records = records - 1, heartbeats = heartbeats - old.n,
    bytes = bytes - length(old.lines) WHERE shard = old.shard;"""
_SCHEMA = (
    """CREATE TABLE records (id INTEGER PRIMARY KEY AUTOINCREMENT, shard INTEGER NOT NULL,
    n INTEGER NOT NULL, checksum BLOB NOT NULL, lines BLOB NOT NULL)""",
    """CREATE TABLE damaged (id INTEGER PRIMARY KEY, shard, n, checksum, lines,
    found_ms INTEGER NOT NULL)""",
    # no types: counting must not fail on what the disk has damaged
    "CREATE TABLE held (shard PRIMARY KEY, records, heartbeats, bytes)",
    f"CREATE TRIGGER entered AFTER INSERT ON records BEGIN {_ENTER} END",
    f"CREATE TRIGGER gone AFTER DELETE ON records BEGIN {_LEAVE} END",
    f"CREATE TRIGGER rewritten AFTER UPDATE ON records BEGIN {_LEAVE} {_ENTER} END",
    "CREATE TABLE facts (name TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID",
    f"PRAGMA user_version = {FORMAT}",
)
_COLUMNS = "id, shard, n, checksum, lines"
_INSERT = f"INSERT OR IGNORE INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)"  # noqa: S608  # ours

_Row: TypeAlias = tuple[Any, ...]
"""A row with `_COLUMNS`: anything may stand in it when the disk has damaged it."""


@dataclass(frozen=True, slots=True)
class Record:
    """Lines of one shard, and their place in the order."""

    id: int
    shard: int
    lines: tuple[bytes, ...]


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """A transaction: everything in the block or nothing; on disk when the block ends."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # SQLite ends it by itself when the disk is full, for one
            db.execute("ROLLBACK")
        raise


def prepare(db: sqlite3.Connection, shards: int, older: sqlite3.Connection | None) -> int:
    """Make the tables if there are none, with what can be read of an `older` damaged database.

    Returns:
        Heartbeats that came from the older one.

    Raises:
        SettingsError: another format, or records of another number of shards.
    """
    saved = 0
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version == 0:
        for statement in _SCHEMA:
            db.execute(statement)
        if older is not None:
            saved = _salvage(db, older)
    elif version != FORMAT:
        raise SettingsError(
            f"spool: of format {version}, this version of hb reads {FORMAT}: let the other one "
            "replay it first, or set HB_SPOOL_MAX_BYTES=0"
        )
    # What the triggers counted may be damaged too.
    recount(db)
    known = fact(db, "shards")
    if known is not None and known != shards and held_shards(db):
        raise SettingsError(
            f"spool: it holds heartbeats of HB_SHARDS={known}: run the gateway with that until "
            "Redis has taken them"
        )
    remember(db, "shards", shards)
    return saved


def add(db: sqlite3.Connection, by_shard: Mapping[int, Sequence[bytes]], most_lines: int) -> None:
    """Insert lines, in records of at most `most_lines`."""
    for shard, lines in by_shard.items():
        for start in range(0, len(lines), most_lines):
            db.execute(_INSERT, (None, shard, *_content(shard, lines[start : start + most_lines])))


def read(
    db: sqlite3.Connection, after: int, skipping: Iterable[int], most_bytes: int
) -> tuple[list[Record], list[int], bool]:
    """Records behind `after`, in order, up to about `most_bytes` of lines.

    Returns:
        The records that are whole, the ids of damaged ones, and whether these are the last.
    """
    found: list[Record] = []
    damaged: list[int] = []
    size = 0
    # The lines of shards that are skipped aren't read from the disk.
    shards = ", ".join(str(int(shard)) for shard in skipping)
    statement = (
        f"SELECT {_COLUMNS} FROM records WHERE id > ?"  # noqa: S608  # integers
        f" AND shard NOT IN ({shards}) ORDER BY id"
    )
    with contextlib.closing(db.execute(statement, (after,))) as rows:
        for row in rows:
            record = _record(row)
            if record is None:
                damaged.append(row[0])
                continue
            found.append(record)
            size += len(row[4])
            if size >= most_bytes:
                return found, damaged, False
    return found, damaged, True


def remove(db: sqlite3.Connection, found: Sequence[Record]) -> None:
    """Delete records, and count their heartbeats as replayed."""
    db.executemany("DELETE FROM records WHERE id = ?", [(record.id,) for record in found])
    replayed = fact(db, "replayed") or 0
    remember(db, "replayed", replayed + sum(len(record.lines) for record in found))


def set_aside(db: sqlite3.Connection, ids: Sequence[int]) -> None:
    """Move damaged records out of the way, as they are."""
    if not ids:
        return
    now_ms = time.time_ns() // 1_000_000
    for number in ids:
        db.execute(
            "INSERT OR REPLACE INTO damaged SELECT *, ? FROM records WHERE id = ?", (now_ms, number)
        )
        db.execute("DELETE FROM records WHERE id = ?", (number,))
    recount(db)


def rewrite(db: sqlite3.Connection, keep: Callable[[bytes], bool]) -> int:
    """Delete the lines that `keep` says no to, out of damaged records too; how many."""
    # A new checksum must not make a damaged record look whole.
    set_aside(db, [row[0] for row in _rows(db, "records") if _record(row) is None])
    deleted = 0
    for table in ("records", "damaged"):
        for number, shard, _, _, text in _rows(db, table):
            lines = (text if isinstance(text, bytes) else str(text).encode()).split(b"\n")
            kept = [line for line in lines if keep(line)]
            deleted += len(lines) - len(kept)
            if not kept:
                db.execute(f"DELETE FROM {table} WHERE id = ?", (number,))  # noqa: S608  # ours
            elif len(kept) < len(lines):
                statement = f"UPDATE {table} SET n = ?, checksum = ?, lines = ?"  # noqa: S608  # ours
                db.execute(statement + " WHERE id = ?", (*_content(shard, kept), number))
    return deleted


def compact(db: sqlite3.Connection) -> None:
    """Give pages that hold nothing back to the file system; outside a transaction."""
    # `execute` would take one step of it, a page; a script is run to its end
    db.executescript("PRAGMA incremental_vacuum")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


def recount(db: sqlite3.Connection) -> None:
    """Make `held` agree with the records."""
    db.execute("DELETE FROM held")
    db.execute(
        "INSERT INTO held SELECT shard, count(*), sum(n), sum(length(lines)) FROM records"
        " GROUP BY shard"
    )


def held_shards(db: sqlite3.Connection) -> set[int]:
    """The shards that have records; a damaged number counts as 0."""
    held = db.execute("SELECT shard FROM held WHERE records > 0")
    return {shard if isinstance(shard, int) and 0 <= shard < 100 else 0 for (shard,) in held}


def sums(db: sqlite3.Connection) -> tuple[int, int, int]:
    """Heartbeats and bytes of the records, and how many damaged records there are."""
    heartbeats, size = db.execute("SELECT total(heartbeats), total(bytes) FROM held").fetchone()
    (damaged,) = db.execute("SELECT count(*) FROM damaged").fetchone()
    return int(heartbeats), int(size), damaged


def fact(db: sqlite3.Connection, name: str) -> Any:
    """The value that is stored under a name; None where there is none."""
    row = db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
    return None if row is None else row[0]


def remember(db: sqlite3.Connection, name: str, value: str | int) -> None:
    """Store a value under a name."""
    if fact(db, name) != value:
        db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))


def _salvage(db: sqlite3.Connection, older: sqlite3.Connection) -> int:
    """Copy what can be read, from both ends towards the damage."""
    with contextlib.suppress(sqlite3.Error):
        for name, value in older.execute("SELECT name, value FROM facts").fetchall():
            remember(db, name, value)
    saved = 0
    for order in ("ASC", "DESC"):
        for row in _readable(older, order):
            if _record(row) is not None and db.execute(_INSERT, row).rowcount:
                saved += row[2]
    return saved


def _readable(db: sqlite3.Connection, order: str) -> Iterator[_Row]:
    """Rows from one end until the first that can't be read."""
    with contextlib.suppress(sqlite3.Error):
        yield from db.execute(f"SELECT {_COLUMNS} FROM records ORDER BY id {order}")  # noqa: S608  # ours


def _rows(db: sqlite3.Connection, table: str) -> Iterator[_Row]:
    """All rows, one in memory at a time; the table may be changed meanwhile."""
    for (number,) in db.execute(f"SELECT id FROM {table} ORDER BY id").fetchall():  # noqa: S608  # ours
        statement = f"SELECT {_COLUMNS} FROM {table} WHERE id = ?"  # noqa: S608  # ours
        yield from db.execute(statement, (number,)).fetchall()


def _content(shard: int, lines: Sequence[bytes]) -> tuple[int, bytes, bytes]:
    """Values of n, checksum and lines."""
    text = b"\n".join(lines)
    return len(lines), _checksum(shard, len(lines), text), text


def _record(row: _Row) -> Record | None:
    """The record that a row holds; None when it isn't what was written."""
    number, shard, n, checksum, text = row
    if not (isinstance(shard, int) and isinstance(n, int) and isinstance(text, bytes)):
        return None
    if checksum != _checksum(shard, n, text):
        return None
    return Record(number, shard, tuple(text.split(b"\n")))


def _checksum(shard: int, n: int, text: bytes) -> bytes:
    digest = hashlib.blake2b(f"{shard} {n}\n".encode(), digest_size=16)
    digest.update(text)
    return digest.digest()
