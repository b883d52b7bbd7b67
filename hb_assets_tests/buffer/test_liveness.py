"""Beats: what processes leave for each other, by Redis' clock."""

from __future__ import annotations

import time

import pytest
import redis

from hb_assets.buffer import keys, liveness
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.settings import Settings


def test_beats_and_counts(client: redis.Redis) -> None:
    assert liveness.read(client).seen_ms == {}
    liveness.mark_alive(client, ["a", "b"], {"n": 2, "n:x": 1, "nothing": 0})
    liveness.mark_alive(client, ["a"], {"n": 3})
    signs = liveness.read(client)
    assert signs.counts == {"n": 5, "n:x": 1}
    assert signs.labelled("n") == {"x": 1}
    assert signs.age("c") is None
    age = signs.age("a")
    assert age is not None
    assert 0 <= age < 5
    assert abs(signs.seen_ms["b"] - time.time_ns() // 1_000_000) < 5000


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.001, "0.01"), (0.01, "0.01"), (0.5, "1"), (999, "inf")]
)
def test_a_duration_falls_into_one_bucket(seconds: float, bucket: str) -> None:
    expected = {"work_us": round(seconds * 1e6), f"work_le:{bucket}": 1}
    assert dict(liveness.timed("work", seconds)) == expected


def test_something_else_at_a_key_is_a_clear_line_and_stops_no_drain(
    client: redis.Redis, settings: Settings
) -> None:
    client.set(keys.BEATS, "x")
    with pytest.raises(BufferUnavailableError, match="something else"):
        liveness.read(client)
    consumer = Consumer(client, settings)
    consumer.open()
    consumer.mark_alive({"n": 1})
    consumer.close()


def test_an_idle_consumer_beats_now_and_then_and_names_its_shards(
    client: redis.Redis, settings: Settings
) -> None:
    consumer = Consumer(client, settings)
    client.set(keys.stream(2), "x")
    consumer.open()
    consumer.mark_alive()
    assert sorted(liveness.read(client).seen_ms) == ["drain:00", "drain:01", "drain:03"]
    client.delete(keys.BEATS)
    consumer.mark_alive()
    assert liveness.read(client).seen_ms == {}
    consumer.mark_alive({"n": 1})
    assert liveness.read(client).counts == {"n": 1}
    consumer.close()
