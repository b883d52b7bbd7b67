"""The buffer sensor: one alarm when the buffer fills up or lost entries, one when it is over."""

from __future__ import annotations

import contextlib
import datetime as dt

import dagster as dg
import pytest
from dagster._core.remote_origin import (
    InProcessCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, InstigatorType
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin

from hb_assets.buffer import keys, liveness
from hb_assets.defs.sensors import buffer
from hb_assets.gateway.spool.queue import Spool
from hb_assets_tests.defs.conftest import Ticks
from hb_assets_tests.servers import wait_for

DAY = "2025-01-15"


@pytest.fixture
def sensor(settings, instance, webhook) -> Ticks:
    low = {"buffer_max_heartbeats": 40, "shards": 2, **webhook.setting}
    return Ticks(settings.model_copy(update=low), instance, "buffer")


def told(webhook) -> list[tuple[str, str]]:
    return [(one["alarm"], one["severity"]) for one in webhook.received]


def test_above_the_high_water_mark_it_alarms_once(append, sensor, webhook, ticks) -> None:
    sensor.tick()
    assert told(webhook) == []
    append(DAY, users=8, readings=5)
    data = sensor.tick()
    assert "HB_BUFFER_HIGH_WATER" in data.skip_message
    sensor.tick()
    assert told(webhook) == [("buffer_high_water", "error")]
    ticks("drain").tick()
    sensor.tick()
    assert told(webhook)[1:] == [("buffer_high_water", "resolved")]
    assert "user-" not in str(webhook.received)


def test_an_alarm_that_stands_is_repeated_after_an_hour(
    append, sensor, webhook, monkeypatch
) -> None:
    append(DAY, users=8, readings=5)
    sensor.tick()
    later = buffer.now_ms() + 3_600_000
    monkeypatch.setattr(buffer, "now_ms", lambda: later)
    sensor.tick()
    sensor.tick()
    assert told(webhook) == [("buffer_high_water", "error")] * 2


def test_entries_that_somebody_deleted_are_an_alarm(append, sensor, webhook, client) -> None:
    append(DAY, users=2, readings=2)
    for shard in range(2):
        client.xtrim(keys.stream(shard), maxlen=0)
    sensor.tick()
    [alarm] = webhook.received
    assert alarm["alarm"] == "entries_lost"
    assert "were deleted before they were drained, with 2 heartbeats" in alarm["message"]
    assert "1 more shards" in alarm["message"]


def test_a_flood_of_another_producer_is_an_alarm(sensor, webhook, client) -> None:
    for _ in range(20):
        client.xadd(keys.stream(1), {"data": "not counted by the ledger"})
    sensor.tick()
    [alarm] = webhook.received
    assert alarm["alarm"] == "buffer_high_water"
    assert "20 entries of other producers" in alarm["message"]


def test_a_receiver_that_is_away_stops_nothing(append, settings, instance) -> None:
    away = {"buffer_max_heartbeats": 40, "alert_webhook": "http://127.0.0.1:1/secret"}
    append(DAY, users=8, readings=5)
    data = Ticks(settings.model_copy(update=away), instance, "buffer").tick()
    assert "HB_BUFFER_HIGH_WATER" in data.skip_message


def test_a_redis_that_is_away_is_a_clear_line(settings, instance) -> None:
    away = {"redis_url": type(settings.redis_url)("redis://127.0.0.1:1")}
    data = Ticks(settings.model_copy(update=away), instance, "buffer").tick()
    assert "can't be reached" in data.skip_message


def test_heartbeats_in_the_spool_are_an_alarm_though_redis_is_away(
    append, settings, instance, webhook
) -> None:
    """And what was wrong with the buffer isn't called over while nobody can look."""
    append(DAY, users=8, readings=5)
    low = settings.model_copy(update={"buffer_max_heartbeats": 40, **webhook.setting})
    sensor = Ticks(low, instance, "buffer")
    sensor.tick()
    with contextlib.closing(Spool(settings)) as spool:
        spool.put([{0: [b"{}"]}])
    gone = low.model_copy(update={"redis_url": type(settings.redis_url)("redis://127.0.0.1:1")})
    during = Ticks(gone, instance, "buffer")
    during.cursor = sensor.cursor
    during.tick()
    assert told(webhook) == [("buffer_high_water", "error"), ("spool", "error")]
    assert "1 heartbeats" in webhook.received[1]["message"]


def test_a_tick_beats_and_misses_a_drain(append, settings, instance, webhook, client) -> None:
    eager = {"health_drain_age": dt.timedelta(milliseconds=1), **webhook.setting}
    sensor = Ticks(settings.model_copy(update=eager), instance, "buffer")
    sensor.tick()
    assert liveness.read(client).age(liveness.DAGSTER) is not None
    append(DAY, users=2, readings=2)
    wait_for(lambda: "no drain for" in sensor.tick().skip_message, "the drain to be missed")
    assert told(webhook) == [("drain_late", "error")]


@pytest.mark.parametrize("name", ["buffer", "drain", "consolidation"])
def test_a_stopped_sensor_is_an_alarm_whichever_ticks(
    name, settings, tmp_path, client, webhook
) -> None:
    """Also where the buffer sensor is the stopped one."""
    origin = RemoteInstigatorOrigin(
        RemoteRepositoryOrigin(
            InProcessCodeLocationOrigin(
                LoadableTargetOrigin(module_name="hb_assets.definitions"), location_name="hb_assets"
            ),
            "__repository__",
        ),
        "failed_runs",
    )
    state = InstigatorState(origin, InstigatorType.SENSOR, InstigatorStatus.STOPPED)
    instance = dg.DagsterInstance.local_temp(str(tmp_path))
    instance.add_instigator_state(state)
    sensor = Ticks(settings.model_copy(update=webhook.setting), instance, name)
    sensor.tick()
    assert liveness.read(client).stopped == ["failed_runs"]
    if name == "buffer":
        [alarm] = webhook.received
        assert alarm["alarm"] == "dagster"
        assert "`hb sensors start failed_runs`" in alarm["message"]
    instance.update_instigator_state(state.with_status(InstigatorStatus.RUNNING))
    sensor.tick()
    assert liveness.read(client).stopped == []
    instance.dispose()
