"""Minutes and queries, against a model in Python, at any state of the lake."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import minutes
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.integrity import checks, known_faults
from hb_assets.lake.query import series, user_scan
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.examples import examples
from hb_assets_tests.lake.deliveries import (
    DAY,
    NOON,
    Point,
    Row,
    deliver,
    entry,
    line,
    minute_points,
    raw,
    survivors,
)

MINUTE = 60_000
Cell = tuple[str, int, str]


def rank(device: str, priority: tuple[str, ...]) -> tuple[int, str]:
    return (priority.index(device) if device in priority else len(priority), device)


def model(rows: list[Row], priority: tuple[str, ...]) -> dict[Cell, tuple[list[int], list[int]]]:
    """(user, minute, device) to all bpm and to kept bpm."""
    found: dict[Cell, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    by_instant: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for one in survivors(rows).values():
        by_instant[one[0], one[2]].append(one)
    for (user, at), together in by_instant.items():
        best = min((one[1] for one in together), key=lambda device: rank(device, priority))
        for _, device, _, bpm, _ in together:
            everything, kept = found[user, at // MINUTE * MINUTE, device]
            everything.append(bpm)
            if device == best:
                kept.append(bpm)
    return found


def points(
    rows: list[Row], user: str, start: int, end: int, device: str | None, priority: tuple[str, ...]
) -> list[Point]:
    start, end = start // MINUTE * MINUTE, -(-end // MINUTE) * MINUTE
    found = []
    for (who, minute, which), (everything, kept) in sorted(model(rows, priority).items()):
        values = kept if device is None else everything
        wanted = who == user and start <= minute < end and device in (None, which)
        if wanted and values:
            half_up = int(sum(values) / len(values) + 0.5)
            found.append(Point(minute, half_up, which))
    return sorted(found, key=lambda point: (point.start_ms, point.device_id))


def stored(lake: Lake, day: dt.date = DAY) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for shard in range(lake.shards):
        path = layout.minutes_file(lake.root, day, shard)
        if path.exists():
            rows = pq.read_table(path, partitioning=None).to_pylist()
            assert rows == sorted(
                rows, key=lambda row: (row["user_id"], row["minute"], row["device_id"])
            )
            found += rows
    return found


def assert_minutes(lake: Lake, priority: tuple[str, ...]) -> None:
    expected = model(raw(lake), priority)
    found = stored(lake)
    assert len(found) == len(expected)
    for row in found:
        everything, kept = expected[row["user_id"], days.ms_of(row["minute"]), row["device_id"]]
        assert (row["sum"], row["count"]) == (sum(everything), len(everything))
        assert (row["min"], row["max"]) == (min(everything), max(everything))
        assert (row["kept_sum"], row["kept_count"]) == (sum(kept), len(kept))
        assert (row["kept_min"], row["kept_max"]) == (
            min(kept, default=None),
            max(kept, default=None),
        )


MIDNIGHT = days.start_ms(DAY)
DEVICES = ("device_a", "device_b", "zz", "aa")
readings = st.tuples(
    st.sampled_from(["u1", "u2"]),
    st.sampled_from(DEVICES),
    st.sampled_from(
        [MIDNIGHT - 1, MIDNIGHT, MIDNIGHT + 1, MIDNIGHT + MINUTE, MIDNIGHT + MINUTE - 1]
    ),
    st.integers(60, 63),
)
priorities = st.lists(st.sampled_from(DEVICES), unique=True, max_size=3).map(tuple)
YESTERDAY = DAY - dt.timedelta(days=1)


@pytest.mark.long
@given(
    st.lists(st.lists(readings, min_size=1, max_size=6), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=5, max_size=5),
    priorities,
    st.tuples(st.integers(-2, 2), st.integers(0, 200_000)),
    st.sampled_from([None, *DEVICES]),
)
@example_settings(max_examples=examples(12))
def test_against_the_model(
    batches: list[list[tuple[str, str, int, int]]],
    runs: list[bool],
    priority: tuple[str, ...],
    span: tuple[int, int],
    device: str | None,
) -> None:
    with TemporaryDirectory() as home:
        settings = Settings(home=Path(home), shards=2, duckdb_threads=1, device_priority=priority)
        lake = Lake.open(settings)
        start = MIDNIGHT + span[0]
        for seq, batch in enumerate(batches):
            deliver(lake, settings, entry([line(*reading) for reading in batch], seq))
            if runs[seq]:
                consolidate(lake, DAY, settings)
            rows = raw(lake) + raw(lake, YESTERDAY)
            found = minute_points(lake, "u1", start, start + span[1], device, settings)
            expected = points(rows, "u1", start, start + span[1], device, priority)
            assert found == expected
        consolidate(lake, DAY, settings)
        built = minutes.build(lake, DAY, settings)
        assert_minutes(lake, priority)
        assert all(figure.passed for figure in built.figures)
        assert built.readings == len(survivors(raw(lake)))
        assert built.rows == len(stored(lake))


def consolidated_day(lake: Lake, settings: Settings) -> None:
    deliver(
        lake,
        settings,
        entry(
            [line(device=device, bpm=60 + n) for n, device in enumerate(("device_b", "device_a"))]
        ),
    )
    consolidate(lake, DAY, settings)


def test_stale_when_the_day_or_the_priority_changes(lake: Lake, settings: Settings) -> None:
    shard = shard_of("u1", lake.shards)
    priority = settings.device_priority
    assert minutes.is_current(lake, DAY, shard, priority)
    consolidated_day(lake, settings)
    assert not minutes.is_current(lake, DAY, shard, priority)
    assert minutes.build(lake, DAY, settings).shards_written == 1
    assert minutes.is_current(lake, DAY, shard, priority)
    assert minutes.build(lake, DAY, settings).shards_written == 0
    other = settings.model_copy(update={"device_priority": ("device_b",)})
    assert not minutes.is_current(lake, DAY, shard, other.device_priority)
    assert minutes.build(lake, DAY, other).shards_written == 1
    assert_minutes(lake, other.device_priority)
    deliver(lake, settings, entry([line(at=NOON + MINUTE)], 1))
    consolidate(lake, DAY, other)
    assert not minutes.is_current(lake, DAY, shard, other.device_priority)


def test_day_without_anything(lake: Lake, settings: Settings) -> None:
    assert minutes.build(lake, DAY, settings) == minutes.MinutesBuilt(DAY)


@pytest.mark.parametrize("where", ["footer", "page"])
def test_damaged_minutes(lake: Lake, settings: Settings, where: str) -> None:
    """With a sound footer they look current, and are made anew all the same."""
    consolidated_day(lake, settings)
    minutes.build(lake, DAY, settings)
    path = layout.minutes_file(lake.root, DAY, shard_of("u1", lake.shards))
    whole = path.read_bytes()
    path.write_bytes(b"PAR1" if where == "footer" else whole[:60] + b"?" + whole[61:])
    current = minutes.is_current(lake, DAY, shard_of("u1", lake.shards), settings.device_priority)
    assert current == (where == "page")
    assert minutes.build(lake, DAY, settings).shards_written == 1
    assert_minutes(lake, settings.device_priority)


def test_a_damaged_page_of_the_published_file_is_an_error_that_stands(
    lake: Lake, settings: Settings
) -> None:
    consolidated_day(lake, settings)
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))
    whole = path.read_bytes()
    path.write_bytes(whole[:60] + b"?" + whole[61:])
    with pytest.raises(DamagedFileError):
        minutes.build(lake, DAY, settings)
    assert [fault.path for fault in known_faults.faults(lake, [DAY])] == [path]


def test_consolidated_again_meanwhile(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The metadata is of one edition, the rows of the next: both are read again."""
    consolidated_day(lake, settings)
    original = layout.minutes_file
    once = [True]

    def call(*arguments: Any) -> Path:
        if once.pop() if once else False:
            deliver(lake, settings, entry([line(at=NOON + MINUTE)], 1))
            consolidate(lake, DAY, settings)
        return original(*arguments)

    monkeypatch.setattr(layout, "minutes_file", call)
    built = minutes.build(lake, DAY, settings)
    monkeypatch.undo()
    assert (built.readings, built.shards_written) == (3, 1)
    assert minutes.is_current(lake, DAY, shard_of("u1", lake.shards), settings.device_priority)
    assert checks.MINUTES_ADD_UP in {figure.name for figure in built.figures}


# -- queries


@pytest.mark.parametrize(
    ("bpm", "mean"), [([60, 61], 61), ([60, 60, 61], 60), ([60, 61, 61], 61), ([61, 62], 62)]
)
def test_mean_is_rounded_half_up(lake: Lake, settings: Settings, bpm: list[int], mean: int) -> None:
    deliver(lake, settings, entry([line(at=NOON + n, bpm=value) for n, value in enumerate(bpm)]))
    assert minute_points(lake, "u1", NOON, NOON + 1, None, settings) == [
        Point(NOON, mean, "device_a")
    ]


@pytest.mark.parametrize(
    ("start", "end", "whole"),
    [
        (0, MINUTE, (0, MINUTE)),
        (1, MINUTE + 1, (0, 2 * MINUTE)),
        (MINUTE - 1, MINUTE - 1, (0, MINUTE)),
        (-1, 0, (-MINUTE, 0)),
    ],
)
def test_range_grows_to_whole_minutes(start: int, end: int, whole: tuple[int, int]) -> None:
    assert series.Query("u1", start, end).whole_buckets() == whole


@pytest.mark.parametrize("user", ["nobody", "", "'; DROP TABLE x; --", "u1\x00", "😀", "../u1"])
def test_user_of_whom_nothing_is_known(lake: Lake, settings: Settings, user: str) -> None:
    deliver(lake, settings, entry([line(f"u{n}") for n in range(9)]))
    assert minute_points(lake, user, NOON, NOON + MINUTE, None, settings) == []


