"""Lakes of any size, made fast and the same every time, and kept for the next run.

Consolidated files to query, and raw fragments to consolidate, written by the lake's own writers.

All rows are of one day. In consolidated files each user has a reading a second: whatever a lake has
more of lies in the files that a query has to read. More days would only be more folders.
"""

from __future__ import annotations

import datetime as dt
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from bench.traffic import Traffic
from hb_assets.core import days
from hb_assets.core.record import shard_of
from hb_assets.core.schema import HEARTBEATS, ORDER
from hb_assets.core.settings import Settings
from hb_assets.lake.files import fragments
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.durable_files import TempFile
from hb_assets.lake.storage.store import FORMAT, Lake

DAY = dt.date(2025, 1, 15)
SECONDS = 86_400
GENERATION = 2
"""Raise it when the rows or their row groups change: lakes of before are made anew."""
_USERS_AT_ONCE = 32


def users_of(rows: int) -> list[str]:
    """Names of as many users as it takes for about `rows` rows."""
    return [f"user-{number:06}" for number in range(round(rows / SECONDS))]


def lake_of(rows: int, cache: Path, say: Callable[[str], None]) -> Path:
    """A lake of about `rows` rows under `cache`: the one of before, or a new one."""
    root = cache / f"lake-{rows}-{FORMAT}-{GENERATION}-{parquet.ROW_GROUP}"
    if root.is_dir():
        return root
    making = root.with_suffix(".part")
    shutil.rmtree(making, ignore_errors=True)
    say(f"making a lake of {rows:,} rows; it is kept under {cache}")
    lake = Lake.open(Settings(home=making, lake=str(making)))
    by_shard: dict[int, list[str]] = {}
    for user in users_of(rows):
        by_shard.setdefault(shard_of(user, lake.shards), []).append(user)
    for shard, users in by_shard.items():
        _write(lake, shard, sorted(users))
    return making.rename(root)


def raw_of(traffic: Traffic, cache: Path, say: Callable[[str], None]) -> Path:
    """A lake with the fragments of a day's traffic under `cache`, as a drain leaves them.

    It is the one of before, or a new one. Consolidate a `copy_of` it.
    """
    root = cache / f"raw-{traffic.name}-{FORMAT}"
    if root.is_dir():
        return root
    making = root.with_suffix(".part")
    shutil.rmtree(making, ignore_errors=True)
    say(f"making fragments of {traffic.rows:,} rows; they are kept under {cache}")
    lake = Lake.open(Settings(home=making, lake=str(making), shards=traffic.shards))
    for rows in traffic.tables():
        fragments.publish(lake, rows)
    return making.rename(root)


def copy_of(lake: Path, home: Path) -> Path:
    """The lake once more, as that of a new HB_HOME: links, which cost nothing.

    No file of a lake is ever written to again, and so one file may lie in many.
    """
    return Path(shutil.copytree(lake, home / "lake", copy_function=os.link))


def _write(lake: Lake, shard: int, users: Sequence[str]) -> None:
    final = layout.consolidated_file(lake.root, DAY, shard)
    metadata = msgspec.structs.replace(
        ConsolidatedMetadata.nothing(),
        day=DAY.isoformat(),
        shard=shard,
        version=f"{shard:016x}",
        rows=SECONDS * len(users),
        unique=SECONDS * len(users),
        rows_written=SECONDS * len(users),
    )
    chance = np.random.default_rng(shard)
    with TempFile(lake.root, final.parent) as temp:
        with parquet.writer(temp.path, HEARTBEATS, ORDER) as out:
            for start in range(0, len(users), _USERS_AT_ONCE):
                out.write(_rows(users[start : start + _USERS_AT_ONCE], shard, chance))
            out.close_with(metadata)
        temp.publish_replacing(final)


def _rows(users: Sequence[str], shard: int, chance: np.random.Generator) -> pa.Table:
    """A day at 1 Hz of each user: a heart rate that wanders, delivered within a second or so."""
    count = SECONDS * len(users)
    names = np.repeat(np.arange(len(users), dtype=np.int32), SECONDS)
    timestamps = days.start_ms(DAY) + np.tile(np.arange(SECONDS, dtype=np.int64) * 1000, len(users))
    steps = chance.integers(-1, 2, (len(users), SECONDS)).cumsum(axis=1)
    # A walk that turns back at 50 and at 130.
    rates = 50 + np.abs((steps + 25) % 160 - 80)
    columns = {
        "user_id": pa.DictionaryArray.from_arrays(names, list(users)).cast(pa.string()),
        "device_id": pa.array(["device_a"]).take(pa.array(np.zeros(count, np.int32))),
        "timestamp": pa.array(timestamps),
        "heart_rate": pa.array(rates.ravel()),
        "arrival_ms": pa.array(timestamps + chance.integers(100, 1500, count)),
        "arrival_seq": pa.array(chance.integers(0, 50, count)),
        "arrival_pos": pa.array(chance.integers(0, 500, count)),
        "arrival_shard": pa.array(np.full(count, shard)),
    }
    return pa.table([columns[field.name].cast(field.type) for field in HEARTBEATS], HEARTBEATS)
