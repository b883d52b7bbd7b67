"""Consolidation: one sorted row per key, every row counted once, whatever the order of events."""

from __future__ import annotations

import datetime as dt
import errno
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from msgspec.structs import replace

from hb_assets.core import days
from hb_assets.core.errors import CheckFailedError, DamagedFileError, FencedError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, ledger
from hb_assets.lake.compaction import consolidation, pruning
from hb_assets.lake.compaction.consolidation import Consolidated, consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.files.consolidated import ConsolidatedMetadata, Current, current
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.integrity import checks, known_faults
from hb_assets.lake.integrity.checks import Figure
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.examples import examples
from hb_assets_tests.lake.deliveries import (
    DAY,
    NOON,
    Delivered,
    Row,
    consolidated,
    deliver,
    entry,
    left_behind,
    line,
    raw,
    rows_of,
    survivors,
)

FIRST = days.end_ms(DAY)
USERS = ("u1", "u2")  # of both shards, where there are two
ALL = 4
OTHER = next(f"u{n}" for n in range(2, 99) if shard_of(f"u{n}", ALL) > shard_of("u1", ALL))
"""A user of a later shard than u1's."""


def assert_consolidated(lake: Lake, rows: Sequence[Row]) -> None:
    """The files hold the model's survivors of `rows`, strictly sorted."""
    found: list[Row] = []
    for shard in range(lake.shards):
        of_shard = [one for one in consolidated(lake) if shard_of(one[0], lake.shards) == shard]
        keys = [(one[0], one[2], one[1]) for one in of_shard]
        assert keys == sorted(set(keys))
        found += of_shard
    assert sorted(found) == sorted(survivors(rows).values())


def split(rows: Sequence[Row]) -> tuple[int, int]:
    """Repeats and corrections of the model: each superseded row against its successor."""
    repeats = corrections = 0
    by_key: dict[tuple[str, str, int], list[Row]] = {}
    for one in sorted(rows, key=lambda row: row[4]):
        by_key.setdefault(one[:3], []).append(one)
    for chain in by_key.values():
        for one, successor in pairwise(chain):
            repeats += one[3] == successor[3]
            corrections += one[3] != successor[3]
    return repeats, corrections


readings = st.tuples(
    st.sampled_from(USERS),
    st.sampled_from(["device_a", "device_b"]),
    st.sampled_from([NOON, NOON + 1]),
    st.sampled_from([60, 61]),
)
entry_ids = st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2))
"""source shard, milliseconds, sequence number"""


Step = list[int] | str


@st.composite
def histories(draw: st.DrawFn) -> tuple[list[Delivered], list[Step]]:
    """Entries, and a history: batches of them (any, in any order, again and again) and runs."""
    identities = draw(st.lists(entry_ids, min_size=1, max_size=6, unique=True))
    entries = [
        entry(
            [line(*reading) for reading in draw(st.lists(readings, min_size=1, max_size=4))],
            seq,
            shard=source,
            ms=FIRST + ms,
        )
        for source, ms, seq in identities
    ]
    batch = st.lists(st.integers(0, len(entries) - 1), min_size=1, max_size=4, unique=True)
    step = batch | st.sampled_from(["consolidate", "consolidate", "rebuild", "prune", "prune"])
    return entries, draw(st.lists(step, min_size=1, max_size=10))


def acknowledged(entries: Sequence[Delivered], delivered: set[int]) -> dict[int, tuple[int, int]]:
    """Watermarks of a buffer that acknowledged what was delivered, and has nothing else to come."""
    found = {}
    for source in {one.shard for one in entries}:
        mark = None
        for index in sorted(range(len(entries)), key=lambda i: (entries[i].ms, entries[i].seq)):
            if entries[index].shard == source:
                if index not in delivered:
                    break
                mark = (entries[index].ms, entries[index].seq)
        if mark is not None:
            found[source] = mark
    return found


