"""Damage: what is moved away, what stays, and what is missed then."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hb_assets.errors import DamagedFileError, HbError
from hb_assets.lake import consolidated, damage, fragments, layout, ledger, parquet
from hb_assets.lake.consolidation import consolidate
from hb_assets.lake.store import Lake
from hb_assets.record import shard_of
from hb_assets.settings import Settings
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
    fragments._size.cache_clear()
    error = parquet.damaged(one.path, "cut short")
    said = damage.set_aside(lake, error)
    assert said is not None
    assert "its rows are in the consolidated file" in said
    assert damage.listed(lake) == []
    assert [found.faults for found in ledger.of_days(lake, settings, deep=True)] == [[]]
    published(lake).write_bytes(b"PAR1")
    with pytest.raises(DamagedFileError, match="put a whole copy in its place"):
        consolidate(lake, DAY, settings)


def test_no_watermark_is_claimed_for_rows_that_were_set_aside(
    lake: Lake, settings: Settings
) -> None:
    """Put back, they are no replays: they were never counted."""
    [bad] = deliver(lake, settings, entry([line(), line(bpm=76)], 0))
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    whole = bad.path.read_bytes()
    bad.path.write_bytes(whole[:-1])
    fragments._size.cache_clear()
    done = consolidate(lake, DAY, settings, watermarks={0: (2**60, 0)})
    assert len(done.set_aside) == 1
    found = consolidated.current(lake, DAY, shard_of("u1", lake.shards))
    assert found is not None
    assert found.note.watermark == {}
    assert len(damage.listed(lake)) == 1
    [aside] = (lake.root / layout.DAMAGED).rglob("*.parquet")
    aside.unlink()
    bad.path.write_bytes(whole)
    done = consolidate(lake, DAY, settings, watermarks={0: (2**60, 0)})
    assert (done.rows, done.unique, done.corrections, done.replayed) == (3, 2, 1, 0)
    assert damage.listed(lake) == []


@pytest.mark.parametrize("kind", [pa.ArrowMemoryError, MemoryError])
def test_too_little_memory_damages_nothing(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))

    def starving(*_: Any) -> None:
        raise kind("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(parquet.pq, "read_metadata", starving)
        fragments._size.cache_clear()
        with pytest.raises((HbError, MemoryError)) as raised:
            consolidate(lake, DAY, settings)
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
            consolidate(lake, DAY, settings)
    aside = list((lake.root / layout.DAMAGED).rglob("*.parquet"))
    assert one.path.exists() == (not aside)
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    assert consolidate(lake, DAY, settings).unique == 1
    assert len(damage.listed(lake)) == 1


def test_a_sound_file_stays_whatever_an_engine_says(lake: Lake, settings: Settings) -> None:
    [one] = deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    for path in (one.path, published(lake)):
        assert damage.set_aside(lake, parquet.damaged(path, "an engine's mistake")) is None
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
