"""Erasure of a forgotten user from the lake: finds their bytes in every file and removes them.

The steps for one day and for the quarantine, each of which may be repeated after a crash. The
tombstone (`files.tombstones`) has to exist before; buffer and spool are erased by
`pipeline.erasure`, which calls this.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core.errors import DamagedFileError, FencedError
from hb_assets.core.record import shard_of
from hb_assets.core.schema import ARRIVAL, IDENTITY
from hb_assets.core.schema import QUARANTINE as QUARANTINE_SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, minutes
from hb_assets.lake.compaction import pruning
from hb_assets.lake.compaction.consolidation import Lock, Watermarks, consolidate
from hb_assets.lake.files import erased, fragments, quarantine, tombstones
from hb_assets.lake.files.tombstones import Cutoffs
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.durable_files import sync_folder
from hb_assets.lake.storage.engine import engine
from hb_assets.lake.storage.layout import DAMAGED, QUARANTINE, FragmentName
from hb_assets.lake.storage.store import Lake

_ATTEMPTS = 5
_HOLDING = f"""
SELECT DISTINCT filename FROM rows AS delivered
{tombstones.REACHED} WHERE user_id = $user
"""
_LATEST = """
SELECT arrival_shard, max(row(arrival_ms, arrival_seq))
FROM rows WHERE user_id = $user GROUP BY arrival_shard
"""


_COPIES = f"""
SELECT count(*) FROM quarantine SEMI JOIN (SELECT {IDENTITY} FROM raw) AS rows
USING ({IDENTITY})
"""
_OTHERS = f"""
SELECT * EXCLUDE (filename) FROM quarantine ANTI JOIN (SELECT {IDENTITY} FROM raw) AS rows
USING ({IDENTITY})
"""


@dataclass(frozen=True, slots=True)
class Whose:
    """The heartbeats to erase: one user's, up to an arrival by source shard."""

    user_id: str
    cutoffs: Cutoffs

    def said_in(self, text: bytes) -> bool:
        """Whether a record's bytes mention the user, as far as that can be told.

        A JSON object does when its `user_id` is the user's. Other bytes do when they contain the
        user_id between quotes.
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
        """Matches the field user_id with this user, as any JSON has it, escaped once or not."""
        users = b"|".join(re.escape(needle[1:-1]) for needle in self.needles)
        return re.compile(
            rb'\\?"user_id\\?"\s*:\s*\\?"(?:' + users + rb')\\?"',
        )


def _utf16(char: str) -> Iterator[int]:
    encoded = char.encode("utf-16-be")
    return (int.from_bytes(encoded[at : at + 2]) for at in range(0, len(encoded), 2))


@dataclass(frozen=True, slots=True)
class Gone:
    """Counts of what was erased: days written anew, rows, fragments, records of quarantine."""

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
    connection.register("cutoffs", tombstones.table(whose.cutoffs))
    found = _ask(lake, day, shard, whose.user_id, _HOLDING, connection)
    return [Path(path) for (path,) in found]


def _ask(
    lake: Lake,
    day: dt.date,
    shard: int,
    user_id: str,
    query: str,
    connection: duckdb.DuckDBPyConnection,
) -> list[tuple[Any, ...]]:
    """Rows of a query over the fragments and the published file, run again when one went."""
    published = layout.consolidated_file(lake.root, day, shard)
    for _ in range(_ATTEMPTS):
        paths = [one.path for one in fragments.listed(lake, day, shard)]
        paths += [published] if published.exists() else []
        if not paths:
            return []
        try:
            with verified.relations(connection, {"rows": paths}):
                return connection.sql(query, params={"user": user_id}).fetchall()
        except (FileNotFoundError, duckdb.IOException):
            continue  # a file went meanwhile
        except duckdb.Error as error:
            raise parquet.explained(error, paths) from None
    raise DamagedFileError(f"day {day.isoformat()}, shard {shard:02d} can't be read")


def latest(lake: Lake, user_id: str, settings: Settings) -> dict[int, tuple[int, int]]:
    """The user's latest arrival in the lake by source shard, quarantine included.

    A Redis that was replaced may have given later ids than the present one.
    """
    shard = shard_of(user_id, lake.shards)
    found: dict[int, tuple[int, int]] = {}

    def see(source: int, entry: tuple[int, int]) -> None:
        found[source] = max(entry, found.get(source, entry))

    with engine(settings) as connection:
        for day in inventory.days(lake):
            for source, entry in _ask(lake, day, shard, user_id, _LATEST, connection):
                see(source, tuple(entry.values()) if isinstance(entry, dict) else tuple(entry))
    whose = Whose(user_id, {})
    for path in _quarantine_files(lake):
        rows = quarantine.read(path)
        spoken = rows.filter(pa.array(_spoken_of(rows, whose)))
        for row in spoken.select(ARRIVAL).to_pylist():
            see(row["arrival_shard"], (row["arrival_ms"], row["arrival_seq"]))
    return found


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

    They are deleted, not rewritten: what else they hold is in the consolidated file. Everything up
    to the cutoffs has to be acknowledged. A fragment stays whose later entries aren't: drain, read
    the watermarks and call this again.

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
            ).require()
            break
        except FencedError:
            if attempt == _ATTEMPTS - 1:
                raise
    # Whoever read the tombstones before this one was put, and sleeps, must not publish any more.
    fence(lake, shard)
    with engine(settings) as connection:
        doomed = set(_holding(lake, day, shard, whose, connection))
        _drop_copies(lake, [one for one in doomed if FragmentName.parse(one.name)], connection)
        pruned = pruning.prune_shard(
            lake,
            day,
            shard,
            connection,
            lambda one: one.path in doomed,
            acknowledged=whose.cutoffs,
            forgetting=True,
        )
    minutes.build(lake, day, settings)
    return Gone(1, _erased_rows(lake, day) - before, pruned.fragments)


def _erased_rows(lake: Lake, day: dt.date) -> int:
    return sum(metadata.erased for metadata in inventory.published_metadata(lake, day))


def forget_quarantine(lake: Lake, whose: Whose, settings: Settings) -> Gone:
    """Take the user's records out of quarantine: files that hold one are written anew, renamed.

    Raises:
        DamagedFileError: a file can't be read.
        OSError: a file can't be written.
    """
    taken = 0
    for path in _quarantine_files(lake):
        rows = quarantine.read(path)
        gone = _forgotten(rows, whose)
        count = int(pc.sum(gone).as_py() or 0)
        if not count:
            continue
        # Each of these steps may be the last before a crash: an identity counts once, wherever.
        erased.publish(lake, settings, rows.filter(gone).select(ARRIVAL))
        quarantine.publish(lake, rows.filter(pc.invert(gone)))
        path.unlink()
        sync_folder(path.parent)
        taken += count
    return Gone(quarantined=taken)


def _drop_copies(lake: Lake, raw: Sequence[Path], connection: duckdb.DuckDBPyConnection) -> None:
    """Take records out of quarantine that these fragments hold as rows: they count as the rows.

    Once the fragments are gone nobody could tell any more.
    """
    names = [name for path in raw if (name := FragmentName.parse(path.name)) is not None]
    for path in _quarantine_files(lake):
        own = FragmentName.parse(path.name)
        if own is None or not any(own.overlaps(name) for name in names):
            continue
        with verified.relations(connection, {"raw": raw, "quarantine": [path]}):
            if connection.sql(_COPIES).fetchall() == [(0,)]:
                continue
            kept = connection.sql(_OTHERS).to_arrow_table()
        quarantine.publish(lake, kept.cast(QUARANTINE_SCHEMA))
        path.unlink()
        sync_folder(path.parent)


def _quarantine_files(lake: Lake) -> list[Path]:
    return sorted((lake.root / QUARANTINE).rglob("*.parquet"))


def _forgotten(rows: pa.Table, whose: Whose) -> pa.Array:
    """Whether each quarantined record is the user's and arrived at the cutoff or before."""
    early = tombstones.reached(rows, [whose.cutoffs] * rows.num_rows)
    return pc.and_(pa.array(early, pa.bool_()), pa.array(_spoken_of(rows, whose), pa.bool_()))


