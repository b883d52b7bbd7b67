"""`hb quarantine`: what couldn't be used, why, and putting it back.

Belongs here: the commands and putting back (re-validation under today's settings, append, mark).
Doesn't belong here: the files (`lake.quarantine`).
"""

from __future__ import annotations

import datetime as dt
import time
from typing import Annotated

import typer

from hb_assets import days, record
from hb_assets.buffer import connection, durability, server
from hb_assets.buffer.producer import Producer
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, settings_of
from hb_assets.errors import HbError
from hb_assets.lake import quarantine
from hb_assets.lake.quarantine import Quarantined
from hb_assets.lake.store import Lake
from hb_assets.record import Refusal
from hb_assets.settings import Settings

group = typer.Typer(no_args_is_help=True, help="Records that couldn't be used.")
app.add_typer(group, name="quarantine")

_CHUNK = 1000

Reason = Annotated[str | None, typer.Option(help="Only records with this reason code.")]


@group.command("list")
def list_records(
    context: typer.Context,
    reason: Reason = None,
    limit: Annotated[int, typer.Option(min=1, help="Most records to list.")] = 50,
    as_json: AsJson = False,
) -> None:
    """Count records by reason and list the first ones (without their content)."""
    lake = Lake.open(settings_of(context))
    found = list(quarantine.records(lake, reason=reason))
    counts: dict[str, int] = {}
    for one in found:
        counts[one.reason] = counts.get(one.reason, 0) + 1
    shown = found[:limit]
    if as_json:
        records = [{"id": one.id, **_described(one)} for one in shown]
        output.print_json({"count": len(found), "reasons": counts, "records": records})
        return
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):
        output.results.print(f"{count:,} {name}")
    table = output.table(f"{len(shown):,} of {len(found):,}", "id", "reason", "arrived", "put back")
    for one in shown:
        arrived = _iso(one.arrival.arrival_ms)
        table.add_row(one.id, one.reason, arrived, "yes" if one.released else "no")
    output.results.print(table)


@group.command()
def show(
    context: typer.Context,
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids as `list` prints them.")],
    as_json: AsJson = False,
) -> None:
    """Show records with their raw bytes. These may hold health data: mind who looks on."""
    lake = Lake.open(settings_of(context))
    found = _chosen(lake, ids, None)
    if as_json:
        output.print_json(
            [
                {"id": one.id, **_described(one), "raw": one.raw.decode(errors="backslashreplace")}
                for one in found
            ]
        )
        return
    for one in found:
        output.results.print(f"{one.id}  {one.reason}: {one.message}", markup=False)
        output.results.print(repr(one.raw), markup=False, soft_wrap=True)


@group.command()
def replay(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...")] = None,
    reason: Reason = None,
    every: Annotated[bool, typer.Option("--all", help="Everything in quarantine.")] = False,
    as_json: AsJson = False,
) -> None:
    """Put records back into the buffer that are valid by now (HB_START_DATE was changed, say).

    A record that is put back arrives anew: it supersedes what arrived meanwhile for the same user,
    device and timestamp. What is still invalid stays where it is. To repair content, export it
    with `show --json`, mend it and `hb import` it.
    """
    settings = settings_of(context)
    if sum((bool(ids), reason is not None, every)) != 1:
        raise typer.BadParameter("name ids, or --reason, or --all")
    lake = Lake.open(settings)
    chosen = [one for one in _chosen(lake, ids, reason) if not one.released]
    with server.borrowed(settings):
        client = connection.connect(settings)
        connection.ping(client)
        durability.require(client, settings)
        released, still = _put_back(lake, Producer(client, settings), chosen, settings)
    if as_json:
        output.print_json({"replayed": released, "still_refused": still})
    else:
        output.results.print(f"put back {released:,} records, {still:,} are still refused")
    if still and not released:
        raise typer.Exit(FAILED)


def _put_back(
    lake: Lake, producer: Producer, chosen: list[Quarantined], settings: Settings
) -> tuple[int, int]:
    """Put back what is valid by now, a chunk at a time, so that each fits into the buffer."""
    back = still = 0
    for first in range(0, len(chosen), _CHUNK):
        stored, refused = _put_back_chunk(lake, producer, chosen[first : first + _CHUNK], settings)
        back, still = back + stored, still + refused
    return back, still


def _put_back_chunk(
    lake: Lake, producer: Producer, chosen: list[Quarantined], settings: Settings
) -> tuple[int, int]:
    """Append first, mark after: a crash in between appends twice, which dedup removes."""
    now_ms = time.time_ns() // 1_000_000
    by_shard: dict[int, list[tuple[bytes, Quarantined]]] = {}
    still = 0
    for one in chosen:
        result, _ = record.parse(one.raw, now_ms, settings.time_bounds)
        if isinstance(result, Refusal):
            still += 1
            continue
        shard = record.shard_of(result.user_id, settings.shards)
        by_shard.setdefault(shard, []).append((record.encode(result), one))
    outcomes = producer.append(
        {shard: [line for line, _ in lines] for shard, lines in by_shard.items()}
    )
    stored = [
        one for shard, lines in by_shard.items() if outcomes[shard] is None for _, one in lines
    ]
    quarantine.release(lake, stored)
    for outcome in outcomes.values():
        if outcome is not None:
            raise outcome
    return len(stored), still


def _chosen(lake: Lake, ids: list[str] | None, reason: str | None) -> list[Quarantined]:
    found = list(quarantine.records(lake, reason=reason))
    if ids is None:
        return found
    by_id = {one.id: one for one in found}
    missing = [name for name in ids if name not in by_id]
    if missing:
        raise HbError(f"not in quarantine: {', '.join(missing)}; see `hb quarantine list`")
    return [by_id[name] for name in ids]


def _described(one: Quarantined) -> dict[str, object]:
    return {
        "reason": one.reason,
        "message": one.message,
        "arrived": _iso(one.arrival.arrival_ms),
        "attempts": one.attempts,
        "released": one.released,
    }


def _iso(epoch_ms: int) -> str:
    moment = days.EPOCH + dt.timedelta(milliseconds=min(epoch_ms, days.LAST_MS))
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
