"""Inventory: how a day stands, out of names and footers."""

from __future__ import annotations

import time

import pytest

from hb_assets.errors import DamagedFileError
from hb_assets.lake import inventory, layout, minutes
from hb_assets.lake.consolidation import consolidate
from hb_assets.lake.store import Lake
from hb_assets.record import shard_of
from hb_assets.settings import Settings
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


def test_damaged_footer(lake: Lake, settings: Settings) -> None:
    deliver(lake, settings, entry([line()]))
    consolidate(lake, DAY, settings)
    path = layout.consolidated_file(lake.root, DAY, shard_of("u1", lake.shards))
    path.write_bytes(b"PAR1")
    with pytest.raises(DamagedFileError, match=r"heartbeats\.parquet is damaged"):
        inventory.day_state(lake, DAY, settings)
