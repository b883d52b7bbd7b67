"""The job `known_damage`, which evaluates the check `complete` of days without touching them.

The damage sensor asks for it when a day's faults changed. An evaluation that belongs to no run
would do, but Dagster keeps one of these for each check and partition, and fails at the second.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` itself.

from collections.abc import Iterator

import dagster as dg

from hb_assets.core import days
from hb_assets.defs import outcomes
from hb_assets.defs.resources import Installation
from hb_assets.lake.integrity import known_faults

KNOWN_DAMAGE = "known_damage"


class Days(dg.Config):
    """Run configuration: which days, like 2025-01-15."""

    days: list[str]


@dg.op(description="Evaluates the check `complete` of each day.")
def tell_damage(
    context: dg.OpExecutionContext, config: Days, installation: dg.ResourceParam[Installation]
) -> Iterator[dg.AssetCheckEvaluation | dg.Output[None]]:
    """Evaluate the check `complete` of each of these days."""
    with outcomes.failures():
        faults = known_faults.faults(
            installation.lake(), [days.parse_day(day) for day in config.days]
        )
    for day in config.days:
        of_day = [fault for fault in faults if fault.day == days.parse_day(day)]
        yield outcomes.completeness(context.instance, day, of_day)
    yield dg.Output(None)


@dg.job(
    name=KNOWN_DAMAGE,
    description="Has the check `complete` of heartbeats say what is known to be wrong with some "
    "days. The damage sensor launches it.",
)
def known_damage() -> None:
    """The job."""
    tell_damage()
