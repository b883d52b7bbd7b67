"""`hb status`: the state of members, buffer and lake, and what raises an alarm.

It works when nothing runs, and starts nothing. What can't be read is an alarm, one line each, and
everything else is shown all the same. Every figure is computed elsewhere.
"""

from __future__ import annotations

import shutil
import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hb_assets.buffer import connection, depth, durability, liveness, server
from hb_assets.buffer.clock import ServerClock
from hb_assets.buffer.depth import ShardDepth
from hb_assets.cli import output, state
from hb_assets.cli.app import FAILED, AsJson, app, settings_of
from hb_assets.cli.members import gateway_url
from hb_assets.cli.state import MemberState, UpState
from hb_assets.core.errors import HbError, SettingsError, SpoolUnavailableError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring
from hb_assets.gateway.http import tls
from hb_assets.lake.storage import layout, permissions, store
from hb_assets.lake.storage.layout import RAW
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import vitals

if TYPE_CHECKING:
    import datetime as dt

    from hb_assets.gateway.spool.queue import Holdings
    from hb_assets.lake.inventory import DayState


@dataclass(slots=True)
class Status:
    """Everything that `hb status` shows.

    `pid` is that of `hb up`, None when it doesn't run; `buffer` is None when Redis can't be asked,
    `spool` when there is none; `last_drain` is epoch seconds; `durability` the mode in force; a
    warning is no alarm.
    """

    pid: int | None = None
    phase: str = "not running"
    gateway: str | None = None
    dagster: str | None = None
    members: tuple[MemberState, ...] = ()
    buffer: list[ShardDepth] | None = None
    spool: Holdings | None = None
    days: list[DayState] = field(default_factory=list)
    days_in_lake: int = 0
    last_drain: float | None = None
    durability: str = ""
    warnings: list[str] = field(default_factory=list)
    alarms: list[str] = field(default_factory=list)


@app.command()
def status(
    context: typer.Context,
    days: Annotated[
        int, typer.Option("--days", min=0, help="Show this many of the latest days; 0: all.")
    ] = 14,
    as_json: AsJson = False,
) -> None:
    """Show members, buffer, lake and alarms. Exit code 1 when there is an alarm."""
    settings = settings_of(context)
    found = gathered(settings, latest=days)
    if as_json:
        output.print_json(found)
    else:
        _show(found, settings)
    if found.alarms:
        raise typer.Exit(FAILED)


def gathered(settings: Settings, *, latest: int = 14) -> Status:
    """Collect the status of everything; of the lake the `latest` days (0: all)."""
    found = Status(durability=settings.durability)
    up = state.running(settings)
    if up is not None:
        _look_at_members(found, up)
    _look_at_buffer(found, settings, up)
    _look_at_spool(found, settings)
    _look_at_keys(found, settings)
    found.warnings += permissions.warnings(settings)
    _look_at_lake(found, settings, latest)
    return found


def _look_at_members(found: Status, up: UpState) -> None:
    found.pid, found.phase = up.pid, up.phase
    found.gateway, found.dagster = up.gateway, up.dagster
    found.members = up.members
    if up.phase == "running":
        found.alarms += [
            f"member {member.name} is {member.state}; see its log"
            for member in up.members
            if member.state != "running"
        ]


def _look_at_buffer(found: Status, settings: Settings, up: UpState | None) -> None:
    if settings.embedded and up is None and not server.running(settings):
        return
    signs = None
    try:
        with closing(connection.connect(settings)) as client:
            depths = depth.depths(client, settings)
            found.buffer = depths.states
            found.alarms += [
                *depths.faults.values(),
                *depth.high_water(depths.states, settings),
                *depth.losses(depths.states),
            ]
            standing = durability.standing(client, settings)
            found.warnings += standing.warnings
            found.alarms += [standing.fault] if standing.fault else []
            clock = ServerClock()
            clock.ask(client)
            found.warnings += clock.warnings()
            signs = liveness.read(client)
    except HbError as error:
        found.alarms.append(str(error))
    if found.buffer is not None and signs is not None:
        late = (
            vitals.drain(found.buffer, signs, settings),
            vitals.backlog(found.buffer, signs, settings),
            vitals.consumers(found.buffer, signs, settings),
            vitals.dagster(signs, settings),
        )
        found.alarms += [line for line in late if line]


def _look_at_spool(found: Status, settings: Settings) -> None:
    from hb_assets.gateway.spool import queue

    try:
        found.spool = queue.holdings(settings)
    except SpoolUnavailableError as error:
        found.alarms.append(str(error))
    if found.spool is not None:
        found.alarms += found.spool.alarms()


def _look_at_keys(found: Status, settings: Settings) -> None:
    file = keyring.path(settings)
    try:
        keys = keyring.read(file)
    except SettingsError as error:
        found.alarms.append(str(error))
        return
    if keys is None and file.with_suffix(".lock").exists():
        # whoever took the file away to go back to a gateway without keys has stopped that gateway
        found.alarms += [line for line in _alarms_of_gateway(settings) if str(file) in line]


