"""Names: taken apart they say what they were made of; nothing else is taken for ours."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hb_assets.lake.storage import layout
from hb_assets.lake.storage.layout import FragmentName

unsigned = st.integers(0, 2**64 - 1)
ids = st.tuples(unsigned, unsigned)
shards = st.integers(0, 99)


@given(shards, ids, ids)
def test_fragment_name_round_trip(
    source: int, first: tuple[int, int], last: tuple[int, int]
) -> None:
    name = FragmentName.new(source, first, last)
    assert FragmentName.parse(str(name)) == name


@given(shards, ids, ids)
def test_a_name_is_never_used_twice(
    source: int, first: tuple[int, int], last: tuple[int, int]
) -> None:
    assert FragmentName.new(source, first, last) != FragmentName.new(source, first, last)


@pytest.mark.parametrize(
    "name",
    [
        "heartbeats.parquet",
        "raw-day=2025-01-15-shard=00-0123456789abcdef",
        "part-00-1-0-2-0-0123456789abcdef.parquet.tmp",
        "part-0-1-0-2-0-0123456789abcdef.parquet",
        "part-00--1-0-2-0-0123456789abcdef.parquet",
        "part-00-1-0-2-0-0123456789ABCDEF.parquet",
        "part-00-\u0661-0-2-0-0123456789abcdef.parquet",
        "part-00-1-0-2-0-0123456789abcdef.parquet\n",
        "",
    ],
)
def test_other_names_are_not_ours(name: str) -> None:
    assert FragmentName.parse(name) is None


@given(shards, ids, ids)
def test_names_sort_by_arrival_as_numbers(
    source: int, one: tuple[int, int], two: tuple[int, int]
) -> None:
    a, b = FragmentName.new(source, one, one), FragmentName.new(source, two, two)
    assert min(a, b).first == min(one, two)


small = st.tuples(st.integers(0, 3), st.integers(0, 3))


@given(small, small, small, small, st.booleans())
def test_overlaps(
    a: tuple[int, int], b: tuple[int, int], c: tuple[int, int], d: tuple[int, int], same: bool
) -> None:
    one = FragmentName.new(0, min(a, b), max(a, b))
    two = FragmentName.new(0 if same else 1, min(c, d), max(c, d))
    everything = [(ms, seq) for ms in range(4) for seq in range(4)]
    common = [x for x in everything if one.first <= x <= one.last and two.first <= x <= two.last]
    assert one.overlaps(two) == two.overlaps(one) == (same and bool(common))


@given(st.dates())
def test_day_folder_round_trip(day: dt.date) -> None:
    assert layout.day_of_folder(layout.day_folder(Path("/lake"), layout.RAW, day).name) == day


def test_days_are_folders_of_ours(tmp_path: Path) -> None:
    for name in (
        "day=2025-01-16",
        "day=2025-01-15",
        "day=2025-13-01",
        "day=",
        "other",
        "day=x",
        "day=20250117",
        "day=2025-W03-5",
    ):
        (tmp_path / layout.RAW / name).mkdir(parents=True)
    found = [dt.date(2025, 1, 15), dt.date(2025, 1, 16)]
    assert layout.days_of(tmp_path, layout.RAW) == found
    assert layout.days_of(tmp_path, layout.MINUTES) == []
