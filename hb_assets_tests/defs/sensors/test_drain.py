"""The drain sensor: drains, reports what the lake holds, and survives a Redis that is away."""

from __future__ import annotations

import datetime as dt
import json
import time

import pytest

from hb_assets.buffer import keys
from hb_assets.defs import partitions, reports
from hb_assets.defs.reports import Cursor
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import drain as drain_sensor
from hb_assets.lake import inventory
from hb_assets.pipeline import drain
from hb_assets_tests.defs.conftest import Ticks
from hb_assets_tests.servers import wait_for


@pytest.fixture
def without_pause(monkeypatch) -> None:
    monkeypatch.setattr(reports, "PAUSE_SECONDS", 0)


def reported(data) -> list[str]:
    return [event.partition for event in data.asset_events]


def test_a_tick_drains_and_reports_each_touched_day_once(append, ticks) -> None:
    append("2025-01-15", users=4, readings=5)
    append("2025-01-16", users=1, readings=3)
    sensor = ticks("drain")
    data = sensor.tick()
    assert reported(data) == ["2025-01-15", "2025-01-16"]
    figures = data.asset_events[0].metadata
    assert figures["dagster/row_count"].value == 20
    assert figures["pending_rows"].value == 20
    assert "drained 23 rows" in data.skip_message


@pytest.mark.usefixtures("without_pause")
def test_unchanged_days_are_not_reported_again(append, ticks) -> None:
    sensor = ticks("drain")
    append("2025-01-15")
    sensor.tick()
    assert reported(sensor.tick()) == []
    append("2025-01-16")
    assert reported(sensor.tick()) == ["2025-01-16"]
    append("2025-01-15")
    assert reported(sensor.tick()) == ["2025-01-15"]


def test_a_tick_that_was_killed_before_it_was_saved_loses_no_report(append, ticks) -> None:
    append("2025-01-15")
    sensor = ticks("drain")
    killed = sensor.tick(saved=False)
    assert reported(killed) == ["2025-01-15"]
    again = sensor.tick()
    assert reported(again) == ["2025-01-15"]
    assert again.skip_message == "the buffer is empty"


def test_fragments_of_another_writer_are_reported(append, ticks, settings) -> None:
    sensor = ticks("drain")
    sensor.tick()
    append("2025-01-15")
    worker = Installation(settings)
    with worker.consumer() as consumer:
        drain.drain(consumer, worker.lake(), settings, until_empty=True)
    assert reported(sensor.tick()) == ["2025-01-15"]


def test_entries_claimed_by_a_killed_tick_are_drained_by_the_next(
    append, ticks, installation
) -> None:
    append("2025-01-15")
    with installation.consumer() as consumer:
        assert consumer.claim(1000, 10**6)
    data = ticks("drain").tick()
    assert reported(data) == ["2025-01-15"]


