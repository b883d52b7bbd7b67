"""Inventory: counts of what the lake holds of each day, from file names and footers alone.

Sensors, `hb status` and the gateway's survey ask for these counts often. What can't be read is one
line among the `faults`, and everything else is counted all the same. No rows are read, and nothing
is decided here (`compaction.policy` does).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hb_assets.core.errors import DamagedFileError
from hb_assets.core.settings import Settings
from hb_assets.lake import minutes
from hb_assets.lake.files import consolidated, fragments
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.files.counts import Counts
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.catalog import remembered
from hb_assets.lake.storage.durable_files import Fingerprint, barred, fingerprint
from hb_assets.lake.storage.layout import HEARTBEATS, RAW
from hb_assets.lake.storage.store import Lake


class DayState(Counts, kw_only=True):
    """The state of a day: its counts, and what is pending.

    `digest` changes when its set of raw fragments does, `pending_digest` when its set of pending
    ones does; `oldest_pending_ms` is when the oldest of them was written
    (epoch milliseconds); `most_pending` counts the pending fragments of the shard that has most.
    `minutes_current`: the minute-level files are made of all rows that the day has. `faults` says,
    in one line each, which files and folders couldn't be read: the counts are those of all others.
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
    bytes: int
    minutes_current: bool
    faults: tuple[str, ...] = ()


def days(lake: Lake) -> list[dt.date]:
    """Days of which the lake holds anything, in order. Raises OSError."""
    found = {*layout.days_of(lake.root, RAW), *layout.days_of(lake.root, HEARTBEATS)}
    return sorted(found)


def days_found(lake: Lake, faults: list[str]) -> list[dt.date]:
    """As `days`, without those of a folder that can't be read: `faults` gets a line about it."""
    found: set[dt.date] = set()
    for kind in (RAW, HEARTBEATS):
        with noted(faults, lake.root / kind):
            found.update(layout.days_of(lake.root, kind))
    return sorted(found)


@contextmanager
def noted(faults: list[str], path: Path) -> Iterator[None]:
    """Context that turns a read error into one line of `faults`, and goes on behind the block.

    A file that is gone is no fault: it was replaced, or pruned.
    """
    try:
        yield
    except FileNotFoundError:
        return
    except DamagedFileError as error:
        faults.append(str(error))
    except OSError as error:
        reason, closed = (
            error.strerror or type(error).__name__,
            barred(Path(error.filename or path)),
        )
        faults.append(f"{closed} can't be read ({reason}): mend its permissions or its disk")


def raw_digest(lake: Lake, day: dt.date) -> str:
    """Digest of the day's raw fragments (as `DayState.digest`, without opening any file)."""
    return fragments.digest(fragments.all_listed(lake, day))


def published_metadata(lake: Lake, day: dt.date) -> list[ConsolidatedMetadata]:
    """Footer metadata of the day's consolidated files. Raises DamagedFileError."""
    found = (published(lake, day, shard) for shard in range(lake.shards))
    return [one[0] for one in found if one is not None]


def day_state(lake: Lake, day: dt.date, settings: Settings) -> DayState:
    """The state of a day now, counted shard by shard and file by file."""
    raw: list[Fragment] = []
    waiting: list[Fragment] = []
    faults: list[str] = []
    most = 0
    notes: list[ConsolidatedMetadata] = []
    size = 0
    current = True
    for shard in range(lake.shards):
        listed: list[Fragment] = []
        names: frozenset[str] = frozenset()
        with noted(faults, layout.shard_folder(lake.root, RAW, day, shard)):
            listed = fragments.listed(lake, day, shard)
        with noted(faults, layout.consolidated_file(lake.root, day, shard)):
            file = published(lake, day, shard)
            if file:
                notes.append(file[0])
                size += file[1]
                names = frozenset(file[0].fragments)
        made = False
        with noted(faults, layout.minutes_file(lake.root, day, shard)):
            made = minutes.is_current(lake, day, shard, settings.device_priority)
        current = current and made
        new = [one for one in listed if str(one.name) not in names]
        raw += listed
        waiting += new
        most = max(most, len(new))
    seen = _seen(raw, faults)
    pending = [seen[one.path] for one in waiting if one.path in seen]
    return DayState.of(
        sum(notes, Counts()),
        day=day,
        fragments=len(raw),
        fragment_rows=sum(one.rows for one in seen.values()),
        fragment_bytes=sum(one.bytes for one in seen.values()),
        digest=fragments.digest(raw),
        pending_fragments=len(waiting),
        pending_rows=sum(one.rows for one in pending),
        most_pending=most,
        pending_digest=fragments.digest(waiting),
        oldest_pending_ms=min((one.written_ms for one in pending), default=None),
        bytes=size,
        minutes_current=current and not waiting,
        faults=tuple(dict.fromkeys(faults)),
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    rows: int
    bytes: int
    written_ms: int


def _seen(raw: list[Fragment], faults: list[str]) -> dict[Path, _Seen]:
    """Sizes and times of the fragments that can be read."""
    found = {}
    for one in raw:
        with noted(faults, one.path):
            at = fingerprint(one.path)
            found[one.path] = _Seen(0, at.size, at.mtime_ns // 1_000_000)
            found[one.path] = _Seen(one.rows, at.size, at.mtime_ns // 1_000_000)
    return found


def published(lake: Lake, day: dt.date, shard: int) -> tuple[ConsolidatedMetadata, int] | None:
    """Footer metadata and size in bytes of a consolidated file; None where there is none.

    Raises:
        DamagedFileError: the footer can't be read, or the file is gone although raw alone hasn't
            all of it (as `consolidated.current`).
        OSError: the disk can't be read.
    """
    path = layout.consolidated_file(lake.root, day, shard)
    try:
        seen = fingerprint(path)
    except FileNotFoundError:
        if consolidated.current(lake, day, shard) is None:
            return None
        return published(lake, day, shard)  # it was published meanwhile
    return _note(path, seen), seen.size


@remembered(20_000)
def _note(path: Path, _seen: Fingerprint) -> ConsolidatedMetadata:
    return parquet.metadata(path, consolidated.ConsolidatedMetadata)