@pytest.mark.long
@given(histories())
@example_settings(max_examples=examples(25))
def test_any_history_against_the_model(history: tuple[list[Delivered], list[Step]]) -> None:
    """Whatever comes again, in whatever order, pruned or not: no row is lost or counted twice."""
    entries, steps = history
    with TemporaryDirectory() as home:
        settings = Settings(home=Path(home), shards=2, duckdb_threads=1, raw_keep=timedelta(0))
        lake = Lake.open(settings)
        came: list[Row] = []
        seen: set[int] = set()
        pruned = 0
        for step in [*steps, "consolidate", "rebuild", "prune", "consolidate"]:
            if isinstance(step, list):
                for fragment in deliver(lake, settings, *(entries[index] for index in step)):
                    came += rows_of(fragment.path)
                seen.update(step)
                continue
            if step == "prune":
                result = pruning.prune(lake, settings)
                assert result.faults == ()
                pruned += result.fragments
                continue
            before = consolidated(lake)
            try:
                done = consolidate(
                    lake,
                    DAY,
                    settings,
                    rebuild=step == "rebuild",
                    watermarks=acknowledged(entries, seen),
                ).require()
            except DamagedFileError:
                assert step == "rebuild"
                assert pruned
                continue
            rows = list({one[4]: one for one in came}.values())
            assert_consolidated(lake, rows)
            assert done.rows == len(rows) == done.unique + done.superseded
            assert done.unique == len(survivors(rows))
            assert done.superseded == done.repeats + done.corrections
            assert done.replayed == len(came) - len(rows)
            if step == "rebuild":
                assert (done.repeats, done.corrections) == split(rows)
            elif not done.pending:
                assert consolidated(lake) == before
            assert all(figure.passed for figure in done.figures)
        ledgers = ledger.of_days(lake, settings, deep=True)
        assert [one.faults for one in ledgers if one.faults] == []
        assert sum(one.rows for one in ledgers) == len({one[4] for one in came})
        assert left_behind(lake.root) == []


def metadata(lake: Lake, shard: int) -> ConsolidatedMetadata:
    return parquet.metadata(layout.consolidated_file(lake.root, DAY, shard), ConsolidatedMetadata)


def test_a_run_again_writes_nothing(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line(), line(bpm=76), line("u2")]))
    first = consolidate(lake, DAY, settings)
    shard = shard_of("u1", lake.shards)
    before = metadata(lake, shard)
    again = consolidate(lake, DAY, settings)
    assert (first.written, again.written, again.pending) == (2, 0, 0)
    assert replace(again, written=0, shards_written=0, pending=0) == replace(
        first, written=0, shards_written=0, pending=0
    )
    assert metadata(lake, shard) == before


def test_day_of_which_nothing_is_there(lake: Lake, settings: Settings) -> None:
    assert consolidate(lake, DAY, settings) == Consolidated(day=DAY)
    assert consolidate(lake, DAY, settings, rebuild=True) == Consolidated(day=DAY)
    assert consolidated(lake) == []


