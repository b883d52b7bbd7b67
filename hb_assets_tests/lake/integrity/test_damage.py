"""Damage: what is moved away, what stays, and what is missed then."""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hb_assets.core.errors import CheckFailedError, DamagedFileError, HbError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import ledger
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import consolidated
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.files.fragments import FragmentMetadata
from hb_assets.lake.integrity import checks, damage, known_faults
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.layout import FragmentName
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line


def published(lake: Lake) -> Path:
    return layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))


def test_a_fragment_that_is_included_already_is_missed_by_nobody_but_a_rebuild(
    lake: Lake, settings: Settings
) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    whole = one.path.read_bytes()
    one.path.write_bytes(whole[:-1])
    error = parquet.damaged(one.path, "cut short")
    said = damage.set_aside(lake, error, settings)
    assert said is not None
    assert "its rows are in the consolidated file" in said
    assert known_faults.faults(lake) == []
    assert [found.faults for found in ledger.of_days(lake, settings, deep=True)] == [[]]
    published(lake).write_bytes(b"PAR1")
    with pytest.raises(DamagedFileError, match="puts a whole copy back"):
        consolidate(lake, DAY, settings).require()


def test_no_watermark_is_claimed_for_rows_that_were_set_aside(
    lake: Lake, settings: Settings
) -> None:
    """Put back, they are no replays: they were never counted."""
    [bad] = deliver(lake, settings, entry([line(), line(bpm=76)], 0))
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    whole = bad.path.read_bytes()
    bad.path.write_bytes(whole[:-1])
    done = consolidate(lake, DAY, settings, watermarks={0: (2**60, 0)})
    assert len(done.set_aside) == 1
    found = consolidated.current(lake, DAY, shard_of("u1", lake.shards))
    assert found is not None
    assert found.metadata.watermark == {}
    assert len(known_faults.faults(lake)) == 1
    [aside] = (lake.root / layout.DAMAGED).rglob("*.parquet")
    aside.unlink()
    bad.path.write_bytes(whole)
    done = consolidate(lake, DAY, settings, watermarks={0: (2**60, 0)})
    assert (done.rows, done.unique, done.corrections, done.replayed) == (3, 2, 1, 0)
    assert known_faults.faults(lake) == []


