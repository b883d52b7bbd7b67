"""Clocks that jump: timestamps are judged by Redis' clock, here as in the drain."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from hb_assets.buffer.clock import ServerClock
from hb_assets.buffer.connection import connect_async
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import AsyncProducer, Producer
from hb_assets.core.settings import Settings
from hb_assets.lake.files import quarantine
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.drain import drain
from hb_assets.pipeline.importing.importer import Importer
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, running
from hb_assets_tests.lake.deliveries import line

HOUR_MS = 3_600_000


@pytest.fixture
def set_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets this process's clock ahead by so many hours (back, when negative)."""
    true_ns = time.time_ns

    def ahead(hours: int) -> None:
        monkeypatch.setattr(time, "time_ns", lambda: true_ns() + hours * HOUR_MS * 1_000_000)

    yield ahead
    monkeypatch.undo()


def test_the_servers_clock_is_carried_on(
    client: redis.Redis, set_clock: Callable[[int], None]
) -> None:
    clock = ServerClock()
    clock.ask(client)
    assert clock.warnings() == []
    for hours in (-30, 30):
        set_clock(hours)
        seconds, _ = client.time()
        assert abs(clock.now_ms() - seconds * 1000) < 60_000
        assert clock.now_ms() <= (client.time()[0] + 1) * 1000, "never ahead"
        [warning] = clock.warnings()
        assert ("behind" if hours > 0 else "ahead of") in warning


def test_every_append_tells_it(client: redis.Redis, settings: Settings) -> None:
    async def appended() -> ServerClock:
        async with connect_async(settings) as connected:
            producer = AsyncProducer(connected, settings)
            await producer.start()
            assert producer.clock.warnings() == []
            producer.clock.hear(0)
            assert await producer.append({0: [b"1"]}) == {0: None}
            await producer.close()
            return producer.clock

    threads = Producer(client, settings)
    threads.clock.hear(0)
    threads.append({0: [b"1"]})

    for clock in (threads.clock, asyncio.run(appended())):
        assert abs(clock.now_ms() - client.time()[0] * 1000) < 60_000


@pytest.mark.parametrize("hours", [-48, 48])
def test_what_is_answered_2xx_is_not_quarantined_for_its_time(
    client: redis.Redis,
    lake: Lake,
    settings: Settings,
    set_clock: Callable[[int], None],
    hours: int,
) -> None:
    """The gateway's clock is wrong; now is fine, and 36 h ahead is too far, whatever it says."""
    now = time.time_ns() // 1_000_000

    def at(ahead: int) -> dict[str, object]:
        return heartbeat(timestamp_ms=now + ahead * HOUR_MS, timestamp=None)

    with running(settings) as http:
        set_clock(hours)
        assert http.post(PATH, json=at(0)).status_code == 200
        assert http.post(PATH, json=at(23)).status_code == 200
        assert http.post(PATH, json=at(36)).status_code == 422
        batch = http.post(BATCH, json=[at(1), at(36)]).json()
        assert (batch["accepted"], [one["index"] for one in batch["refused"]]) == (1, [1])
        assert "Redis' clock" in http.get("/health").json()["alarms"][0]
    consumer = Consumer(client, settings)
    consumer.open()
    assert drain(consumer, lake, settings, until_empty=True).rows == 3
    assert quarantine.summary(lake, settings).reasons == {}
    consumer.close()


def test_an_import_judges_by_it_too(
    client: redis.Redis, settings: Settings, set_clock: Callable[[int], None], tmp_path: Path
) -> None:
    now = time.time_ns() // 1_000_000
    file = tmp_path / "some.ndjson"
    file.write_bytes(line(at=now) + b"\n" + line(at=now + 36 * HOUR_MS))
    producer = Producer(client, settings)
    producer.clock.ask(client)
    set_clock(48)
    done = Importer(producer, settings).run(file)
    assert (done.accepted, dict(done.reasons)) == (1, {"timestamp_in_the_future": 1})
