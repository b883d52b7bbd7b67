"""Answers about days that damage has touched: right, with a warning, or none."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError
from hb_assets.core.record import shard_of
from hb_assets.core.schema import ORDER
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files.fragments import Fragment, FragmentMetadata
from hb_assets.lake.integrity import known_faults
from hb_assets.lake.query import series
from hb_assets.lake.query.series import Page, Query
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.layout import FragmentName
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, Point, deliver, entry, line, points_of

NEXT = DAY + dt.timedelta(days=1)
NEXT_NOON = NOON + days.MS_PER_DAY
LATER = days.end_ms(NEXT)
FIRST, SECOND = Point(NOON, 75, "device_a"), Point(NEXT_NOON, 81, "device_a")


def ask(lake: Lake, settings: Settings, start: int = NOON, end: int = LATER) -> Page:
    return series.answer(lake, Query("u1", start, end, granularity="1s"), settings)


def published(lake: Lake, day: dt.date) -> Path:
    return layout.consolidated_file(lake.root, day, shard_of("u1", lake.shards))


def flip(path: Path) -> None:
    """A bit of the last column's values."""
    group = pq.read_metadata(path).row_group(0)
    column = group.column(group.num_columns - 1)
    place = column.data_page_offset + column.total_compressed_size - 2
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 4]))


@pytest.fixture
def two_days(lake: Lake, settings: Settings) -> Lake:
    lines = [line(), line(at=NEXT_NOON, bpm=81), line("u2", at=NOON)]
    deliver(lake, settings, entry(lines, ms=LATER))
    for day in (DAY, NEXT):
        consolidate(lake, day, settings)
    return lake


def test_raw_stands_in_for_a_damaged_consolidated_file(two_days: Lake, settings: Settings) -> None:
    path = published(two_days, DAY)
    flip(path)
    for _ in range(2):  # what was noticed the first time is told the second time, once
        page = ask(two_days, settings)
        assert points_of(page.points) == [FIRST, SECOND]
        assert (page.next_ms, page.ended_by) == (None, None)
        [warning] = page.warnings
        assert (warning.kind, warning.day, warning.path) == ("damaged", DAY, path)
        assert str(path) not in warning.summary
    assert ask(two_days, settings, NEXT_NOON).warnings == ()
    consolidate(two_days, DAY, settings)
    assert ask(two_days, settings).warnings == ()


def test_a_day_that_cannot_be_answered_ends_the_page(two_days: Lake, settings: Settings) -> None:
    path = published(two_days, NEXT)
    mark = layout.pruned_mark(two_days.root, NEXT, shard_of("u1", two_days.shards))
    mark.parent.mkdir(parents=True)
    mark.write_bytes(b"{}")
    flip(path)
    page = ask(two_days, settings)
    assert points_of(page.points) == [FIRST]
    assert page.next_ms == days.start_ms(NEXT)
    assert page.ended_by is not None
    assert page.ended_by.path == path
    with pytest.raises(DamagedFileError) as raised:
        ask(two_days, settings, page.next_ms)
    assert (raised.value.day, raised.value.shard) == (NEXT, shard_of("u1", two_days.shards))


def test_what_was_set_aside_is_missing_with_a_warning(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line(), line(at=NOON + 1000)], 0))
    [bad] = deliver(lake, settings, entry([line(at=NOON + 2000)] * 3, 1))
    flip(bad.path)
    with pytest.raises(DamagedFileError):
        ask(lake, settings)
    consolidate(lake, DAY, settings)
    page = ask(lake, settings)
    assert [point.start_ms for point in points_of(page.points)] == [NOON, NOON + 1000]
    [warning] = page.warnings
    assert (warning.kind, warning.rows) == ("set_aside", 3)


def forged(lake: Lake, rows: pa.Table, shard: int, *, honest: bool = True) -> Fragment:
    """A fragment whose checksums fit, of rows that no drain wrote; it may lie about their range."""
    name = FragmentName.covering(rows)
    folder = layout.shard_folder(lake.root, layout.RAW, DAY, shard)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "new"
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        if not honest:
            original = pq.ParquetWriter
            patch.setattr(
                pq, "ParquetWriter", lambda *a, **k: original(*a, **k, write_statistics=False)
            )
        parquet.write(path, rows, FragmentMetadata(1, DAY.isoformat(), shard, 0), ORDER)
    name = name.sealed(path)
    path.rename(folder / str(name))
    return Fragment(name, folder / str(name))


@pytest.mark.parametrize("honest", [True, False], ids=["by its footer", "by its rows"])
@pytest.mark.parametrize("bpm", [999, 29])
def test_a_forged_heart_rate_is_no_answer(
    lake: Lake, settings: Settings, bpm: int, honest: bool
) -> None:
    shard = shard_of("u1", lake.shards)
    deliver(lake, settings, entry([line()], 0))
    [other] = deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    rows = pq.read_table(other.path, partitioning=None)
    at = rows.schema.get_field_index("heart_rate")
    rows = rows.set_column(at, rows.field(at), pa.array(np.array([bpm], np.int16)))
    other.path.unlink()
    bad = forged(lake, rows, shard, honest=honest)
    parquet.verify(bad.path)
    with pytest.raises(DamagedFileError, match="out of bounds") as raised:
        ask(lake, settings)
    assert raised.value.path == bad.path
    assert str(bpm) not in str(raised.value).replace(str(bad.path), "")
    done = consolidate(lake, DAY, settings)
    assert len(done.set_aside) == 1
    page = ask(lake, settings)
    assert points_of(page.points) == [FIRST]
    assert [warning.kind for warning in page.warnings] == ["set_aside"]


def test_another_days_rows_are_no_answer(lake: Lake, settings: Settings) -> None:
    [other] = deliver(lake, settings, entry([line(at=NEXT_NOON)], ms=LATER))
    rows = pq.read_table(other.path, partitioning=None)
    forged(lake, rows, shard_of("u1", lake.shards))
    with pytest.raises(DamagedFileError, match="timestamp is out"):
        ask(lake, settings)


def test_nothing_is_said_of_what_a_person_put_right(two_days: Lake, settings: Settings) -> None:
    path = published(two_days, DAY)
    whole = path.read_bytes()
    flip(path)
    assert len(ask(two_days, settings).warnings) == 1
    path.write_bytes(whole)
    assert ask(two_days, settings).warnings == ()
    assert known_faults.faults(two_days) == []
