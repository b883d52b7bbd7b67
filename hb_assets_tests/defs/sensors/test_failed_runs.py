"""The failed runs sensor: says which day failed and why, in our own words."""

from __future__ import annotations

import dagster as dg

from hb_assets.definitions import of
from hb_assets.defs.resources import Installation
from hb_assets.lake.storage import layout
from hb_assets_tests.lake.deliveries import spoil_for_good

DAY = "2025-01-15"


def evaluate(settings, result, instance, run=None) -> object:
    sensor = of(settings).get_repository_def().get_sensor_def("failed_runs")
    event = next(
        event for event in result.all_events if event.event_type_value == "PIPELINE_FAILURE"
    )
    context = dg.build_run_status_sensor_context(
        sensor_name="failed_runs",
        dagster_instance=instance,
        dagster_run=run or result.dagster_run,
        dagster_event=event,
        resources={"installation": Installation(settings)},
    ).for_run_failure()
    return sensor(context)


def failed_run(append, ticks, run, installation):
    append(DAY, users=4, readings=5)
    ticks("drain").tick()
    run(DAY)
    path = next((installation.lake().root / layout.HEARTBEATS).rglob("*.parquet"))
    spoil_for_good(installation.lake(), path)
    return path, run(DAY)


def test_a_failed_run_is_an_alarm(
    append, ticks, run, installation, settings, instance, webhook
) -> None:
    path, result = failed_run(append, ticks, run, installation)
    evaluate(settings.model_copy(update=webhook.setting), result, instance)
    [alarm] = webhook.received
    assert alarm["alarm"] == "run_failed"
    assert alarm["severity"] == "error"
    assert alarm["details"] == {"run_id": result.run_id, "job": "consolidate_day", "day": DAY}
    assert alarm["message"].startswith(
        f"run of consolidate_day for {DAY} failed: {path} is damaged"
    )
    assert alarm["at"].endswith("Z")


def test_a_run_that_is_tried_again_is_none(
    append, ticks, run, installation, settings, instance, webhook
) -> None:
    _, result = failed_run(append, ticks, run, installation)
    retried = result.dagster_run.with_tags(
        {**result.dagster_run.tags, "dagster/will_retry": "true"}
    )
    evaluate(settings.model_copy(update=webhook.setting), result, instance, retried)
    assert webhook.received == []
