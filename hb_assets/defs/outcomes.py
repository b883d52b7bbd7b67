"""Outcomes: what plain functions return, report or raise, in Dagster's words.

Belongs here: figures as check results, errors as failures with one line, progress as log lines.
Doesn't belong here: metadata of assets (`metadata`), and deciding anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import dagster as dg

from hb_assets.drain import Drained
from hb_assets.errors import BufferUnavailableError, FencedError, HbError
from hb_assets.lake import checks
from hb_assets.lake.checks import Figure
from hb_assets.lake.consolidation import Consolidated

RETRIES = dg.RetryPolicy(max_retries=2, delay=2)
"""For those errors of `failures` that may pass by themselves; the others fail the run at once."""


def check_specs(asset: dg.AssetKey, names: Sequence[str]) -> list[dg.AssetCheckSpec]:
    """Blocking checks of an asset: what it feeds doesn't run when one fails."""
    return [
        dg.AssetCheckSpec(name, asset=asset, blocking=True, description=checks.DESCRIPTIONS[name])
        for name in names
    ]


def check_results(
    asset: dg.AssetKey, names: Sequence[str], figures: Sequence[Figure]
) -> list[dg.AssetCheckResult]:
    """One result for each name; a check that had no file to look at has passed."""
    found = {figure.name: figure for figure in figures}
    return [_check_result(asset, found.get(name) or Figure(name, True)) for name in names]


def _check_result(asset: dg.AssetKey, figure: Figure) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        asset_key=asset,
        check_name=figure.name,
        passed=figure.passed,
        metadata=dict(figure.figures),
        description=figure.message or None,
    )


def failed_checks(
    asset: dg.AssetKey, figures: Sequence[Figure]
) -> Iterator[dg.AssetCheckEvaluation]:
    """Evaluations of checks that failed on a part of the asset, for a step that ends with that.

    The others say nothing of the whole, and nothing is said of them.
    """
    for figure in figures:
        if not figure.passed:
            yield dg.AssetCheckEvaluation(
                asset_key=asset,
                check_name=figure.name,
                passed=False,
                metadata=dict(figure.figures),
                description=figure.message or None,
                blocking=True,
            )


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
