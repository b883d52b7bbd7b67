"""Tallies: what each worker of a gateway counts, kept where every other worker can read it.

Belongs here: the files under HB_HOME/run/metrics, who is alive by them, and what becomes of the
counts of those who aren't. Doesn't belong here: what is counted (`metrics`).

Prometheus reads one worker, whichever takes its connection, and wants the sum of all. Each worker
writes its counts into a file of its own once a second and holds the kernel's lock on it, which goes
with the process, however it ends. Whoever finds a file without its lock adds it to `kept`,
so that no counter of the gateway ever falls, and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import struct
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from hb_assets.core import private
from hb_assets.core.settings import Settings

SAVE_SECONDS = 1.0
_HEAD = struct.Struct("<II")
"""Bytes that follow, and their CRC-32: a file is written in place, and may be read meanwhile."""
_TRIES = 5
_SUFFIX = ".tally"

_log = logging.getLogger(__name__)


class Counts(msgspec.Struct):
    """What was counted, in one worker or several.

    `totals` only grow; `levels` hold for a process as long as it lives. `requests` has, by route,
    method and status, the seconds that they took together, and then how many fell into each bucket
    of `metrics.BUCKETS` and above. Parts of a key are joined by tabs.
    """

    totals: dict[str, float] = {}
    requests: dict[str, list[float]] = {}
    levels: dict[str, float] = {}

    def add(self, other: Counts) -> None:
        """Add another worker's."""
        for mine, its in ((self.totals, other.totals), (self.levels, other.levels)):
            for name, number in its.items():
                mine[name] = mine.get(name, 0) + number
        for key, cells in other.requests.items():
            before = self.requests.get(key, [0.0] * len(cells))
            # other numbers of buckets are those of another release: what fits is added
            self.requests[key] = [a + b for a, b in zip(before, cells, strict=False)]


class _Kept(msgspec.Struct):
    """The counts of workers that have ended; `taken` names files that are in it already."""

    counts: Counts
    taken: list[str] = []


_NOTHING = msgspec.json.encode(_Kept(Counts()))


class Tallies:
    """The tallies of one gateway: one HB_HOME and port.

    No fault of a disk ever raises here: a gateway goes on, and its metrics lack other workers'.
    """

    def __init__(self, settings: Settings, count: Callable[[], Counts]) -> None:
        self._folder = settings.run_dir / "metrics" / str(settings.gateway_port)
        self._count = count
        self._file: int | None = None
        self._name = ""
        self._stop = threading.Event()

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Write this worker's counts once a second, and a last time at the end of the block."""
        saver = threading.Thread(target=self._save_on, name="tallies", daemon=True)
        saver.start()
        try:
            yield
        finally:
            self._stop.set()
            saver.join(timeout=SAVE_SECONDS)  # a disk that hangs must not hold up the end

    def others(self) -> tuple[Counts, int]:
        """The counts of all other workers, ended ones too, and how many others are alive."""
        try:
            private.make_folder(self._folder)
            with _locked(self._folder / "lock"):
                return self._gathered()
        except OSError as error:
            _log.debug("metrics of this worker alone: %s", error)
            return Counts(), 0

    def _gathered(self) -> tuple[Counts, int]:
        kept, alive = self._read_kept(), []
        ended = {}
        for path in self._folder.glob(f"*{_SUFFIX}"):
            if path.name == self._name:
                continue
            counts, living = _read(path)
            if living:
                alive.append(counts)
            else:
                ended[path.name] = counts
        if ended:
            self._keep(kept, ended)
        found = Counts()
        for counts in (kept.counts, *alive):
            found.add(counts)
        return found, len(alive)

    def _keep(self, kept: _Kept, ended: dict[str, Counts]) -> None:
        """Add the counts of ended workers to the kept ones, and only then remove their files."""
        for name, counts in ended.items():
            if name not in kept.taken:
                counts.levels = {}
                kept.counts.add(counts)
        kept.taken = sorted(ended)
        private.replace(self._folder / "kept", msgspec.json.encode(kept))
        for name in ended:
            (self._folder / name).unlink()

    def _read_kept(self) -> _Kept:
        try:
            text = (self._folder / "kept").read_bytes()
        except FileNotFoundError:
            text = _NOTHING
        try:
            return msgspec.json.decode(text, type=_Kept)
        except msgspec.MsgspecError:
            return _Kept(Counts())

    def _save_on(self) -> None:
        ended = ending = False
        while not ended:
            ended = ending
            try:
                if self._file is None:
                    self._file = self._begin()
                _write(self._file, self._count())
            except OSError as error:
                _log.debug("metrics aren't saved: %s", error)
            ending = ending or self._stop.wait(SAVE_SECONDS)
        if self._file is not None:
            os.close(self._file)

    def _begin(self) -> int:
        """A new file of this worker, locked; under the lock that keeps others from taking it."""
        private.make_folder(self._folder)
        with _locked(self._folder / "lock"):
            name = f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"
            file = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            fcntl.flock(file, fcntl.LOCK_EX)
            self._name = name
        return file


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _write(file: int, counts: Counts) -> None:
    body = msgspec.json.encode(counts)
    os.pwrite(file, _HEAD.pack(len(body), zlib.crc32(body)) + body, 0)


def _read(path: Path) -> tuple[Counts, bool]:
    """A worker's counts (none, where they can't be read), and whether it lives."""
    file = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            living = False
        except BlockingIOError:
            living = True
        for _ in range(_TRIES):
            text = os.pread(file, os.fstat(file).st_size, 0)
            if len(text) < _HEAD.size:
                break
            size, crc32 = _HEAD.unpack_from(text)
            body = text[_HEAD.size : _HEAD.size + size]
            if len(body) == size and zlib.crc32(body) == crc32:
                return msgspec.json.decode(body, type=Counts), living
    except msgspec.MsgspecError:  # another release wrote it
        pass
    finally:
        os.close(file)
    return Counts(), living
