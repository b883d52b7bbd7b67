"""`hb quarantine`: list records that can't be used, show why, and put them back.

Putting back means validation under today's settings, an append, and a mark in the lake
(`lake.files.quarantine`).
"""

from __future__ import annotations

import codecs
import datetime as dt
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from hb_assets.buffer import connection, durability, server
from hb_assets.buffer.producer import Producer
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, day_of, existing_lake, settings_of
from hb_assets.core import days, record
from hb_assets.core.errors import DamagedFileError, HbError
from hb_assets.core.record import Arrival, Refusal
from hb_assets.core.settings import Settings
from hb_assets.lake.files import quarantine, tombstones
from hb_assets.lake.files.quarantine import Choice, Quarantined, parse_id
from hb_assets.lake.storage.store import Lake

group = typer.Typer(no_args_is_help=True, help="Records that couldn't be used.")
app.add_typer(group, name="quarantine")

_CHUNK = 1000
_SHOWN = 20
_PAGE = 50


Reason = Annotated[str | None, typer.Option(help="Only records with this reason code.")]
Day = Annotated[
    str | None, typer.Option(metavar="YYYY-MM-DD", help="Only records that arrived on this day.")
]
After = Annotated[
    str | None, typer.Option(metavar="ID", help="Only records behind this one: the next page.")
]


@group.command("list")
def list_records(
    context: typer.Context,
    reason: Reason = None,
    day: Day = None,
    after: After = None,
    limit: Annotated[int, typer.Option(min=1, help="Most records to list.")] = _PAGE,
    as_json: AsJson = False,
) -> None:
    """Count records by reason and list the first ones (without their content)."""
    settings = settings_of(context)
    lake = existing_lake(settings)
    damage = _Damage()
    choice = _choice(reason, day, None)
    counted = quarantine.summary(lake, settings, choice, on_damage=damage)
    page = replace(choice, after=_arrival(after))
    shown = list(quarantine.records(lake, settings, page, limit=limit, on_damage=damage))
    count = counted.reasons.total()
    if as_json:
        records = [{"id": one.id, **_described(one)} for one in shown]
        output.print_json({"count": count, "reasons": counted.reasons, "records": records})
    else:
        for name, found in counted.reasons.most_common():
            output.results.print(f"{found:,} {name}")
        title = f"{len(shown):,} of {count:,}"
        table = output.table(title, "id", "reason", "arrived", "put back")
        for one in shown:
            arrived = _iso(one.arrival.arrival_ms)
            table.add_row(one.id, one.reason, arrived, "yes" if one.released else "no")
        output.results.print(table)
        if len(shown) == limit:
            output.results.print(f"the next ones: --after {shown[-1].id}", markup=False)
    damage.end()


@group.command()
def show(
    context: typer.Context,
    ids: Annotated[
        list[str] | None, typer.Argument(metavar="[ID]...", help="Ids as `list` prints them.")
    ] = None,
    reason: Reason = None,
    day: Day = None,
    after: After = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help=f"Most records to show; {_PAGE}, with --raw all.")
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Id and bytes as NDJSON, to mend and `replay --from`.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show records with their raw bytes. These may hold health data: mind who looks on.

    With --raw each line is {"id": ..., "raw": ...}; `raw_base64` instead where it isn't UTF-8.
    """
    settings = settings_of(context)
    lake = existing_lake(settings)
    damage = _Damage()
    if ids:
        found: Iterable[Quarantined] = _named(lake, settings, ids, damage)
    else:
        choice = _choice(reason, day, after)
        most = limit or (None if raw else _PAGE)
        found = quarantine.records(lake, settings, choice, limit=most, on_damage=damage)
    if raw:
        for one in found:
            typer.echo(_exported(one))
    elif as_json:
        output.print_json(
            [
                {"id": one.id, **_described(one), "raw": one.raw.decode(errors="backslashreplace")}
                for one in found
            ]
        )
    else:
        for one in found:
            output.results.print(f"{one.id}  {one.reason}: {one.message}", markup=False)
            output.results.print(repr(one.raw), markup=False, soft_wrap=True)
    damage.end()


@group.command()
def replay(
    context: typer.Context,
    ids: Annotated[list[str] | None, typer.Argument(metavar="[ID]...")] = None,
    reason: Reason = None,
    day: Day = None,
    every: Annotated[bool, typer.Option("--all", help="Everything in quarantine.")] = False,
    repaired: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Mended records, as `show --raw` writes them."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put records back into the buffer that are valid by now (HB_START_DATE was changed, say).

    A record that is put back arrives anew: it supersedes what arrived meanwhile for the same user,
    device and timestamp. What is still invalid stays where it is. To repair content:
    `show --raw > FILE`, mend `raw` in it, `replay --from FILE`; doing that twice changes nothing.
    """
    settings = settings_of(context)
    if sum((bool(ids), bool(reason or day), every, repaired is not None)) != 1:
        raise typer.BadParameter("name ids, or --reason or --day, or --all, or --from")
    lake = existing_lake(settings)
    damage = _Damage()
    done = _Outcome()
    if repaired is not None:
        chunks = _repaired(lake, settings, repaired, damage, done)
    else:
        chunks = _chunks(
            iter(_named(lake, settings, ids, damage))
            if ids
            else quarantine.records(
                lake, settings, replace(_choice(reason, day, None), kept=True), on_damage=damage
            )
        )
    with server.borrowed(settings):
        client = connection.connect(settings)
        connection.ping(client)
        durability.require(client, settings)
        producer = Producer(client, settings)
        producer.clock.ask(client)
        for chunk in chunks:
            _put_back(lake, producer, [one for one in chunk if not one.released], settings, done)
    result: dict[str, object] = {"replayed": done.replayed, "still_refused": done.refused}
    if repaired is not None:
        result |= {"already_back": done.already, "refused_lines": done.first}
    if as_json:
        output.print_json(result)
    else:
        for refused in done.first if repaired is not None else ():
            output.note("; ".join(f"{name} {text}" for name, text in refused.items()))
        output.results.print(
            f"put back {done.replayed:,} records, {done.refused:,} are still refused"
            + (f", {done.already:,} were back already" if done.already else "")
        )
    damage.end()
    if done.refused and (repaired is not None or not done.replayed):
        raise typer.Exit(FAILED)


