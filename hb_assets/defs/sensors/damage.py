"""The damage sensor: reports what is known to be wrong with each day, until it is resolved."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

import dagster as dg

from hb_assets.core.errors import HbError
from hb_assets.defs import outcomes, partitions
from hb_assets.defs.damage import KNOWN_DAMAGE, tell_damage
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import mark_alive, now_ms
from hb_assets.lake.integrity import known_faults
from hb_assets.pipeline import alarms

MOST_DAYS = 50
"""Days of one run; others wait for the next tick."""


def damage_sensor(first: dt.date) -> dg.SensorDefinition:
    """The sensor; it has the check `complete` evaluated for days whose faults changed.

    Args:
        first: the first partition of these definitions.
    """

    def tick(
        context: dg.SensorEvaluationContext, installation: dg.ResourceParam[Installation]
    ) -> dg.SensorResult | dg.SkipReason:
        return _tick(context, installation, first)

    return dg.sensor(
        name="damage",
        job_name=KNOWN_DAMAGE,
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Raises an alarm for each day of which something is damaged or lost, and has its "
        "check `complete` say so, until that is resolved.",
    )(tick)


def _tick(
    context: dg.SensorEvaluationContext, installation: Installation, first: dt.date
) -> dg.SensorResult | dg.SkipReason:
    mark_alive(context, installation)
    try:
        faults = known_faults.faults(installation.lake())
    except HbError as error:
        return dg.SkipReason(str(error))  # the drain sensor raises the alarm
    now = now_ms()
    before = alarms.load(context.cursor)
    found = alarms.of_lake(faults)
    told = _by_day({name: raised.message for name, raised in before.items()})
    changed: list[str] = []
    stands = _by_day(found)
    for day in sorted(told.keys() | stands.keys()):
        if told.get(day) == stands.get(day):
            continue
        date = dt.date.fromisoformat(day)
        if len(changed) < MOST_DAYS and partitions.has(date, first, now, installation.settings):
            changed.append(day)
        else:  # the alarm waits for a later tick as well, which finds by it that the day changed
            found = {name: text for name, text in found.items() if _day_of(name) != day}
            found |= told.get(day, {})
    notices, raised = alarms.changes(before, found, now)
    alarms.tell(notices, installation.settings)
    requests = []
    if changed:
        requests.append(
            dg.RunRequest(run_config={"ops": {tell_damage.name: {"config": {"days": changed}}}})
        )
    said = outcomes.summary(list(found.values())) or "nothing is damaged or lost"
    return dg.SensorResult(
        run_requests=requests,
        skip_reason=None if requests else said,
        cursor=alarms.dump(raised),
    )


def _by_day(messages: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Messages of alarms that name a day, by day and name."""
    found: dict[str, dict[str, str]] = {}
    for name, message in messages.items():
        if day := _day_of(name):
            found.setdefault(day, {})[name] = message
    return found


def _day_of(name: str) -> str:
    """The day of an alarm that `alarms.of_lake` named; empty where it is of none."""
    return name.partition(":")[2]
