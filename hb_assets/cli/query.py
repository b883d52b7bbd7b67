"""`hb query`: heart rate of one user over time."""

from __future__ import annotations

import datetime as dt
from typing import Annotated

import typer

from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, existing_lake, settings_of, text_of
from hb_assets.core import days, record
from hb_assets.lake.query import series
from hb_assets.lake.query.aggregate import GRANULARITIES
from hb_assets.lake.query.series import Query


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
    query = Query(text_of(user, "USER"), first, last, device, granularity)
    lake = existing_lake(settings)
    page = series.answer(lake, query, settings)
    points = page.points.to_pylist()
    for fault in page.warnings:
        output.complain(fault.message)
    if page.ended_by is not None:
        since = _iso(days.EPOCH + dt.timedelta(milliseconds=page.next_ms or 0))
        output.complain(f"from {since} on nothing can be answered: {output.line(page.ended_by)}")
    elif not points:
        whose = "this user" if device is None else "this user and device"
        before, after = series.nearest(lake, query, settings)
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
