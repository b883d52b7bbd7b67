"""Inventory: what the lake holds of each day, out of names and footers alone.

Belongs here: counts that sensors, `hb status` and the audit ask for often. Doesn't belong here:
anything that reads rows, and what to do about it (`policy`).
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from hb_assets.lake import consolidated, fragments, layout, minutes, parquet
from hb_assets.lake.consolidated import ConsolidatedNote
from hb_assets.lake.fragments import Fragment
from hb_assets.lake.layout import HEARTBEATS, RAW
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings


@dataclass(frozen=True, slots=True)
class DayState:
    """How a day stands.

    `digest` changes when its set of raw fragments does, `pending_digest` when its set of pending
    ones does; `oldest_pending_ms` is when the oldest of them was written
    (epoch milliseconds); `most_pending` counts the pending fragments of the shard that has most.
    """

    day: dt.date
    fragments: int
    fragment_rows: int
    fragment_bytes: int
    digest: str
    pending_fragments: int
    pending_rows: int
    most_pending: int
    pending_digest: str
    oldest_pending_ms: int | None
    rows: int
    unique: int
    superseded: int
    repeats: int
    corrections: int
    replayed: int
    rows_written: int
    bytes: int
    minutes_current: bool


def days(lake: Lake) -> list[dt.date]:
    """Days of which the lake holds anything, in order."""
    found = {*layout.days_of(lake.root, RAW), *layout.days_of(lake.root, HEARTBEATS)}
    return sorted(found)


def raw_digest(lake: Lake, day: dt.date) -> str:
    """Digest of the day's raw fragments (as `DayState.digest`, without opening any file)."""
    return fragments.digest(fragments.all_listed(lake, day))


def notes(lake: Lake, day: dt.date) -> list[ConsolidatedNote]:
    """Notes of the day's consolidated files. Raises DamagedFileError."""
    found = (published(lake, day, shard) for shard in range(lake.shards))
    return [one[0] for one in found if one is not None]


def day_state(lake: Lake, day: dt.date, settings: Settings) -> DayState:
    """How a day stands now.

    Raises:
        DamagedFileError: a footer can't be read.
    """
    raw: list[Fragment] = []
    waiting: list[Fragment] = []
    most = 0
    notes: list[ConsolidatedNote] = []
    size = 0
    current = True
    for shard in range(lake.shards):
        listed = fragments.listed(lake, day, shard)
        file = published(lake, day, shard)
        if file:
            notes.append(file[0])
            size += file[1]
            names = frozenset(file[0].fragments)
            current = current and minutes.is_current(lake, day, shard, settings.device_priority)
        else:
            names = frozenset()
        new = [one for one in listed if str(one.name) not in names]
        raw += listed
        waiting += new
        most = max(most, len(new))
    return DayState(
        day=day,
        fragments=len(raw),
        fragment_rows=sum(one.rows for one in raw),
        fragment_bytes=sum(one.bytes for one in raw),
        digest=fragments.digest(raw),
        pending_fragments=len(waiting),
        pending_rows=sum(one.rows for one in waiting),
        most_pending=most,
        pending_digest=fragments.digest(waiting),
        oldest_pending_ms=min((_written_ms(one.path) for one in waiting), default=None),
        rows=sum(note.rows for note in notes),
        unique=sum(note.unique for note in notes),
        superseded=sum(note.superseded for note in notes),
        repeats=sum(note.repeats for note in notes),
        corrections=sum(note.corrections for note in notes),
        replayed=sum(note.replayed for note in notes),
        rows_written=sum(note.rows_written for note in notes),
        bytes=size,
        minutes_current=current,
    )


def _written_ms(path: Path) -> int:
    return path.stat().st_mtime_ns // 1_000_000


def published(lake: Lake, day: dt.date, shard: int) -> tuple[ConsolidatedNote, int] | None:
    """Note and size in bytes of a consolidated file; None where there is none.

    A replaced file is another inode, so that a stat tells whether a footer was read already.

    Raises:
        DamagedFileError: the footer can't be read.
    """
    path = layout.consolidated_file(lake.root, day, shard)
    try:
        seen = path.stat()
    except FileNotFoundError:
        return None
    return _note(path, seen.st_ino, seen.st_mtime_ns), seen.st_size


@lru_cache(maxsize=20_000)
def _note(path: Path, inode: int, mtime_ns: int) -> ConsolidatedNote:  # noqa: ARG001  # they are the cache's key
    return parquet.note(path, consolidated.ConsolidatedNote)
