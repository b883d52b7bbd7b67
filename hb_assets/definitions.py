"""The definitions that Dagster loads, assembled from the parts in `defs`.

Nothing is opened or read until Dagster asks for them.
"""

from __future__ import annotations

import dagster as dg

from hb_assets.core import private_files
from hb_assets.core import settings as configuration
from hb_assets.core.settings import Settings
from hb_assets.defs import executors, jobs, partitions
from hb_assets.defs.assets.heartbeats import heartbeats
from hb_assets.defs.assets.minute_heart_rate import minute_heart_rate
from hb_assets.defs.assets.raw_heartbeats import raw_heartbeats
from hb_assets.defs.damage import known_damage
from hb_assets.defs.maintenance import hourly_maintenance, maintenance
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import now_ms
from hb_assets.defs.sensors.buffer import buffer_sensor
from hb_assets.defs.sensors.consolidation import consolidation_sensor
from hb_assets.defs.sensors.damage import damage_sensor
from hb_assets.defs.sensors.drain import drain_sensor
from hb_assets.defs.sensors.failed_runs import failed_runs_sensor


@dg.definitions
def definitions() -> dg.Definitions:
    """The definitions for the settings in the environment. Raises SettingsError.

    Code servers and runs load them before they write anything: what they write is closed to others.
    """
    private_files.umask()
    return of(configuration.load())


def of(settings: Settings) -> dg.Definitions:
    """The definitions for these settings. Raises SettingsError."""
    first = partitions.first_day(settings, now_ms())
    daily = partitions.daily(first, settings)
    return dg.Definitions(
        assets=[raw_heartbeats(daily), heartbeats(daily), minute_heart_rate(daily)],
        jobs=[jobs.consolidate_day, jobs.drain_and_report, known_damage, maintenance],
        schedules=[hourly_maintenance],
        sensors=[
            drain_sensor(settings, first),
            consolidation_sensor(first),
            damage_sensor(first),
            buffer_sensor(),
            failed_runs_sensor(),
        ],
        resources={"installation": Installation(settings)},
        executor=executors.chosen(settings),
    )
