"""Maintenance: through a real buffer, raw goes when it may, and the audit still adds up."""

from __future__ import annotations

from datetime import timedelta

import pytest
import redis

from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.compaction.consolidation import consolidate, no_lock
from hb_assets.lake.files import fragments
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.coordination import Coordination, coordinated
from hb_assets.pipeline.drain import drain
from hb_assets.pipeline.maintenance import maintain
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.lake.deliveries import DAY, NOON, line

redis_url = on_valkey


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"raw_keep": timedelta(0)})


def arrive(client: redis.Redis, settings: Settings, *lines: bytes) -> None:
    assert set(Producer(client, settings).append({0: list(lines)}).values()) == {None}


def consolidated(lake: Lake, settings: Settings) -> Coordination:
    with coordinated(lake, settings, start_server=False) as known:
        consolidate(lake, DAY, settings, watermarks=known.watermarks, lock=known.lock)
        return known


def test_after_a_prune_it_still_adds_up(
    client: redis.Redis, settings: Settings, lake: Lake, consumer: Consumer
) -> None:
    arrive(client, settings, line(bpm=60), line(bpm=61), line("u2"), b"not json")
    drain(consumer, lake, settings)
    known = consolidated(lake, settings)
    done = maintain(lake, settings, known)
    assert done.fragments > 0
    assert (done.faults, done.renewed) == ((), 0)
    assert fragments.all_listed(lake, DAY) == []
    verdict = audit(client, lake, settings, deep=True)
    assert verdict.differences == []
    assert (verdict.rows, verdict.quarantined) == (3, 1)
    arrive(client, settings, line(bpm=62))
    drain(consumer, lake, settings)
    assert audit(client, lake, settings, deep=True).differences == []
    consolidated(lake, settings)
    assert audit(client, lake, settings, deep=True).differences == []


def test_a_file_published_before_the_acknowledgement_is_renewed(
    client: redis.Redis, settings: Settings, lake: Lake, consumer: Consumer
) -> None:
    """Nothing may ever be pending there again: its fragments must not stay for ever."""
    arrive(client, settings, line())
    drain(consumer, lake, settings)
    consolidate(lake, DAY, settings)
    assert maintain(lake, settings, Coordination({}, no_lock)).fragments == 0
    with coordinated(lake, settings, start_server=False) as known:
        assert maintain(lake, settings, known, dry_run=True).renewed == 1
        done = maintain(lake, settings, known)
    assert (done.renewed, done.fragments, done.faults) == (1, 1, ())
    assert inventory.day_state(lake, DAY, settings).minutes_current
    assert audit(client, lake, settings, deep=True).differences == []


def test_what_is_in_flight_is_not_pruned(
    client: redis.Redis, settings: Settings, lake: Lake, consumer: Consumer
) -> None:
    """An older entry is still to be acknowledged: nothing above it goes."""
    arrive(client, settings, line(at=NOON))
    [stuck] = consumer.claim(10, 10_000)
    arrive(client, settings, line(at=NOON + 1))
    fragments_before = drain_past(client, settings, lake)
    known = consolidated(lake, settings)
    assert known.watermarks[0] < (stuck.ms, stuck.seq)
    assert maintain(lake, settings, known).fragments == 0
    assert len(fragments.all_listed(lake, DAY)) == fragments_before


def drain_past(client: redis.Redis, settings: Settings, lake: Lake) -> int:
    """Another drainer of another host, who can't know that the first one is alive or dead."""
    other = Consumer(client, settings, name="elsewhere:1:1:00")
    other.open()
    drain(other, lake, settings)
    return len(fragments.all_listed(lake, DAY))
