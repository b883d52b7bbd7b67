"""`hb audit`: checks that every heartbeat that was appended lies in exactly one place."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from hb_assets.buffer import connection, server
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, day_of, existing_lake, settings_of
from hb_assets.pipeline.audit import Audit, audit


@app.command("audit")
def audit_all(
    context: typer.Context,
    wanted: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DAY]...", help="With --deep: verify the files of these days."),
    ] = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Verify every file, bit for bit, and count keys from raw."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Reconcile the buffer and every day of the lake; exit code 1 when it doesn't add up."""
    settings = settings_of(context)
    if wanted and not deep:
        raise typer.BadParameter("days are named with --deep: without it all days are counted")
    named = {day_of(text) for text in wanted or ()}
    lake = existing_lake(settings)
    began = time.monotonic()
    with server.borrowed(settings):
        client = connection.connect(settings)
        connection.ping(client)
        with output.progress() as progress:
            progress.add_task("audit", total=None)
            verdict = audit(client, lake, settings, deep=named or deep)
    if as_json:
        output.print_json({"adds_up": verdict.adds_up, "audit": verdict})
    else:
        _show_audit(verdict, time.monotonic() - began)
    if not verdict.adds_up:
        raise typer.Exit(FAILED)


_COUNTS = ("rows", "unique", "repeats", "corrections", "erased", "pending")


def _show_audit(verdict: Audit, seconds: float) -> None:
    table = output.table(
        "Every day: rows = unique + repeats + corrections + erased + pending",
        *("day", *_COUNTS, "adds up"),
    )
    for day in verdict.days:
        counts = (f"{getattr(day, name):,}" for name in _COUNTS)
        table.add_row(str(day.day), *counts, "no" if day.faults else "yes")
    table.add_section()
    table.add_row(
        f"{len(verdict.days)} days",
        *(f"{sum(getattr(day, name) for day in verdict.days):,}" for name in _COUNTS),
        "",
    )
    output.results.print(table)
    side = verdict.buffer
    output.results.print(
        f"buffer: {side.appended:,} appended = {side.acknowledged:,} acknowledged + "
        f"{side.buffered:,} buffered"
    )
    output.results.print(
        f"lake: {verdict.rows:,} rows in raw + {verdict.quarantined:,} quarantined"
        + (f" + {verdict.erased:,} erased" if verdict.erased else "")
        + (f" + {verdict.written_off:,} written off" if verdict.written_off else "")
        + f" = {verdict.rows + verdict.quarantined + verdict.erased + verdict.written_off:,}"
        + (f" ({side.in_flight:,} in flight)" if side.in_flight else "")
    )
    for difference in verdict.differences:
        output.complain(difference)
    answer = "it adds up" if verdict.adds_up else "it does NOT add up"
    output.results.print(f"{answer} ({seconds:.1f} s)", style="green" if verdict.adds_up else "red")
