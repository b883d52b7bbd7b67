"""The merge in memory and the one in DuckDB give the same rows and the same counts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core.schema import ARRIVAL, HEARTBEATS, ORDER
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction import merge as merge_module
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.merge import Tally, merged
from hb_assets.lake.files.consolidated import ConsolidatedNote
from hb_assets.lake.storage import columns, parquet
from hb_assets_tests.examples import examples
from hb_assets_tests.lake.deliveries import NOON

pytestmark = pytest.mark.slow

texts = st.sampled_from(["a", "b", "B", "é", "aa", "z" * 128, "\x00"])
small = st.integers(0, 3)
rows = st.tuples(texts, texts, small, st.integers(60, 62), small, small, small, small)
fragments = st.lists(st.lists(rows, min_size=1, max_size=12), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def bounds(folder: Path) -> Settings:
    return Settings(home=folder)


def written(path: Path, found: pa.Table) -> Path:
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP", 5)
        parquet.write(path, found, ConsolidatedNote.nothing())
    return path


def table(found: Sequence[tuple[object, ...]]) -> pa.Table:
    """Rows of one delivery; whatever has the same identity is the same row."""
    by_identity = {row[4:]: row for row in found}
    listed = [
        dict(zip(HEARTBEATS.names, (*row[:2], NOON + row[2], *row[3:]), strict=True))  # type: ignore[operator]  # an instant
        for row in by_identity.values()
    ]
    return pa.Table.from_pylist(listed, schema=HEARTBEATS)


def merge(
    base: Path | None,
    new: Sequence[Path],
    bounds: Settings,
    *,
    in_memory: bool,
) -> tuple[pa.Table, Tally]:
    tally = Tally()
    arrived = sum(pq.read_metadata(path).num_rows for path in new)
    found = merged(Inputs(base, new), arrived, tally, bounds, in_memory=in_memory)
    return pa.concat_tables(
        [part.cast(HEARTBEATS) for part in (columns.ENCODED.empty_table(), *found)]
    ).combine_chunks(), tally


@pytest.mark.parametrize("word", [63, 3], ids=["as one number", "column by column"])
@pytest.mark.parametrize("few", [1, 100], ids=["few put between", "all sorted"])
@given(before=st.lists(rows, max_size=30), new=fragments)
@example_settings(max_examples=examples(25))
def test_both_sorts_agree(
    folder: Path,
    bounds: Settings,
    word: int,
    few: int,
    before: list[tuple[object, ...]],
    new: list[list[tuple[object, ...]]],
) -> None:
    paths = [written(folder / f"{n}.parquet", table(found)) for n, found in enumerate(new)]
    base = None
    if before:
        first = written(folder / "first.parquet", table(before))
        survivors, _ = merge(None, [first], bounds, in_memory=False)
        base = written(folder / "base.parquet", survivors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "_BATCH", 4)
        patch.setattr(merge_module, "_FEW", few)
        patch.setattr(columns, "_WORD", word)
        found, counted = merge(base, paths, bounds, in_memory=True)
    expected, expected_tally = merge(base, paths, bounds, in_memory=False)
    assert found == expected
    assert counted == expected_tally


def test_a_row_group_that_no_row_falls_into_is_passed_on(
    folder: Path, bounds: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = written(
        folder / "base.parquet", table([("u", "d", n, 60, 0, n, 0, 0) for n in range(50)])
    )
    new = written(folder / "new.parquet", table([("u", "d", 22, 61, 1, 0, 0, 0)]))
    taken: list[int] = []
    original = columns.Columns.of

    def noted(tables: Sequence[pa.Table], rows: int) -> columns.Columns:
        taken.append(rows)
        return original(tables, rows)

    monkeypatch.setattr(columns.Columns, "of", noted)
    found, tally = merge(base, [new], bounds, in_memory=True)
    assert taken == [1, 5 + 1, 0]
    assert tally == Tally(survivors=50, corrections=1)
    assert found["heart_rate"].to_pylist() == [61 if n == 22 else 60 for n in range(50)]


@pytest.mark.parametrize("name", ORDER)
def test_place_after(name: str) -> None:
    """Behind the key itself, and where it would stand when it isn't there."""
    found = table([("b", "b", n, 60, n, 0, 0, 0) for n in (1, 3)])
    sorted_rows = columns.Columns.of([found], 2)
    sorted_rows.sort()
    key = {"user_id": "b", "timestamp": NOON + 1, "device_id": "b"}
    other: dict[str, tuple[object, object]] = {
        "user_id": ("a", "c"),
        "timestamp": (NOON, NOON + 2),
        "device_id": ("a", "c"),
    }
    less, more = other[name]
    assert sorted_rows.place_after(key) == 1
    assert sorted_rows.place_after(key | {name: less}) == 0
    assert sorted_rows.place_after(key | {name: more}) == (2 if name == "user_id" else 1)


@pytest.mark.parametrize("in_memory", [True, False])
def test_arrival_decides_whatever_the_order_of_files(
    folder: Path, bounds: Settings, in_memory: bool
) -> None:
    arrivals = [(2, 0, 0, 0), (1, 9, 0, 0), (2, 0, 0, 1), (1, 9, 1, 0), (2, 0, 1, 0), (10, 0, 0, 0)]
    files = [
        written(folder / f"{n}.parquet", table([("u", "d", 0, 60 + n, *arrival)]))
        for n, arrival in enumerate(arrivals)
    ]
    for order in (files, files[::-1]):
        found, tally = merge(None, order, bounds, in_memory=in_memory)
        assert [tuple(row[name] for name in ARRIVAL) for row in found.to_pylist()] == [
            max(arrivals)
        ]
        assert tally == Tally(survivors=1, corrections=5)
