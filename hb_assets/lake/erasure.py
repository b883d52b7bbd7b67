"""Erasure: making the bytes of a forgotten user go from the lake.

Belongs here: finding them, in every file, and the steps for one day and for the quarantine; each
may be done again after a crash. Doesn't belong here: the tombstone (`tombstones`), which has to
stand before, and buffer and spool (`erasure` of the layer above).
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.errors import DamagedFileError, FencedError
from hb_assets.lake import (
    erased,
    fragments,
    inventory,
    layout,
    minutes,
    parquet,
    pruning,
    quarantine,
)
from hb_assets.lake.consolidation import Lock, Watermarks, consolidate
from hb_assets.lake.engine import engine
from hb_assets.lake.layout import DAMAGED, QUARANTINE
from hb_assets.lake.store import Lake
from hb_assets.record import shard_of
from hb_assets.schema import ARRIVAL
from hb_assets.settings import Settings

_ATTEMPTS = 5
_HOLDING = """
SELECT DISTINCT filename FROM read_parquet($paths, hive_partitioning = false, filename = true)
WHERE user_id = $user AND arrival_ms <= $cutoff
"""


@dataclass(frozen=True, slots=True)
class Whose:
    """Which heartbeats: the user's, up to an arrival (epoch ms)."""

    user_id: str
    cutoff_ms: int

    def said_in(self, text: bytes) -> bool:
        """Whether a record's bytes speak of the user, as far as that can be told.

        A JSON object does when its `user_id` is the user's. Other bytes do when the user_id stands
        in them between quotes.
        """
        try:
            found = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return any(needle in text for needle in self.needles)
        if isinstance(found, dict) and isinstance(found.get("user_id"), str):
            return bool(found["user_id"] == self.user_id)
        return any(needle in text for needle in self.needles)

    @property
    def needles(self) -> tuple[bytes, ...]:
        """The user_id as JSON may write it, quotes included."""
        plain = msgspec.json.encode(self.user_id)
        escaped = "".join(
            char if char.isascii() else "".join(f"\\u{unit:04x}" for unit in _utf16(char))
            for char in plain.decode()
        ).encode()
        return tuple(dict.fromkeys((plain, escaped)))

    @property
    def named(self) -> re.Pattern[bytes]:
        """The field user_id with the user in it, as any JSON text has it, escaped once or not."""
        users = b"|".join(re.escape(needle[1:-1]) for needle in self.needles)
        return re.compile(
            rb'\\?"user_id\\?"\s*:\s*\\?"(?:' + users + rb')\\?"',
        )


def _utf16(char: str) -> Iterator[int]:
    encoded = char.encode("utf-16-be")
    return (int.from_bytes(encoded[at : at + 2]) for at in range(0, len(encoded), 2))


@dataclass(frozen=True, slots=True)
class Gone:
    """What went: days that were written anew, rows, fragments deleted, records of quarantine."""

    days: int = 0
    rows: int = 0
    fragments: int = 0
    quarantined: int = 0

    def plus(self, other: Gone) -> Gone:
        """Both together."""
        return Gone(
            self.days + other.days,
            self.rows + other.rows,
            self.fragments + other.fragments,
            self.quarantined + other.quarantined,
        )


def holding(lake: Lake, whose: Whose, settings: Settings) -> dict[dt.date, list[Path]]:
    """Files under raw, heartbeats and minutes that may hold the user's heartbeats, by day.

    Minutes don't know arrivals: they are listed where they weren't made from the published file.
    """
    shard = shard_of(whose.user_id, lake.shards)
    found = {}
    with engine(settings) as connection:
        for day in inventory.days(lake):
            paths = _holding(lake, day, shard, whose, connection)
            if not minutes.is_current(lake, day, shard, settings.device_priority):
                made = layout.minutes_file(lake.root, day, shard)
                paths += [made] if made.exists() else []
            if paths:
                found[day] = paths
    return found


