"""The asset `heartbeats`: the consolidated files of a day.

A graph of three ops: `plan` divides the day's shards into groups, `consolidate_shards` does one
group, `check_day` judges what all of them did. In process the groups follow each other, and the
shards of a group share the cores (`lake.compaction.consolidation`); another executor (HB_EXECUTOR)
does the groups side by side, wherever it runs its steps. What one op hands to the next is a handful
of counts.
"""

# No `from __future__ import annotations`: Dagster compares the annotation of `context` itself.

import datetime as dt
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import dagster as dg

from hb_assets.core import days, schema
from hb_assets.defs import metadata, outcomes
from hb_assets.defs.assets import HEARTBEATS, OWNERS, RAW_HEARTBEATS, TAGS
from hb_assets.defs.resources import Installation
from hb_assets.defs.sensors import now_ms
from hb_assets.lake.compaction.consolidation import Consolidated
from hb_assets.lake.files.counts import Counts
from hb_assets.lake.integrity import checks, known_faults
from hb_assets.lake.integrity.checks import HEARTBEAT_CHECKS, Figure
from hb_assets.pipeline import alarms
from hb_assets.pipeline.coordination import coordinated

SHARDS_A_STEP = 4
"""Least shards in a step: a step for each would cost more than it shows."""
MOST_STEPS = 16
"""Steps of one run, however many shards there are: each writes a dozen events."""

_DESCRIPTION = """\
The day's heartbeats, deduplicated by (user_id, device_id, timestamp), the latest arrival surviving;
sorted by user_id, timestamp, device_id: `heartbeats/day=.../shard=NN/heartbeats.parquet`. Each file
lists in its own metadata the fragments that it includes; what it doesn't list is pending. A file is
checked before it replaces the published one, so that a bad one is never visible.

Rows of the day = unique + superseded; a superseded row is a repeat (same value) or a correction. Run
config `rebuild` starts from raw fragments alone.

A step does a group of shards. A shard that fails keeps no other from being published; the last step
judges the day from all of them, and fails then. To try again, materialize the day again: what is
published already is only verified. A day without data is not materialized.
"""
_CHECKS = (*HEARTBEAT_CHECKS, outcomes.COMPLETE)
_MAY_PASS = ("fenced", "storage")
"""Kinds of failures that another try may not meet."""


class Consolidation(dg.Config):
    """Run configuration of `heartbeats`."""

    rebuild: bool = False
    """Start from the day's raw fragments alone, instead of the published files."""


@dataclass(frozen=True, slots=True)
class Group:
    """The work of one step: some shards of the run's day."""

    shards: tuple[int, ...]
    rebuild: bool

    @property
    def name(self) -> str:
        """As the step's key shows it, such as `shards_00_03`."""
        return "_".join(
            ["shards", *(f"{shard:02d}" for shard in (self.shards[0], self.shards[-1]))]
        )


def heartbeats(daily: dg.PartitionsDefinition[str]) -> dg.AssetsDefinition:
    """The asset `heartbeats`, with these partitions."""
    return dg.graph_multi_asset(
        name="heartbeats",
        ins={"raw": dg.AssetIn(RAW_HEARTBEATS, dagster_type=dg.Nothing)},
        outs={
            "heartbeats": dg.AssetOut(
                key=HEARTBEATS,
                dagster_type=dg.Nothing,
                is_required=False,  # a day without data is not materialized
                kinds={"parquet", "duckdb"},
                owners=OWNERS,
                tags=TAGS,
                metadata={"dagster/column_schema": metadata.columns(schema.HEARTBEATS)},
                description=_DESCRIPTION,
            )
        },
        config=_config,
        partitions_def=daily,
        group_name="heart_rate",
        check_specs=outcomes.check_specs(HEARTBEATS, _CHECKS, daily),
        can_subset=True,  # jobs leave the checks out
    )(_graph)


def _graph(raw: Any) -> dict[str, Any]:
    reported = check_day(plan(raw).map(consolidate_shards).collect())
    made = {name: getattr(reported, name) for name in check_day.output_dict}
    return {"heartbeats": made.pop("result"), **made}


@dg.config_mapping
def _config(config: Consolidation) -> Mapping[str, Any]:
    return {"plan": {"config": {"rebuild": config.rebuild}}}