@dataclass(slots=True)
class _Outcome:
    """Counts of records by outcome, and the `first` refused ones, without their content."""

    replayed: int = 0
    refused: int = 0
    already: int = 0
    first: list[dict[str, str]] = field(default_factory=list)

    def refuse(self, reason: str, **where: str) -> None:
        self.refused += 1
        if len(self.first) < _SHOWN:
            self.first.append({**where, "reason": reason})


class _Damage:
    """Reports files that can't be read; the others go on, and the exit code is FAILED."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def __call__(self, error: DamagedFileError) -> None:
        if str(error) not in self._seen:
            output.complain(str(error))
        self._seen.add(str(error))

    def end(self) -> None:
        if self._seen:
            raise typer.Exit(FAILED)


def _chunks(found: Iterator[Quarantined]) -> Iterator[list[Quarantined]]:
    """Split records into chunks that fit into the buffer."""
    while chunk := list(islice(found, _CHUNK)):
        yield chunk


def _put_back(
    lake: Lake,
    producer: Producer,
    chosen: list[Quarantined],
    settings: Settings,
    done: _Outcome,
) -> None:
    """Append first, mark after: a crash in between appends twice, which dedup removes."""
    now_ms = producer.clock.now_ms()
    by_shard: dict[int, list[tuple[bytes, Quarantined]]] = {}
    read = [(one, record.parse(one.raw, now_ms, settings.time_bounds)[0]) for one in chosen]
    users = {result.user_id for _, result in read if not isinstance(result, Refusal)}
    forgotten = tombstones.cutoffs(lake, users)
    for one, result in read:
        if isinstance(result, Refusal):
            done.refuse(f"{result.reason}: {result.message}", id=one.id)
            continue
        at = one.arrival
        cutoff = forgotten.get(result.user_id, {}).get(at.arrival_shard, tombstones.BEFORE_ALL)
        if (at.arrival_ms, at.arrival_seq) <= cutoff:
            done.refuse("its user was forgotten; `hb forget` is to be run again", id=one.id)
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
    done.replayed += len(stored)
    for outcome in outcomes.values():
        if outcome is not None:
            raise outcome


class _Repaired(msgspec.Struct, frozen=True):
    """One line of a file for `replay --from`; either `raw` or `raw_base64` holds the record."""

    id: str
    raw: str | None = None
    raw_base64: bytes | None = None


def _exported(one: Quarantined) -> str:
    try:
        line = _Repaired(one.id, raw=one.raw.decode())
    except UnicodeDecodeError:
        line = _Repaired(one.id, raw_base64=one.raw)
    fields = {
        name: value for name, value in msgspec.structs.asdict(line).items() if value is not None
    }
    return msgspec.json.encode(fields).decode()


def _repaired(
    lake: Lake, settings: Settings, path: Path, damage: _Damage, done: _Outcome
) -> Iterator[list[Quarantined]]:
    """Records in quarantine with the bytes that a file has for them, a chunk at a time."""
    with path.open("rb") as file:
        numbered = ((n, line) for n, line in enumerate(file, 1) if line.strip())
        while lines := list(islice(numbered, _CHUNK)):
            wanted: dict[Arrival, tuple[int, bytes]] = {}
            for number, line in lines:
                try:
                    # an editor may have put a byte order mark before the first one
                    read = msgspec.json.decode(line.removeprefix(codecs.BOM_UTF8), type=_Repaired)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    done.refuse("not a line as `show --raw` writes it", line=str(number))
                    continue
                raw = read.raw.encode() if read.raw is not None else read.raw_base64
                arrival = parse_id(read.id)
                if arrival is None or raw is None:
                    done.refuse("not a line as `show --raw` writes it", line=str(number))
                else:
                    wanted[arrival] = number, raw
            choice = Choice(ids=list(wanted))
            found = list(quarantine.records(lake, settings, choice, on_damage=damage))
            for arrival in wanted.keys() - {one.arrival for one in found}:
                done.refuse("not in quarantine", line=str(wanted[arrival][0]))
            done.already += sum(one.released for one in found)
            yield [replace(one, raw=wanted[one.arrival][1]) for one in found]


def _named(lake: Lake, settings: Settings, ids: list[str], damage: _Damage) -> list[Quarantined]:
    """The records with these ids, in this order, each once."""
    arrivals = [parse_id(name) for name in ids]
    choice = Choice(ids=[one for one in arrivals if one is not None])
    found = {
        one.arrival: one for one in quarantine.records(lake, settings, choice, on_damage=damage)
    }
    missing = [name for name, at in zip(ids, arrivals, strict=True) if at not in found]
    if missing:
        raise HbError(f"not in quarantine: {', '.join(missing)}; see `hb quarantine list`")
    return [found[at] for at in dict.fromkeys(arrivals) if at is not None]


def _choice(reason: str | None, day: str | None, after: str | None) -> Choice:
    date = None if day is None else day_of(day, "--day")
    return Choice(reason=reason, day=date, after=_arrival(after))


def _arrival(text: str | None) -> Arrival | None:
    found = None if text is None else parse_id(text)
    if text is not None and found is None:
        raise typer.BadParameter("not an id as `list` prints them", param_hint="--after")
    return found


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