def _holding(
    lake: Lake, day: dt.date, shard: int, whose: Whose, connection: duckdb.DuckDBPyConnection
) -> list[Path]:
    published = layout.consolidated_file(lake.root, day, shard)
    for _ in range(_ATTEMPTS):
        paths = [one.path for one in fragments.listed(lake, day, shard)]
        paths += [published] if published.exists() else []
        if not paths:
            return []
        parameters = {
            "paths": [str(path) for path in paths],
            "user": whose.user_id,
            "cutoff": whose.cutoff_ms,
        }
        try:
            found = connection.sql(_HOLDING, params=parameters).fetchall()
        except duckdb.IOException:
            continue  # a file went meanwhile
        except duckdb.Error as error:
            raise parquet.explained(error, paths) from None
        return [Path(path) for (path,) in found]
    raise DamagedFileError(f"day {day.isoformat()}, shard {shard:02d} can't be read")


def forget_day(
    lake: Lake,
    day: dt.date,
    whose: Whose,
    settings: Settings,
    *,
    watermarks: Watermarks,
    lock: Lock,
) -> Gone:
    """Write the day's shard anew without the user, then delete the fragments that hold rows of it.

    They are deleted, not rewritten: what else they hold is in the consolidated file. A fragment
    stays whose entries aren't all acknowledged yet: drain, read the watermarks and call this again.

    Raises:
        CheckFailedError, DamagedFileError, OSError: as `consolidate`.
    """
    shard = shard_of(whose.user_id, lake.shards)
    before = _erased_rows(lake, day)
    for attempt in range(_ATTEMPTS):
        try:
            consolidate(
                lake,
                day,
                settings,
                rewrite=True,
                shards=[shard],
                watermarks=watermarks,
                lock=lock,
            )
            break
        except FencedError:
            if attempt == _ATTEMPTS - 1:
                raise
    with engine(settings) as connection:
        doomed = set(_holding(lake, day, shard, whose, connection))
        pruned = pruning.prune_shard(lake, day, shard, connection, lambda one: one.path in doomed)
    minutes.build(lake, day, settings)
    return Gone(1, _erased_rows(lake, day) - before, pruned.fragments)


def _erased_rows(lake: Lake, day: dt.date) -> int:
    return sum(note.erased for note in inventory.notes(lake, day))


def forget_quarantine(lake: Lake, whose: Whose, settings: Settings) -> Gone:
    """Take the user's records out of quarantine: files that hold one are written anew, renamed.

    Raises:
        DamagedFileError: a file can't be read.
        OSError: a file can't be written.
    """
    taken = 0
    for path in sorted((lake.root / QUARANTINE).rglob("*.parquet")):
        rows = quarantine.read(path)
        gone = _spoken_of(rows, whose)
        count = int(pc.sum(gone).as_py() or 0)
        if not count:
            continue
        # Each of these steps may be the last before a crash: an identity counts once, wherever.
        erased.publish(lake, settings, rows.filter(gone).select(ARRIVAL))
        quarantine.publish(lake, rows.filter(pc.invert(gone)))
        path.unlink()
        taken += count
    return Gone(quarantined=taken)


def _spoken_of(rows: pa.Table, whose: Whose) -> pa.Array:
    raws = rows["raw"].combine_chunks()
    likely = pc.match_substring(raws, pattern="\\")
    for needle in whose.needles:
        likely = pc.or_(likely, pc.match_substring(raws, pattern=needle.decode()))
    early = pc.less_equal(rows["arrival_ms"].combine_chunks().cast(pa.int64()), whose.cutoff_ms)
    doubtful = pc.and_(likely, early).to_pylist()
    return pa.array(
        [maybe and whose.said_in(raw.as_py()) for maybe, raw in zip(doubtful, raws, strict=True)],
        pa.bool_(),
    )


def unreadable(lake: Lake) -> list[Path]:
    """Damaged files that were set aside: nobody can tell whose heartbeats they hold."""
    return [path for path in sorted((lake.root / DAMAGED).rglob("*")) if path.is_file()]


def quarantined(lake: Lake, whose: Whose) -> list[Path]:
    """Files of quarantine that hold records of the user."""
    return [
        path
        for path in sorted((lake.root / QUARANTINE).rglob("*.parquet"))
        if pc.any(_spoken_of(quarantine.read(path), whose)).as_py()
    ]


def sweep_temp(lake: Lake, before_ms: int) -> int:
    """Remove temp files that were last written before the tombstone stood."""
    swept = 0
    for path in (lake.root / layout.TEMP).glob("*"):
        try:
            if path.stat().st_mtime_ns // 1_000_000 <= before_ms:
                path.unlink()
                swept += 1
        except FileNotFoundError:
            continue
    return swept