def test_a_day_that_changes_all_the_time_is_reported_once_a_minute(
    append, ticks, monkeypatch
) -> None:
    now = [time.time_ns() // 1_000_000]
    monkeypatch.setattr(drain_sensor, "now_ms", lambda: now[0])
    sensor, seen = ticks("drain"), []
    for seconds in (0, 5, 30, 25, 5):
        now[0] += seconds * 1000
        append("2025-01-15", users=1, readings=1)
        seen.append(reported(sensor.tick()))
    assert seen == [["2025-01-15"], [], [], ["2025-01-15"], []]
    now[0] += 55_000
    assert reported(sensor.tick()) == ["2025-01-15"], "the last change is told, too"


@pytest.mark.usefixtures("without_pause")
def test_at_most_some_days_a_tick_and_none_waits_for_ever(append, ticks, monkeypatch) -> None:
    monkeypatch.setattr(drain_sensor, "MOST_EVENTS", 2)
    for day in range(1, 6):
        append(f"2025-01-0{day}", users=1, readings=1)
    sensor = ticks("drain")
    seen = reported(sensor.tick())
    for _ in range(2):
        append("2025-01-01", users=1, readings=1)
        append("2025-01-02", users=1, readings=1)
        seen += reported(sensor.tick())
    assert seen == [f"2025-01-0{day}" for day in range(1, 6)] + ["2025-01-01"]


def test_a_redis_that_is_away_is_a_clear_line_and_the_lake_is_reported_all_the_same(
    append, ticks, settings, instance, webhook
) -> None:
    append("2025-01-15")
    ticks("drain").tick(saved=False)
    away = settings.model_copy(
        update={"redis_url": type(settings.redis_url)("redis://127.0.0.1:1"), **webhook.setting}
    )
    sensor = Ticks(away, instance, "drain")
    data = sensor.tick()
    assert "Redis at redis://127.0.0.1:1 can't be reached" in data.skip_message
    assert reported(data) == ["2025-01-15"]
    sensor.tick()
    back = Ticks(settings.model_copy(update=webhook.setting), instance, "drain")
    back.cursor = sensor.cursor
    wait_for(lambda: bool(back.tick()) and len(webhook.received) > 1, "the end of the rest")
    assert [(one["alarm"], one["severity"]) for one in webhook.received] == [
        ("drain", "error"),
        ("drain", "resolved"),
    ]


def test_without_a_running_server_it_says_what_to_start(settings, instance) -> None:
    embedded = settings.model_copy(update={"redis_url": None})
    data = Ticks(embedded, instance, "drain").tick()
    assert "start `hb up`, or set HB_REDIS_URL" in data.skip_message


def test_a_lake_of_another_shard_count_is_a_clear_line(append, settings, instance, ticks) -> None:
    ticks("drain").tick()
    other = settings.model_copy(update={"shards": 3})
    data = Ticks(other, instance, "drain").tick()
    assert "HB_SHARDS" in data.skip_message


def test_the_cursor_stays_small() -> None:
    days = [dt.date(2020, 1, 1) + dt.timedelta(days=n) for n in range(365)]
    cursor = Cursor().advanced(dict.fromkeys(days, "0123abcd"), {}, 0).advanced({}, {}, 60_000)
    assert len(str(cursor)) < 7000
    assert json.loads(str(cursor))["months"]["2020-01"]["15"] == "0123abcd"


@pytest.mark.parametrize("text", ["", "x", "[]", '{"months": 1}', None])
def test_a_cursor_that_is_none_starts_anew(text) -> None:
    assert Cursor.parse(text) == Cursor()


def test_anything_unforeseen_is_an_alarm_without_its_message(monkeypatch, ticks, webhook) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret 177")

    monkeypatch.setattr(drain, "drain", fail)
    data = ticks("drain").tick()
    assert "unexpected RuntimeError" in data.skip_message
    assert "secret" not in data.skip_message


def test_after_faults_it_rests_and_the_alarm_stands(
    append, ticks, settings, instance, webhook, monkeypatch
) -> None:
    """Longer with each fault; days are reported all the same."""
    now = [10**12]
    monkeypatch.setattr(drain_sensor, "now_ms", lambda: now[0])
    tries = []

    def fail(*_: object, **__: object) -> None:
        tries.append(now[0] - 10**12)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(drain, "drain", fail)
    append("2025-01-15")
    sensor = Ticks(settings.model_copy(update=webhook.setting), instance, "drain")
    for _ in range(200):
        assert "No space left on device" in sensor.tick().skip_message
        now[0] += 500
    assert tries == [0, 500, 1500, 3500, 7500, 15500, 31500, 61500, 91500]
    monkeypatch.undo()
    webhook_after = Ticks(settings.model_copy(update=webhook.setting), instance, "drain")
    webhook_after.cursor = sensor.cursor
    assert reported(webhook_after.tick()) == ["2025-01-15"], "a clock set back prolongs no rest"
    assert [one["severity"] for one in webhook.received] == ["error", "resolved"]


def test_a_shard_that_cannot_be_used_is_an_alarm_and_the_others_are_drained(
    append, ticks, settings, client
) -> None:
    append("2025-01-15", users=8)
    [shard] = [n for n in range(settings.shards) if client.exists(keys.stream(n))][:1]
    client.rename(keys.stream(shard), "kept")
    client.set(keys.stream(shard), "x")
    data = ticks("drain").tick()
    assert keys.stream(shard) in data.skip_message
    assert "drained" in data.skip_message
    assert reported(data) == ["2025-01-15"]


def test_earlier_days_wait_for_a_reload_and_are_kept(append, settings, instance) -> None:
    partitions.keep_first_day(settings, dt.date(2025, 1, 1))
    loaded = Ticks(settings, instance, "drain")
    append("2024-12-30")
    append("2025-01-15")
    data = loaded.tick()
    assert reported(data) == ["2025-01-15"]
    assert "the lake holds days since 2024-12-30" in data.skip_message
    assert partitions.first_day(settings, time.time_ns() // 1_000_000) == dt.date(2024, 12, 30)
    again = Ticks(settings, instance, "drain")
    again.cursor = loaded.cursor
    assert reported(again.tick()) == ["2024-12-30"]


def test_a_day_that_cant_be_read_keeps_no_other_from_being_reported(
    append, ticks, monkeypatch
) -> None:
    append("2025-01-14")
    append("2025-01-15")
    listed = inventory.raw_digest

    def deny(lake, day):
        if day == dt.date(2025, 1, 14):
            raise PermissionError(13, "Permission denied", "raw/day=2025-01-14/shard=00")
        return listed(lake, day)

    monkeypatch.setattr(inventory, "raw_digest", deny)
    data = ticks("drain").tick()
    assert reported(data) == ["2025-01-15"]
    assert (
        "2025-01-14 can't be reported: raw/day=2025-01-14/shard=00: Permission" in data.skip_message
    )
