"""Pruning: what may go goes, what may not stays, and nobody loses a row meanwhile."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError, FencedError
from hb_assets.core.record import shard_of
from hb_assets.core.schema import ARRIVAL, HEARTBEATS
from hb_assets.core.settings import Settings
from hb_assets.lake import ledger
from hb_assets.lake.compaction import consolidation, pruning
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.compaction.pruning import Pruned, prune
from hb_assets.lake.files import consolidated, erased, fragments
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.integrity import checks
from hb_assets.lake.query import user_scan
from hb_assets.lake.storage import catalog, layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import (
    DAY,
    NOON,
    Row,
    deliver,
    entry,
    left_behind,
    line,
    minute_points,
    rows_of,
    survivors,
)
from hb_assets_tests.lake.deliveries import consolidated as consolidated_rows

LATEST = {0: (days.end_ms(DAY) + 1_000_000, 0)}
"""A watermark above all entries of these tests."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """No grace: whatever may go goes at once."""
    return settings.model_copy(update={"raw_keep": timedelta(0)})


def there(lake: Lake) -> set[Path]:
    return {one.path for one in fragments.all_listed(lake, DAY)}


def age(path: Path, by: timedelta) -> None:
    at = time.time() - by.total_seconds()
    os.utime(path, (at, at))


def everything_adds_up(lake: Lake, settings: Settings, came: list[Row]) -> None:
    by_identity = {one[4]: one for one in came}
    latest = survivors(list(by_identity.values())).values()
    assert sorted(consolidated_rows(lake)) == sorted(latest)
    [found] = ledger.of_days(lake, settings, deep=True)
    assert found.faults == []
    assert found.rows == len(by_identity)


def test_only_what_is_consolidated_acknowledged_and_old(lake: Lake, settings: Settings) -> None:
    kept = settings.model_copy(update={"raw_keep": timedelta(hours=1)})
    [old] = deliver(lake, settings, entry([line()], 0))
    [unacknowledged] = deliver(lake, settings, entry([line(bpm=76)], 5))
    [young] = deliver(lake, settings, entry([line(bpm=77)], 1))
    consolidate(lake, DAY, settings, watermarks={0: (days.end_ms(DAY), 4)})
    [pending] = deliver(lake, settings, entry([line(bpm=78)], 2))
    for one in (old, unacknowledged, pending):
        age(one.path, timedelta(hours=2))
    assert prune(lake, kept, dry_run=True).fragments == 1
    assert there(lake) == {one.path for one in (old, unacknowledged, young, pending)}
    done = prune(lake, kept)
    assert (done.fragments, done.faults) == (1, ())
    assert done.bytes > 0
    assert there(lake) == {one.path for one in (unacknowledged, young, pending)}
    assert prune(lake, kept) == Pruned()


def test_without_a_watermark_nothing_goes(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    assert prune(lake, settings) == Pruned()


def test_a_watermark_never_goes_back(lake: Lake, settings: Settings) -> None:
    """Another server, or one that was set back, knows less than what was included already."""
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    for earlier in ({0: (1, 0)}, {}):
        deliver(lake, settings, entry([line(bpm=76)], 1))
        consolidate(lake, DAY, settings, watermarks=earlier)
        published = consolidated.current(lake, DAY, shard_of("u1", lake.shards))
        assert published is not None
        assert published.metadata.watermark == LATEST


def test_a_fragment_that_is_away_stays_listed_above_the_watermark(
    lake: Lake, settings: Settings
) -> None:
    """Whoever puts it back brings nothing new: its rows are included, and known by its name."""
    [away] = deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings)
    copy = away.path.read_bytes()
    away.path.unlink()
    deliver(lake, settings, entry([line(bpm=76)], 1))
    consolidate(lake, DAY, settings).require()
    away.path.write_bytes(copy)
    assert consolidate(lake, DAY, settings, rewrite=True).replayed == 0
    [found] = ledger.of_days(lake, settings)
    assert (found.faults, found.rows, found.pending) == ([], 2, 0)


def test_a_pruner_keeps_what_the_file_lists_no_more(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published file is another one by the time that its fragments would go."""
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    original = pruning.current
    seen = 0

    def current(*arguments: Any) -> Any:
        nonlocal seen
        seen += 1
        found = original(*arguments)
        if found is None or seen == 1:
            return found
        return consolidated.Current(
            found.path, msgspec.structs.replace(found.metadata, fragments=())
        )

    monkeypatch.setattr(pruning, "current", current)
    assert prune(lake, settings).fragments == 0
    assert len(there(lake)) == 1


