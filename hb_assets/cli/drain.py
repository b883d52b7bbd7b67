"""`hb drain`: write heartbeats from the buffer into durable fragments of the lake."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Annotated

import typer

from hb_assets.buffer import connection, server
from hb_assets.buffer.consumer import Consumer
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, AsJson, app, settings_of
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import alarms
from hb_assets.pipeline.alarms import Raised
from hb_assets.pipeline.drain import Drained, drain


@app.command("drain")
def drain_buffer(
    context: typer.Context,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="Go on until nothing is left, at any drainer.")
    ] = False,
    follow: Annotated[
        bool, typer.Option("--follow", help="Go on for ever (Ctrl-C ends it).")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring heartbeats from the buffer into durable fragments of the lake.

    Without an option: until a claim took all there was. Any number may run side by side. With
    --follow little is gathered for HB_DRAIN_MAX_WAIT, and a fault (a full disk, a Redis that is
    away) is told and tried again, after longer and longer rests; otherwise it ends the command.
    What wasn't acknowledged stays in the buffer.
    """
    if until_empty and follow:
        raise typer.BadParameter("--until-empty and --follow exclude each other")
    settings = settings_of(context)
    lake = Lake.open(settings)
    with server.borrowed(settings), _stop_on_signal() as stop:
        connection.ping(connection.connect(settings))
        with (
            closing(Consumer(connection.connect(settings), settings)) as consumer,
            output.progress() as progress,
        ):
            consumer.open()
            task = progress.add_task("drain", total=None)
            faults = _Faults(settings, consumer)

            def on_cycle(total: Drained) -> None:
                progress.update(task, description=f"drained {total.rows:,} rows")
                faults.cycle()

            done = drain(
                consumer,
                lake,
                settings,
                until_empty=until_empty,
                follow=follow,
                stop=stop.is_set,
                on_cycle=on_cycle,
                on_fault=faults.add,
            )
    _show_drain(done, as_json)
    if consumer.unusable:
        raise typer.Exit(FAILED)


class _Faults:
    """Reports faults of a drain: a line and an alarm when one begins, and when it is over."""

    def __init__(self, settings: Settings, consumer: Consumer) -> None:
        self._settings = settings
        self._consumer = consumer
        self._standing: dict[str, Raised] = {}

    def add(self, error: Exception) -> None:
        if isinstance(error, HbError | OSError):
            text = output.line(error)
        else:  # only its kind: the message may quote a heartbeat
            text = f"unexpected {type(error).__name__}, which is a bug"
        self._tell({"drain": f"nothing can be drained: {text}; trying again, nothing is lost"})

    def cycle(self) -> None:
        if self._standing or self._consumer.unusable:
            self._tell({})

    def _tell(self, found: dict[str, str]) -> None:
        if self._consumer.unusable:
            found["shards"] = "; ".join(self._consumer.unusable.values())
        now_ms = time.time_ns() // 1_000_000
        notices, self._standing = alarms.changes(self._standing, found, now_ms)
        alarms.tell(notices, self._settings)
        for notice in notices:
            if notice.severity == "resolved":
                output.note(notice.message)


def _show_drain(done: Drained, as_json: bool) -> None:
    if as_json:
        output.print_json(done)
        return
    output.results.print(
        f"drained {done.entries:,} entries: {done.rows:,} rows into {done.fragments:,} fragments, "
        f"{done.quarantined:,} quarantined, in {done.seconds:.1f} s"
    )
    if done.unknown_fields:
        output.results.print(f"ignored {done.unknown_fields:,} unknown fields")


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM end the loop after the cycle at hand; a second one ends at once."""
    stop = threading.Event()

    def ask(number: int, _: object) -> None:
        stop.set()
        signal.signal(number, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
