from __future__ import annotations

import pytest
import redis

from hb_assets.buffer import keys
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.depth import ShardDepth, depths, high_water, losses, scanned
from hb_assets.buffer.producer import Producer
from hb_assets.core.settings import Settings


def test_an_untouched_buffer_is_empty(client: redis.Redis, settings: Settings) -> None:
    assert depths(client, settings).states == [
        ShardDepth(
            shard=shard,
            entries=0,
            heartbeats=0,
            bytes=0,
            pending=0,
            undelivered=0,
            oldest_ms=None,
            appended=0,
            acknowledged=0,
            consumers=0,
            external=0,
            external_bytes=0,
            lost=0,
        )
        for shard in range(4)
    ]
    assert scanned(client, settings) == {0: 0, 1: 0, 2: 0, 3: 0}


def test_depths_tell_pending_from_undelivered(client: redis.Redis, settings: Settings) -> None:
    client.xadd(keys.stream(1), {"data": "external"}, id="1700000000000-3")
    single = settings.model_copy(update={"entry_max_heartbeats": 1})
    Producer(client, single).append({1: [b"22"] * 5})
    consumer = Consumer(client, settings)
    consumer.open()
    assert len(consumer.claim(2, 10**6, shards=[1])) == 2

    depth = depths(client, settings).states[1]

    assert (depth.entries, depth.pending, depth.undelivered, depth.consumers) == (6, 2, 4, 1)
    assert (depth.heartbeats, depth.bytes, depth.appended, depth.acknowledged) == (5, 10, 5, 0)
    assert (depth.external, depth.lost) == (1, 0)
    assert depth.oldest_ms == 1_700_000_000_000


def test_scanning_reads_every_page(client: redis.Redis, settings: Settings) -> None:
    pairs = settings.model_copy(update={"entry_max_heartbeats": 2})
    Producer(client, pairs).append({0: [b"1"] * 1001, 3: [b"1"] * 400})
    client.xadd(keys.stream(3), {"data": "external"})

    assert scanned(client, settings) == {0: 1001, 1: 0, 2: 0, 3: 400}


def test_high_water_names_shards_above_the_mark(client: redis.Redis, settings: Settings) -> None:
    tight = settings.model_copy(update={"buffer_max_heartbeats": 40, "buffer_max_bytes": 400})
    producer = Producer(client, tight)
    producer.append({0: [b"1"] * 8, 1: [b"1"] * 9, 2: [b"x" * 90]})

    lines = high_water(depths(client, tight).states, tight)

    assert len(lines) == 2
    assert "shard 01 is 90% full (9 of 10 heartbeats" in lines[0]
    assert "shard 02 is 90% full" in lines[1]


@pytest.mark.parametrize(("entries", "size"), [(9, 1), (1, 20_000), (3, 7_000)])
def test_a_flood_of_other_producers_is_heard_of(
    client: redis.Redis, settings: Settings, entries: int, size: int
) -> None:
    """The ledger knows nothing of them, and the bound refuses none: by number or by weight."""
    tight = settings.model_copy(update={"buffer_max_heartbeats": 40, "buffer_max_bytes": 80_000})
    Producer(client, tight).append({1: [b"1"]})
    client.xadd(keys.stream(2), {"data": "few of them are nobody's business"})
    assert high_water(depths(client, tight).states, tight) == []

    for _ in range(entries):
        client.xadd(keys.stream(1), {"data": "x" * size})

    [line] = high_water(depths(client, tight).states, tight)
    assert "shard 01" in line
    assert "1 of 10 heartbeats" in line
    assert f"and {entries} entries of other producers with about" in line
    external_bytes = depths(client, tight).states[1].external_bytes
    assert entries * size <= external_bytes < 2 * entries * size + 6_000  # a node of 4 KiB


def test_own_entries_are_not_taken_for_foreign_ones(
    client: redis.Redis, settings: Settings
) -> None:
    pairs = settings.model_copy(update={"entry_max_heartbeats": 2})
    Producer(client, pairs).append({0: [b"22"] * 9})
    consumer = Consumer(client, settings)
    consumer.open()
    claimed = consumer.claim(4, 10**6, shards=[0])
    consumer.acknowledge([(entry, entry.rows) for entry in claimed])

    depth = depths(client, settings).states[0]

    assert (depth.entries, depth.external, depth.lost) == (5 - len(claimed), 0, 0)
    assert depth.external_bytes == 0


@pytest.mark.parametrize("how", ["XDEL", "XTRIM", "DEL"])
def test_entries_that_somebody_deleted_are_missed(
    client: redis.Redis, settings: Settings, how: str
) -> None:
    single = settings.model_copy(update={"entry_max_heartbeats": 1})
    Producer(client, single).append({3: [b"1"] * 5})
    [(first, _), (second, _)] = client.xrange(keys.stream(3), count=2)
    assert losses(depths(client, settings).states) == []
    if how == "XDEL":
        client.xdel(keys.stream(3), first, second)
    elif how == "XTRIM":
        client.xtrim(keys.stream(3), maxlen=3, approximate=False)
    else:
        client.delete(keys.stream(3))

    [line] = losses(depths(client, settings).states)

    lost = 5 if how == "DEL" else 2
    assert f"data loss: {lost} entries of shard 03" in line
    assert ("with 5 heartbeats" in line) == (how == "DEL")


def test_a_loss_can_be_written_off_as_documented(client: redis.Redis, settings: Settings) -> None:
    Producer(client, settings).append({3: [b"1"] * 5})
    client.delete(keys.stream(3))
    client.hincrby(keys.ledger(3), "acknowledged_entries", 1)
    client.hincrby(keys.ledger(3), "acknowledged", 5)
    client.hdel(keys.ledger(3), "lost")

    state = depths(client, settings).states[3]

    assert losses([state]) == []
    assert (state.heartbeats, state.external) == (0, 0)
