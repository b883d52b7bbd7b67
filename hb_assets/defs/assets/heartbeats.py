"""heartbeats: the consolidated files of a day."""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` itself.

import datetime as dt
from collections.abc import Iterator

import dagster as dg

from hb_assets import alarms, days, schema
from hb_assets.coordination import coordinated
from hb_assets.defs import metadata, outcomes
from hb_assets.defs.assets import HEARTBEATS, OWNERS, RAW_HEARTBEATS, TAGS
from hb_assets.defs.installation import Installation
from hb_assets.defs.sensors import now_ms
from hb_assets.errors import CheckFailedError
from hb_assets.lake.checks import HEARTBEAT_CHECKS

_DESCRIPTION = """\
The day's heartbeats, deduplicated by (user_id, device_id, timestamp), the latest arrival surviving;
sorted by user_id, timestamp, device_id: `heartbeats/day=.../shard=NN/heartbeats.parquet`. Each file
lists in its own metadata the fragments that it includes; what it doesn't list is pending. A file is
checked before it replaces the published one, so that a bad one is never visible.

Rows of the day = unique + superseded; a superseded row is a repeat (same value) or a correction. Run
config `rebuild` starts from raw fragments alone.
"""


class Consolidation(dg.Config):
    """Run configuration of `heartbeats`."""

    rebuild: bool = False
    """Start from the day's raw fragments alone, instead of the published files."""


def heartbeats(daily: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    """The asset, with these partitions."""
    return dg.asset(
        key=HEARTBEATS,
        deps=[RAW_HEARTBEATS],
        partitions_def=daily,
        group_name="heart_rate",
        kinds={"parquet", "duckdb"},
        owners=OWNERS,
        tags=TAGS,
        retry_policy=outcomes.RETRIES,
        check_specs=outcomes.check_specs(HEARTBEATS, HEARTBEAT_CHECKS),
        metadata={"dagster/column_schema": metadata.columns(schema.HEARTBEATS)},
        description=_DESCRIPTION,
    )(_heartbeats)


def _heartbeats(
    context: dg.AssetExecutionContext,
    config: Consolidation,
    installation: dg.ResourceParam[Installation],
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[None]]:
    day = days.parse_day(context.partition_key)
    settings = installation.settings
    with outcomes.failures():
        lake = installation.lake()
        try:
            with coordinated(lake, settings, start_server=False) as known:
                done = known.consolidate(
                    lake,
                    day,
                    settings,
                    rebuild=config.rebuild,
                    progress=outcomes.progress(context.log),
                )
        except CheckFailedError as error:
            yield from outcomes.check_results(HEARTBEATS, HEARTBEAT_CHECKS, error.figures)
            raise
        alarms.tell([_damage(day, said) for said in done.set_aside], settings)
        yield dg.MaterializeResult(
            metadata=metadata.of_heartbeats(lake, done),
            check_results=outcomes.check_results(HEARTBEATS, HEARTBEAT_CHECKS, done.figures),
        )


def _damage(day: dt.date, said: str) -> alarms.Alarm:
    return alarms.alarm("damaged_file", said, now_ms(), day=day.isoformat())
