"""Inventory: how a day stands, out of names and footers."""

from __future__ import annotations

import os
import time

import pytest

from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, minutes
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line


def test_empty(lake: Lake, settings: Settings) -> None:
    assert inventory.days(lake) == []
    state = inventory.day_state(lake, DAY, settings)
    assert (state.fragments, state.pending_rows, state.oldest_pending_ms) == (0, 0, None)
    assert state.minutes_current


def test_a_day_from_its_first_fragment_to_its_minutes(lake: Lake, settings: Settings) -> None:
    before = time.time_ns() // 1_000_000 - 1000
    deliver(lake, settings, entry([line(), line(bpm=80), line("u2"), line("u2")], 0))
    deliver(lake, settings, entry([line(bpm=80)], 1))
    assert inventory.days(lake) == [DAY]
    state = inventory.day_state(lake, DAY, settings)
    shards = {shard_of(user, lake.shards) for user in ("u1", "u2")}
    assert state.fragments == state.pending_fragments == len(shards) + 1
    assert state.fragment_rows == state.pending_rows == 5
    assert state.most_pending == 2
    assert state.digest == state.pending_digest == inventory.raw_digest(lake, DAY)
    assert state.oldest_pending_ms is not None
    assert before <= state.oldest_pending_ms <= time.time_ns() // 1_000_000 + 1000
    assert (state.rows, state.bytes) == (0, 0)

    consolidate(lake, DAY, settings)
    done = inventory.day_state(lake, DAY, settings)
    assert (done.rows, done.unique, done.superseded) == (5, 2, 3)
    assert (done.repeats, done.corrections, done.replayed) == (2, 1, 0)
    assert (done.pending_fragments, done.pending_rows, done.most_pending) == (0, 0, 0)
    assert (done.digest, done.oldest_pending_ms) == (state.digest, None)
    assert done.pending_digest != state.pending_digest
    assert done.rows_written == 2
    assert done.bytes > 0
    assert not done.minutes_current

    minutes.build(lake, DAY, settings)
    assert inventory.day_state(lake, DAY, settings).minutes_current
    other = settings.model_copy(update={"device_priority": ("zz",)})
    assert not inventory.day_state(lake, DAY, other).minutes_current

    deliver(lake, settings, entry([line(at=NOON + 1)], 2))
    late = inventory.day_state(lake, DAY, settings)
    assert (late.pending_fragments, late.pending_rows, late.unique) == (1, 1, 2)
    consolidate(lake, DAY, settings)
    assert inventory.day_state(lake, DAY, settings).unique == 3, "a replaced footer is read anew"


def test_minutes_are_not_current_while_rows_are_pending(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()]))
    assert not inventory.day_state(lake, DAY, settings).minutes_current
    consolidate(lake, DAY, settings)
    minutes.build(lake, DAY, settings)
    assert inventory.day_state(lake, DAY, settings).minutes_current
    deliver(lake, settings, entry([line(at=NOON + 1)], 1))
    assert not inventory.day_state(lake, DAY, settings).minutes_current


def test_one_bad_file_hides_no_other(lake: Lake, settings: Settings) -> None:
    """A footer that is none, a fragment that was cut, a folder that isn't one: a line each."""
    users = users_of_each_shard(lake)
    deliver(lake, settings, *(entry([line(user)], seq) for seq, user in enumerate(users)))
    consolidate(lake, DAY, settings, shards=[0, 1])
    deliver(lake, settings, entry([line(users[3], at=NOON + 1)], 9))
    layout.consolidated_file(lake.root, DAY, 0).write_bytes(b"PAR1")
    cut = fragments.listed(lake, DAY, 3)[0].path
    os.truncate(cut, 100)
    folder = layout.shard_folder(lake.root, layout.RAW, DAY, 2)
    folder.rename(folder.with_name("elsewhere"))
    folder.touch()

    state = inventory.day_state(lake, DAY, settings)

    assert [line.split()[0] for line in state.faults] == [
        str(layout.consolidated_file(lake.root, DAY, 0)),
        str(folder),
        str(cut),
    ]
    assert (state.unique, state.fragments, state.fragment_rows) == (1, 4, 3)
    assert (state.pending_fragments, state.pending_rows) == (3, 2)
    assert not state.minutes_current


def test_a_fragment_that_is_changed_in_place_is_noticed(lake: Lake, settings: Settings) -> None:
    [one] = deliver(lake, settings, entry([line()]))
    assert inventory.day_state(lake, DAY, settings).faults == ()
    whole = one.path.read_bytes()
    one.path.write_bytes(whole[:-1] + b"X")
    [fault] = inventory.day_state(lake, DAY, settings).faults
    assert str(one.path) in fault
    one.path.write_bytes(whole)
    assert inventory.day_state(lake, DAY, settings).faults == ()


def test_days_of_a_kind_that_cannot_be_read(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()]))
    (lake.root / layout.HEARTBEATS).touch()
    faults: list[str] = []
    assert inventory.days_found(lake, faults) == [DAY]
    [fault] = faults
    assert "heartbeats can't be read (Not a directory)" in fault
    with pytest.raises(NotADirectoryError):
        inventory.days(lake)


def users_of_each_shard(lake: Lake) -> list[str]:
    """A user of each shard, by shard."""
    found = {shard_of(f"u{number}", lake.shards): f"u{number}" for number in range(100)}
    return [found[shard] for shard in range(lake.shards)]
