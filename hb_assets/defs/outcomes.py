"""Translates what plain functions return, report or raise into Dagster's terms.

Figures become check results, errors become failures with one line, progress becomes log lines.
Metadata of assets is in `metadata`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import dagster as dg
from dagster._core.definitions.asset_checks.asset_check_evaluation import (
    AssetCheckEvaluationTargetMaterializationData,  # no public name
)

from hb_assets.core.errors import BufferUnavailableError, FencedError, HbError
from hb_assets.defs.assets import HEARTBEATS
from hb_assets.lake.compaction.consolidation import Consolidated
from hb_assets.lake.integrity import checks
from hb_assets.lake.integrity.checks import Figure
from hb_assets.lake.integrity.known_faults import Fault
from hb_assets.pipeline.drain import Drained

COMPLETE = "complete"
"""The check that stays red for a day until what is known to be wrong with it is resolved."""
DESCRIPTIONS = {
    **checks.DESCRIPTIONS,
    COMPLETE: "nothing of the day is known to be damaged or lost; red until that is resolved "
    "(`hb damaged list`), whatever later runs do",
}
_SHOWN = 3

RETRIES = dg.RetryPolicy(max_retries=2, delay=2)
"""Retries of errors in `failures` that may pass by themselves; others fail the run at once."""


def check_specs(
    asset: dg.AssetKey, names: Sequence[str], daily: dg.PartitionsDefinition[str]
) -> list[dg.AssetCheckSpec]:
    """Checks of an asset, evaluated for each partition by the step that makes it.

    All but `complete` say of a file whether it may be published: the step fails with them, and what
    it feeds isn't made.
    """
    with warnings.catch_warnings():
        # Without partitions the latest day's result would stand for all days; what may change in a
        # later version of Dagster shows in our tests.
        text = "Specifying a partitions_def on an AssetCheckSpec"
        warnings.filterwarnings("ignore", text, dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(
                name,
                asset=asset,
                partitions_def=daily,
                blocking=name != COMPLETE,
                description=DESCRIPTIONS[name],
            )
            for name in names
        ]


def step_outs(asset: dg.AssetKey, names: Sequence[str]) -> dict[str, dg.Out]:
    """Outputs of the step that makes an asset and evaluates these checks; each is optional.

    It evaluates them by events, and not by these outputs: runs of our jobs leave the checks out,
    so that none is planned. One that was planned reads as failed when its run died before it.
    """
    identifier = asset.to_python_identifier()
    outs = {"result": "", **{f"{identifier}_{name}": name for name in names}}
    return {name: dg.Out(dg.Nothing, is_required=False) for name in outs}


def evaluations(
    context: dg.OpExecutionContext, asset: dg.AssetKey, figures: Sequence[Figure]
) -> Iterator[dg.AssetCheckEvaluation]:
    """One evaluation of each check for the run's day: how many rows are bad, and in words why."""
    for figure in figures:
        expected, found = figure.words()
        yield evaluation(
            context.instance,
            dg.AssetCheckKey(asset, figure.name),
            context.partition_key,
            f"expected: {expected}; found: {found}"
            + (f" ({figure.message})" if figure.message else ""),
            passed=figure.passed,
            metadata={**figure.figures, "expected": expected, "found": found},
        )


def completeness(
    instance: dg.DagsterInstance, day: str, faults: Sequence[Fault]
) -> dg.AssetCheckEvaluation:
    """The check `complete` of a day: what is known to be wrong with it (`known_faults`)."""
    rows = [fault.rows for fault in faults]
    return evaluation(
        instance,
        dg.AssetCheckKey(HEARTBEATS, COMPLETE),
        day,
        summary([fault.message for fault in faults]) or "nothing of the day is damaged or lost",
        passed=not faults,
        metadata={
            "bad_rows": "unknown" if None in rows else sum(filter(None, rows)),
            "expected": "every heartbeat of the day can be read, and its counts add up",
            "found": f"faults: {len(faults):,}" if faults else "so it is",
        },
    )


def evaluation(
    instance: dg.DagsterInstance,
    check: dg.AssetCheckKey,
    day: str,
    description: str,
    *,
    passed: bool,
    metadata: Mapping[str, str | int],
) -> dg.AssetCheckEvaluation:
    """An evaluation of the day's latest materialization: of an earlier one it wouldn't count."""
    records = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=check.asset_key, asset_partitions=[day]), limit=1
    ).records
    target = None
    if records:
        latest = records[0]
        target = AssetCheckEvaluationTargetMaterializationData(
            storage_id=latest.storage_id,
            run_id=latest.event_log_entry.run_id,
            timestamp=latest.timestamp,
        )
    return dg.AssetCheckEvaluation(
        asset_key=check.asset_key,
        check_name=check.name,
        passed=passed,
        metadata=metadata,
        target_materialization_data=target,
        description=description,
        partition=day,
    )


def summary(lines: Sequence[str]) -> str:
    """Join a few lines into one, with the number of those left out."""
    more = f"; and {len(lines) - _SHOWN:,} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more


@contextmanager
def failures() -> Iterator[None]:
    """Errors that a user can act on end the step with their one line.

    Raises:
        dagster.Failure: for any HbError, and for an OSError (a full disk).
    """
    try:
        yield
    except HbError as error:
        again = isinstance(error, BufferUnavailableError | FencedError)
        raise dg.Failure(str(error), allow_retries=again) from None
    except OSError as error:
        raise dg.Failure(line(error), allow_retries=True) from None


def line(error: HbError | OSError) -> str:
    """One line for an error that a user can act on."""
    if isinstance(error, HbError):
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    what = error.strerror or type(error).__name__
    return f"{where}{what}: is there space, and may we write there?"


def progress(log: dg.DagsterLogManager) -> Callable[[int, int], None]:
    """Reports shards done to a run's log, a dozen lines at most."""

    def report(done: int, total: int) -> None:
        if done == total or done % max(1, total // 8) == 0:
            log.info(f"{done} of {total} shards done")

    return report


def consolidated(done: Consolidated) -> str:
    """One line about a consolidation."""
    return (
        f"took in {done.pending:,} fragments, wrote {done.written:,} rows into "
        f"{done.shards_written:,} files; of {done.rows:,} rows so far {done.unique:,} are unique"
    )


def drained(total: Drained) -> str:
    """One line about a drain."""
    return (
        f"drained {total.rows:,} rows of {total.entries:,} entries into {total.fragments:,} "
        f"fragments, {total.quarantined:,} into quarantine, in {total.seconds:.1f} s"
    )
