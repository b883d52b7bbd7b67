"""The consolidation sensor: asks for a run of each day that is due.

It knows which runs are under way or failed, waits after a failure, and raises alarms for days that
can't be read or wait for too long. `lake.compaction.policy` decides when a day is due, `vitals`
what is too long.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterator, Sequence
from itertools import takewhile

import dagster as dg

from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.defs import partitions
from hb_assets.defs.jobs import CONSOLIDATE_DAY
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import mark_alive, now_ms
from hb_assets.lake import inventory
from hb_assets.lake.compaction import policy
from hb_assets.lake.inventory import DayState
from hb_assets.lake.storage.layout import HEARTBEATS, MINUTES, RAW
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import alarms, vitals

REASON = "hb/reason"
"""Run tag: why the day was due."""
MOST_REQUESTS = 8
"""Runs asked for in one tick; more would only wait in Dagster's queue."""
BACKOFF_MINUTES = (1, 5, 15, 60)
"""Pause after a day's first, second, ... failure in a row; the last one counts for all others."""

_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_WITHOUT_SUCCESS = (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def consolidation_sensor(first: dt.date) -> dg.SensorDefinition:
    """The sensor; it asks for runs of `consolidate_day`, from the first partition on."""

    def tick(
        context: dg.SensorEvaluationContext, installation: dg.ResourceParam[Installation]
    ) -> dg.SensorResult | dg.SkipReason:
        return _tick(context, installation, first)

    return dg.sensor(
        name="consolidation",
        job_name=CONSOLIDATE_DAY,
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for the consolidation of days with enough, or old enough, pending rows.",
    )(tick)


def _tick(
    context: dg.SensorEvaluationContext, installation: Installation, first: dt.date
) -> dg.SensorResult | dg.SkipReason:
    settings = installation.settings
    now = now_ms()
    mark_alive(context, installation)
    try:
        lake = installation.lake()
    except HbError as error:
        return dg.SkipReason(str(error))  # the drain sensor raises the alarm
    unfinished = context.instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))
    busy = {run.tags.get(partitions.TAG) for run in unfinished}
    unread: list[str] = []
    held = inventory.days_found(lake, unread)
    loaded = [day for day in held if partitions.has(day, first, now, settings)]
    states = _states(installation, lake, loaded)
    requests: list[dg.RunRequest] = []
    waiting = partitions.waiting(first, min(held, default=first))
    faults = {one.day.isoformat(): "; ".join(one.faults) for one in states if one.faults}
    passed_over = [*unread, *faults.values(), *([waiting] if waiting else [])]
    for day, reason, fingerprint in _due(states, now, settings):
        if day in busy:
            passed_over.append(f"{day}: a run is under way")
            continue
        attempt = _attempt(context.instance, day, now)
        if attempt is None:
            passed_over.append(f"{day}: waiting after a failure")
            continue
        run_key = f"{day}/{fingerprint}/{attempt}"
        requests.append(dg.RunRequest(run_key=run_key, partition_key=day, tags={REASON: reason}))
        if len(requests) == MOST_REQUESTS:
            break
    found: dict[str, str] = {}  # files that can't be read are the damage sensor's
    oldest = ((state.day, state.oldest_pending_ms) for state in states)
    late = vitals.consolidation(*policy.most_overdue(oldest, now, settings), settings)
    if late is not None:
        found["consolidation_late"] = late
    notices, standing = alarms.changes(alarms.load(context.cursor), found, now)
    alarms.tell(notices, settings)
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else "; ".join(passed_over[:5]) or "no day is due",
        cursor=alarms.dump(standing),
    )


def _due(states: Sequence[DayState], now: int, settings: Settings) -> Iterator[tuple[str, ...]]:
    """Each day that is due, with the reason and a fingerprint of what is to be done.

    A day with a file that can't be read is: its run sets the file aside, or fails and says why.
    """
    for state in states:
        reason = policy.due(state, now, settings)
        if reason is None and state.faults:
            reason = "a file of it is damaged"
        if reason is not None:
            yield state.day.isoformat(), reason, _fingerprint(state, settings)


def _states(installation: Installation, lake: Lake, loaded: Sequence[dt.date]) -> list[DayState]:
    """The state of each day."""

    def look(lake: Lake, day: dt.date) -> DayState:
        return inventory.day_state(lake, day, installation.settings)

    kinds = (RAW, HEARTBEATS, MINUTES)
    return [installation.folders.remembered(lake, day, kinds, look) for day in loaded]


def _attempt(instance: dg.DagsterInstance, day: str, now: int) -> str | None:
    """A key that tells this attempt from those before it; None while a failed day has to wait.

    A run key is never used twice, even when its run failed or was cancelled: the last such run is
    part of it.
    After a success there is no such part, so that a day which stays due all the same isn't
    consolidated over and over.
    """
    records = instance.get_run_records(
        dg.RunsFilter(job_name=CONSOLIDATE_DAY, tags={partitions.TAG: day}),
        limit=len(BACKOFF_MINUTES),
    )
    failed = list(takewhile(lambda one: one.dagster_run.status in _WITHOUT_SUCCESS, records))
    if not failed:
        return "first"
    ended = failed[0].end_time or failed[0].update_timestamp.timestamp()
    if now < (ended + BACKOFF_MINUTES[len(failed) - 1] * 60) * 1000:
        return None
    return failed[0].dagster_run.run_id[:8]


def _fingerprint(state: DayState, settings: Settings) -> str:
    """A fingerprint of what is to be done: another one means that there is other work.

    That is other pending fragments, another publication, another device priority, or other files
    that can't be read.
    """
    parts = (state.pending_digest, str(state.rows_written), *settings.device_priority)
    return _digest(*parts, *state.faults)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()
