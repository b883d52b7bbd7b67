"""`hb prune`: delete raw fragments that are consolidated and old, and leftovers of crashes."""

from __future__ import annotations

from typing import Annotated

import typer

from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, day_of, existing_lake, settings_of
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.maintenance import maintain


@app.command()
def prune(
    context: typer.Context,
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DAY]...", help="Days like 2025-01-15, UTC; default: all."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Delete raw fragments that are consolidated and older than HB_RAW_KEEP, and leftovers."""
    settings = settings_of(context)
    chosen = [day_of(text) for text in wanted] if wanted else None
    lake = existing_lake(settings)
    with coordinated(lake, settings, start_server=True) as known, output.progress() as progress:
        progress.add_task("prune", total=None)
        done = maintain(lake, settings, known, days=chosen, dry_run=dry_run)
    if as_json:
        output.print_json(done)
    else:
        verb = "would be pruned" if dry_run else "pruned"
        output.results.print(
            f"{done.fragments:,} fragments ({done.bytes:,} bytes) {verb}, {done.renewed:,} "
            f"consolidated files renewed, {done.leftovers:,} leftovers of crashes removed",
            soft_wrap=True,
        )
    for fault in done.faults:
        output.complain(fault)
    if done.faults:
        raise typer.Exit(FAILED)