def _spoken_of(rows: pa.Table, whose: Whose) -> list[bool]:
    raws = rows["raw"].combine_chunks()
    likely = pc.match_substring(raws, pattern="\\")
    for needle in whose.needles:
        likely = pc.or_(likely, pc.match_substring(raws, pattern=needle.decode()))
    return [
        bool(maybe) and whose.said_in(raw.as_py())
        for maybe, raw in zip(likely.to_pylist(), raws, strict=True)
    ]


def unreadable(lake: Lake) -> list[Path]:
    """Damaged files that were set aside: nobody can tell whose heartbeats they hold."""
    return [path for path in sorted((lake.root / DAMAGED).rglob("*")) if path.is_file()]


def quarantined(lake: Lake, whose: Whose) -> list[Path]:
    """Files of quarantine that hold records of the user."""
    return [
        path
        for path in _quarantine_files(lake)
        if pc.any(_forgotten(quarantine.read(path), whose)).as_py()
    ]


def fence(lake: Lake, shard: int) -> int:
    """Remove all temp files of a shard: whoever is about to publish there starts again."""
    marked = f"-shard={shard:02d}-"
    fenced = 0
    for path in (lake.root / layout.TEMP).glob("*"):
        if marked in path.name:
            path.unlink(missing_ok=True)
            fenced += 1
    return fenced


def sweep_temp(lake: Lake, before_ms: int) -> int:
    """Remove all other temp files that were last written before the tombstone stood."""
    swept = 0
    for path in (lake.root / layout.TEMP).glob("*"):
        try:
            if path.stat().st_mtime_ns // 1_000_000 <= before_ms:
                path.unlink()
                swept += 1
        except FileNotFoundError:
            continue
    return swept
