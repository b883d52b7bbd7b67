from __future__ import annotations

import redis

from hb_assets.buffer import keys
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.depth import ShardDepth, depths, high_water, scanned
from hb_assets.buffer.producer import Producer
from hb_assets.settings import Settings


def test_an_untouched_buffer_is_empty(client: redis.Redis, settings: Settings) -> None:
    assert depths(client, settings) == [
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
        )
        for shard in range(4)
    ]
    assert scanned(client, settings) == {0: 0, 1: 0, 2: 0, 3: 0}


def test_depths_tell_pending_from_undelivered(client: redis.Redis, settings: Settings) -> None:
    client.xadd(keys.stream(1), {"data": "foreign"}, id="1700000000000-3")
    single = settings.model_copy(update={"entry_max_heartbeats": 1})
    Producer(client, single).append({1: [b"22"] * 5})
    consumer = Consumer(client, settings)
    consumer.open()
    assert len(consumer.claim(2, 10**6, shards=[1])) == 2

    depth = depths(client, settings)[1]

    assert (depth.entries, depth.pending, depth.undelivered, depth.consumers) == (6, 2, 4, 1)
    assert (depth.heartbeats, depth.bytes, depth.appended, depth.acknowledged) == (5, 10, 5, 0)
    assert depth.oldest_ms == 1_700_000_000_000


def test_scanning_reads_every_page(client: redis.Redis, settings: Settings) -> None:
    pairs = settings.model_copy(update={"entry_max_heartbeats": 2})
    Producer(client, pairs).append({0: [b"1"] * 1001, 3: [b"1"] * 400})
    client.xadd(keys.stream(3), {"data": "foreign"})

    assert scanned(client, settings) == {0: 1001, 1: 0, 2: 0, 3: 400}


def test_high_water_names_shards_above_the_mark(client: redis.Redis, settings: Settings) -> None:
    tight = settings.model_copy(update={"buffer_max_heartbeats": 40, "buffer_max_bytes": 400})
    producer = Producer(client, tight)
    producer.append({0: [b"1"] * 8, 1: [b"1"] * 9, 2: [b"x" * 90]})

    lines = high_water(depths(client, tight), tight)

    assert len(lines) == 2
    assert "shard 01 is 90% full (9 of 10 heartbeats" in lines[0]
    assert "shard 02 is 90% full" in lines[1]
