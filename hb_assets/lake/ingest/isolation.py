"""Isolation: decodes entries that may have killed their drainers in a child process with limits.

Such a suspect is never decoded in the drainer's own process. One child decodes suspects one after
the other, line by line (`record.parse`), and leaves each one's result in a folder of the drainer's.
Where the child ended at an entry that wasn't its first, that entry gets a child of its own: only
what ends a fresh child, or fails in it, is poison. A disk that fails, a child that can't start or
that somebody ends with a signal say nothing about an entry.

The drain decides which entries are suspects, and publishes the results.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import IO, TypeVar

import msgspec
import pyarrow as pa

from hb_assets.core import private_files
from hb_assets.core import settings as settings_module
from hb_assets.core.errors import HbError
from hb_assets.core.record import Refusal
from hb_assets.core.schema import QUARANTINE
from hb_assets.core.settings import Settings
from hb_assets.lake.ingest import decode
from hb_assets.lake.ingest.decode import ROWS, Decoded, Delivery
from hb_assets.lake.storage import engine

_log = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "hb_assets.lake.ingest.isolation")
"""What starts a child; the folder of its results is added."""
_STORAGE = 74
"""Exit code: the disk failed (EX_IOERR); the error number is all that it says."""
_FAILED = 70
"""Exit code: decoding raised an error (EX_SOFTWARE), whose kind is all that it says."""
_CLOCK = 3
"""Seconds by the clock for each of CPU time: others want the CPU as well."""
_FROM_OUTSIDE = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
_FROM_DISK = {signal.SIGBUS, signal.SIGXFSZ}
_ROWS, _REJECTED, _COUNT, _DONE = "rows.arrow", "rejected.arrow", "count", "done"

Suspect = TypeVar("Suspect", bound=Delivery)


class _Header(msgspec.Struct, frozen=True):
    """An entry on its way to the child; `size` bytes of data follow (None: it has none)."""

    shard: int
    ms: int
    seq: int
    own: int | None
    deliveries: int
    size: int | None


@dataclass(frozen=True, slots=True)
class _Entry:
    shard: int
    ms: int
    seq: int
    data: bytes | None
    own: int | None
    deliveries: int


def examine(
    suspects: Sequence[Suspect], settings: Settings
) -> Iterator[tuple[Suspect, Iterator[Decoded]]]:
    """Decode suspects in child processes, and yield the outcome of each, in order.

    It ends early, so that one cycle of a drain stays short: after a poison, and when a child had
    enough to do. Nothing is decided about suspects that are left out.

    Args:
        suspects: entries that were handed out often.
        settings: POISON_MEMORY and POISON_SECONDS, and what is valid.

    Yields:
        The entry, and what it holds, in pieces: its rows and refused lines, or all of its lines as
        refused ones when it is poison.

    Raises:
        OSError: a disk failed, or no process could be started. It says nothing about an entry.
        HbError: the child can't work, or somebody ended it.
    """
    rest = list(suspects)
    while rest:
        done = 0
        with engine.spill_folder(settings) as folder:
            code, said = _run_child(rest, folder, settings)
            for number, entry in enumerate(rest):
                results = folder / str(number)
                if not (results / _DONE).exists():
                    break
                done += 1
                yield entry, _results(results)
            if done == len(rest) or (code == 0 and done):
                return
            how = _how_it_ended(code, said, folder, started=(folder / str(done)).exists())
        if done == 0:
            first = rest[0]
            _log.error(
                "entry %d-%d of shard %02d is poison (%s): it goes to the quarantine",
                *(first.ms, first.seq, first.shard, how),
            )
            message = f"decoding the entry alone, in a process of its own, failed: {how}"
            refusal = Refusal("record", "poison", message)
            yield first, decode.refused(first, refusal, settings)
            return
        rest = rest[done:]


def _run_child(
    suspects: Sequence[Delivery], folder: Path, settings: Settings
) -> tuple[int, list[str]]:
    """Run a child; returns its exit code and the words that it printed."""
    with ExitStack() as stack:
        child = subprocess.Popen(
            [*COMMAND, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,  # a file would lie on the disk whose faults it tells of
            env=settings_module.environment(settings),
            start_new_session=True,  # a Ctrl-C in the terminal is for us
        )
        stack.callback(child.wait)
        stack.callback(child.kill)  # does nothing to one that has ended
        assert child.stdin is not None
        assert child.stderr is not None
        stack.enter_context(child.stderr)
        listener = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(child.kill)  # or the listener would wait for it
        said = listener.submit(child.stderr.read)
        with suppress(BrokenPipeError), child.stdin as pipe:
            for entry in suspects:
                _send(pipe, entry)
        code = child.wait()
        words = said.result().decode(errors="replace").split()
    return code, words


def _send(pipe: IO[bytes], entry: Delivery) -> None:
    size = None if entry.data is None else len(entry.data)
    header = _Header(entry.shard, entry.ms, entry.seq, entry.own, entry.deliveries, size)
    pipe.write(msgspec.json.encode(header) + b"\n")
    pipe.write(entry.data or b"")


def _results(folder: Path) -> Iterator[Decoded]:
    for batch in _batches(folder / _ROWS):
        rows = pa.Table.from_batches([batch])
        yield Decoded(rows, QUARANTINE.empty_table(), [rows.num_rows], 0)
    for batch in _batches(folder / _REJECTED):
        rejected = pa.Table.from_batches([batch])
        yield Decoded(ROWS.empty_table(), rejected, [rejected.num_rows], 0)
    unknown_fields = int((folder / _DONE).read_bytes())
    yield Decoded(ROWS.empty_table(), QUARANTINE.empty_table(), [0], unknown_fields)


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with path.open("rb") as file, pa.ipc.open_stream(file) as stream:
        yield from stream


def _how_it_ended(code: int, said: Sequence[str], folder: Path, *, started: bool) -> str:
    """The reason for the child's end, where that is the entry's fault.

    Raises:
        OSError, HbError: where it isn't.
    """
    if code == _STORAGE:
        number = int(said[-1]) if said and said[-1].isdigit() else errno.EIO
        raise OSError(number, os.strerror(number), str(folder.parent))
    if -code in _FROM_OUTSIDE:
        raise HbError(
            f"the process that decodes suspect entries was ended by {signal.Signals(-code).name}; "
            "they stay in the buffer and are tried again"
        )
    if -code in _FROM_DISK:
        name = signal.Signals(-code).name
        raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}, {name}", str(folder.parent))
    how = f"exit code {code}" if code >= 0 else f"ended by {_name(-code)}"
    if not started:
        raise HbError(
            f"the process that decodes suspect entries can't start ({how}): check the "
            "installation; they stay in the buffer"
        )
    if code == _FAILED:
        # never more than one word: a trace may quote a heartbeat
        return f"it raised {said[0]}" if len(said) == 1 else "it raised an error"
    if code >= 0:  # none of ours: nothing says that the entry did it
        raise HbError(
            f"the process that decodes suspect entries ended without a reason ({how}); they stay "
            "in the buffer and are tried again"
        )
    return how


def _name(number: int) -> str:
    limits = {
        signal.SIGXCPU: " (its limit of CPU time, HB_POISON_SECONDS)",
        signal.SIGALRM: " (its limit of time, HB_POISON_SECONDS)",
        signal.SIGKILL: " (out of memory, most likely)",
    }
    try:
        return signal.Signals(number).name + limits.get(signal.Signals(number), "")
    except ValueError:
        return f"signal {number}"


# -- in the child


def main() -> None:
    """Decode what comes by stdin into the folder that the command line names."""
    try:
        _serve(Path(sys.argv[1]), settings_module.load())
    except OSError as error:
        if error.errno != errno.ENOMEM:
            _end(_STORAGE, str(error.errno or errno.EIO))
        _end(_FAILED, type(error).__name__)
    except Exception as error:  # noqa: BLE001  # whatever it is: only its kind leaves this process
        _end(_FAILED, type(error).__name__)


def _end(code: int, word: str) -> None:
    try:
        os.write(2, f"{word}\n".encode())
    finally:
        os._exit(code)  # nothing that the error left behind can hinder it


def _serve(folder: Path, settings: Settings) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Before anything is allocated: Arrow's allocator keeps what it reserves.
    _limit_memory(settings)
    pa.array([""])  # the first one imports pandas where it is installed: that is no entry's time
    began = monotonic()
    number = 0
    while header := sys.stdin.buffer.readline():
        if number and monotonic() - began > settings.poison_seconds:
            return
        results = folder / str(number)
        results.mkdir(private_files.FOLDER)
        about = msgspec.json.decode(header, type=_Header)
        data = None if about.size is None else sys.stdin.buffer.read(about.size)
        if data is not None and len(data) != about.size:
            return  # the drainer is gone
        _decode(
            _Entry(about.shard, about.ms, about.seq, data, about.own, about.deliveries),
            results,
            settings,
        )
        number += 1


def _limit_memory(settings: Settings) -> None:
    """Limit this process's memory; an allocation beyond the limit fails."""
    # Not the address space: Arrow reserves far more of it than it uses.
    _, highest = resource.getrlimit(resource.RLIMIT_DATA)
    with suppress(ValueError, OSError):  # a system that can't, or a lower limit that stands
        resource.setrlimit(resource.RLIMIT_DATA, (settings.poison_memory, highest))


