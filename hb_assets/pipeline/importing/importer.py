"""Imports one file after the other: appends their records to the buffer.

Each record is validated as any heartbeat is, and a refused one is reported with its number. While
the buffer is full, the import waits. What is wrong with a file ends that file alone.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from hb_assets.buffer.producer import Bound, Lines, Producer
from hb_assets.core import record
from hb_assets.core.errors import BufferFullError, ImportFileError
from hb_assets.core.record import Heartbeat, Refusal
from hb_assets.core.settings import Settings
from hb_assets.pipeline.importing import csv_file, json_file, parquet_file, sources
from hb_assets.pipeline.importing.sources import (
    UNREADABLE,
    Format,
    Row,
    Source,
    Unreadable,
    first_line,
)

_CHUNK = 10_000
_LINE_BYTES = 2048
"""More than the canonical JSON of any heartbeat takes."""
_PATIENCE = 300.0
"""Seconds that a full buffer may stay full before an import gives up."""


@dataclass(frozen=True, slots=True)
class RefusedLine:
    """A record that was not imported.

    `line` counts from 1: lines in NDJSON and CSV (its header is line 1), in a JSON array its
    elements, and in Parquet its rows.
    """

    file: str
    line: int
    reason: str
    message: str


@dataclass(slots=True)
class Imported:
    """Counts of a file's import so far.

    `fault` says why it couldn't be read, or not to its end; what was read before it counts.
    `ignored` counts the values of unknown fields by their names. `waited` is the time that a full
    buffer held it up, in seconds.
    """

    path: str
    accepted: int = 0
    refused: int = 0
    fault: str | None = None
    reasons: Counter[str] = field(default_factory=Counter)
    ignored: record.Ignored = field(default_factory=record.Ignored)
    seconds: float = 0.0
    waited: float = 0.0

    @property
    def in_vain(self) -> bool:
        """Whether nothing of the file could be read."""
        return self.fault is not None and not self.accepted + self.refused


class Importer:
    """Appends files to the buffer; `files` are those that were begun.

    Args:
        producer: where to.
        settings: shards, accepted timestamps.
        make_room: called when the buffer is full and nobody else drains it; None: wait.
        on_refused: told of every refused record.
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
        self.files: list[Imported] = []
        self._producer = producer
        bound = Bound.of(settings)
        # What one append brings for a shard must fit into that shard when it is empty.
        self._chunk = max(1, min(_CHUNK, bound.heartbeats, bound.size // _LINE_BYTES))
        self._settings = settings
        self._make_room = make_room
        self._on_refused = on_refused
        self._on_progress = on_progress

    def run(self, path: Path, form: Format | None = None) -> Imported:
        """Import one file, as far as it can be read.

        Args:
            path: the file; `-` is standard input.
            form: None: as its name says.

        Raises:
            BufferFullError: the buffer stayed full for five minutes.
            BufferUnavailableError: Redis doesn't answer. Importing the file again is harmless.
        """
        began = time.monotonic()
        done = Imported(sources.name_of(path))
        self.files.append(done)
        with ExitStack() as stack:
            rows: Iterator[tuple[int, Row]] = iter(())
            with _noted(done, "can't be read"):
                form = form or sources.format_of(path)
                source = sources.opened(path, stack)
                rows = _records(source, form, stack, done.ignored)
            rows = _up_to_a_fault(rows, done)
            while self._append(islice(rows, self._chunk), done):
                self._on_progress(source.position())
        done.seconds = time.monotonic() - began
        return done

    def _append(self, chunk: Iterable[tuple[int, Row]], done: Imported) -> bool:
        """Validate records and append those that are heartbeats; whether there were any records."""
        now_ms = self._producer.clock.now_ms()
        bounds = self._settings.time_bounds
        by_shard: dict[int, list[bytes]] = {}
        line = 0
        for line, row in chunk:
            if isinstance(row, bytes):
                result, unknown = record.parse(row, now_ms, bounds)
            elif isinstance(row, dict):
                result, unknown = record.parse_object(row, now_ms, bounds)
            else:
                self._refuse(line, row, done)
                continue
            if isinstance(result, Heartbeat):
                shard = record.shard_of(result.user_id, self._settings.shards)
                by_shard.setdefault(shard, []).append(record.encode(result))
                done.ignored.add(unknown)
            else:
                self._refuse(line, result, done)
        self._store(by_shard, done)
        return line > 0

    def _refuse(self, line: int, refusal: Refusal | Unreadable, done: Imported) -> None:
        done.refused += 1
        done.reasons[refusal.reason] += 1
        self._on_refused(RefusedLine(done.path, line, refusal.reason, refusal.message))

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


@contextmanager
def _noted(done: Imported, what: str) -> Iterator[None]:
    """Record what is wrong with a file as its `fault` instead of raising it."""
    try:
        yield
    except ImportFileError as error:
        done.fault = str(error)
    except UNREADABLE as error:
        done.fault = f"{done.path}: {what}: {first_line(error)}"


def _up_to_a_fault(rows: Iterator[tuple[int, Row]], done: Imported) -> Iterator[tuple[int, Row]]:
    with _noted(done, "can't be read to its end"):
        yield from rows


def _records(
    source: Source, form: Format, stack: ExitStack, ignored: record.Ignored
) -> Iterator[tuple[int, Row]]:
    if form == "parquet":
        return parquet_file.records(source.name, source.seekable(stack), ignored)
    read = csv_file.records if form == "csv" else json_file.records
    return read(source.name, source.text())
