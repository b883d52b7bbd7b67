"""The consolidated folder is plain hive-partitioned Parquet: read with no help from us."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import duckdb
import pandas as pd
import polars as pl
import pytest

from hb_assets.core import days
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, consolidated, deliver, entry, line

COLUMNS = ["user_id", "device_id", "timestamp", "heart_rate"]
NEXT = DAY + dt.timedelta(days=1)
Plain = list[tuple[str, str, int, int]]


@pytest.fixture
def folder(lake: Lake, settings: Settings) -> Path:
    lines = [line(f"u{n}", at=NOON + n * days.MS_PER_DAY // 8, bpm=60 + n) for n in range(8)]
    deliver(lake, settings, entry([*lines, *lines], ms=days.end_ms(NEXT)))
    for day in (DAY, NEXT):
        consolidate(lake, day, settings)
    return lake.root / layout.HEARTBEATS


@pytest.fixture
def expected(lake: Lake, folder: Path) -> Plain:
    rows = sorted(one[:4] for day in (DAY, NEXT) for one in consolidated(lake, day))
    assert len(rows) == 8
    return rows


def plain(frame: pd.DataFrame) -> Plain:
    names = frame[COLUMNS].itertuples(index=False)
    return sorted(
        (user, device, days.ms_of(at.to_pydatetime()), bpm) for user, device, at, bpm in names
    )


def test_duckdb(folder: Path, expected: Plain) -> None:
    rows = duckdb.read_parquet(f"{folder}/**/*.parquet", hive_partitioning=True)
    found = rows.aggregate("epoch_ms(timestamp) AS at, user_id, device_id, heart_rate").fetchall()
    assert sorted((user, device, at, bpm) for at, user, device, bpm in found) == expected
    assert {"day", "shard"} <= set(rows.columns)
    assert rows.filter(f"day = '{NEXT}'").aggregate("count(*)").fetchall() == [(4,)]


def test_polars(folder: Path, expected: Plain) -> None:
    frame = pl.scan_parquet(folder, hive_partitioning=True).collect()
    at = frame["timestamp"].dt.epoch("ms")
    found = zip(frame["user_id"], frame["device_id"], at, frame["heart_rate"], strict=True)
    assert sorted(found) == expected
    assert {"day", "shard"} <= set(frame.columns)
    assert frame.filter(pl.col("day") == NEXT).height == 4


def test_pandas(folder: Path, expected: Plain) -> None:
    frame = pd.read_parquet(folder)
    assert plain(frame) == expected
    assert {"day", "shard"} <= set(frame.columns)
    assert (frame["day"].astype(str) == str(NEXT)).sum() == 4
    assert str(frame["timestamp"].dtype) == "datetime64[ms, UTC]"


def test_a_row_group_is_sorted_as_the_file_says(folder: Path) -> None:
    import pyarrow.parquet as pq

    for path in folder.rglob("*.parquet"):
        group = pq.read_metadata(path).row_group(0)
        names = [group.column(one.column_index).path_in_schema for one in group.sorting_columns]
        assert names == ["user_id", "timestamp", "device_id"]
