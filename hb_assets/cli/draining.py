"""`hb import` and `hb drain`: into the buffer, and out of it into the lake.

Belongs here: options, progress and results of these commands. Doesn't belong here: the work itself
(`importing`, `drain`).
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from hb_assets import alarms
from hb_assets.alarms import Raised
from hb_assets.buffer import connection, durability, server
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, REFUSED, AsJson, app, settings_of
from hb_assets.drain import Drained, drain
from hb_assets.errors import HbError, ImportFileError
from hb_assets.importing import Format, Imported, Importer, RefusedLine
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings

_SHOWN = 20


@contextmanager
def _consumer(settings: Settings) -> Iterator[Consumer]:
    consumer = Consumer(connection.connect(settings), settings)
    consumer.open()
    try:
        yield consumer
    finally:
        consumer.close()


@app.command("import")
def import_files(
    context: typer.Context,
    files: Annotated[
        list[Path], typer.Argument(help="NDJSON, CSV or Parquet files, plain or gzipped.")
    ],
    form: Annotated[
        str | None, typer.Option("--format", help="ndjson, csv or parquet; default: by the name.")
    ] = None,
    refused_file: Annotated[
        Path | None,
        typer.Option(
            "--refused", help="Write every refused line's number and reason here, NDJSON."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Bring files into the buffer, the way any heartbeat goes; importing twice changes nothing.

    Waits while the buffer is full. When no server runs, the embedded one is started for the time
    of the import, and drained as well.
    """
    settings = settings_of(context)
    wanted = _format(form)
    if refused_file and any(
        path.exists() and refused_file.exists() and path.samefile(refused_file) for path in files
    ):
        raise typer.BadParameter("is a file to import", param_hint="--refused")
    lake = Lake.open(settings)
    alone = settings.embedded and not server.running(settings)
    with server.borrowed(settings), _RefusedLines(refused_file) as refused:
        client = connection.connect(settings)
        connection.ping(client)
        durability.require(client, settings)
        drained = Drained()
        with _consumer(settings) as consumer:

            def make_room() -> None:
                nonlocal drained
                drained = drained.plus(drain(consumer, lake, settings))

            results: list[Imported] = []
            unreadable: list[str] = []
            for path in files:
                try:
                    room = make_room if alone else None
                    results.append(_import(path, wanted, settings, client, refused, room))
                except ImportFileError as error:
                    unreadable.append(str(error))  # the other files go on
            if alone:
                drained = drained.plus(drain(consumer, lake, settings, until_empty=True))
    if results or as_json:
        _show_import(results, drained if alone else None, refused, as_json)
    for complaint in unreadable:
        output.complain(complaint)
    if unreadable:
        raise typer.Exit(REFUSED)


def _format(form: str | None) -> Format | None:
    if form in (None, "ndjson", "csv", "parquet"):
        return form  # type: ignore[return-value]  # one of the three, as just seen
    raise typer.BadParameter("must be ndjson, csv or parquet", param_hint="--format")


def _import(
    path: Path,
    form: Format | None,
    settings: Settings,
    client: Any,
    refused: _RefusedLines,
    make_room: Callable[[], None] | None,
) -> Imported:
    with output.progress() as progress:
        size = path.stat().st_size if path.is_file() else None
        task = progress.add_task(f"import {path.name}", total=size)
        producer = Producer(client, settings)
        producer.clock.ask(client)
        importer = Importer(
            producer,
            settings,
            make_room=make_room,
            on_refused=lambda line: refused.add(path, line),
            on_progress=lambda read: progress.update(task, completed=read),
        )
        return importer.run(path, form)


class _RefusedLines:
    """Shows the first refused lines on stderr, and writes all of them to a file if asked to."""

    def __init__(self, path: Path | None) -> None:
        self.seen = 0
        self.first: list[dict[str, object]] = []
        self._path = path
        self._file: Any = None

    def __enter__(self) -> _RefusedLines:
        if self._path is not None:
            try:
                self._file = self._path.open("wb")
            except OSError as error:
                raise typer.BadParameter(
                    f"{self._path}: {error.strerror}", param_hint="--refused"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, path: Path, line: RefusedLine) -> None:
        self.seen += 1
        entry = {
            "file": str(path),
            "line": line.line,
            "reason": line.reason,
            "message": line.message,
        }
        if self.seen <= _SHOWN:
            self.first.append(entry)
            output.note(f"{path.name}:{line.line}: {line.reason}: {line.message}", style="yellow")
        if self._file is not None:
            self._file.write(msgspec.json.encode(entry) + b"\n")


def _show_import(
    results: list[Imported], drained: Drained | None, refused: _RefusedLines, as_json: bool
) -> None:
    if as_json:
        output.print_json({"files": results, "refused_lines": refused.first, "drained": drained})
        return
    if refused.seen > _SHOWN:
        output.note(
            f"... and {refused.seen - _SHOWN:,} more refused lines; --refused FILE writes them all",
            style="yellow",
        )
    table = output.table("Imported", "file", "accepted", "refused", "seconds")
    for one in results:
        table.add_row(
            Path(one.path).name, f"{one.accepted:,}", f"{one.refused:,}", f"{one.seconds:.1f}"
        )
    output.results.print(table)
    reasons = sum((one.reasons for one in results), start=Counter[str]())
    for reason, count in reasons.most_common():
        output.results.print(f"refused {count:,}: {reason}")
    if drained is not None:
        output.results.print(f"drained {drained.rows:,} rows into {drained.fragments:,} fragments")
        output.results.print("next: hb consolidate --pending")
    else:
        output.results.print(
            "next: the running `hb up` drains and consolidates, or: hb drain --until-empty"
        )


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
        with _consumer(settings) as consumer, output.progress() as progress:
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
    """Tells what hinders a drain: a line and an alarm when it begins, and when it is over."""

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
