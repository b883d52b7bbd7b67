"""The sensors: one drains and reports, one asks for consolidation, the others raise alarms."""

from __future__ import annotations

import time
from contextlib import suppress

import dagster as dg
from dagster._core.scheduler.instigation import InstigatorStatus, InstigatorType  # no public name

from hb_assets.buffer import liveness
from hb_assets.buffer.liveness import DAGSTER
from hb_assets.core.errors import HbError
from hb_assets.defs.resources import Installation


def now_ms() -> int:
    """The clock, epoch milliseconds."""
    return time.time_ns() // 1_000_000


def mark_alive(context: dg.SensorEvaluationContext, installation: Installation) -> None:
    """Set the liveness timestamps of Dagster and of sensors that somebody stopped.

    Each sensor does, so that the others' alarm (`vitals.dagster`) doesn't depend on one that is
    stopped itself. A Redis that is away is told elsewhere.
    """
    stopped: set[str] = set()
    if context.instance.schedule_storage is not None:  # an instance in memory has none
        known = context.instance.all_instigator_state(
            instigator_type=InstigatorType.SENSOR, instigator_statuses={InstigatorStatus.STOPPED}
        )
        stopped = {liveness.stopped(state.instigator_name) for state in known}
    with suppress(HbError), installation.client() as client:
        liveness.mark_alive(client, [DAGSTER, *sorted(stopped)], {})
