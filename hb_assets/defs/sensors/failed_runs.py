"""The failed runs sensor: an alarm for each run that failed for good.

An alarm never contains an exception's text, which may quote data; only failures that our own code
describes (`outcomes`) are told in words.
"""

from __future__ import annotations

import dagster as dg

from hb_assets.defs import partitions
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import now_ms
from hb_assets.pipeline import alarms

_WILL_RETRY = "dagster/will_retry"


def failed_runs_sensor() -> dg.SensorDefinition:
    """The sensor; it watches every job of this code location."""
    return dg.run_failure_sensor(
        name="failed_runs",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Raises an alarm for each run that failed and isn't tried again by Dagster.",
    )(_tick)


def _tick(
    context: dg.RunFailureSensorContext, installation: dg.ResourceParam[Installation]
) -> dg.SkipReason | None:
    run = context.dagster_run
    if run.tags.get(_WILL_RETRY) == "true":
        return dg.SkipReason(f"run {run.run_id} is tried again by Dagster")
    day = run.tags.get(partitions.TAG, "")
    what = f"run of {run.job_name}" + (f" for {day}" if day else "")
    notice = alarms.alarm(
        "run_failed",
        f"{what} failed: {_reason(context)}",
        now_ms(),
        run_id=run.run_id,
        job=run.job_name,
        day=day,
    )
    alarms.tell([notice], installation.settings)
    return None


def _reason(context: dg.RunFailureSensorContext) -> str:
    for event in context.get_step_failure_events():
        failure = event.step_failure_data
        described = failure.user_failure_data.description if failure.user_failure_data else None
        if described:
            return described
        error = failure.error.cause or failure.error if failure.error else None
        if error is not None and error.cls_name:
            return f"{event.step_key} ended with {error.cls_name}; see the run's log"
    return "see the run's log"
