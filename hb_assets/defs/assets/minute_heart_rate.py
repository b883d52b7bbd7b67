"""minute_heart_rate: the minute-level files of a day."""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` itself.

from collections.abc import Iterator

import dagster as dg

from hb_assets import days, schema
from hb_assets.defs import metadata, outcomes
from hb_assets.defs.assets import HEARTBEATS, MINUTE_HEART_RATE, OWNERS, TAGS
from hb_assets.defs.installation import Installation
from hb_assets.errors import CheckFailedError
from hb_assets.lake import minutes
from hb_assets.lake.checks import MINUTE_CHECKS

_DESCRIPTION = """\
One row per user, minute and device: sum, count, min and max over all readings, and again (`kept_*`)
over those that device priority keeps: `minutes/day=.../shard=NN/minutes.parquet`. Priority decides
only between readings of one user at exactly the same timestamp. Coarser spans add up from these sums
and counts.
"""


def minute_heart_rate(daily: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    """The asset, with these partitions."""
    return dg.asset(
        key=MINUTE_HEART_RATE,
        deps=[HEARTBEATS],
        partitions_def=daily,
        group_name="heart_rate",
        kinds={"parquet", "duckdb"},
        owners=OWNERS,
        tags=TAGS,
        retry_policy=outcomes.RETRIES,
        check_specs=outcomes.check_specs(MINUTE_HEART_RATE, MINUTE_CHECKS),
        metadata={"dagster/column_schema": metadata.columns(schema.MINUTES)},
        description=_DESCRIPTION,
    )(_minute_heart_rate)


def _minute_heart_rate(
    context: dg.AssetExecutionContext, installation: dg.ResourceParam[Installation]
) -> Iterator[dg.AssetCheckResult | dg.MaterializeResult[None]]:
    day, settings = days.parse_day(context.partition_key), installation.settings
    with outcomes.failures():
        lake = installation.lake()
        try:
            done = minutes.build(lake, day, settings, progress=outcomes.progress(context.log))
        except CheckFailedError as error:
            yield from outcomes.check_results(MINUTE_HEART_RATE, MINUTE_CHECKS, error.figures)
            raise
        yield dg.MaterializeResult(
            metadata=metadata.of_minutes(lake, done, settings),
            check_results=outcomes.check_results(MINUTE_HEART_RATE, MINUTE_CHECKS, done.figures),
        )
