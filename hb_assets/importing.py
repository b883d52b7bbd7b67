"""Importing files: NDJSON, CSV and Parquet, plain or gzipped, through the buffer.

Belongs here: reading records out of files with their line numbers, and appending them with
back-pressure. Doesn't belong here: what makes a record valid (`record`), how a run of `hb import`
looks (`cli`). A file goes the way of any heartbeat, so that importing it twice changes nothing.
"""

from __future__ import annotations

import codecs
import csv
import datetime as dt
import gzip
import io
import re
import shutil
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from hb_assets import days, record
from hb_assets.buffer.producer import Bound, Lines, Producer
from hb_assets.errors import BufferFullError, ImportFileError
from hb_assets.record import Heartbeat, Refusal
from hb_assets.settings import Settings

Format = Literal["ndjson", "csv", "parquet"]
_SUFFIXES: dict[str, Format] = {
    ".ndjson": "ndjson",
    ".jsonl": "ndjson",
    ".json": "ndjson",
    ".csv": "csv",
    ".parquet": "parquet",
}
_CHUNK = 10_000
_FIELD_BYTES = 64 * 2**20
"""A longer CSV field is a quote that was never closed."""
_LINE_BYTES = 2048
"""More than the canonical JSON of any heartbeat takes."""
_REQUIRED = {"user_id", "device_id", "heart_rate"}
_TIMES = {"timestamp", "timestamp_ms"}
_PATIENCE = 300.0
"""Seconds that a full buffer may stay full before an import gives up."""

