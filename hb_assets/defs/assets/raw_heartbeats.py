"""The asset `raw_heartbeats`: the fragments of a day.

The drain sensor reports its materializations; materialized by hand, it drains.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` itself.

from collections.abc import Iterator

import dagster as dg

from hb_assets.buffer import server
from hb_assets.core import days, schema
from hb_assets.defs import metadata, outcomes
from hb_assets.defs.assets import OWNERS, RAW_HEARTBEATS, TAGS
from hb_assets.defs.resources import Installation
from hb_assets.lake import inventory
from hb_assets.pipeline.drain import drain

_SECONDS = 60.0
_DESCRIPTION = f"""\
Every delivered heartbeat of the day, as it came: immutable Parquet fragments,
`raw/day=.../shard=NN/part-*.parquet`, each row with its identity (source shard, entry id, position).
An entry of the buffer is acknowledged only when its fragments are durable; a fragment is never
rewritten.

The drain sensor drains all the time, and reports here what the lake holds, whoever wrote it.
Materialized by hand, it drains the buffer (all days of it) until it is empty, for {_SECONDS:.0f} s at
most.
"""


def raw_heartbeats(daily: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    """The asset `raw_heartbeats`, with these partitions."""
    return dg.asset(
        key=RAW_HEARTBEATS,
        partitions_def=daily,
        output_required=False,  # a day without data is not materialized
        group_name="ingest",
        kinds={"redis", "parquet"},
        owners=OWNERS,
        tags=TAGS,
        retry_policy=outcomes.RETRIES,
        metadata={"dagster/column_schema": metadata.columns(schema.HEARTBEATS)},
        description=_DESCRIPTION,
    )(_raw_heartbeats)


def _raw_heartbeats(
    context: dg.AssetExecutionContext, installation: dg.ResourceParam[Installation]
) -> Iterator[dg.MaterializeResult[None]]:
    day, settings = days.parse_day(context.partition_key), installation.settings
    with outcomes.failures():
        lake = installation.lake()
        with server.borrowed(settings), installation.consumer() as consumer:
            drained = drain(
                consumer,
                lake,
                settings,
                seconds=_SECONDS,
                until_empty=True,
                on_cycle=lambda total: context.log.info(outcomes.drained(total)),
            )
        if not drained.empty:
            context.log.warning(f"the buffer isn't empty after {_SECONDS:.0f} s")
        state = inventory.day_state(lake, day, settings)
        for fault in state.faults:
            context.log.warning(fault)
        if state.fragments or state.rows:
            yield dg.MaterializeResult(metadata=metadata.of_raw(lake, state))
        else:
            context.log.warning(f"the lake holds nothing of {day}: nothing was materialized")
