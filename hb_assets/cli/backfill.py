"""`hb backfill`: a Dagster backfill over a range of days, launched and followed."""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from hb_assets.cli import output, state
from hb_assets.cli.app import FAILED, AsJson, app, existing_lake, settings_of
from hb_assets.cli.control_room import ControlRoom, Run
from hb_assets.cli.interrupts import Interrupts
from hb_assets.days import parse_day
from hb_assets.errors import HbError

_POLL_SECONDS = 0.5


@app.command()
def backfill(
    context: typer.Context,
    first: Annotated[str, typer.Argument(help="First day, like 2025-01-15 (UTC).")],
    last: Annotated[str, typer.Argument(help="Last day, it is included.")],
    empty: Annotated[
        bool, typer.Option("--empty", help="Days of which the lake holds nothing, too.")
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Start from raw fragments, not the published files.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Consolidate every day from FIRST to LAST that the lake holds, by Dagster, and wait for it."""
    from hb_assets.lake import inventory

    settings = settings_of(context)
    days = _range(first, last)
    if not empty:
        held = set(inventory.days(existing_lake(settings)))
        days = [day for day in days if day in held]
    if not days:
        raise HbError(f"the lake {settings.lake_dir} holds nothing from {first} to {last}")
    up = state.running(settings)
    if up is None:
        raise HbError(
            f"no `hb up` runs on {settings.home_dir}: start it, or use `hb consolidate` without it"
        )
    with ControlRoom(up.dagster) as room, Interrupts() as interrupts:

        def look() -> tuple[list[Run], bool]:
            over = room.backfill_over(backfill_id)
            return room.backfill_runs(backfill_id), over

        backfill_id = ""
        try:
            with interrupts.held_back():  # once it is launched, its id is known
                backfill_id = room.backfill(days, rebuild=rebuild)
            runs = follow(f"backfill of {len(days)} days", look, expected=len(days))
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


def follow(title: str, look: Callable[[], tuple[list[Run], bool]], *, expected: int) -> list[Run]:
    """Show a progress bar until all runs have ended, well or not; those runs.

    Args:
        title: what the bar is called.
        look: the runs so far, and whether no more will come.
        expected: how many there will be.
    """
    with output.progress() as progress:
        task = progress.add_task(title, total=expected)
        while True:
            runs, over = look()
            progress.update(task, completed=sum(run.ended for run in runs))
            if over and all(run.ended for run in runs):
                return runs
            time.sleep(_POLL_SECONDS)


def _range(first: str, last: str) -> Sequence[dt.date]:
    try:
        start, end = parse_day(first), parse_day(last)
    except ValueError:
        raise typer.BadParameter("days are written like 2025-01-15") from None
    if end < start:
        raise typer.BadParameter(f"the last day {end} lies before the first one {start}")
    return [start + dt.timedelta(days=n) for n in range((end - start).days + 1)]