def _alarms_of_gateway(settings: Settings) -> list[str]:
    """Alarms that the gateway of these settings lists in /health; none where none answers."""
    import httpx  # a tenth of what it takes to load all of us, and mostly for nothing

    try:
        url, verify = f"{gateway_url(settings)}/health", tls.client_context(settings)
        said = httpx.get(url, timeout=2, trust_env=False, verify=verify).json()
        return [str(line) for line in said["alarms"]]
    except (SettingsError, httpx.HTTPError, ValueError, LookupError, TypeError):
        return []


def _look_at_lake(found: Status, settings: Settings, latest: int) -> None:
    root = settings.lake_dir
    try:
        if not (root / "lake.json").exists() and not store.holds_data(root):
            home = settings.home_dir
            missing = f"lake at {root}" if home.is_dir() else f"HB_HOME at {home}"
            found.warnings.append(f"there is no {missing}: check HB_HOME and HB_LAKE")
            return
        lake = Lake.open(settings, create=False)
    except (HbError, OSError) as error:
        found.alarms.append(output.line(error))
        return
    from hb_assets.lake import inventory
    from hb_assets.lake.compaction import policy
    from hb_assets.lake.integrity import known_faults

    faults = [fault.message for fault in known_faults.faults(lake)]
    every = inventory.days_found(lake, faults)
    found.days_in_lake = len(every)
    found.days = [inventory.day_state(lake, day, settings) for day in every[-latest:]]
    found.last_drain = _last_drain(lake, every)
    faults += [fault for one in found.days for fault in one.faults]
    now_ms = time.time_ns() // 1_000_000
    oldest = ((one.day, one.oldest_pending_ms) for one in found.days)
    late = vitals.consolidation(*policy.most_overdue(oldest, now_ms, settings), settings)
    space = None
    with inventory.noted(faults, root):
        space = vitals.space(shutil.disk_usage(root).free, settings)
    found.alarms += [line for line in (*dict.fromkeys(faults), late, space) if line]


def _last_drain(lake: Lake, days: list[dt.date]) -> float | None:
    """When a fragment was published last, epoch seconds: a folder's time is that of its names."""
    newest = None
    for day in days:
        for shard in range(lake.shards):
            try:
                changed = layout.shard_folder(lake.root, RAW, day, shard).stat().st_mtime
            except OSError:
                continue  # there is none, or it can't be read, which is told where it is listed
            newest = changed if newest is None else max(newest, changed)
    return newest


def _show(found: Status, settings: Settings) -> None:
    console = output.results
    now = time.time()
    if found.pid is None:
        console.print(f"`hb up` doesn't run on {settings.home_dir}", soft_wrap=True)
    else:
        console.print(
            f"`hb up` (pid {found.pid}) is {found.phase}: gateway {found.gateway}, "
            f"Dagster {found.dagster}",
            soft_wrap=True,
        )
        table = output.table("Members", "member", "state", "pid", "uptime", "restarts")
        for member in found.members:
            table.add_row(
                member.name,
                member.state,
                str(member.pid or "-"),
                output.duration(now - member.since) if member.since else "-",
                str(member.restarts),
            )
        console.print(table)
    if found.buffer is None:
        console.print("the buffer's server doesn't run; what it holds is on the disk")
    elif any(one.entries or one.pending for one in found.buffer):
        console.print(_buffer_table(found.buffer, now))
    else:
        console.print(f"the buffer is empty ({len(found.buffer)} shards)")
    if found.spool is not None and found.spool.heartbeats:
        console.print(
            f"the spool holds {found.spool.heartbeats:,} heartbeats, {found.spool.bytes:,} bytes"
        )
    console.print(f"durability of what is accepted: {found.durability} (HB_DURABILITY)")
    for warning in found.warnings:
        output.note(f"warning: {warning}", style="yellow")
    if found.days:
        console.print(_lake_table(found))
    else:
        console.print(f"the lake {settings.lake_dir} holds no days", soft_wrap=True)
    if found.last_drain is not None:
        console.print(f"last drain: {output.duration(now - found.last_drain)} ago")
    for alarm in found.alarms:
        output.complain(f"alarm: {alarm}")


def _buffer_table(shards: list[ShardDepth], now: float) -> Table:
    table = output.table(
        "Buffer", "shard", "heartbeats", "bytes", "entries", "claimed", "waiting", "oldest"
    )
    busy = [one for one in shards if one.entries or one.pending]
    for one in busy:
        age = output.duration(now - one.oldest_ms / 1000) if one.oldest_ms else "-"
        table.add_row(
            f"{one.shard:02d}",
            *(f"{n:,}" for n in (one.heartbeats, one.bytes, one.entries, one.pending)),
            f"{one.undelivered:,}",
            age,
        )
    table.caption = f"{len(shards) - len(busy)} of {len(shards)} shards are empty"
    return table


def _lake_table(found: Status) -> Table:
    table = output.table(
        "Lake",
        "day (UTC)",
        "unique",
        "superseded",
        "pending",
        "fragments",
        "bytes",
        "minutes",
    )
    for one in found.days:
        table.add_row(
            f"{one.day} (alarm)" if one.faults else str(one.day),
            *(f"{n:,}" for n in (one.unique, one.superseded, one.pending_rows)),
            f"{one.pending_fragments:,}",
            f"{one.bytes:,}",
            "current" if one.minutes_current else "stale",
        )
    table.caption = f"{len(found.days)} of {found.days_in_lake} days"
    return table
