"""The buffer sensor: alarms when buffer or spool fill up, entries wait too long, or some are lost.

It also leaves the liveness timestamp by which others see that Dagster is alive. The thresholds are
in `buffer.depth`, `gateway.spool.queue` and `vitals`. A Redis that is away is the drain sensor's
alarm.
"""

from __future__ import annotations

from collections.abc import Sequence

import dagster as dg

from hb_assets.buffer import depth, liveness
from hb_assets.buffer.depth import Depths
from hb_assets.buffer.liveness import Liveness
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import mark_alive, now_ms
from hb_assets.gateway.spool import queue
from hb_assets.pipeline import alarms, vitals

BUFFER_ALARMS = (
    "buffer_high_water",
    "entries_lost",
    "drain_late",
    "backlog",
    "dead_consumers",
    "dagster",
)


def buffer_sensor() -> dg.SensorDefinition:
    """The sensor; it asks for no runs."""
    return dg.sensor(
        name="buffer",
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Raises an alarm when the buffer is nearly full, has lost entries or isn't drained, "
        "and when the gateway's spool holds heartbeats or is damaged. By its ticks the gateway's "
        "health tells whether Dagster is alive.",
    )(_tick)


def _tick(
    context: dg.SensorEvaluationContext, installation: dg.ResourceParam[Installation]
) -> dg.SensorResult:
    settings = installation.settings
    before = alarms.load(context.cursor)
    mark_alive(context, installation)
    found = _spool_faults(settings)
    said = "all well"
    try:
        with installation.client() as client:
            buffer = depth.depths(client, settings)
            signs = liveness.read(client)
    except HbError as error:
        said = str(error)
        # nothing is known, so that what was wrong isn't over
        found |= {name: before[name].message for name in BUFFER_ALARMS if name in before}
    else:
        found |= faults(buffer, signs, settings)
        said = f"{sum(state.heartbeats for state in buffer.states):,} heartbeats are buffered: all well"
        if buffer.faults:  # the drain sensor raises the alarm
            said = "; ".join(buffer.faults.values())
    notices, standing = alarms.changes(before, found, now_ms())
    alarms.tell(notices, settings)
    said = "; ".join(found.values()) or said
    return dg.SensorResult(skip_reason=said, cursor=alarms.dump(standing))


def _spool_faults(settings: Settings) -> dict[str, str]:
    try:
        holdings = queue.holdings(settings)
    except HbError as error:
        return {"spool": str(error)}
    lines = holdings.alarms() if holdings else []
    return {"spool": "; ".join(lines)} if lines else {}


def faults(buffer: Depths, signs: Liveness, settings: Settings) -> dict[str, str]:
    """Messages of faults, by the name of the alarm."""
    found = {}
    states = buffer.states
    full = depth.high_water(states, settings)
    if full:
        found[BUFFER_ALARMS[0]] = full[0] + _others(full)
    lost = depth.losses(states)
    if lost:
        found[BUFFER_ALARMS[1]] = lost[0] + _others(lost)
    late = (
        vitals.drain(states, signs, settings),
        vitals.backlog(states, signs, settings),
        vitals.consumers(states, signs, settings),
        vitals.dagster(signs, settings),
    )
    found |= {name: line for name, line in zip(BUFFER_ALARMS[2:], late, strict=True) if line}
    return found


def _others(lines: Sequence[str]) -> str:
    return f"; {len(lines) - 1} more shards as well" if len(lines) > 1 else ""