def test_whole_calendar(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()]))
    first = days.start_ms(dt.date.min)
    assert len(minute_points(lake, "u1", first, days.LAST_MS, None, settings)) == 1


def test_file_that_vanishes_meanwhile(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pruner takes the fragments between the list and the reading: asked again, all are there."""
    deliver(lake, settings, entry([line()]))
    once = [True]
    original = user_scan._pending

    def pending(*arguments: Any) -> Any:
        found = original(*arguments)
        if once:
            once.clear()
            consolidate(lake, DAY, settings)
            for fragment in fragments.all_listed(lake, DAY):
                fragment.path.unlink()
        return found

    monkeypatch.setattr(user_scan, "_pending", pending)
    assert len(minute_points(lake, "u1", NOON, NOON + 1, None, settings)) == 1


def test_file_that_is_replaced_meanwhile_by_an_older_list(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slower consolidator may publish a file that lists less than the one that was read."""
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))
    less = path.read_bytes()
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    consolidate(lake, DAY, settings)
    once = [True]
    original = user_scan._pending

    def pending(*arguments: Any) -> Any:
        found = original(*arguments)
        if once:
            once.clear()
            path.with_name("other").write_bytes(less)
            path.with_name("other").replace(path)
        return found

    monkeypatch.setattr(user_scan, "_pending", pending)
    deliver(lake, settings, entry([line(at=NOON + MINUTE)], 2))
    found = minute_points(lake, "u1", NOON, NOON + 2 * MINUTE, None, settings)
    assert found == points(raw(lake), "u1", NOON, NOON + 2 * MINUTE, None, settings.device_priority)


def test_damaged_file(lake: Lake, settings: Settings) -> None:
    [fragment] = deliver(lake, settings, entry([line()]))
    fragment.path.write_bytes(b"PAR1 no more")
    with pytest.raises(DamagedFileError) as raised:
        minute_points(lake, "u1", NOON, NOON + 1, None, settings)
    assert "u1" not in str(raised.value).replace(str(fragment.path), "")
    assert "\n" not in str(raised.value)