@dg.op(
    ins={"raw": dg.In(dg.Nothing)},
    out=dg.DynamicOut(Group),
    retry_policy=outcomes.RETRIES,
    description="Deals the shards out into groups.",
)
def plan(
    config: Consolidation, installation: dg.ResourceParam[Installation]
) -> Iterator[dg.DynamicOutput[Group]]:
    """One output for each group of shards."""
    with outcomes.failures():
        lake = installation.lake()
    for shards in dealt(lake.shards):
        group = Group(shards, config.rebuild)
        yield dg.DynamicOutput(group, mapping_key=group.name)


def dealt(shards: int) -> list[tuple[int, ...]]:
    """Groups of neighbours that differ by one shard at most."""
    steps = max(1, min(MOST_STEPS, shards // SHARDS_A_STEP))
    bounds = [shards * step // steps for step in range(steps + 1)]
    return [tuple(range(*pair)) for pair in pairwise(bounds)]


@dg.op(
    out=dg.Out(Consolidated),
    retry_policy=outcomes.RETRIES,
    description="Merges what is pending of a few shards into their files, and checks these.",
)
def consolidate_shards(
    context: dg.OpExecutionContext, group: Group, installation: dg.ResourceParam[Installation]
) -> dg.Output[Consolidated]:
    """Consolidate a group; a shard that fails doesn't keep the others from being published."""
    day, settings = days.parse_day(context.partition_key), installation.settings
    with outcomes.failures():
        lake = installation.lake()
        with coordinated(lake, settings, start_server=False) as known:
            done = known.consolidate(
                lake,
                day,
                settings,
                rebuild=group.rebuild,
                shards=group.shards,
                progress=outcomes.progress(context.log),
            )
        alarms.tell([_damage(day, said) for said in done.set_aside], settings)
        passing = [one for one in done.failed if one.kind in _MAY_PASS]
        if passing and context.retry_number < outcomes.RETRIES.max_retries:
            raise passing[0].error()
    context.log.info(outcomes.consolidated(done))
    return dg.Output(done, metadata=metadata.of_consolidated(done))


@dg.op(
    out=outcomes.step_outs(HEARTBEATS, _CHECKS),
    retry_policy=outcomes.RETRIES,
    description="Judges the day: evaluates its checks, and reports what was done or fails.",
)
def check_day(
    context: dg.OpExecutionContext,
    groups: list[Consolidated],
    installation: dg.ResourceParam[Installation],
) -> Iterator[dg.Output[None] | dg.AssetCheckEvaluation]:
    """The materialization, unless a shard failed or there is no data; each check, once."""
    day = days.parse_day(context.partition_key)
    done = together(day, groups)
    with outcomes.failures():
        lake = installation.lake()
        if done.rows and not done.failed:
            yield dg.Output(None, "result", metadata=metadata.of_heartbeats(lake, done))
        yield from outcomes.evaluations(context, HEARTBEATS, judged(done))
        faults = known_faults.faults(lake, [day])
        if done.rows or done.failed or faults:
            yield outcomes.completeness(context.instance, context.partition_key, faults)
        else:
            context.log.warning(f"the lake holds nothing of {day}: nothing was materialized")
    if done.failed:
        said = [outcomes.line(one.error()) for one in done.failed]
        raise dg.Failure(outcomes.summary(said), allow_retries=False)


def judged(done: Consolidated) -> list[Figure]:
    """Figures that hold for the whole day.

    Where a shard failed before its file was checked, these are only those that failed.
    """
    unknown = any(not one.figures for one in done.failed)
    return [one for one in done.figures if not (unknown and one.passed)]


def together(day: dt.date, groups: Sequence[Consolidated]) -> Consolidated:
    """The day's result, joined from those of groups of its shards."""
    own = ("written", "shards_written", "pending", "bytes")
    return Consolidated.of(
        sum(groups, Counts()),
        day=day,
        figures=checks.summed(list(chain.from_iterable(group.figures for group in groups))),
        set_aside=list(chain.from_iterable(group.set_aside for group in groups)),
        failed=list(chain.from_iterable(group.failed for group in groups)),
        **{name: sum(getattr(group, name) for group in groups) for name in own},
    )


def _damage(day: dt.date, said: str) -> alarms.Alarm:
    return alarms.alarm("damaged_file", said, now_ms(), day=day.isoformat())
