"""The merge: rows and every count as a plain model of it in Python has them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core.schema import ENCODED, HEARTBEATS, ORDER, TEXTS
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction import merge as merge_module
from hb_assets.lake.compaction import row_groups
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.merge import Tally, merged
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.storage import engine, parquet
from hb_assets.lake.storage.layout import FragmentName
from hb_assets_tests.examples import examples
from hb_assets_tests.lake.deliveries import NOON

pytestmark = pytest.mark.slow


class Reading(NamedTuple):
    """A row, in the order of HEARTBEATS; the instant in milliseconds since NOON."""

    user: str
    device: str
    at: int
    bpm: int
    ms: int
    seq: int
    shard: int
    pos: int

    @property
    def key(self) -> tuple[str, int, str]:
        return self.user, self.at, self.device

    @property
    def entry(self) -> tuple[int, int]:
        return self.ms, self.seq

    @property
    def arrival(self) -> tuple[int, ...]:
        return self[4:]


@dataclass(frozen=True)
class Case:
    """What is merged; `unread` are ranges of entries of a source shard."""

    base: list[Reading]
    new: list[list[Reading]]
    included: list[Reading]
    erased_before: list[Reading]
    watermark: dict[int, tuple[int, int]]
    erased: dict[str, dict[int, tuple[int, int]]]
    unread: list[tuple[int, tuple[int, int], tuple[int, int]]]


def model(case: Case) -> tuple[list[Reading], Tally]:  # noqa: C901  # all of the rules
    """The survivors in order, and the counts."""

    def reached(row: Reading, marks: dict[int, tuple[int, int]]) -> bool:
        return row.shard in marks and row.entry <= marks[row.shard]

    base = {row.key: row for row in case.base}
    counted = {row.arrival for row in case.erased_before}
    arrived = [row for rows in case.new for row in rows if row not in case.included]
    if case.unread:
        by_entry = groupby(
            sorted((row for rows in case.new for row in rows), key=itemgetter(6, 4, 5)),
            key=itemgetter(6, 4, 5),
        )
        for (shard, *entry), rows in by_entry:
            of_one = any(s == shard and a <= tuple(entry) <= b for s, a, b in case.unread)
            if of_one and all(
                row.user in case.erased
                or (row.key in base and base[row.key].arrival >= row.arrival)
                for row in rows
            ):
                arrived = [one for one in arrived if (one.shard, *one.entry) != (shard, *entry)]
    rows = [(row, reached(row, case.watermark) or row.arrival in counted) for row in arrived]
    rows += [(row, False) for row in case.base]
    rows.sort(key=lambda one: (one[0].key, one[0].arrival, not one[1]))
    survivors, tally = [], Tally()
    for _, same_key in groupby(rows, key=lambda one: one[0].key):
        chain = list(same_key)
        for (row, late), (following, _) in pairwise(chain):
            if row.arrival == following.arrival:
                continue
            if late:
                tally.uncounted += 1
            elif row.bpm == following.bpm:
                tally.repeats += 1
            else:
                tally.corrections += 1
        row, late = chain[-1]
        if not reached(row, case.erased.get(row.user, {})):
            survivors.append(row)
            tally.survivors += 1
        elif late:
            tally.uncounted += 1
        else:
            tally.erased += 1
    return survivors, tally


# -- cases

users = st.sampled_from(["a", "b", "B", "é", "aa", "z" * 128, "\x00"])
small = st.integers(0, 2)
readings = st.builds(
    Reading,
    users,
    st.sampled_from(["d", "e"]),
    small,
    st.integers(60, 61),
    small,
    small,
    small,
    small,
)
entries = st.tuples(small, small)
marks = st.dictionaries(small, entries, max_size=2)
ranges = st.tuples(small, entries, entries).map(lambda one: (one[0], *sorted(one[1:])))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Anything may come again; but a row with the key and the identity of another is that row."""
    known: dict[tuple[object, ...], Reading] = {}

    def some(most: int, least: int = 0) -> list[Reading]:
        found = draw(st.lists(readings, min_size=least, max_size=most))
        again = draw(st.lists(st.sampled_from([*known.values()]), max_size=4)) if known else []
        rows = [known.setdefault((*row.key, *row.arrival), row) for row in (*found, *again)]
        return list({row.arrival: row for row in rows}.values())

    included = some(6)
    base = {row.key: row for row in sorted([*some(30), *included], key=lambda row: row.arrival)}
    return Case(
        sorted(base.values(), key=lambda row: row.key),
        [some(12, 1) for _ in range(draw(st.integers(1, 4)))],
        included if base else [],
        some(4),
        draw(marks) if base else {},
        draw(st.dictionaries(users, marks, max_size=2)),
        draw(st.lists(ranges, max_size=2)) if base else [],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("merge")


@pytest.fixture(scope="module")
def bounds(folder: Path) -> Settings:
    return Settings(home=folder, duckdb_threads=1)


def written(path: Path, rows: Iterable[Reading]) -> Path:
    """A file of small row groups."""
    listed = [
        dict(zip(HEARTBEATS.names, row._replace(at=NOON + row.at), strict=True)) for row in rows
    ]
    path.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "ROW_GROUP", 4)
        parquet.write(
            path, pa.Table.from_pylist(listed, HEARTBEATS), ConsolidatedMetadata.nothing(), ORDER
        )
    return path


