"""The drain sensor: drains the buffer in its tick, and reports what the lake holds.

The tick's budget and the handling of its faults are here; draining is in `pipeline.drain`, and
which days to report in `reports`.
"""

from __future__ import annotations

import datetime as dt
import time

import dagster as dg

from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.defs import metadata, outcomes, partitions
from hb_assets.defs.assets import RAW_HEARTBEATS
from hb_assets.defs.reports import Cursor, unreported
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import mark_alive, now_ms
from hb_assets.lake import inventory
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import alarms, drain

MOST_EVENTS = 50
"""Asset events of one tick: Dagster writes them one by one, before it saves the cursor."""
REPORT_SECONDS = 15.0
"""Seconds for which a tick gathers figures of days; other days wait for the next tick."""


DRAIN = {"drain", "shards"}
"""Alarms about draining; they stay raised while it rests after a fault."""


def drain_sensor(settings: Settings, first: dt.date) -> dg.SensorDefinition:
    """The sensor; it drains for DRAIN_TICK_SECONDS and a bit, then reports.

    Args:
        settings: how often it ticks.
        first: the first partition of these definitions.
    """

    def tick(
        context: dg.SensorEvaluationContext, installation: dg.ResourceParam[Installation]
    ) -> dg.SensorResult:
        return _tick(context, installation, first)

    return dg.sensor(
        name="drain",
        minimum_interval_seconds=settings.drain_sensor_interval,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Drains the buffer into raw fragments, and reports the days that changed.",
    )(tick)


def _tick(
    context: dg.SensorEvaluationContext, installation: Installation, first: dt.date
) -> dg.SensorResult:
    settings = installation.settings
    mark_alive(context, installation)
    cursor = Cursor.parse(context.cursor)
    said, lost = "", 0
    faults: dict[str, str] = {}
    events: list[dg.AssetMaterialization] = []
    reported: dict[dt.date, str] = {}
    try:
        lake = installation.lake()
        if cursor.resting(now_ms()):
            faults = {name: cursor.alarms[name].message for name in DRAIN & cursor.alarms.keys()}
        else:
            said, lost, faults = _drain(installation, lake)
            cursor = cursor.after_drain(failed="drain" in faults, now_ms=now_ms())
        events, reported, unread = _report(installation, lake, cursor, first)
        faults |= unread
        earliest = min(first, partitions.first_day(settings, now_ms()))
        partitions.keep_first_day(settings, earliest)
        said = "; ".join(filter(None, [said, partitions.waiting(first, earliest)]))
    except (HbError, OSError) as error:
        faults["lake"] = outcomes.line(error)
    now = now_ms()
    notices, standing = alarms.changes(cursor.alarms, faults, now)
    if lost:
        message = f"{lost} entries of the buffer were deleted before they were drained: data loss"
        notices.append(alarms.alarm("entries_lost", message, now))
    alarms.tell(notices, settings)
    return dg.SensorResult(
        skip_reason="; ".join([*faults.values(), *([said] if said else [])]),
        asset_events=events,
        cursor=str(cursor.advanced(reported, standing, now)),
    )


def _drain(installation: Installation, lake: Lake) -> tuple[str, int, dict[str, str]]:
    """Drain; returns one line about it, the number of lost entries, and the faults."""
    settings = installation.settings
    faults = {}
    said, lost = "", 0
    try:
        with installation.consumer() as consumer:
            try:
                done = drain.drain(consumer, lake, settings, seconds=settings.drain_tick_seconds)
                said = outcomes.drained(done) if done.entries else "the buffer is empty"
            finally:
                lost = consumer.lost
                if consumer.unusable:
                    faults["shards"] = "; ".join(consumer.unusable.values())
    except (HbError, OSError) as error:
        faults["drain"] = f"nothing can be drained: {outcomes.line(error)}"
    except Exception as error:  # noqa: BLE001  # a drain that stands still must raise an alarm
        # only its kind: the message may quote a heartbeat
        faults["drain"] = f"nothing can be drained: unexpected {type(error).__name__}"
    return said, lost, faults


def _report(
    installation: Installation, lake: Lake, cursor: Cursor, first: dt.date
) -> tuple[list[dg.AssetMaterialization], dict[dt.date, str], dict[str, str]]:
    """Events of days that changed, the digests that they report, and what can't be read."""
    settings = installation.settings
    now = now_ms()
    end = time.monotonic() + REPORT_SECONDS
    events: list[dg.AssetMaterialization] = []
    reported: dict[dt.date, str] = {}
    faults: dict[str, str] = {}
    changed = unreported(
        lake,
        cursor,
        installation.folders,
        lambda day: partitions.has(day, first, now, settings),
        now,
        faults,
    )
    for day, digest in changed:
        events.append(_event(lake, day, settings))
        reported[day] = digest
        if len(events) == MOST_EVENTS or time.monotonic() > end:
            break
    return events, reported, faults


def _event(lake: Lake, day: dt.date, settings: Settings) -> dg.AssetMaterialization:
    state = inventory.day_state(lake, day, settings)
    return dg.AssetMaterialization(
        asset_key=RAW_HEARTBEATS,
        partition=day.isoformat(),
        description="; ".join(state.faults) or None,
        metadata=metadata.of_raw(lake, state),
    )
