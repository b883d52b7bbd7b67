"""The watermark: never above an entry that somebody may still hand out."""

from __future__ import annotations

import redis

from hb_assets.buffer import keys
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.buffer.watermark import watermarks
from hb_assets.settings import Settings

LINE = b'{"user_id":"u1","device_id":"d","timestamp_ms":1736942400000,"heart_rate":75}'


def test_nothing_was_ever_there(client: redis.Redis, settings: Settings) -> None:
    assert watermarks(client, settings) == {}


def test_it_stands_right_below_the_oldest_entry(
    client: redis.Redis, settings: Settings, consumer: Consumer
) -> None:
    one_a_time = settings.model_copy(update={"entry_max_heartbeats": 1})
    Producer(client, one_a_time).append({0: [LINE] * 3})
    first, second, third = entries = consumer.claim(10, 10_000)
    before = watermarks(client, settings)[0]
    assert before < (first.ms, first.seq)
    consumer.acknowledge([(second, 1)])
    assert watermarks(client, settings)[0] == before, "the first one may come again"
    consumer.acknowledge([(first, 1)])
    assert (second.ms, second.seq) <= watermarks(client, settings)[0] < (third.ms, third.seq)
    consumer.acknowledge([(third, 1)])
    assert watermarks(client, settings)[0] == (third.ms, third.seq)
    assert len(entries) == 3


def test_below_the_first_sequence_number_of_a_millisecond(
    client: redis.Redis, settings: Settings
) -> None:
    client.xadd(keys.stream(1), {"data": LINE}, id="1000-0")
    client.xadd(keys.stream(2), {"data": LINE}, id="1000-7")
    found = watermarks(client, settings)
    assert found[1] == (999, 2**64 - 1)
    assert found[2] == (1000, 6)
