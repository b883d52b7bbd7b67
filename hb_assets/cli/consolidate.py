"""`hb consolidate`: deduplicate and sort days into consolidated files, and check them."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, day_of, existing_lake, settings_of
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, minutes
from hb_assets.lake.compaction.consolidation import Consolidated
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.coordination import coordinated


@app.command()
def consolidate(
    context: typer.Context,
    wanted: Annotated[
        list[str] | None, typer.Argument(metavar="[DAY]...", help="Days like 2025-01-15, UTC.")
    ] = None,
    pending: Annotated[
        bool, typer.Option("--pending", help="Every day that has pending fragments.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="Every day of the lake.")] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Start from raw fragments, not the published file.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Deduplicate and sort days into consolidated files, check them, and make their minutes."""
    settings = settings_of(context)
    if sum((bool(wanted), pending, every)) != 1:
        raise typer.BadParameter("name days, or --pending, or --all")
    lake = existing_lake(settings)
    named = [day_of(text) for text in wanted or ()]
    unknown = sorted(set(named) - set(inventory.days(lake)))
    if unknown:
        raise HbError(f"the lake {lake.root} holds nothing of {', '.join(map(str, unknown))}")
    chosen = named or _days(lake, settings, pending_only=pending)
    results: list[Consolidated] = []
    failed: dict[dt.date, str] = {}
    with (
        coordinated(lake, settings, start_server=True) as known,
        output.progress() as progress,
    ):
        task = progress.add_task("consolidate", total=len(chosen))
        for day in chosen:
            progress.update(task, description=f"consolidate {day}")
            why: list[str] = []
            try:
                done = known.consolidate(lake, day, settings, rebuild=rebuild)
                results.append(done)
                why += [output.line(one.error()) for one in done.failed]
                minutes.build(lake, day, settings)
            except (HbError, OSError) as error:
                why.append(output.line(error))
            if why:
                failed[day] = "; ".join(dict.fromkeys(why))
            progress.advance(task)
    if as_json:
        output.print_json(
            {"days": results, "failed": {str(day): why for day, why in failed.items()}}
        )
    else:
        _show_consolidated(results, nothing_pending=not chosen)
    set_aside = [said for one in results for said in one.set_aside]
    for line in [*set_aside, *failed.values()]:
        output.complain(line)
    if failed or set_aside:
        raise typer.Exit(FAILED)


def _days(lake: Lake, settings: Settings, *, pending_only: bool) -> list[dt.date]:
    found = inventory.days(lake)
    if not pending_only:
        return found

    def is_due(day: dt.date) -> bool:
        state = inventory.day_state(lake, day, settings)
        # consolidating a day with faults says what is wrong, and the other days go on
        return bool(state.faults or state.pending_fragments) or not state.minutes_current

    return [day for day in found if is_due(day)]


def _show_consolidated(results: list[Consolidated], *, nothing_pending: bool) -> None:
    if nothing_pending:
        output.results.print("nothing is pending")
    if not results:
        return
    table = output.table(
        "Consolidated", "day", "rows", "unique", "repeats", "corrections", "files written", "checks"
    )
    for one in results:
        passed = sum(figure.passed for figure in one.figures)
        table.add_row(
            str(one.day),
            f"{one.rows:,}",
            f"{one.unique:,}",
            f"{one.repeats:,}",
            f"{one.corrections:,}",
            f"{one.shards_written:,}",
            f"{passed} of {len(one.figures)} passed",
        )
    table.add_section()
    table.add_row(
        f"{len(results)} days",
        f"{sum(one.rows for one in results):,}",
        f"{sum(one.unique for one in results):,}",
        f"{sum(one.repeats for one in results):,}",
        f"{sum(one.corrections for one in results):,}",
        f"{sum(one.shards_written for one in results):,}",
        "",
    )
    output.results.print(table)