def _limit_cpu(seconds: float | None) -> None:
    """Have the kernel end us after so much CPU time from now on; None: no limit."""
    _, highest = resource.getrlimit(resource.RLIMIT_CPU)
    limit = highest
    if seconds is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    with suppress(ValueError, OSError):  # a lower limit stands
        resource.setrlimit(resource.RLIMIT_CPU, (limit, highest))


def _decode(entry: Delivery, results: Path, settings: Settings) -> None:
    unknown_fields = 0
    with (
        pa.OSFile(str(results / _ROWS), "wb") as rows_file,
        pa.OSFile(str(results / _REJECTED), "wb") as rejected_file,
        pa.ipc.new_stream(rows_file, ROWS) as rows,
        pa.ipc.new_stream(rejected_file, QUARANTINE) as rejected,
    ):
        parts = decode.pieces([entry], settings, careful=True)
        while part := _within_time(parts, settings):
            rows.write_table(part.rows.combine_chunks())
            rejected.write_table(part.rejected.combine_chunks())
            unknown_fields += part.unknown_fields
    # Its name comes last: a full disk may leave a file without its content.
    (results / _COUNT).write_text(str(unknown_fields))
    (results / _COUNT).rename(results / _DONE)


def _within_time(parts: Iterator[Decoded], settings: Settings) -> Decoded | None:
    """Yield pieces, each within a CPU budget of its own: a large entry has many of them.

    The time that the disk takes to write it doesn't count.
    """
    _limit_cpu(settings.poison_seconds)
    signal.setitimer(signal.ITIMER_REAL, _CLOCK * settings.poison_seconds)
    try:
        return next(parts, None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        _limit_cpu(None)


if __name__ == "__main__":
    main()