def test_progress(lake: Lake, settings: Settings) -> None:
    told: list[tuple[int, int]] = []
    consolidate(lake, DAY, settings, progress=lambda done, of: told.append((done, of)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("rows", [parquet.ROW_GROUP + 1, 2 * parquet.ROW_GROUP])
def test_chains_across_batches(
    lake: Lake, settings: Settings, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A key's chain may be cut by the end of a batch of the sorted stream at any place."""
    monkeypatch.setattr(parquet, "ROW_GROUP", 2048)
    lines = [line(at=NOON + number // 3, bpm=60 + number % 3) for number in range(6000)]
    deliver(lake, settings, entry(lines))
    done = consolidate(lake, DAY, settings)
    assert (done.unique, done.corrections, done.repeats) == (2000, 4000, 0)
    assert {one[3] for one in consolidated(lake)} == {62}


@pytest.mark.parametrize("late", [False, True])
def test_the_latest_arrival_survives_whenever_it_is_consolidated(
    lake: Lake, settings: Settings, late: bool
) -> None:
    older, newer = entry([line(bpm=60)], 1), entry([line(bpm=61)], 2)
    for one in (newer, older) if late else (older, newer):
        deliver(lake, settings, one)
        consolidate(lake, DAY, settings)
    assert [one[3] for one in consolidated(lake)] == [61]


def test_arrival_is_compared_as_numbers(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line(bpm=60)], 9), entry([line(bpm=61)], 10))
    deliver(lake, settings, entry([line("u2", bpm=60)], 2**64 - 1), entry([line("u2", bpm=61)], 1))
    consolidate(lake, DAY, settings)
    assert {one[0]: one[3] for one in consolidated(lake)} == {"u1": 61, "u2": 60}


# -- two at once (invariant 4)


def interleaved(
    monkeypatch: pytest.MonkeyPatch, where: str, meanwhile: Callable[[], object]
) -> None:
    """Before the first call of `consolidation.<where>`, something else happens, once."""
    original = getattr(consolidation, where)
    happened = threading.Event()

    def call(*arguments: object, **named: object) -> object:
        if not happened.is_set():
            happened.set()
            meanwhile()
        return original(*arguments, **named)

    monkeypatch.setattr(consolidation, where, call)


def one_user(lake: Lake) -> int:
    return shard_of("u1", lake.shards)


@pytest.mark.parametrize("where", ["pending", "_merge", "merged", "_figures"])
@pytest.mark.parametrize("correction", [True, False])
def test_overtaken_by_one_who_knows_more(
    lake: Lake,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    correction: bool,
) -> None:
    """The slower one has read an older file and an older list; no row is lost or counted twice."""
    deliver(lake, settings, entry([line(bpm=60)], 0))
    consolidate(lake, DAY, settings)
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))

    def faster() -> None:
        at = NOON if correction else NOON + 2
        deliver(lake, settings, entry([line(at=at, bpm=70)], 2))
        consolidate(lake, DAY, settings)

    interleaved(monkeypatch, where, faster)
    consolidate(lake, DAY, settings)
    monkeypatch.undo()
    listed = metadata(lake, one_user(lake)).fragments
    waiting = [
        one for one in fragments.listed(lake, DAY, one_user(lake)) if str(one.name) not in listed
    ]
    assert consolidate(lake, DAY, settings).pending == len(waiting)
    assert_consolidated(lake, raw(lake))
    assert [one.faults for one in ledger.of_days(lake, settings, deep=True)] == [[]]


def test_slower_one_publishes_last(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Right before its rename: what the faster one had taken in is pending again, not lost."""
    deliver(lake, settings, entry([line(bpm=60)], 0))
    consolidate(lake, DAY, settings)
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))

    def faster() -> None:
        deliver(lake, settings, entry([line(bpm=70)], 2))
        consolidate(lake, DAY, settings)

    overtaken = threading.Event()
    original = checks.require

    def require(results: Sequence[Figure], what: str) -> None:
        original(results, what)
        if not overtaken.is_set():
            overtaken.set()
            faster()

    monkeypatch.setattr(checks, "require", require)
    consolidate(lake, DAY, settings)
    assert inventory.day_state(lake, DAY, settings).pending_fragments == 1
    assert consolidate(lake, DAY, settings).pending == 1
    assert_consolidated(lake, raw(lake))
    assert [one.faults for one in ledger.of_days(lake, settings, deep=True)] == [[]]


def test_first_publication_overtaken(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(lake, settings, entry([line(bpm=60)], 0))

    def faster() -> None:
        deliver(lake, settings, entry([line(bpm=70)], 1))
        consolidate(lake, DAY, settings)

    interleaved(monkeypatch, "_merge", faster)
    consolidate(lake, DAY, settings)
    consolidate(lake, DAY, settings)
    assert_consolidated(lake, raw(lake))


def test_many_at_once(lake: Lake, settings: Settings) -> None:
    stop = threading.Event()

    def consolidate_again_and_again() -> None:
        while not stop.is_set():
            consolidate(lake, DAY, settings)

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(consolidate_again_and_again) for _ in range(2)]
        try:
            for seq in range(12):
                lines = [line(f"u{seq % 3}", at=NOON + n % 3, bpm=60 + seq) for n in range(5)]
                deliver(lake, settings, entry(lines, seq))
        finally:
            stop.set()
        for worker in workers:
            worker.result()
    done = consolidate(lake, DAY, settings)
    assert done.rows == 60
    assert_consolidated(lake, raw(lake))
    assert [one.faults for one in ledger.of_days(lake, settings, deep=True)] == [[]]


@pytest.mark.parametrize("where", ["pending", "_merge", "merged", "_figures", "publication"])
def test_fenced_off(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A pruner unlinks temp files first: whoever was writing one publishes nothing, ever after."""
    deliver(lake, settings, entry([line(bpm=60)], 0))
    consolidate(lake, DAY, settings)
    before = consolidated(lake)
    deliver(lake, settings, entry([line(bpm=61)], 1))

    def prune() -> None:
        for temp in left_behind(lake.root):
            temp.unlink()

    def pruning(call: Callable[..., Any], *, first: bool) -> Callable[..., Any]:
        def pruned(*arguments: Any) -> Any:
            if first:
                prune()
            result = call(*arguments)
            prune()
            return result

        return pruned

    if where == "publication":
        monkeypatch.setattr(checks, "require", pruning(checks.require, first=False))
    elif where == "pending":  # the second look, after the temp file was made
        monkeypatch.setattr(fragments, "listed", pruning(fragments.listed, first=True))
    else:
        interleaved(monkeypatch, where, prune)
    with pytest.raises(FencedError, match="start again"):
        consolidate(lake, DAY, settings).require()
    monkeypatch.undo()
    assert consolidated(lake) == before
    assert consolidate(lake, DAY, settings).pending == 1


def test_pruned_while_the_fragments_are_counted(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that stays, fragments are looked at without a temp file that could be unlinked."""
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    shard = one_user(lake)
    [fragment] = fragments.listed(lake, DAY, shard)

    def pruned(*_: object) -> int:
        fragment.path.unlink()
        return fragment.path.stat().st_size

    monkeypatch.setattr(fragments, "distinct_rows", pruned)
    with pytest.raises(FencedError, match=rf"shard {shard:02d}: .*part-.*start again"):
        consolidate(lake, DAY, settings).require()
    monkeypatch.undo()
    assert consolidate(lake, DAY, settings).rows == 1


def test_first_publication_overtaken_and_pruned(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing published was seen, and then nothing raw: the day isn't empty for all that."""
    deliver(lake, settings, entry([line()], 0))
    original, looks = fragments.listed, 0

    def listed(where: Lake, day: dt.date, shard: int) -> list[Fragment]:
        nonlocal looks
        if shard == one_user(lake):
            looks += 1
            if looks == 2:  # after the temp file was made, and the published file looked for
                consolidate(lake, DAY, settings, shards=[shard])
                for fragment in original(where, day, shard):
                    fragment.path.unlink()
        return original(where, day, shard)

    monkeypatch.setattr(fragments, "listed", listed)
    assert consolidate(lake, DAY, settings).rows == 1


def test_rebuild_overtaken_between_the_published_file_and_raw(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it doesn't know of came later: nothing was pruned, and nothing is missing."""
    deliver(lake, settings, entry([line(bpm=60)], 0))
    consolidate(lake, DAY, settings)
    shard = one_user(lake)
    original = consolidation._Task.listing

    def listing(task: Any) -> Any:
        found = original(task)
        monkeypatch.setattr(consolidation._Task, "listing", original)
        deliver(lake, settings, entry([line(bpm=70)], 1))
        consolidate(lake, DAY, settings, shards=[shard])
        return found

    monkeypatch.setattr(consolidation._Task, "listing", listing)
    consolidate(lake, DAY, settings, rebuild=True, shards=[shard]).require()
    assert_consolidated(lake, raw(lake))
    assert [one.faults for one in ledger.of_days(lake, settings, deep=True)] == [[]]


# -- what goes wrong


def test_failed_check_leaves_everything_in_place(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(lake, settings, entry([line(bpm=60), line(OTHER)], 0))
    consolidate(lake, DAY, settings)
    before = consolidated(lake)
    deliver(lake, settings, entry([line(bpm=61), line(OTHER, bpm=62)], 1))
    failing = Figure(checks.SORTED, False, {"out_of_order": 1}, "1 row stands before another")
    original = checks.heartbeats
    path = layout.consolidated_file(lake.root, DAY, one_user(lake))
    monkeypatch.setattr(
        checks,
        "heartbeats",
        lambda file, *others: (
            [*original(file, *others)[:-1], failing]
            if path.parent.name in file.name
            else original(file, *others)
        ),
    )
    shard = f"{one_user(lake):02d}"
    with pytest.raises(
        CheckFailedError, match=f"day 2025-01-15, shard {shard} failed .*sorted: 1 row"
    ):
        consolidate(lake, DAY, settings).require()
    assert [one for one in consolidated(lake) if one[0] == "u1"] == [
        one for one in before if one[0] == "u1"
    ]
    assert [one[3] for one in consolidated(lake) if one[0] == OTHER] == [62], "other shards go on"
    monkeypatch.undo()
    state = inventory.day_state(lake, DAY, settings)
    assert (state.pending_fragments, state.pending_rows) == (1, 1)
    assert consolidate(lake, DAY, settings).pending == 1
    assert_consolidated(lake, raw(lake))


def spoil(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "data":
        content[6:200] = b"\xff" * 194
        path.write_bytes(content)
    else:
        path.write_bytes(b"not a Parquet file at all")


@pytest.mark.parametrize("how", ["cut", "empty", "data", "other"])
def test_damaged_consolidated_file(lake: Lake, settings: Settings, how: str) -> None:
    deliver(lake, settings, entry([line(f"u{n}") for n in range(50)], 0))
    consolidate(lake, DAY, settings)
    path = layout.consolidated_file(lake.root, DAY, one_user(lake))
    spoil(path, how)
    deliver(lake, settings, entry([line(f"u{n}", bpm=99) for n in range(50)], 1))
    if how != "data":
        assert any(
            str(path) in fault for one in ledger.of_days(lake, settings) for fault in one.faults
        )
    done = consolidate(lake, DAY, settings)
    [told] = done.set_aside
    assert told.startswith(f"{path} was damaged and is now ")
    assert told.endswith("it is made anew from raw fragments")
    assert_consolidated(lake, raw(lake))
    assert len(list((lake.root / layout.DAMAGED).rglob("*.parquet"))) == 1
    assert known_faults.faults(lake) == []
    assert consolidate(lake, DAY, settings).set_aside == []


@pytest.mark.parametrize("how", ["cut", "empty", "data", "other"])
def test_damaged_fragment(lake: Lake, settings: Settings, how: str) -> None:
    """It is set aside: the others of its shard and the other shards go on; put back, it counts."""
    deliver(lake, settings, entry([line(f"u{n}") for n in range(50)], 0))
    consolidate(lake, DAY, settings)
    bad: Fragment = next(
        one
        for one in deliver(lake, settings, entry([line(f"u{n}", bpm=99) for n in range(50)], 1))
        if one.path.parent.name == f"shard={one_user(lake):02d}"
    )
    rows = rows_of(bad.path)
    deliver(lake, settings, entry([line("u1", at=NOON + 1)], 2))
    whole = bad.path.read_bytes()
    spoil(bad.path, how)
    done = consolidate(lake, DAY, settings)
    [told] = done.set_aside
    assert told.startswith(f"{bad.path} was damaged and is now ")
    assert "\n" not in told
    assert_consolidated(lake, raw(lake))
    [fault] = known_faults.faults(lake)
    assert fault.path is not None
    assert fault.path.name == bad.path.name
    [aside] = (lake.root / layout.DAMAGED).rglob("*.parquet")
    aside.unlink()
    bad.path.write_bytes(whole)
    consolidate(lake, DAY, settings)
    assert set(rows) <= set(raw(lake))
    assert_consolidated(lake, raw(lake))
    assert known_faults.faults(lake) == []


def test_disk_that_fails_to_read_damages_nothing(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What can't be read now may be read later: it stays where it is."""
    deliver(lake, settings, entry([line()], 0))

    def failing(_: Any, path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(parquet, "verify_open", failing)
        with pytest.raises(OSError, match="Input/output"):
            consolidate(lake, DAY, settings).require()
    assert consolidate(lake, DAY, settings).set_aside == []
    assert_consolidated(lake, raw(lake))


def test_rebuild_needs_every_fragment(lake: Lake, settings: Settings) -> None:
    [fragment] = deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    fragment.path.unlink()
    with pytest.raises(DamagedFileError, match=r"can't be rebuilt: 1 of its raw fragments"):
        consolidate(lake, DAY, settings, rebuild=True).require()
    assert len(consolidated(lake)) == 1
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    done = consolidate(lake, DAY, settings)
    assert (done.rows, done.unique) == (2, 2), "counts outlive their fragments"


def test_current(lake: Lake, settings: Settings) -> None:
    assert current(lake, DAY, 0) is None
    deliver(lake, settings, entry([line()]))
    consolidate(lake, DAY, settings)
    found = current(lake, DAY, one_user(lake))
    assert isinstance(found, Current)
    assert found.names == {str(one.name) for one in fragments.all_listed(lake, DAY)}


def test_a_failed_merge_keeps_no_other_shard_waiting(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merges take turns at the engine's memory, whatever becomes of one."""
    deliver(lake, settings, entry([line(f"u{n}") for n in range(50)], 0))
    original, failed = parquet.Writer.write, threading.Event()

    def write(out: parquet.Writer, rows: pa.Table) -> None:
        if not failed.is_set():
            failed.set()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(out, rows)

    monkeypatch.setattr(parquet.Writer, "write", write)
    with pytest.raises(OSError, match="No space"):
        consolidate(lake, DAY, settings).require()
    assert len(list((lake.root / layout.HEARTBEATS).rglob("*.parquet"))) == lake.shards - 1
    consolidate(lake, DAY, settings)
    assert_consolidated(lake, raw(lake))


@pytest.mark.parametrize(
    ("threads", "memory_mb", "merges"), [(1, 1024, 1), (2, 1024, 2), (8, 1024, 4), (64, 1024, 4)]
)
def test_merges_side_by_side_share_memory_and_threads(
    settings: Settings, threads: int, memory_mb: int, merges: int
) -> None:
    memory = memory_mb * 2**20
    given = settings.model_copy(update={"duckdb_threads": threads, "duckdb_memory": memory})
    bounds = consolidation._Bounds.of(given)
    assert [bounds.turns.acquire(blocking=False) for _ in range(merges + 1)] == [
        *([True] * merges),
        False,
    ]
    assert bounds.settings.duckdb_threads * merges == threads
    assert bounds.settings.duckdb_memory * merges == memory
