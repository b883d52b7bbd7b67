"""The consolidation sensor: asks for what is due, once, and waits after failures."""

from __future__ import annotations

import time

import dagster as dg
import pytest

from hb_assets.defs.sensors import consolidation
from hb_assets.defs.sensors.consolidation import BACKOFF_MINUTES, REASON
from hb_assets.lake.storage import layout
from hb_assets_tests.defs.conftest import Ticks

DAY = "2025-01-15"
CREATABLE = [one for one in consolidation._UNFINISHED if one != dg.DagsterRunStatus.QUEUED]
"""A queued run needs a code location that it came from."""


@pytest.fixture
def settings(settings):
    return settings.model_copy(update={"consolidate_min_rows": 10, "consolidate_ratio": 0})


def a_run(instance: dg.DagsterInstance, definitions, status: dg.DagsterRunStatus) -> dg.DagsterRun:
    return instance.create_run_for_job(
        definitions.resolve_job_def("consolidate_day"),
        tags={"dagster/partition": DAY},
        status=status,
    )


def test_a_due_day_is_asked_for_and_one_that_is_not_is_not(append, ticks) -> None:
    append(DAY, users=4, readings=5)
    append("2025-01-16", users=1, readings=1)
    ticks("drain").tick()
    data = ticks("consolidation").tick()
    [request] = data.run_requests
    assert request.partition_key == DAY
    assert request.tags["dagster/partition"] == DAY
    assert request.tags[REASON] == "20 rows are pending"
    assert request.run_key.startswith(DAY)


def test_nothing_is_asked_for_when_it_is_done(append, ticks, run) -> None:
    append(DAY, users=4, readings=5)
    ticks("drain").tick()
    sensor = ticks("consolidation")
    sensor.tick()
    assert run(DAY).success
    data = sensor.tick()
    assert not data.run_requests
    assert data.skip_message == "no day is due"


@pytest.mark.parametrize("status", CREATABLE, ids=lambda status: status.value)
def test_a_day_with_a_run_under_way_is_left_alone(
    status, append, ticks, instance, definitions
) -> None:
    append(DAY, users=4, readings=5)
    ticks("drain").tick()
    a_run(instance, definitions, status)
    assert not ticks("consolidation").tick().run_requests


def test_after_failures_it_waits_longer_each_time_and_uses_no_key_twice(
    append, ticks, instance, definitions, monkeypatch
) -> None:
    append(DAY, users=4, readings=5)
    ticks("drain").tick()
    sensor = ticks("consolidation")
    keys = [sensor.tick().run_requests[0].run_key]
    now = time.time_ns() // 1_000_000
    monkeypatch.setattr(consolidation, "now_ms", lambda: now)
    for minutes in (*BACKOFF_MINUTES, BACKOFF_MINUTES[-1]):
        failed = a_run(instance, definitions, dg.DagsterRunStatus.STARTED)
        instance.report_run_failed(failed)
        append(DAY, users=1, readings=1)  # new fragments don't make a failing day less failing
        ticks("drain").tick()
        ended = time.time_ns() // 1_000_000
        now = ended + minutes * 60_000 - 5_000
        assert not sensor.tick().run_requests
        now = ended + minutes * 60_000 + 1_000
        keys.append(sensor.tick().run_requests[0].run_key)
    assert len(set(keys)) == len(keys)


def test_a_day_whose_run_was_cancelled_is_asked_for_again(
    append, ticks, instance, definitions, monkeypatch
) -> None:
    append(DAY, users=4, readings=5)
    ticks("drain").tick()
    sensor = ticks("consolidation")
    [first] = sensor.tick().run_requests
    a_run(instance, definitions, dg.DagsterRunStatus.CANCELED)
    later = time.time_ns() // 1_000_000 + BACKOFF_MINUTES[0] * 60_000 + 1_000
    monkeypatch.setattr(consolidation, "now_ms", lambda: later)
    [second] = sensor.tick().run_requests
    assert second.run_key != first.run_key


def test_a_day_that_stays_due_after_a_success_is_not_asked_for_again(
    append, ticks, instance, definitions
) -> None:
    append(DAY, users=4, readings=5)
    ticks("drain").tick()
    sensor = ticks("consolidation")
    [first] = sensor.tick().run_requests
    a_run(instance, definitions, dg.DagsterRunStatus.SUCCESS)
    [second] = sensor.tick().run_requests
    assert second.run_key == first.run_key  # so that Dagster drops it
    append(DAY, users=1, readings=1)
    ticks("drain").tick()
    [third] = sensor.tick().run_requests
    assert third.run_key != first.run_key


def test_another_device_priority_makes_days_due(append, ticks, run, settings, instance) -> None:
    append(DAY, users=4, readings=5)
    ticks("drain").tick()
    run(DAY)
    other = settings.model_copy(update={"device_priority": ("device_z",)})
    [request] = Ticks(other, instance, "consolidation").tick().run_requests
    assert request.tags[REASON] == "minutes are stale"


def test_a_day_that_cannot_be_read_is_an_alarm_and_the_others_go_on(
    append, ticks, settings, instance, installation, webhook
) -> None:
    append(DAY, users=4, readings=5)
    append("2025-01-16", users=4, readings=5)
    ticks("drain").tick()
    raw = layout.day_folder(
        installation.lake().root, layout.RAW, layout.day_of_folder(f"day={DAY}")
    )
    next(raw.rglob("*.parquet")).write_bytes(b"")
    sensor = Ticks(settings.model_copy(update=webhook.setting), instance, "consolidation")
    for _ in range(2):
        asked = [one.partition_key for one in sensor.tick().run_requests]
        assert asked == [DAY, "2025-01-16"], "its run sets the damaged file aside"
    assert webhook.received == [], "the damage sensor tells"


def test_a_day_that_waits_for_too_long_is_an_alarm(
    append, ticks, settings, instance, webhook, run, monkeypatch
) -> None:
    append(DAY, users=1, readings=1)
    ticks("drain").tick()
    sensor = Ticks(settings.model_copy(update=webhook.setting), instance, "consolidation")
    sensor.tick()
    assert webhook.received == []
    later = time.time_ns() // 1_000_000 + 2 * 3_600_000
    monkeypatch.setattr(consolidation, "now_ms", lambda: later)
    sensor.tick()
    assert run(DAY).success
    sensor.tick()
    assert [(one["alarm"], one["severity"]) for one in webhook.received] == [
        ("consolidation_late", "error"),
        ("consolidation_late", "resolved"),
    ]
    assert f"day {DAY} should have been consolidated" in webhook.received[0]["message"]


def test_a_day_before_the_first_partition_is_not_asked_for(append, settings, instance) -> None:
    append("2024-12-30", users=4, readings=5)
    append(DAY, users=4, readings=5)
    loaded = [Ticks(settings, instance, name) for name in ("drain", "consolidation")]
    data = [sensor.tick() for sensor in loaded][-1]
    assert [request.partition_key for request in data.run_requests] == [DAY]
    again = Ticks(settings, instance, "consolidation").tick()
    assert [request.partition_key for request in again.run_requests] == ["2024-12-30", DAY]