def test_days_that_were_not_asked_for(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    assert prune(lake, settings, days=[DAY + timedelta(days=1)]).fragments == 0
    assert prune(lake, settings, days=[DAY]).fragments == 1


def test_what_comes_again_after_the_prune_is_a_replay(lake: Lake, settings: Settings) -> None:
    """A drainer that slept since before the acknowledgement writes its fragment at last."""
    came: list[Row] = []
    entries = [entry([line(bpm=60), line("u2")], 0), entry([line(bpm=61)], 1)]
    for fragment in deliver(lake, settings, *entries):
        came += rows_of(fragment.path)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    prune(lake, settings)
    assert there(lake) == set()
    deliver(lake, settings, *entries)
    [before] = ledger.of_days(lake, settings)
    assert (before.rows, before.pending) == (3, 0), "what was counted isn't counted again"
    done = consolidate(lake, DAY, settings, watermarks=LATEST)
    assert (done.rows, done.unique, done.superseded, done.replayed) == (3, 2, 1, 3)
    everything_adds_up(lake, settings, came)


def test_a_new_server_whose_clock_is_behind_loses_nothing(lake: Lake, settings: Settings) -> None:
    """Below the watermark, but never seen: kept. The watermark decides counts, never rows."""
    deliver(lake, settings, entry([line(bpm=60)], 5))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    prune(lake, settings)
    deliver(lake, settings, entry([line("u1", at=NOON + 1)], 1))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    assert {one[2] for one in consolidated_rows(lake)} == {NOON, NOON + 1}


def test_counts_hold_below_the_watermark(lake: Lake, settings: Settings) -> None:
    """A new server whose clock is behind: repeats of its own rows count, though not here."""
    deliver(lake, settings, entry([line(bpm=60)], 5))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    deliver(lake, settings, entry([line(at=NOON + 1), line(at=NOON + 1, bpm=61)], 1))
    done = consolidate(lake, DAY, settings, watermarks=LATEST)
    assert all(figure.passed for figure in done.figures)
    assert {(one[2], one[3]) for one in consolidated_rows(lake)} == {
        (NOON, 75 - 15),
        (NOON + 1, 61),
    }
    [found] = ledger.of_days(lake, settings, deep=True)
    assert found.faults == []
    assert consolidate(lake, DAY, settings, rebuild=True).unique == 2


@pytest.mark.parametrize("consolidated_first", [False, True])
def test_an_id_that_is_given_again_drops_nobody(
    lake: Lake, settings: Settings, consolidated_first: bool
) -> None:
    """A server that lost its last ids gives them to other heartbeats."""
    deliver(lake, settings, entry([line("u1", bpm=60)], 7))
    if consolidated_first:
        consolidate(lake, DAY, settings)
    deliver(lake, settings, entry([line("u1", at=NOON + 1)], 7))
    done = consolidate(lake, DAY, settings)
    assert (done.unique, done.rows) == (2, 2)
    [found] = ledger.of_days(lake, settings, deep=True)
    assert (found.faults, found.rows) == ([], 2)


def test_an_erased_identity_that_is_given_again_drops_nobody(
    lake: Lake, settings: Settings
) -> None:
    gone = decode([entry([line("u1")], 7)], settings).rows.select(ARRIVAL)
    erased.publish(lake, settings, gone)
    deliver(lake, settings, entry([line("u2")], 7))
    done = consolidate(lake, DAY, settings)
    assert [one[0] for one in consolidated_rows(lake)] == ["u2"]
    assert all(figure.passed for figure in done.figures)
    assert ledger.of_days(lake, settings, deep=True)[0].faults == []


def test_a_full_disk_stops_one_shard_not_the_others(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(lake, settings, entry([line(f"u{n}") for n in range(50)], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    original = pruning.mark_incomplete

    def full(of: Lake, day: date, shard: int) -> None:
        if shard == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(of, day, shard)

    monkeypatch.setattr(pruning, "mark_incomplete", full)
    done = prune(lake, settings)
    assert done.faults == ("day 2025-01-15, shard 00: can't be pruned (No space left on device)",)
    assert {one.parent.name for one in there(lake)} == {"shard=00"}


def test_names_of_pruned_fragments_are_dropped(lake: Lake, settings: Settings) -> None:
    """The list in the footer stays as short as raw, however long the day."""
    for seq in range(5):
        deliver(lake, settings, entry([line(at=NOON + seq)], seq))
        consolidate(lake, DAY, settings, watermarks=LATEST)
        prune(lake, settings)
    found = consolidated.current(lake, DAY, shard_of("u1", lake.shards))
    assert found is not None
    assert (len(found.metadata.fragments), found.metadata.pruned, found.metadata.rows) == (1, 4, 5)


def test_rows_that_lie_in_quarantine_too_are_kept_for_the_audit(
    lake: Lake, settings: Settings
) -> None:
    """Decoded once, refused the next time (HB_START_DATE was changed between): one heartbeat."""
    [fragment] = deliver(lake, settings, entry([line()], 0))
    stricter = settings.model_copy(update={"start_date": DAY + timedelta(days=1)})
    deliver(lake, stricter, entry([line()], 0))
    deliver(lake, settings, entry([b"not json"], 1), entry([line(at=NOON + 1)], 2))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    assert prune(lake, settings).fragments == 1
    assert there(lake) == {fragment.path}
    assert ledger.of_quarantine(lake, settings).in_fragments == 1


# -- others at work


def test_a_consolidator_that_slept_is_fenced(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before its rename, it wakes up when all that it had read is gone from raw."""
    came: list[Row] = []
    for fragment in deliver(lake, settings, entry([line(bpm=60)], 0)):
        came += rows_of(fragment.path)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    for fragment in deliver(lake, settings, entry([line(at=NOON + 1)], 1)):
        came += rows_of(fragment.path)
    original = checks.require

    def sleep(*arguments: Any) -> None:
        monkeypatch.setattr(checks, "require", original)
        for fragment in deliver(lake, settings, entry([line(at=NOON + 2)], 2)):
            came.extend(rows_of(fragment.path))
        consolidate(lake, DAY, settings, watermarks=LATEST)
        assert prune(lake, settings).fragments == 3
        original(*arguments)

    monkeypatch.setattr(checks, "require", sleep)
    with pytest.raises(FencedError):
        consolidate(lake, DAY, settings, watermarks=LATEST).require()
    everything_adds_up(lake, settings, came)


def arrive(lake: Lake, settings: Settings, came: list[Row], seq: int) -> None:
    """One heartbeat, which corrects another one now and then; `came` notes its row."""
    for fragment in deliver(lake, settings, entry([line(at=NOON + seq % 3, bpm=60 + seq)], seq)):
        came.extend(rows_of(fragment.path))


@pytest.mark.parametrize("where", ["pending", "merged", "_figures"])
def test_consolidator_overtaken_by_a_pruner(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    came: list[Row] = []
    arrives = partial(arrive, lake, settings, came)
    arrives(0)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    arrives(1)
    original = getattr(consolidation, where)

    def overtaken(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(consolidation, where, original)
        arrives(2)
        consolidate(lake, DAY, settings, watermarks=LATEST)
        prune(lake, settings)
        arrives(3)
        return original(*arguments, **named)

    monkeypatch.setattr(consolidation, where, overtaken)
    with contextlib.suppress(FencedError):
        consolidate(lake, DAY, settings, watermarks=LATEST)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    everything_adds_up(lake, settings, came)


@pytest.mark.parametrize("where", ["fence", "current", "mark_incomplete"])
def test_pruner_overtaken_by_consolidators(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Between any two steps of the pruner others publish; one of them sleeps through the rest."""
    came: list[Row] = []
    arrives = partial(arrive, lake, settings, came)
    arrives(0)
    arrives(1)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    arrives(2)
    step = getattr(pruning, where)
    calls = 0

    def overtaken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == (2 if where == "current" else 1):
            monkeypatch.setattr(pruning, where, step)
            consolidate(lake, DAY, settings, watermarks=LATEST)
            arrives(3)
        return step(*arguments)

    monkeypatch.setattr(pruning, where, overtaken)
    prune(lake, settings)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    everything_adds_up(lake, settings, came)


def test_consolidator_and_pruner_asleep_in_turn(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pruner sleeps after its fence; a consolidator that began later has read an older file,
    sleeps before its rename, and wakes up last. It must not bury what the pruner has deleted."""
    came: list[Row] = []

    def arrives(seq: int) -> None:
        for fragment in deliver(lake, settings, entry([line(at=NOON + seq, bpm=60)], seq)):
            came.extend(rows_of(fragment.path))

    arrives(0)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    arrives(1)
    fence = pruning.fence
    require = checks.require
    awake: list[Callable[[], None]] = []

    def fence_then_sleep(*arguments: Any) -> int:
        fenced = fence(*arguments)
        monkeypatch.setattr(pruning, "fence", fence)

        def sleeper(*of_check: Any) -> None:
            monkeypatch.setattr(checks, "require", require)
            arrives(2)
            consolidate(lake, DAY, settings, watermarks=LATEST)
            awake[0]()
            require(*of_check)

        monkeypatch.setattr(checks, "require", sleeper)
        return fenced

    # the rest of the pruner's work happens inside the sleeping consolidator
    parts: list[tuple[Path, ...]] = []

    def rest_of_the_pruner() -> None:
        prune(lake, settings)
        parts.append(tuple(there(lake)))

    awake.append(rest_of_the_pruner)
    monkeypatch.setattr(pruning, "fence", fence_then_sleep)
    prune(lake, settings)
    consolidate(lake, DAY, settings, watermarks=LATEST)  # it may be fenced off
    assert parts
    consolidate(lake, DAY, settings, watermarks=LATEST).require()
    everything_adds_up(lake, settings, came)


def test_reader_overtaken_by_a_pruner(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver(lake, settings, entry([line(bpm=60)], 0))
    original = user_scan._pending

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(user_scan, "_pending", original)
        consolidate(lake, DAY, settings, watermarks=LATEST)
        prune(lake, settings)
        return original(*arguments)

    monkeypatch.setattr(user_scan, "_pending", overtaken)
    points = minute_points(lake, "u1", NOON, NOON + 60_000, None, settings)
    assert [point.heart_rate for point in points] == [60]


@pytest.mark.parametrize("after", ["names", "published"])
def test_reader_overtaken_between_raw_and_the_published_file(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """Whichever it has looked at first: what went into the other one meanwhile is answered."""
    shard = shard_of("u1", lake.shards)
    neighbour = next(f"n{n}" for n in range(99) if shard_of(f"n{n}", lake.shards) == shard)
    deliver(lake, settings, entry([line(neighbour)], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    deliver(lake, settings, entry([line(bpm=60)], 1))
    place, name = {
        "names": (catalog, "names"),
        "published": (user_scan, "_published_at"),
    }[after]
    original = getattr(place, name)

    def overtaken(*arguments: Any) -> Any:
        found = original(*arguments)
        monkeypatch.setattr(place, name, original)
        consolidate(lake, DAY, settings, watermarks=LATEST)
        assert prune(lake, settings).fragments >= 1
        return found

    monkeypatch.setattr(place, name, overtaken)
    points = minute_points(lake, "u1", NOON, NOON + 60_000, None, settings)
    assert [point.heart_rate for point in points] == [60]


# -- what goes wrong


def test_a_prune_that_dies_goes_on_the_next_time(
    lake: Lake, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[Row] = []
    for seq in range(3):
        for fragment in deliver(lake, settings, entry([line(at=NOON + seq)], seq)):
            came += rows_of(fragment.path)
    consolidate(lake, DAY, settings, watermarks=LATEST)
    unlink = Path.unlink
    gone = 0

    def dying(path: Path, missing_ok: bool = False) -> None:
        nonlocal gone
        gone += 1
        if gone == 2:
            raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(KeyboardInterrupt):
            pruning.prune_shard(
                lake,
                DAY,
                shard_of("u1", lake.shards),
                _connection(settings),
                lambda _: True,
            )
    for temp in left_behind(lake.root):
        temp.unlink()
    assert 0 < len(there(lake)) < 4
    everything_adds_up(lake, settings, came)
    prune(lake, settings)
    assert there(lake) == set()
    everything_adds_up(lake, settings, came)


def _connection(settings: Settings) -> Any:
    from hb_assets.lake.storage.engine import connect

    return connect(settings)


def test_nothing_is_pruned_for_a_file_that_is_damaged(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line(f"u{n}") for n in range(50)], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    done = prune(lake, settings)
    assert len(done.faults) == 1
    assert str(path) in done.faults[0]
    assert {one.parent.name for one in there(lake)} == {path.parent.name}, "other shards go on"


def test_a_damaged_file_whose_raw_was_pruned_stays(lake: Lake, settings: Settings) -> None:
    """Moved away it would be missed by nobody who reads: an error is better than half a day."""
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    prune(lake, settings)
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))
    whole = path.read_bytes()
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    path.write_bytes(whole[:-20])
    for rebuild in (False, True):
        with pytest.raises(DamagedFileError, match="puts a whole copy back"):
            consolidate(lake, DAY, settings, rebuild=rebuild).require()
    with pytest.raises(DamagedFileError):
        minute_points(lake, "u1", NOON, NOON + 60_000, None, settings)
    path.unlink()
    with pytest.raises(DamagedFileError, match=r"is gone, and raw fragments .* were pruned"):
        consolidate(lake, DAY, settings).require()
    with pytest.raises(DamagedFileError, match="is gone"):
        minute_points(lake, "u1", NOON, NOON + 60_000, None, settings)
    path.write_bytes(whole)
    assert consolidate(lake, DAY, settings).unique == 2


def test_rebuild_is_refused_once_raw_was_pruned(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()], 0))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    prune(lake, settings)
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    consolidate(lake, DAY, settings, watermarks=LATEST)
    with pytest.raises(DamagedFileError, match="can't be rebuilt: 1 of its raw fragments"):
        consolidate(lake, DAY, settings, rebuild=True).require()


def test_leftovers_of_crashes_go_after_a_safe_age(lake: Lake, settings: Settings) -> None:
    temp = lake.root / layout.TEMP / "raw-day=2025-01-15-shard=00-0011223344556677"
    temp.parent.mkdir(exist_ok=True)
    young = temp.with_name("heartbeats-day=2025-01-15-shard=00-0011223344556677")
    for path in (temp, young):
        path.write_bytes(b"half a file")
    age(temp, timedelta(hours=25))
    assert prune(lake, settings, dry_run=True) == Pruned()
    assert prune(lake, settings).leftovers == 1
    assert left_behind(lake.root) == [young]
    young.unlink()


@pytest.mark.parametrize("kind", ["fragment", "consolidated"])
def test_a_flipped_bit_is_found_wherever_it_is(lake: Lake, settings: Settings, kind: str) -> None:
    """Of a fragment any bit; of a consolidated file any that a reader of rows could notice."""
    [fragment] = deliver(lake, settings, entry([line(at=NOON + n) for n in range(40)], 0))
    consolidate(lake, DAY, settings)
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))
    if kind == "fragment":
        path = fragment.path
    whole = path.read_bytes()
    rows = rows_of(path)
    missed = []
    for at in range(0, len(whole), 7):
        content = bytearray(whole)
        content[at] ^= 1 << at % 8
        path.write_bytes(content)
        try:
            if kind == "fragment":
                parquet.verify(fragment.path)
            else:
                parquet.verify(path)
                parquet.verify_footer(path, HEARTBEATS)
        except DamagedFileError:
            continue
        missed.append(at)
        assert kind == "consolidated"
        assert rows_of(path) == rows
    assert len(missed) < len(whole) // 7 / 2
