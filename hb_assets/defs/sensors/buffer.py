"""The buffer sensor: alarms when the buffer fills up, or lacks what its ledger says.

Belongs here: looking, and remembering what stands. Doesn't belong here: the marks
(`buffer.depth`), telling (`alarms`), and a Redis that is away, for which the drain sensor raises
the alarm.
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from hb_assets import alarms
from hb_assets.buffer import depth
from hb_assets.buffer.depth import ShardDepth
from hb_assets.defs.installation import Installation
from hb_assets.defs.sensors import now_ms
from hb_assets.errors import HbError
from hb_assets.settings import Settings


def buffer_sensor() -> dg.SensorDefinition:
    """The sensor; it asks for no runs."""
    return dg.sensor(
        name="buffer",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Raises an alarm when the buffer is nearly full, or has lost entries.",
    )(_tick)


def _tick(
    context: dg.SensorEvaluationContext, installation: dg.ResourceParam[Installation]
) -> dg.SensorResult | dg.SkipReason:
    settings = installation.settings
    try:
        with installation.client() as client:
            states = depth.depths(client, settings)
    except HbError as error:
        return dg.SkipReason(str(error))
    found = faults(states, settings)
    notices, standing = alarms.changes(alarms.load(context.cursor), found, now_ms())
    alarms.tell(notices, settings)
    heartbeats = sum(state.heartbeats for state in states)
    said = "; ".join(found.values()) or f"{heartbeats:,} heartbeats are buffered: all well"
    return dg.SensorResult(skip_reason=said, cursor=alarms.dump(standing))


def faults(states: Sequence[ShardDepth], settings: Settings) -> dict[str, str]:
    """Messages of what is wrong, by the name of the alarm."""
    found = {}
    full = depth.high_water(states, settings)
    if full:
        found["buffer_high_water"] = full[0] + _others(full)
    lost = depth.losses(states)
    if lost:
        found["entries_lost"] = lost[0] + _others(lost)
    return found


def _others(lines: Sequence[str]) -> str:
    return f"; {len(lines) - 1} more shards as well" if len(lines) > 1 else ""
