"""`hb import`: append files to the buffer; every refused line is named."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from hb_assets.buffer import connection, durability, server
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.cli import output
from hb_assets.cli.app import FAILED, REFUSED, AsJson, app, settings_of
from hb_assets.cli.interrupts import Interrupts
from hb_assets.core.errors import HbError
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.drain import Drained, drain
from hb_assets.pipeline.importing.importer import Imported, Importer, RefusedLine
from hb_assets.pipeline.importing.sources import FORMATS, Format

_SHOWN = 20


@app.command("import")
def import_files(
    context: typer.Context,
    files: Annotated[
        list[Path],
        typer.Argument(
            help="NDJSON, JSON, CSV or Parquet, plain, .gz or .zst; pipes too, - is stdin."
        ),
    ],
    form: Annotated[
        str | None,
        typer.Option("--format", help="ndjson, json, csv or parquet; default: by the name."),
    ] = None,
    refused_file: Annotated[
        Path | None,
        typer.Option(
            "--refused", help="Write every refused line's number and reason here, NDJSON."
        ),
    ] = None,
    allow_refused: Annotated[
        bool, typer.Option("--allow-refused", help="Exit code 0 in spite of refused lines.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring files into the buffer, the way any heartbeat goes; importing twice changes nothing.

    Waits while the buffer is full. When no server runs, the embedded one is started for the time
    of the import, and drained as well. Exit code 1 when a line was refused, or a file couldn't be
    read, or not to its end; 2 when none could.
    """
    settings = settings_of(context)
    wanted = _format(form)
    if refused_file and any(
        path.exists() and refused_file.exists() and path.samefile(refused_file) for path in files
    ):
        raise typer.BadParameter("is a file to import", param_hint="--refused")
    lake = Lake.open(settings)
    alone = settings.embedded and not server.running(settings)
    with Interrupts(), server.borrowed(settings), _RefusedLines(refused_file) as refused:
        client = connection.connect(settings)
        connection.ping(client)
        durability.require(client, settings)
        producer = Producer(client, settings)
        producer.clock.ask(client)
        drained = Drained()
        with (
            closing(Consumer(connection.connect(settings), settings)) as consumer,
            output.progress() as progress,
        ):
            consumer.open()

            def make_room() -> None:
                nonlocal drained
                drained = drained.plus(drain(consumer, lake, settings))

            importer = Importer(
                producer,
                settings,
                make_room=make_room if alone else None,
                on_refused=refused.add,
                on_progress=lambda read: progress.update(task, completed=read),
            )
            try:
                for path in files:
                    size = path.stat().st_size if path.is_file() else None
                    task = progress.add_task(f"import {path.name}", total=size)
                    importer.run(path, wanted)
                    progress.remove_task(task)
                if alone:
                    drained = drained.plus(drain(consumer, lake, settings, until_empty=True))
            except (KeyboardInterrupt, HbError, OSError):
                _show_broken_off(importer.files)
                raise
    faults = [one.fault for one in importer.files if one.fault is not None]
    in_vain = all(one.in_vain for one in importer.files)
    if as_json or not in_vain:
        _show_import(importer.files, drained if alone else None, refused, as_json)
    for fault in faults:
        output.complain(fault)
    if in_vain:
        raise typer.Exit(REFUSED)
    if faults or (refused.seen and not allow_refused):
        raise typer.Exit(FAILED)


def _format(form: str | None) -> Format | None:
    if form is not None and form not in FORMATS:
        raise typer.BadParameter(f"must be one of {', '.join(FORMATS)}", param_hint="--format")
    return None if form is None else FORMATS[form]


def _show_broken_off(begun: list[Imported]) -> None:
    accepted = sum(one.accepted for one in begun)
    where = f", the last ones of {begun[-1].path}" if begun else ""
    output.note(
        f"ended early: {accepted:,} heartbeats were taken{where}, and maybe a few more; they stay. "
        "Importing the same files again is safe: none of them will be there twice"
    )


class _RefusedLines:
    """Shows the first refused lines on stderr, and writes all of them to a file if asked to."""

    def __init__(self, path: Path | None) -> None:
        self.seen = 0
        self.first: list[RefusedLine] = []
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

    def add(self, line: RefusedLine) -> None:
        self.seen += 1
        if self.seen <= _SHOWN:
            self.first.append(line)
            where = f"{Path(line.file).name}:{line.line}"
            output.note(f"{where}: {line.reason}: {line.message}", style="yellow")
        if self._file is not None:
            self._file.write(msgspec.json.encode(line) + b"\n")


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
        if not one.in_vain:
            table.add_row(
                Path(one.path).name, f"{one.accepted:,}", f"{one.refused:,}", f"{one.seconds:.1f}"
            )
    output.results.print(table)
    reasons = sum((one.reasons for one in results), start=Counter[str]())
    for reason, count in reasons.most_common():
        output.results.print(f"refused {count:,}: {reason}")
    ignored = sum((one.ignored for one in results), start=Counter[str]())
    for name, count in ignored.most_common():
        shown = name if name.isprintable() else ascii(name)
        output.results.print(f"ignored {count:,}: {shown} is no field of a heartbeat", markup=False)
    if drained is not None:
        output.results.print(f"drained {drained.rows:,} rows into {drained.fragments:,} fragments")
        output.results.print("next: hb consolidate --pending")
    else:
        output.results.print(
            "next: the running `hb up` drains and consolidates, or: hb drain --until-empty"
        )
