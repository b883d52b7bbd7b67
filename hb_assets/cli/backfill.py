"""`hb backfill`: a Dagster backfill over a range of days, launched and followed."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from hb_assets.cli import output, state
from hb_assets.cli.app import FAILED, AsJson, app, existing_lake, settings_of
from hb_assets.cli.dagster_api import ControlRoom, Run
from hb_assets.cli.interrupts import Interrupts
from hb_assets.core.days import parse_day
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings

if TYPE_CHECKING:
    from hb_assets.lake.storage.store import Lake

_POLL_SECONDS = 0.5
_FAILED = ("damaged", "not_adding_up", "check_failed", "consolidation_failed")
"""Kinds of `lake.integrity.known_faults` faults that another consolidation may resolve."""


@app.command()
def backfill(
    context: typer.Context,
    first: Annotated[str, typer.Argument(help="First day, like 2025-01-15 (UTC).")] = "",
    last: Annotated[str, typer.Argument(help="Last day, it is included.")] = "",
    missing: Annotated[
        bool,
        typer.Option(
            "--missing", help="Only days with data that is pending or whose consolidation failed."
        ),
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Start from raw fragments, not the published files.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Consolidate every day from FIRST to LAST that the lake holds, by Dagster, and wait for it.

    With --missing no range is needed: it takes all days of the lake that have something to do.
    """
    settings = settings_of(context)
    days = _chosen(first, last, settings, missing=missing)
    if not days:
        if as_json:
            output.print_json({"backfill": None, "days": 0, "failed": []})
        else:
            output.results.print("nothing is pending, and no consolidation failed")
        return
    up = state.running(settings)
    if up is None:
        raise HbError(
            f"no `hb up` runs on {settings.home_dir}: start it, or use `hb consolidate` without it"
        )
    with ControlRoom(up.dagster) as room, Interrupts() as interrupts:

        def poll() -> tuple[list[Run], bool]:
            over = room.backfill_over(backfill_id)
            return room.backfill_runs(backfill_id), over

        backfill_id = ""
        try:
            room.wait_for_partition(days[0])
            with interrupts.held_back():  # once it is launched, its id is known
                backfill_id = room.backfill(days, rebuild=rebuild)
            runs = follow(f"backfill of {len(days)} days", poll, expected=len(days))
        except KeyboardInterrupt:
            if backfill_id:
                output.note(
                    f"backfill {backfill_id} goes on without this command; to cancel it, open "
                    f"{up.dagster}/runs/b/{backfill_id} and choose Cancel backfill"
                )
            raise
    succeeded = {run.day for run in runs if run.succeeded}
    failed = [day for day in days if day not in succeeded]
    if as_json:
        output.print_json({"backfill": backfill_id, "days": len(days), "failed": failed})
    else:
        output.results.print(
            f"backfill {backfill_id}: {len(days) - len(failed)} of {len(days)} days succeeded"
        )
        for day in failed:
            output.complain(f"the run of {day} failed; see {up.dagster}/runs")
    if failed:
        raise typer.Exit(FAILED)


def follow(title: str, poll: Callable[[], tuple[list[Run], bool]], *, expected: int) -> list[Run]:
    """Show a progress bar until all runs have ended, well or not; those runs.

    Args:
        title: what the bar is called.
        poll: the runs so far, and whether no more will come.
        expected: how many there will be.
    """
    with output.progress() as progress:
        task = progress.add_task(title, total=expected)
        while True:
            runs, over = poll()
            progress.update(task, completed=sum(run.ended for run in runs))
            if over and all(run.ended for run in runs):
                return runs
            time.sleep(_POLL_SECONDS)


def _chosen(first: str, last: str, settings: Settings, *, missing: bool) -> list[dt.date]:
    """Days of the lake that are to be done. Raises HbError where it holds none of the range."""
    from hb_assets.lake import inventory

    if not missing and not (first and last):
        raise typer.BadParameter("name the first and the last day, or use --missing")
    lake = existing_lake(settings)
    wanted = _range(first, last) if first and last else None
    days = [day for day in inventory.days(lake) if wanted is None or day in wanted]
    if not days:
        where = f" from {first} to {last}" if wanted else ""
        raise HbError(f"the lake {settings.lake_dir} holds nothing{where}")
    return undone(lake, days, settings) if missing else days


def undone(lake: Lake, held: Sequence[dt.date], settings: Settings) -> list[dt.date]:
    """The days among `held` with pending rows, stale minutes, or a failed consolidation."""
    from hb_assets.lake import inventory
    from hb_assets.lake.integrity import known_faults

    failed = {one.day for one in known_faults.faults(lake, held) if one.kind in _FAILED}
    found = []
    for day in held:
        try:
            state = inventory.day_state(lake, day, settings)
        except (HbError, OSError):
            found.append(day)  # its run says what is wrong
            continue
        if day in failed or state.pending_fragments or not state.minutes_current:
            found.append(day)
    return found


def _range(first: str, last: str) -> Sequence[dt.date]:
    try:
        start, end = parse_day(first), parse_day(last)
    except ValueError:
        raise typer.BadParameter("days are written like 2025-01-15") from None
    if end < start:
        raise typer.BadParameter(f"the last day {end} lies before the first one {start}")
    return [start + dt.timedelta(days=n) for n in range((end - start).days + 1)]
