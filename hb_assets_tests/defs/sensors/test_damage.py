"""The damage sensor: a day that something is wrong with is red until that is resolved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dagster as dg
import pytest

from hb_assets.core.days import parse_day
from hb_assets.defs.assets import HEARTBEATS
from hb_assets.defs.sensors import damage
from hb_assets.lake.storage import layout
from hb_assets_tests.defs.conftest import Ticks

DAY = "2025-01-15"
COMPLETE = dg.AssetCheckKey(HEARTBEATS, "complete")


@pytest.fixture
def sensor(settings, instance, webhook) -> Ticks:
    return Ticks(settings.model_copy(update=webhook.setting), instance, "damage")


def told(webhook) -> list[tuple[str, str]]:
    return [(one["alarm"], one["severity"]) for one in webhook.received]


def asked(data) -> list[str]:
    """Days whose check the sensor wants to be evaluated."""
    return [
        day
        for request in data.run_requests
        for day in request.run_config["ops"]["tell_damage"]["config"]["days"]
    ]


@pytest.fixture
def judge(definitions, instance) -> Callable[[Any], list[tuple[str, str, bool]]]:
    """Runs what a tick asked for: check, partition and result of each evaluation."""

    def judge(data: Any) -> list[tuple[str, str, bool]]:
        [request] = data.run_requests
        job = definitions.resolve_job_def("known_damage")
        done = job.execute_in_process(instance=instance, run_config=request.run_config)
        found = done.get_asset_check_evaluations()
        return [(one.check_name, one.partition, one.passed) for one in found]

    return judge


def test_each_day_is_told_when_it_changes_and_not_again(
    append, ticks, run, installation, sensor, webhook, instance, judge
) -> None:
    for day in (DAY, "2025-01-16"):
        append(day, users=4, readings=5)
    ticks("drain").tick()
    for day in (DAY, "2025-01-16"):
        assert run(day).success
    data = sensor.tick()
    assert asked(data) == []
    assert data.skip_message == "nothing is damaged or lost"
    path = next(
        (layout.day_folder(installation.lake().root, "heartbeats", parse_day(DAY))).rglob(
            "*.parquet"
        )
    )
    whole = path.read_bytes()
    path.write_bytes(b"PAR1 no more")
    assert judge(sensor.tick()) == [("complete", DAY, False)]
    [record] = instance.event_log_storage.get_asset_check_execution_history(COMPLETE, limit=1)
    assert str(path) in record.evaluation.description
    assert record.evaluation.metadata["found"].value == "faults: 1"
    latest = instance.get_latest_materialization_event(HEARTBEATS)
    target = record.evaluation.target_materialization_data
    assert target.run_id != latest.run_id, "that of the other day"
    assert asked(sensor.tick()) == []
    path.write_bytes(whole)
    assert judge(sensor.tick()) == [("complete", DAY, True)]
    assert asked(sensor.tick()) == []
    assert told(webhook) == [(f"lake_damaged:{DAY}", "error"), (f"lake_damaged:{DAY}", "resolved")]


def test_a_day_without_a_partition_waits_for_it(
    append, settings, instance, installation, ticks
) -> None:
    append("2024-12-30", users=4, readings=5)
    before = Ticks(settings, instance, "damage")
    drain = Ticks(settings, instance, "drain")
    drain.tick()
    path = next((installation.lake().root / layout.RAW).rglob("*.parquet"))
    path.write_bytes(b"PAR1 no more")
    assert asked(before.tick()) == []
    after = Ticks(settings, instance, "damage")
    after.cursor = before.cursor
    assert asked(after.tick()) == ["2024-12-30"]


def test_more_days_than_one_tick_tells_are_told_by_the_next(
    append, installation, sensor, ticks, monkeypatch
) -> None:
    for day in (DAY, "2025-01-16", "2025-01-17"):
        append(day, users=1, readings=1)
    ticks("drain").tick()
    for path in (installation.lake().root / layout.RAW).rglob("*.parquet"):
        path.write_bytes(b"PAR1 no more")
    monkeypatch.setattr(damage, "MOST_DAYS", 2)
    assert asked(sensor.tick()) == [DAY, "2025-01-16"]
    assert asked(sensor.tick()) == ["2025-01-17"]
    assert asked(sensor.tick()) == []
