"""A Dagster instance in memory, and heartbeats on their way."""

from __future__ import annotations

import contextlib
import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import redis

from hb_assets.buffer.producer import Producer
from hb_assets.core import days, record
from hb_assets.core.settings import Settings
from hb_assets.definitions import of
from hb_assets.defs import partitions
from hb_assets.defs.resources import Installation
from hb_assets_tests.receiver import Receiver, receiving

Append = Callable[..., None]


@pytest.fixture
def redis_url(server_urls: Callable[[str], str]) -> str:
    """One kind of server is enough here: the buffer's own tests run on both."""
    url = server_urls("valkey")
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushall()
    return url


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """Of an installation that has partitions since the beginning of 2025."""
    made = Settings(home=tmp_path / "home", redis_url=redis_url, shards=2, drain_tick_seconds=5)
    partitions.keep_first_day(made, dt.date(2025, 1, 1))
    return made


@pytest.fixture
def installation(settings: Settings) -> Installation:
    return Installation(settings)


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as made:
        yield made


@pytest.fixture
def definitions(settings: Settings) -> dg.Definitions:
    return of(settings)


@pytest.fixture
def append(client: redis.Redis, settings: Settings) -> Append:
    """Puts valid heartbeats of some users and one device into the buffer, one a second."""
    producer = Producer(client, settings)

    def append(day: str, *, users: int = 4, readings: int = 5, bpm: int = 70) -> None:
        start = days.start_ms(days.parse_day(day))
        lines: dict[int, list[bytes]] = {}
        for number in range(users):
            user = f"user-{number}"
            shard = record.shard_of(user, settings.shards)
            lines.setdefault(shard, []).extend(
                record.encode(record.Heartbeat(user, "device_a", start + second * 1000, bpm))
                for second in range(readings)
            )
        assert set(producer.append(lines).values()) == {None}

    return append


class Ticks:
    """Ticks of one sensor as the daemon makes them, each with the cursor that the last saved."""

    def __init__(self, settings: Settings, instance: dg.DagsterInstance, sensor: str) -> None:
        self._repository = of(settings).get_repository_def()
        self._resources = {"installation": Installation(settings)}
        self._instance, self._sensor = instance, sensor
        self.cursor: str | None = None

    def tick(self, *, saved: bool = True) -> Any:
        """What the sensor returned. `saved`: whether the daemon lived to keep it."""
        with dg.build_sensor_context(
            instance=self._instance,
            cursor=self.cursor,
            repository_def=self._repository,
            sensor_name=self._sensor,
            resources=self._resources,
        ) as context:
            data = self._repository.get_sensor_def(self._sensor).evaluate_tick(context)
        if saved:
            self.cursor = data.cursor
            for event in data.asset_events:
                self._instance.report_runless_asset_event(event)
        return data


@pytest.fixture
def ticks(settings: Settings, instance: dg.DagsterInstance) -> Callable[[str], Ticks]:
    return lambda sensor: Ticks(settings, instance, sensor)


@pytest.fixture
def run(
    definitions: dg.Definitions, instance: dg.DagsterInstance
) -> Callable[..., dg.ExecuteInProcessResult]:
    """Runs a job for a day, in this process."""

    def run(day: str, job: str = "consolidate_day", **config: Any) -> dg.ExecuteInProcessResult:
        return definitions.resolve_job_def(job).execute_in_process(
            partition_key=day,
            instance=instance,
            raise_on_error=False,
            run_config={"ops": {"heartbeats": {"config": config}}} if config else None,
        )

    return run


@pytest.fixture
def webhook() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver
