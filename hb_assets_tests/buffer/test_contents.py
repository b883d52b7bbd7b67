"""Looking at the buffer, which takes nothing out of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import redis

from hb_assets.buffer import contents, depth, external
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core.errors import BufferTooLargeError, BufferUnavailableError
from hb_assets.core.settings import Settings


def state(client: redis.Redis, settings: Settings) -> list[depth.ShardDepth]:
    return [replace(one, idle_ms=()) for one in depth.depths(client, settings).states]


def test_own_shard_and_foreign_entries_claimed_or_not(
    client: redis.Redis, settings: Settings, consumer: Consumer
) -> None:
    producer = Producer(client, settings)
    producer.append({1: [b"one", b"two"], 2: [b"other"]})
    external.append(client, 2, b"external\nlines")
    client.xadd("hb:{03}:stream", {"nothing": "of ours"})
    assert len(consumer.claim(100, 10**6)) == 4
    for n in range(120):  # more than a page
        external.append(client, 1, b"%d" % n)
    before = state(client, settings)
    found = contents.that_may_concern(client, 1, settings)
    assert [(one.own, one.data) for one in found if one.shard == 1] == [
        (2, b"one\ntwo"),
        *[(None, b"%d" % n) for n in range(120)],
    ]
    assert [(one.shard, one.own, one.data) for one in found if one.shard != 1] == [
        (2, None, b"external\nlines"),
        (3, None, None),
    ]
    assert all(one.ms > 0 for one in found)
    assert state(client, settings) == before


def test_more_than_may_be_read(client: redis.Redis, settings: Settings) -> None:
    small = settings.model_copy(update={"fresh_max_bytes": 1024})
    external.append(client, 0, b"x" * 1024)
    assert len(contents.that_may_concern(client, 1, small)) == 1
    Producer(client, settings).append({2: [b"x" * 100] * 100})
    assert len(contents.that_may_concern(client, 1, small)) == 1, "nobody's of shard 1"
    with pytest.raises(BufferTooLargeError, match="HB_FRESH_MAX_BYTES"):
        contents.that_may_concern(client, 2, small)


def test_our_own_appends_of_other_shards_are_not_gone_through(
    client: redis.Redis, settings: Settings, consumer: Consumer
) -> None:
    producer = Producer(client, settings)
    external.append(client, 3, b"drained")
    producer.append({shard: [b"drained"] for shard in range(4)})
    consumer.acknowledge([(entry, 1) for entry in consumer.claim(100, 10**6)])
    producer.append({shard: [b"one"] for shard in range(4)})
    external.append(client, 2, b"external")
    client.config_resetstat()
    found = contents.that_may_concern(client, 1, settings)
    assert [(one.shard, one.data) for one in found] == [(1, b"one"), (2, b"external")]
    assert client.info("commandstats")["cmdstat_xrange"]["calls"] == 2


def test_something_else_at_a_key(client: redis.Redis, settings: Settings) -> None:
    client.set("hb:{02}:stream", "text")
    with pytest.raises(BufferUnavailableError, match="something else"):
        contents.that_may_concern(client, 1, settings)
