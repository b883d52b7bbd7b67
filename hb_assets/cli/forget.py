"""`hb forget`: erase a user from buffer, spool and lake."""

from __future__ import annotations

import contextlib
import datetime as dt
import sys
from typing import Annotated

import typer

from hb_assets.buffer import connection, server
from hb_assets.buffer.consumer import Consumer
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, existing_lake, settings_of, text_of
from hb_assets.core.days import EPOCH
from hb_assets.gateway.spool.queue import Spool
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.erasure import Forgotten
from hb_assets.pipeline.erasure import forget as forget_user


@app.command()
def forget(
    context: typer.Context,
    user: Annotated[str, typer.Argument(metavar="USER", help="user_id; - reads it from stdin.")],
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Erase all heartbeats of a user that have arrived by now; nothing brings them back.

    Exit code 1 when bytes of them are, or may be, left: each place is named. Asking again goes on
    where it stopped. Heartbeats that arrive later are accepted as ever.
    """
    settings = settings_of(context)
    user_id = text_of(sys.stdin.readline().rstrip("\n") if user == "-" else user, "USER")
    if not user_id:
        raise typer.BadParameter("must not be empty", param_hint="USER")
    lake = existing_lake(settings)
    if not yes:
        typer.confirm(f"Erase the heartbeats of {user_id} from {lake.root} for good?", abort=True)
    spool = Spool(settings)
    with (
        server.borrowed(settings),
        contextlib.closing(connection.connect(settings)) as client,
        contextlib.closing(Consumer(client, settings)) as consumer,
        coordinated(lake, settings, start_server=False) as known,
        contextlib.closing(spool),
        output.progress() as progress,
    ):
        connection.ping(client)
        consumer.open()
        task = progress.add_task("forget", total=None)
        done = forget_user(
            user_id,
            client,
            consumer,
            lake,
            settings,
            known,
            spool.rewrite,
            lambda step: progress.update(task, description=f"forget: {step}"),
        )
    _show_forgotten(done, as_json=as_json)
    if not done.done:
        raise typer.Exit(FAILED)


def _show_forgotten(done: Forgotten, *, as_json: bool) -> None:
    if as_json:
        output.print_json(done)
    else:
        output.results.print(
            f"erased: {done.rows:,} heartbeats on {done.days:,} days, {done.buffered:,} in the "
            f"buffer, {done.spooled:,} in the spool, {done.quarantined:,} records in quarantine; "
            f"{done.fragments:,} fragments deleted ({done.seconds:.1f} s)",
            soft_wrap=True,
        )
        if done.done:
            output.results.print("a scan of all bytes finds nothing of them", style="green")
    for line in done.unscanned:
        output.note(line)
    if done.resumed_ms is not None:
        output.note(
            f"this ended what was asked for at {_instant(done.resumed_ms)}: for heartbeats that "
            "have arrived since, ask again"
        )
    for line in done.left:
        output.complain(line)


def _instant(epoch_ms: int) -> str:
    moment = EPOCH + dt.timedelta(milliseconds=epoch_ms)
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
