"""Damages files of a lake, one at a time, and queries it: `python -m chaos.flips --count 1000`.

Each time one bit of one file is flipped, or its end is cut off, and a query is made that the file
may matter for: to a new process, or to one that has just read the file. Half of the bits lie in
bytes that the query reads. The answer has to be right, or has to say that something is wrong. At
the end some are asked again with every verification turned off, to see what it is good for.

New processes are forks of one that has loaded everything and read nothing: libraries start threads
for their first work, and a fork has none of them. Some are started from scratch. Everything is
decided by the seed and a damage's number.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import pickle
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode

import msgspec
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from chaos import specimen
from chaos.specimen import Answer, Asked
from hb_assets.buffer import server
from hb_assets.cli.app import load_commands
from hb_assets.core import contracts
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.gateway.server import Server, bound
from hb_assets.lake.storage import checksummed_json, layout, parquet

Outcome = Literal["right", "told", "wrong", "trace"]
GATEWAY = "http"
WAYS: dict[str, specimen.Way] = {
    "command": specimen.command,
    "query": specimen.in_process,
    "consolidate": specimen.consolidation,
    "minutes": specimen.building,
    "forget": specimen.forgetting,
    "audit": specimen.auditing,
    "quarantine": specimen.listing,
    "prune": specimen.pruned,
}
_STRICT = {GATEWAY, "command", "query"}
"""Ways whose answers may lack points where they say so, and never have others."""
READ_BY: dict[str, tuple[str, ...]] = {
    layout.RAW: (GATEWAY, "command", "consolidate", "minutes", "forget", "audit", "prune"),
    layout.HEARTBEATS: (GATEWAY, "command", "consolidate", "minutes", "forget", "audit", "prune"),
    layout.MINUTES: ("minutes", "forget"),
    layout.QUARANTINE: ("quarantine", "forget", "audit", "prune"),
    layout.RELEASED: ("quarantine", "audit"),
    layout.ERASED: ("audit", "consolidate", "forget"),
    layout.PRUNED: (GATEWAY, "command", "consolidate"),
    layout.TOMBSTONES: (GATEWAY, "command", "consolidate", "forget"),
    layout.ACCEPTED: ("audit",),
    "lake.json": ("command", "consolidate", "audit", "forget"),
}
_OFTEN = {layout.RAW: 4, layout.HEARTBEATS: 5, layout.TOMBSTONES: 2}
_PATIENCE_SECONDS = 120.0
_SCRATCH_SHARE = 50
_DEAR = {"forget": 0.2, "consolidate": 0.5, "minutes": 0.5, "audit": 0.5}
"""How often ways are gone that cost much more than the others; those have 1."""
_CUT = 0.15
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["chaos.preloaded"])


@dataclass(frozen=True, slots=True)
class Damage:
    """One damage and what is asked then; `where` is a byte, `bit` None cuts the file off there."""

    number: int
    kind: str
    path: str
    where: int
    bit: int | None
    place: Literal["read", "any", "cut"]
    way: str
    fresh: bool
    asked: Asked

    def done_to(self, path: Path) -> None:
        """Damage the file in place."""
        with path.open("r+b") as file:
            if self.bit is None:
                file.truncate(self.where)
                return
            file.seek(self.where)
            [byte] = file.read(1)
            file.seek(self.where)
            file.write(bytes([byte ^ 1 << self.bit]))


@dataclass(slots=True)
class Tally:
    """Outcomes of damages by kind and place, and a line for each that isn't good."""

    counts: Counter[tuple[str, str, Outcome]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, damage: Damage, outcome: Outcome, trace: str) -> None:
        """Count one."""
        self.counts[damage.kind, damage.place, outcome] += 1
        if outcome in ("wrong", "trace"):
            self.bad.append(f"{outcome} {trace}: {damage}")

    def of(self, *outcomes: Outcome) -> int:
        """The number of damages with one of these outcomes."""
        return sum(count for (*_, found), count in self.counts.items() if found in outcomes)

    def plus(self, other: Tally) -> Tally:
        """Both together."""
        return Tally(self.counts + other.counts, self.bad + other.bad)

    def table(self, title: str) -> Table:
        """Outcomes by kind of file and place."""
        table = Table(title=title, box=box.MARKDOWN)
        for head in ("file", "bit in", "right", "error", "wrong", "unforeseen"):
            table.add_column(
                head, justify="right" if head in ("right", "error", "wrong") else "left"
            )
        outcomes: tuple[Outcome, ...] = ("right", "told", "wrong", "trace")
        for kind in READ_BY:
            for place, said in (("read", "what is read"), ("any", "any byte"), ("cut", "cut off")):
                counts = [self.counts[kind, place, outcome] for outcome in outcomes]
                if any(counts):
                    table.add_row(kind, said, *map(str, counts))
        table.add_section()
        table.add_row("all", "", *(str(self.of(outcome)) for outcome in outcomes))
        return table