@pytest.mark.parametrize("kind", [pa.ArrowMemoryError, MemoryError])
def test_too_little_memory_damages_nothing(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))

    def starving(*_: Any) -> None:
        raise kind("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(parquet.pq, "read_metadata", starving)
        with pytest.raises((HbError, MemoryError)) as raised:
            consolidate(lake, DAY, settings).require()
        assert not isinstance(raised.value, DamagedFileError)
    assert one.path.exists()
    assert consolidate(lake, DAY, settings).set_aside == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", ["make_folder", "rename", "sync_folder"])
def test_a_disk_that_fails_while_a_file_is_set_aside(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, step: str, number: int
) -> None:
    """It is in one of both places, and the next consolidation goes on."""
    [one] = deliver(lake, settings, entry([line()], 0))
    one.path.write_bytes(b"PAR1")

    def failing(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(*((Path, step) if step == "rename" else (damage, step)), failing)
        with pytest.raises(OSError, match=os.strerror(number)):
            consolidate(lake, DAY, settings).require()
    aside = list((lake.root / layout.DAMAGED).rglob("*.parquet"))
    assert one.path.exists() == (not aside)
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    assert consolidate(lake, DAY, settings).unique == 1
    assert len(known_faults.faults(lake)) == 1


def test_a_sound_file_stays_whatever_an_engine_says(lake: Lake, settings: Settings) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    for path in (one.path, published(lake)):
        assert (
            damage.set_aside(lake, parquet.damaged(path, "an engine's mistake"), settings) is None
        )
        assert path.exists()


def test_the_ledger_counts_again_what_was_replaced_meanwhile(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    original: Callable[..., Any] = parquet.footer
    once = [True]

    def overtaken(path: Path) -> Any:
        if once and path.parent.parent.parent.name == layout.HEARTBEATS:
            once.clear()
            deliver(lake, settings, entry([line(at=NOON + 1)], 1))
            consolidate(lake, DAY, settings)
        return original(path)

    monkeypatch.setattr(ledger.parquet, "footer", overtaken)
    [found] = ledger.of_days(lake, settings)
    assert (found.faults, found.rows) == ([], 2)


def forge(like: Path, rows: pa.Table, **metadata: object) -> Path:
    """A fragment beside another one: all of its checksums are right, a drain wouldn't write it."""
    name = FragmentName.parse(like.name)
    assert name is not None
    temp = like.with_name("forged")
    temp.touch()
    said = msgspec.structs.replace(parquet.metadata(like, FragmentMetadata), **metadata)
    parquet.write(temp, rows, said)
    name = replace(name, random="f" * 16).sealed(temp)
    return temp.rename(like.with_name(str(name)))


def changed(rows: pa.Table, column: str, value: object) -> pa.Table:
    field = rows.schema.field(column)
    values = pa.array([value] * rows.num_rows, field.type)
    return rows.set_column(rows.schema.get_field_index(column), field, values)


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("heart_rate", 999, "heart_rate is out of bounds"),
        ("timestamp", NOON + 86_400_000, "timestamp is out of bounds"),
        ("user_id", "another", "a user belongs to another shard"),
        ("user_id", "", "user_id is out of bounds"),
        ("arrival_ms", 7, "it holds other entries"),
        ("day", "2025-01-14", "it belongs to day 2025-01-14"),
    ],
)
@pytest.mark.parametrize("before", [False, True], ids=["first", "late"])
def test_a_forged_fragment_stops_no_day(
    lake: Lake, settings: Settings, column: str, value: object, why: str, before: bool
) -> None:
    """Its rows are nobody's heartbeats: it is set aside in the run that meets it."""
    assert shard_of("another", lake.shards) != shard_of("u1", lake.shards)
    if before:
        deliver(lake, settings, entry([line(at=NOON - 1)], 0))
        consolidate(lake, DAY, settings).require()
    [one] = deliver(lake, settings, entry([line()], 1))
    rows = pq.read_table(one.path, partitioning=None)
    forged = (
        forge(one.path, rows, day=value)
        if column == "day"
        else forge(one.path, changed(rows, column, value))
    )
    done = consolidate(lake, DAY, settings).require()
    [said] = done.set_aside
    assert said.startswith(f"{forged} was damaged")
    assert done.unique == 1 + before
    with pytest.raises(DamagedFileError, match=why):
        damage.examine_at(
            lake,
            Path(said.split(" is now ")[1].split(": its")[0]),
            damage.Place(layout.RAW, DAY, shard_of("u1", lake.shards)),
            settings,
        )
    assert [fault.kind for fault in known_faults.faults(lake)] == ["set_aside"]


def test_a_forged_consolidated_file_is_made_anew_while_raw_has_all_of_it(
    lake: Lake, settings: Settings
) -> None:
    deliver(lake, settings, entry([line(), line(at=NOON + 1)], 0))
    consolidate(lake, DAY, settings)
    path = published(lake)
    metadata = parquet.metadata(path, ConsolidatedMetadata)
    rows = pq.read_table(path, partitioning=None)
    parquet.write(path, rows.take([1, 0]), metadata)
    deliver(lake, settings, entry([line(at=NOON + 2)], 1))
    done = consolidate(lake, DAY, settings).require()
    assert len(done.set_aside) == 1
    assert (done.rows, done.unique) == (3, 3)
    assert known_faults.faults(lake) == []


def test_what_failed_is_handed_on_and_stands(lake: Lake, settings: Settings) -> None:
    """One shard can't be read for good, another one is made anew, the others are as ever."""
    users = {shard_of(f"u{n}", lake.shards): f"u{n}" for n in range(50)}
    deliver(lake, settings, entry([line(user) for user in users.values()], 0))
    consolidate(lake, DAY, settings)
    for shard in (0, 1):
        path = layout.consolidated_file(lake.root, DAY, shard)
        path.write_bytes(b"PAR1")
        if not shard:
            consolidated.mark_incomplete(lake, DAY, shard)
    deliver(lake, settings, entry([line(user, at=NOON + 1) for user in users.values()], 1))
    for _ in range(2):
        done = consolidate(lake, DAY, settings)
        [failure] = done.failed
        assert (failure.shard, failure.kind, failure.figures) == (0, "damaged", ())
        assert pickle.loads(pickle.dumps(done)) == done
        with pytest.raises(DamagedFileError, match="is damaged"):
            done.require()
        assert done.unique == 6
        assert all(figure.passed for figure in done.figures)
        [fault] = known_faults.faults(lake)
        assert (fault.kind, fault.shard) == ("damaged", 0)
    layout.pruned_mark(lake.root, DAY, 0).unlink()
    assert consolidate(lake, DAY, settings).require().unique == 8
    assert known_faults.faults(lake) == []


def test_figures_of_a_failed_check_are_handed_on(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    users = {shard_of(f"u{n}", lake.shards): f"u{n}" for n in range(50)}
    deliver(lake, settings, entry([line(user) for user in users.values()], 0))
    failing = checks.Figure(
        checks.SORTED, False, {"out_of_order": 1}, "1 row stands before another"
    )
    original = checks.heartbeats

    def judged(path: Path, *others: Any) -> list[checks.Figure]:
        found = original(path, *others)
        return [*found[:-1], failing] if "shard=02" in str(path) else found

    with monkeypatch.context() as patch:
        patch.setattr(checks, "heartbeats", judged)
        done = consolidate(lake, DAY, settings)
    [failure] = done.failed
    assert (failure.shard, failure.kind) == (2, "check_failed")
    assert failing in failure.figures
    assert [one.name for one in done.figures if not one.passed] == [checks.SORTED]
    with pytest.raises(CheckFailedError) as raised:
        done.require()
    assert raised.value.figures == failure.figures
    assert [(one.kind, one.shard) for one in known_faults.faults(lake)] == [("check_failed", 2)]
    consolidate(lake, DAY, settings).require()
    assert known_faults.faults(lake) == []
