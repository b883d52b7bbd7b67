"""`hb consolidate`, `hb query` and `hb audit`: from fragments to checked days, and what is in them.

Belongs here: options, progress and results of these commands. Doesn't belong here: the work itself
(`lake`, `audit`).
"""

from __future__ import annotations

import datetime as dt
import time
from typing import Annotated

import typer

from hb_assets.buffer import connection, server
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, day_of, existing_lake, settings_of, text_of
from hb_assets.core import days, record
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, minutes
from hb_assets.lake.compaction.consolidation import Consolidated
from hb_assets.lake.query import query
from hb_assets.lake.query.aggregate import GRANULARITIES
from hb_assets.lake.query.query import Question
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import Audit, audit
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


@app.command("query")
def query_user(
    context: typer.Context,
    user: Annotated[str, typer.Argument(help="user_id")],
    start: Annotated[
        str, typer.Option(help="First instant, ISO 8601, or a day; without offset UTC.")
    ],
    end: Annotated[str, typer.Option(help="First instant after the range.")],
    device: Annotated[
        str | None, typer.Option(help="Only this device; default: by device priority.")
    ] = None,
    granularity: Annotated[
        str, typer.Option(help=f"Span of a point: {', '.join(GRANULARITIES)}.")
    ] = "1m",
    as_json: AsJson = False,
) -> None:
    """Heart rate of one user over time, out of everything that is durable in the lake."""
    settings = settings_of(context)
    first, last = _instant(start, "--start"), _instant(end, "--end")
    if first >= last:
        raise typer.BadParameter("must lie after --start", param_hint="--end")
    if granularity not in GRANULARITIES:
        raise typer.BadParameter(
            f"must be one of {', '.join(GRANULARITIES)}", param_hint="--granularity"
        )
    if device is not None:
        text_of(device, "--device")
    question = Question(text_of(user, "USER"), first, last, device, granularity)
    lake = existing_lake(settings)
    page = query.answer(lake, question, settings)
    points = page.points.to_pylist()
    for fault in page.warnings:
        output.complain(fault.message)
    if page.ended_by is not None:
        since = _iso(days.EPOCH + dt.timedelta(milliseconds=page.next_ms or 0))
        output.complain(f"from {since} on nothing can be answered: {output.line(page.ended_by)}")
    elif not points:
        whose = "this user" if device is None else "this user and device"
        before, after = query.nearest(lake, question, settings)
        told = [f"the last one before it is at {_iso(before)}"] if before else []
        told += [f"the first one after it is at {_iso(after)}"] if after else []
        output.note(
            f"no reading of {whose} in this range: "
            + ("; ".join(told) or "nor any other in the lake; `hb drain` brings what is buffered")
        )
    if as_json:
        output.print_json(
            {
                "user_id": user,
                "data": [
                    {
                        "timestamp": _iso(point["timestamp"]),
                        "heart_rate": point["heart_rate"],
                        "device_id": point["device_id"],
                    }
                    for point in points
                ],
                "count": len(points),
            }
            | ({"warnings": [one.message for one in page.warnings]} if page.warnings else {})
        )
    else:
        columns = f"{granularity} from (UTC)", "bpm", "device"
        table = output.table(f"{len(points):,} points", *columns)
        for point in points:
            table.add_row(_iso(point["timestamp"]), str(point["heart_rate"]), point["device_id"])
        output.results.print(table)
    if page.ended_by is not None:
        raise typer.Exit(FAILED)


def _instant(text: str, option: str) -> int:
    try:
        return (
            days.start_ms(days.parse_day(text)) if len(text) == 10 else record.parse_instant(text)
        )
    except ValueError:
        raise typer.BadParameter(
            f"not a time like 2025-01-15T10:00:00Z: {text!r}", param_hint=option
        ) from None


def _iso(moment: dt.datetime) -> str:
    return moment.isoformat().replace("+00:00", "Z")


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
