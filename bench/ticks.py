"""Runs the drain sensor without Dagster's daemon: `python -m bench.ticks HB_HOME REDIS_URL`.

The sensor's function is called when the daemon would: on a grid of five seconds, each tick when the
one before is done. What the daemon adds is measured in `control_room`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import dagster as dg
from pydantic import SecretStr

from bench.ways import settings_in
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors.drain import drain_sensor

GRID_SECONDS = 5.0


def main(home: str, url: str) -> None:
    """Tick until SIGTERM."""
    settings = settings_in(Path(home), redis_url=SecretStr(url))
    installation = Installation(settings)
    sensor = drain_sensor(settings, settings.start_date)
    cursor: str | None = None
    began = time.monotonic()
    with dg.DagsterInstance.ephemeral() as instance:
        while True:
            context = dg.build_sensor_context(
                instance, cursor, resources={"installation": installation}
            )
            found = sensor(context)
            assert isinstance(found, dg.SensorResult)
            for event in found.asset_events:
                assert isinstance(event, dg.AssetMaterialization)
                instance.report_runless_asset_event(event)
            cursor = found.cursor
            time.sleep(GRID_SECONDS - (time.monotonic() - began) % GRID_SECONDS)


if __name__ == "__main__":
    main(*sys.argv[1:])