def inputs_of(case: Case, folder: Path) -> Inputs:
    def files(name: str, rows: list[Reading]) -> list[Path]:
        return [written(folder / f"{name}.parquet", rows)] if rows else []

    return Inputs(
        next(iter(files("base", case.base)), None),
        [written(folder / f"new{n}.parquet", rows) for n, rows in enumerate(case.new)],
        files("included", case.included),
        [FragmentName.new(*one) for one in case.unread],
        files("erased", case.erased_before),
        case.watermark,
        case.erased,
    )


def merge(inputs: Inputs, bounds: Settings) -> tuple[list[Reading], Tally]:
    tally = Tally()
    found = pa.concat_tables([ENCODED.empty_table(), *merged(inputs, tally, bounds)])
    columns = [
        found[name].cast(pa.int64()).to_pylist() if name == "timestamp" else found[name].to_pylist()
        for name in HEARTBEATS.names
    ]
    rows = [Reading(*row) for row in zip(*columns, strict=True)]
    return [row._replace(at=row.at - NOON) for row in rows], tally


@pytest.mark.parametrize("most", [0, 2**17], ids=["as texts", "as ENUM"])
@given(case=cases())
@example_settings(max_examples=examples(60))
def test_against_the_model(folder: Path, bounds: Settings, most: int, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_module, "BATCH", 4)
        patch.setattr(merge_module, "_MOST_IDS", most)
        patch.setattr(merge_module, "_SMALL", 2)
        found = merge(inputs_of(case, folder), bounds)
    assert found == model(case)


def plain(base: Sequence[Reading], *new: Sequence[Reading]) -> Case:
    return Case(list(base), [list(rows) for rows in new], [], [], {}, {}, [])


def test_arrival_decides_whatever_the_order_of_files(folder: Path, bounds: Settings) -> None:
    arrivals = [(2, 0, 0, 0), (1, 9, 0, 0), (2, 0, 0, 1), (1, 9, 1, 0), (2, 0, 1, 0), (10, 0, 0, 0)]
    files = [[Reading("u", "d", 0, 60 + n, *arrival)] for n, arrival in enumerate(arrivals)]
    for order in (files, files[::-1]):
        [survivor], tally = merge(inputs_of(plain([], *order), folder), bounds)
        assert survivor.arrival == max(arrivals)
        assert tally == Tally(survivors=1, corrections=5)


# -- row groups of the base

BASE = [Reading("u", "d", 2 * n, 60, 0, n, 0, 0) for n in range(40)]


@pytest.mark.parametrize(
    ("row", "sorted_rows"),
    [
        (Reading("u", "d", 22, 61, 1, 0, 0, 0), 4),  # the key of a row
        (Reading("u", "d", 23, 61, 1, 0, 0, 0), 0),  # between rows
        (Reading("u", "e", 22, 61, 1, 0, 0, 0), 0),  # at the instant of one
        (Reading("a", "d", 22, 61, 1, 0, 0, 0), 0),  # before all
        (Reading("v", "d", 22, 61, 1, 0, 0, 0), 0),  # behind all
    ],
)
def test_only_a_row_group_with_the_key_of_a_pending_row_is_sorted(
    folder: Path,
    bounds: Settings,
    monkeypatch: pytest.MonkeyPatch,
    row: Reading,
    sorted_rows: int,
) -> None:
    taken: list[int] = []
    reader = row_groups.RowGroups.reader

    def noted(groups: row_groups.RowGroups, *columns: Sequence[str]) -> pa.RecordBatchReader:
        if not columns:  # all of them: for the sort
            taken.extend(table.num_rows for table in groups.tables())
        return reader(groups, *columns)

    monkeypatch.setattr(row_groups.RowGroups, "reader", noted)
    case = plain(BASE, [row])
    assert merge(inputs_of(case, folder), bounds) == model(case)
    assert sum(taken) == sorted_rows


def test_a_row_group_that_no_row_falls_into_is_passed_on(folder: Path, bounds: Settings) -> None:
    inputs = inputs_of(plain(BASE, [Reading("u", "d", 23, 61, 1, 0, 0, 0)]), folder)
    assert inputs.base is not None
    footer = pq.read_metadata(inputs.base)
    sizes = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    found = [table.num_rows for table in merged(inputs, Tally(), bounds)]
    assert len(sizes) == 10
    assert found != sizes
    assert [*found[:2], *found[4:]] == [*sizes[:2], *sizes[3:]], "one is cut where the row goes"


# -- the engine


def test_the_window_is_a_streaming_one(folder: Path, bounds: Settings) -> None:
    """A window that isn't would hold all rows once more."""
    inputs = inputs_of(plain([], BASE), folder)
    with engine.engine(bounds) as connection, merge_module._pending(inputs, connection):
        merge_module.make_types(connection)
        for query in merge_module.FATES.values():
            [(_, plan)] = connection.sql(f"EXPLAIN {query}").fetchall()
            assert plan.count("Streaming Window") == plan.count("Window") == 1


def test_types_go_with_the_work(folder: Path, bounds: Settings) -> None:
    """An engine is kept for the next merge, and one that failed leaves nothing in it either."""
    inputs = inputs_of(plain([], BASE), folder)
    for _ in range(3):
        rows = merged(inputs, Tally(), bounds)
        next(rows)
        with pytest.raises(KeyError):
            rows.throw(KeyError())
        assert merge(inputs, bounds) == (BASE, Tally(survivors=40))
        with engine.engine(bounds) as connection:
            types = connection.sql("SELECT type_name FROM duckdb_types()").fetchall()
        assert not {(f"{name}s",) for name in TEXTS} & set(types)
