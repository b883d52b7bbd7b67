"""The job `maintenance` and its schedule, which keep the lake from only growing.

The work itself is in `pipeline.maintenance`.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` itself.

import dagster as dg

from hb_assets.core.errors import HbError
from hb_assets.defs import outcomes
from hb_assets.defs.resources import Installation
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.maintenance import maintain

MAINTENANCE = "maintenance"


@dg.op(description="Prune raw fragments, and remove what crashes left behind.")
def prune(context: dg.OpExecutionContext, installation: dg.ResourceParam[Installation]) -> None:
    """Prune the lake; the step fails, after all else was done, when a day can't be pruned."""
    settings = installation.settings
    with outcomes.failures():
        lake = installation.lake()
        with coordinated(lake, settings, start_server=False) as known:
            done = maintain(lake, settings, known)
        context.add_output_metadata(
            {
                "fragments_pruned": done.fragments,
                "bytes_pruned": done.bytes,
                "leftovers_removed": done.leftovers,
                "files_renewed": done.renewed,
            }
        )
        if done.faults:
            raise HbError("; ".join(done.faults))


@dg.job(
    name=MAINTENANCE,
    description="Prune raw fragments that consolidated files include and that are older than "
    "HB_RAW_KEEP, and remove what crashes left behind. By hand: `hb prune`.",
)
def maintenance() -> None:
    """The job."""
    prune()


hourly_maintenance = dg.ScheduleDefinition(
    name="hourly_maintenance",
    job=maintenance,
    cron_schedule="17 * * * *",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Runs the maintenance job.",
)