def damage_of(number: int, seed: int, root: Path, *, forks_only: bool) -> Damage:
    """The damage of this number to a lake at `root`."""
    chance = random.Random(f"{seed} {number}")
    files: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*")):
        kind = path.relative_to(root).parts[0]
        if path.is_file() and kind in READ_BY:
            files.setdefault(kind, []).append(path)
    kinds = sorted(files)
    [kind] = chance.choices(kinds, [_OFTEN.get(one, 1) for one in kinds])
    path = chance.choice(files[kind])
    ways = [one for one in READ_BY[kind] if not (forks_only and one == GATEWAY)]
    [way] = chance.choices(ways, [_DEAR.get(one, 1.0) for one in ways])
    where: int = chance.randrange(path.stat().st_size)
    bit: int | None = chance.randrange(8)
    place: Literal["read", "any", "cut"] = "any"
    if chance.random() < _CUT:
        bit, place = None, "cut"
    elif chance.random() < 0.5:
        where, place = chance.choice(_bytes_read(path, way)), "read"
    fresh = chance.random() < (0.25 if way == GATEWAY else 0.5)
    name = str(path.relative_to(root))
    return Damage(number, kind, name, where, bit, place, way, fresh, Asked.near(chance, path))


def _bytes_read(path: Path, way: str) -> Sequence[int]:
    """Bytes that decide about the answer: those of the columns that are asked for."""
    size = path.stat().st_size
    if path.suffix != ".parquet" or way not in (GATEWAY, "command", "query", "minutes"):
        return range(size)
    footer = pq.read_metadata(path)
    found: list[int] = []
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for column in map(group.column, range(min(4, group.num_columns))):
            start = column.dictionary_page_offset or column.data_page_offset
            found += range(start, start + column.total_compressed_size)
    return found


# -- asking


def in_fork(work: Callable[[], Answer]) -> Answer:
    """Run `work` in a fork of this process; returns its result, or how the fork died.

    Raises:
        TimeoutError: it came to nothing in time.
    """
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reads)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123  # whatever it says, its answer counts
            os.dup2(nowhere.fileno(), 2)
        try:
            answer = _foreseen(work)
            with os.fdopen(writes, "wb") as pipe:
                pickle.dump(answer, pipe)
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        try:
            if not select.select([pipe], [], [], _PATIENCE_SECONDS)[0]:
                raise TimeoutError("a fork gave no answer")
            told = pipe.read()
        finally:
            os.kill(child, signal.SIGKILL)  # a whole answer is all that is wanted of it
            os.waitpid(child, 0)
    found: Answer = pickle.loads(told) if told else Answer(told=True, trace="died")
    return found


def _foreseen(work: Callable[[], Answer]) -> Answer:
    try:
        return work()
    except (HbError, OSError):
        return Answer(told=True)
    except Exception as error:  # noqa: BLE001  # what nobody foresaw is what we look for
        return Answer(told=True, trace=f"{type(error).__name__} {error}"[:200])


