"""The watermark: never above an entry that somebody may still hand out."""

from __future__ import annotations

import pytest
import redis

from hb_assets.buffer import keys
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.buffer.watermark import latest, passed, watermarks
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.settings import Settings

LINE = b'{"user_id":"u1","device_id":"d","timestamp_ms":1736942400000,"heart_rate":75}'


def clock(client: redis.Redis) -> int:
    seconds, microseconds = client.time()
    return seconds * 1000 + microseconds // 1000


def test_where_nothing_ever_was_nothing_comes_below_the_clock(
    client: redis.Redis, settings: Settings
) -> None:
    before = clock(client)
    found = watermarks(client, settings)
    assert found.keys() == {0, 1, 2, 3}
    assert all(before <= ms + 1 <= clock(client) for ms, _ in found.values())
    assert latest(client, settings) == dict.fromkeys(range(4), (0, 0))
    assert passed(client, settings, {0: (before, 0)})


def test_latest_is_the_last_id_whatever_the_clock_says(
    client: redis.Redis, settings: Settings
) -> None:
    ahead = clock(client) + 3_600_000
    client.xadd(keys.stream(2), {"data": LINE}, id=f"{ahead}-7")
    assert latest(client, settings)[2] == (ahead, 7)
    assert passed(client, settings, {2: (ahead, 6), 1: (ahead, 9)})
    assert not passed(client, settings, {2: (ahead, 7)})
    client.xtrim(keys.stream(2), maxlen=0)
    assert latest(client, settings)[2] == (ahead, 7), "an empty stream remembers it"
    assert passed(client, settings, {2: (ahead, 7)})


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
    assert watermarks(client, settings)[0] >= (third.ms, third.seq)
    assert len(entries) == 3


def test_below_the_first_sequence_number_of_a_millisecond(
    client: redis.Redis, settings: Settings
) -> None:
    client.xadd(keys.stream(1), {"data": LINE}, id="1000-0")
    client.xadd(keys.stream(2), {"data": LINE}, id="1000-7")
    found = watermarks(client, settings)
    assert found[1] == (999, 2**64 - 1)
    assert found[2] == (1000, 6)


def test_of_a_shard_that_cannot_be_read_nothing_is_known(
    client: redis.Redis, settings: Settings
) -> None:
    """Its raw is kept, and nobody is told that all of its entries are acknowledged."""
    client.set(keys.stream(1), "something else")
    assert watermarks(client, settings).keys() == {0, 2, 3}
    for ask in (lambda: latest(client, settings), lambda: passed(client, settings, {})):
        with pytest.raises(BufferUnavailableError, match=r"hb:\{01\}:stream"):
            ask()
