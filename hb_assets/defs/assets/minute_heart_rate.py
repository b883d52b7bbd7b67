"""The asset `minute_heart_rate`: the minute-level files of a day."""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` itself.

from collections.abc import Iterator
from typing import Any

import dagster as dg

from hb_assets.core import days, schema
from hb_assets.core.errors import CheckFailedError
from hb_assets.defs import metadata, outcomes
from hb_assets.defs.assets import HEARTBEATS, MINUTE_HEART_RATE, OWNERS, TAGS
from hb_assets.defs.resources import Installation
from hb_assets.lake import minutes
from hb_assets.lake.integrity.checks import MINUTE_CHECKS

_DESCRIPTION = """\
One row per user, minute and device: sum, count, min and max over all readings, and again (`kept_*`)
over those that device priority keeps: `minutes/day=.../shard=NN/minutes.parquet`. Priority decides
only between readings of one user at exactly the same timestamp. Coarser spans add up from these sums
and counts.
"""


def minute_heart_rate(daily: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    """The asset `minute_heart_rate`, with these partitions."""
    return dg.graph_multi_asset(
        name="minute_heart_rate",
        ins={"heartbeats": dg.AssetIn(HEARTBEATS, dagster_type=dg.Nothing)},
        outs={
            "minute_heart_rate": dg.AssetOut(
                key=MINUTE_HEART_RATE,
                dagster_type=dg.Nothing,
                is_required=False,  # a day without data is not materialized
                kinds={"parquet", "duckdb"},
                owners=OWNERS,
                tags=TAGS,
                metadata={"dagster/column_schema": metadata.columns(schema.MINUTES)},
                description=_DESCRIPTION,
            )
        },
        partitions_def=daily,
        group_name="heart_rate",
        check_specs=outcomes.check_specs(MINUTE_HEART_RATE, MINUTE_CHECKS, daily),
        can_subset=True,  # jobs leave the checks out
    )(_graph)


def _graph(heartbeats: Any) -> dict[str, Any]:
    built = build_minutes(heartbeats)
    made = {name: getattr(built, name) for name in build_minutes.output_dict}
    return {"minute_heart_rate": made.pop("result"), **made}


@dg.op(
    ins={"heartbeats": dg.In(dg.Nothing)},
    out=outcomes.step_outs(MINUTE_HEART_RATE, MINUTE_CHECKS),
    retry_policy=outcomes.RETRIES,
    description="Builds the minutes that are stale, and checks them.",
)
def build_minutes(
    context: dg.OpExecutionContext, installation: dg.ResourceParam[Installation]
) -> Iterator[dg.Output[None] | dg.AssetCheckEvaluation]:
    """The materialization, unless a check failed or there is no data; each check, once."""
    day, settings = days.parse_day(context.partition_key), installation.settings
    with outcomes.failures():
        lake = installation.lake()
        try:
            done = minutes.build(lake, day, settings, progress=outcomes.progress(context.log))
        except CheckFailedError as error:
            yield from outcomes.evaluations(context, MINUTE_HEART_RATE, error.figures)
            raise
        if not done.figures:
            context.log.warning(f"the lake holds nothing of {day}: nothing was materialized")
            return
        yield dg.Output(None, "result", metadata=metadata.of_minutes(lake, done, settings))
        yield from outcomes.evaluations(context, MINUTE_HEART_RATE, done.figures)