class Gateway:
    """A gateway in a process of its own, serving the lake of a worker."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._child: int | None = None
        self._port = 0

    @property
    def runs(self) -> bool:
        """Whether it was started and not ended."""
        return self._child is not None

    def restart(self) -> None:
        """End it, if it runs, and start another one."""
        self.end()
        with bound("127.0.0.1", 0) as listener:
            self._port = listener.getsockname()[1]
            self._child = os.fork()
            if self._child == 0:
                try:
                    with open(os.devnull, "w") as nowhere:  # noqa: PTH123  # its log is not looked at
                        os.dup2(nowhere.fileno(), 2)
                    Server(self._settings).serve_on(listener)
                finally:
                    os._exit(0)

    def end(self) -> None:
        """End it, if it runs."""
        if self._child is not None:
            os.kill(self._child, signal.SIGKILL)
            os.waitpid(self._child, 0)
            self._child = None

    def ask(self, asked: Asked) -> Answer:
        """Each day by itself, and all of them."""
        found = [self._ask(asked.user, day, day) for day in specimen.DAYS]
        found.append(self._ask(asked.user, specimen.DAYS[0], specimen.DAYS[-1]))
        return Answer(
            frozenset().union(*(one.items for one in found)),
            any(one.told for one in found),
            next((one.trace for one in found if one.trace), ""),
        )

    def _ask(self, user: str, first: Any, last: Any) -> Answer:
        span = {"start": f"{first}T00:00:00Z", "end": f"{last}T23:59:59Z", "granularity": "1s"}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            connection = HTTPConnection("127.0.0.1", self._port, timeout=30)
            try:
                connection.request(
                    "GET", f"/metrics/heart-rate?{urlencode({'user_id': user} | span)}"
                )
                answer = connection.getresponse()
                body = json.loads(answer.read())
            except (OSError, HTTPException):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)  # it starts
                continue
            finally:
                connection.close()
            trace = str(body) if answer.status == 500 and "day" not in body else ""
            return (
                specimen.by_json(answer.status == 200, body)
                if not trace
                else Answer(told=True, trace=trace)
            )


class Worker:
    """Damages a copy of the lake, asks, and puts the copy right again."""

    def __init__(self, home: Path, pristine: Path, number: int) -> None:
        self._pristine, self._home = pristine, home
        self._root = home / f"lake-{number}"
        self._scratch = home / f"scratch-{number}"
        shutil.copytree(pristine, self._root)
        self._settings = specimen.settings_of(home, self._root)
        self._gateway = Gateway(self._settings)
        self._expected: dict[tuple[str, Asked], Answer] = {}
        """Answers of the undamaged lake, by way and by what the way heeds of what is asked."""

    def close(self) -> None:
        """End the gateway."""
        self._gateway.end()

    def outcome(self, damage: Damage) -> tuple[Outcome, str]:
        """The outcome of a damage, and the trace of an unexpected error."""
        key = damage.way, damage.asked.heeded_by(damage.way)
        if key not in self._expected:
            self._expected[key] = self._answer(damage, None)
        right, found = self._expected[key], self._answer(damage, damage)
        assert not right.told, (right, damage)
        if found.trace:
            return "trace", found.trace
        if found.items == right.items:
            return "right", ""
        if found.told and (damage.way not in _STRICT or found.items <= right.items):
            return "told", ""
        return "wrong", ""

    def _answer(self, one: Damage, damage: Damage | None) -> Answer:
        if one.way == GATEWAY:
            return self._by_gateway(one, damage)
        shutil.rmtree(self._scratch, ignore_errors=True)
        shutil.copytree(self._pristine, self._scratch, copy_function=os.link)
        if damage is not None:  # the only file that is changed in place
            (self._scratch / damage.path).unlink()
            shutil.copy2(self._pristine / damage.path, self._scratch / damage.path)
        settings = self._settings.model_copy(update={"lake": str(self._scratch)})
        if damage is not None and damage.fresh and damage.number % _SCRATCH_SHARE == 0:
            damage.done_to(self._scratch / damage.path)
            return _in_new_process(damage, settings)
        return in_fork(lambda: self._in_scratch(one, damage, settings))

    def _in_scratch(self, one: Damage, damage: Damage | None, settings: Settings) -> Answer:
        if damage is not None:
            if not damage.fresh:
                warm = specimen.listing if one.way == "quarantine" else specimen.in_process
                warm(settings, one.asked)
            damage.done_to(self._scratch / damage.path)
        return WAYS[one.way](settings, one.asked)

    def _by_gateway(self, one: Damage, damage: Damage | None) -> Answer:
        if damage is None or not self._gateway.runs:
            self._gateway.restart()
        if damage is None:
            return self._gateway.ask(one.asked)
        if not damage.fresh:
            self._gateway.ask(one.asked)
        path = self._root / damage.path
        try:
            damage.done_to(path)
            if damage.fresh:
                self._gateway.restart()
            return self._gateway.ask(one.asked)
        finally:
            shutil.copy2(self._pristine / damage.path, path)
            shutil.rmtree(self._root / layout.FAULTS, ignore_errors=True)


def _in_new_process(damage: Damage, settings: Settings) -> Answer:
    """Ask in a process that is started from scratch."""
    given = [damage.way, damage.asked, str(settings.home), settings.lake]
    done = subprocess.run(
        [sys.executable, "-m", "chaos.flips", "--ask"],
        input=pickle.dumps(given),
        capture_output=True,
        check=False,
    )
    found: Answer = pickle.loads(done.stdout) if done.stdout else Answer(told=True, trace="died")
    return found


def _asked_by_stdin() -> None:
    way, asked, home, root = pickle.loads(sys.stdin.buffer.read())
    settings = specimen.settings_of(Path(home), Path(root))
    answer = _foreseen(lambda: WAYS[way](settings, asked))
    sys.stdout.buffer.write(pickle.dumps(answer))


# -- a run


@contextlib.contextmanager
def unverified() -> Iterator[None]:
    """Turn every verification off, as the control of the experiment."""
    plain, read = pq.ParquetFile, checksummed_json.read

    def unchecked(*arguments: Any, **named: Any) -> Any:
        return plain(*arguments, **{**named, "page_checksum_verification": False})

    def metadata(_: Path, found: Any) -> Any:
        return found.metadata[parquet.KEY], None

    def just_read(path: Path, kind: Any) -> Any:
        try:
            return msgspec.json.decode(path.read_bytes(), type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return read(path, kind)

    changes: list[tuple[Any, str, Any]] = [
        (parquet, "_verify_end", lambda *_: None),
        (parquet, "verify_open", parquet._footer),  # noqa: SLF001  # what a reader without verification would do
        (parquet, "_sealed", metadata),
        (pq, "ParquetFile", unchecked),
        (checksummed_json, "read", just_read),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def run(home: Path, count: int, seed: int, *, workers: int = 2, control: bool = False) -> Tally:
    """Make a lake under `home`, damage it so many times, and tell what came of it.

    Args:
        home: an empty folder; a server on it serves the gateways.
        count: how many damages.
        seed: decides everything.
        workers: processes that work side by side.
        control: with every verification off.
    """
    pristine = home / "lake"
    settings = specimen.settings_of(home, pristine)
    # one process for each piece of work: it is forked while it is clean
    with ProcessPoolExecutor(workers, _forks, _load, max_tasks_per_child=1) as pool:
        if not pristine.exists():
            pool.submit(specimen.made, settings, seed).result()
        with contextlib.nullcontext() if control else server.borrowed(settings):
            shares = [
                pool.submit(_work, home, number, range(number, count, workers), seed, control)
                for number in range(workers)
            ]
            total = Tally()
            for share in shares:
                total = total.plus(share.result())
    return total


def _load() -> None:
    """Load what forks need, once for all of a process."""
    for module in ("duckdb", "pandera.config", "polars", "pyarrow.dataset"):
        importlib.import_module(module)
    contracts.heartbeats_model()
    contracts.minutes_model()
    load_commands()


def _work(home: Path, number: int, numbers: Sequence[int], seed: int, control: bool) -> Tally:
    pristine = home / "lake"
    worker = Worker(home, pristine, number + (100 if control else 0))
    tally = Tally()
    try:
        with unverified() if control else contextlib.nullcontext():
            for one in numbers:
                damage = damage_of(one, seed, pristine, forks_only=control)
                tally.add(damage, *worker.outcome(damage))
    finally:
        worker.close()
    return tally


def main() -> int:
    """Parse options, run, report. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m chaos.flips", description="Flip bits of a lake's files, and ask."
    )
    parser.add_argument("--count", type=int, default=1000, help="how many damages")
    parser.add_argument("--seed", type=int, default=None, help="default: another one each time")
    parser.add_argument("--control", type=int, default=None, help="how many without verification")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--ask", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        _asked_by_stdin()
        return 0
    seed = random.SystemRandom().randrange(10**6) if options.seed is None else options.seed
    fewer = options.count // 5 if options.control is None else options.control
    console, began = Console(highlight=False), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hb-flips-") as folder:
        home = Path(folder)
        found = run(home, options.count, seed, workers=options.workers)
        console.print(found.table(f"{options.count:,} damages, seed {seed}"))
        for line in found.bad:
            console.print(line)
        if fewer:
            without = run(home, fewer, seed, workers=options.workers, control=True)
            silent = without.of("wrong")
            console.print(without.table(f"control: the first {fewer:,} with verification off"))
            console.print(
                f"with verification off {silent:,} of {fewer:,} answers were silently wrong"
            )
    console.print(f"{time.monotonic() - began:.0f} s")
    return 1 if found.bad else 0


if __name__ == "__main__":
    sys.exit(main())