Row: TypeAlias = bytes | dict[str, Any]
"""A record as its file has it: JSON text, or fields."""
_NUMBER = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?")
_UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    pa.ArrowException,
    csv.Error,
    ValueError,
    OverflowError,
)
"""What reading a broken file raises; a date that Python can't hold is a ValueError or Overflow."""
_Readable: TypeAlias = IO[bytes] | gzip.GzipFile


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A line that was not imported.

    `line` counts from 1 (in a CSV, its header is line 1; in a Parquet file it is the row).
    """

    line: int
    reason: str
    message: str


@dataclass(slots=True)
class Imported:
    """What an import did so far. `waited` is the time that a full buffer held it up, in seconds."""

    path: str
    accepted: int = 0
    refused: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    unknown_fields: int = 0
    seconds: float = 0.0
    waited: float = 0.0


class Importer:
    """Appends files to the buffer.

    Args:
        producer: where to.
        settings: shards, accepted timestamps.
        make_room: called when the buffer is full and nobody else drains it; None: wait.
        on_refused: told of every refused line.
        on_progress: told, after every chunk, the bytes of the file that were read so far.
    """

    def __init__(
        self,
        producer: Producer,
        settings: Settings,
        *,
        make_room: Callable[[], None] | None = None,
        on_refused: Callable[[RefusedLine], None] = lambda _: None,
        on_progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._producer = producer
        bound = Bound.of(settings)
        # What one append brings for a shard must fit into that shard when it is empty.
        self._chunk = max(1, min(_CHUNK, bound.heartbeats, bound.size // _LINE_BYTES))
        self._settings = settings
        self._make_room = make_room
        self._on_refused = on_refused
        self._on_progress = on_progress

    def run(self, path: Path, form: Format | None = None) -> Imported:
        """Import one file.

        Raises:
            ImportFileError: it can't be read, or isn't of its format.
            BufferFullError: the buffer stayed full for five minutes.
            BufferUnavailableError: Redis doesn't answer. Importing the file again is harmless.
        """
        began = time.monotonic()
        done = Imported(str(path))
        with ExitStack() as stack:
            rows, position = _open(path, form or format_of(path), stack)
            while chunk := self._read(rows, done):
                self._append(chunk, done)
                self._on_progress(position())
        done.seconds = time.monotonic() - began
        return done

    def _read(self, rows: Iterator[tuple[int, Row]], done: Imported) -> list[tuple[int, Row]]:
        try:
            return list(islice(rows, self._chunk))
        except _UNREADABLE as error:
            raise ImportFileError(
                f"{done.path}: can't be read on after {done.accepted + done.refused:,} records: "
                f"{_first_line(error)}"
            ) from None

    def _append(self, chunk: Sequence[tuple[int, Row]], done: Imported) -> None:
        now_ms = self._producer.clock.now_ms()
        bounds = self._settings.time_bounds
        by_shard: dict[int, list[bytes]] = {}
        for line, row in chunk:
            if isinstance(row, bytes):
                result, unknown = record.parse(row, now_ms, bounds)
            else:
                result, unknown = record.parse_object(row, now_ms, bounds)
            if isinstance(result, Heartbeat):
                shard = record.shard_of(result.user_id, self._settings.shards)
                by_shard.setdefault(shard, []).append(record.encode(result))
                done.unknown_fields += unknown
            else:
                self._refuse(line, result, done)
        self._store(by_shard, done)

    def _refuse(self, line: int, refusal: Refusal, done: Imported) -> None:
        if refusal.reason == "record_not_an_object":
            refusal = Refusal(refusal.field, refusal.code, f"{refusal.message}, one on each line")
        done.refused += 1
        done.reasons[refusal.reason] += 1
        self._on_refused(RefusedLine(line, refusal.reason, refusal.message))

    def _store(self, lines: Lines, done: Imported) -> None:
        """Append until every line is stored; a full shard is tried again, in order."""
        full_since: float | None = None
        while lines:
            outcomes = self._producer.append(lines)
            full: BufferFullError | None = None
            for shard, outcome in outcomes.items():
                if outcome is None:
                    done.accepted += len(lines[shard])
                elif isinstance(outcome, BufferFullError):
                    full = outcome
                else:
                    raise outcome
            lines = {shard: lines[shard] for shard, outcome in outcomes.items() if outcome}
            if full is None:
                return
            now = time.monotonic()
            if full_since is None or len(lines) < len(outcomes):
                full_since = now
            if now - full_since > _PATIENCE:
                raise full
            if self._make_room is not None:
                self._make_room()
            else:
                time.sleep(min(full.retry_after, 1.0))
            done.waited += time.monotonic() - now


def format_of(path: Path) -> Format:
    """Format by the file's name, `.gz` aside.

    Raises:
        ImportFileError: the name doesn't say.
    """
    name = path.with_suffix("") if path.suffix == ".gz" else path
    found = _SUFFIXES.get(name.suffix.lower())
    if found is None:
        raise ImportFileError(
            f"{path}: can't tell the format by the name; pass --format ndjson, csv or parquet"
        )
    return found


def _open(
    path: Path, form: Format, stack: ExitStack
) -> tuple[Iterator[tuple[int, Row]], Callable[[], int]]:
    """Records with their line numbers, and how many bytes of the file were read so far."""
    try:
        file: IO[bytes] = stack.enter_context(path.open("rb"))
        zipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
    except OSError as error:
        raise ImportFileError(f"{path}: {error.strerror}") from None
    content: _Readable = file
    if zipped:
        content = gzip.GzipFile(fileobj=file)
    if form == "ndjson":
        return _ndjson(content), file.tell
    if form == "csv":
        text = stack.enter_context(io.TextIOWrapper(content, encoding="utf-8-sig", newline=""))
        return _csv(path, text), file.tell
    if zipped:
        plain = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        try:
            shutil.copyfileobj(content, plain)
        except (OSError, EOFError, zlib.error) as error:
            raise ImportFileError(f"{path}: {_first_line(error)}") from None
        content = plain
    return _parquet(path, content), content.tell


def _ndjson(lines: Iterable[bytes]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        text = line.strip() if number > 1 else line.removeprefix(codecs.BOM_UTF8).strip()
        if text:
            yield number, text


def _csv(path: Path, text: io.TextIOWrapper) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(_FIELD_BYTES)  # Python's own would end the file at 128 KiB
    rows = csv.DictReader(text)
    try:
        _require_columns(path, rows.fieldnames or ())
    except _UNREADABLE as error:
        raise ImportFileError(f"{path}: not CSV in UTF-8: {_first_line(error)}") from None
    for row in rows:
        yield rows.line_num, {name: _csv_value(name, value) for name, value in row.items() if name}


def _csv_value(name: str, value: str | None) -> object:
    """CSV knows only text: numbers are read as such, and an empty field is an absent one."""
    if not value:
        return None
    if name in ("heart_rate", "timestamp_ms") and _NUMBER.fullmatch(value):
        return float(value) if "." in value else int(value)
    return value


def _parquet(path: Path, content: _Readable) -> Iterator[tuple[int, Row]]:
    try:
        file = pq.ParquetFile(content)
    except _UNREADABLE as error:
        raise ImportFileError(f"{path}: not a Parquet file: {_first_line(error)}") from None
    _require_columns(path, file.schema_arrow.names)
    wanted = [name for name in file.schema_arrow.names if name in _REQUIRED | _TIMES]
    number = 0
    for batch in file.iter_batches(_CHUNK, columns=wanted):
        for row in batch.to_pylist():
            number += 1
            moment = row.get("timestamp")
            if isinstance(moment, dt.datetime):
                row["timestamp_ms"] = days.ms_of(moment)
            yield number, row


def _require_columns(path: Path, names: Iterable[str]) -> None:
    found = set(names)
    missing = sorted(_REQUIRED - found)
    if not _TIMES & found:
        missing.append("timestamp (or timestamp_ms)")
    if missing:
        # what it has instead isn't told: without a header these would be somebody's values
        raise ImportFileError(
            f"{path}: lacks the columns {', '.join(missing)} (a CSV file needs a header)"
        )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
