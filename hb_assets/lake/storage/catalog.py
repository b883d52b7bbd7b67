"""What this process remembers of the lake's files, folders and days, as long as they look the same.

`remembered` keeps what was made of a file, `names` what lies in a folder, `Folders` what was found
of a day. All compare stat results. A file system's clock may stand still while two changes follow
each other closely, so that nothing is kept of what was changed just now.
"""

from __future__ import annotations

import datetime as dt
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeAlias, TypeVar

from hb_assets.lake.storage import durable_files, layout
from hb_assets.lake.storage.durable_files import Fingerprint
from hb_assets.lake.storage.layout import HEARTBEATS, MINUTES, RAW
from hb_assets.lake.storage.store import Lake

Value = TypeVar("Value")
PathType = TypeVar("PathType", Path, str)
P = ParamSpec("P")
Maker: TypeAlias = Callable[Concatenate[PathType, Fingerprint, P], Value]

SETTLED_NS = 1_000_000_000
_QUIET_NS = 3_600_000_000_000
_REST_SECONDS = 60


def remembered(most: int) -> Callable[[Maker[PathType, P, Value]], Maker[PathType, P, Value]]:
    """Decorate a function of a file and its fingerprint: a cache, valid while that stays the same.

    Args:
        most: of how many files; the ones that were entered first go first.
    """

    def decorate(make: Maker[PathType, P, Value]) -> Maker[PathType, P, Value]:
        known: OrderedDict[Hashable, tuple[Fingerprint, Value]] = OrderedDict()
        lock = threading.Lock()

        @wraps(make)
        def found(path: PathType, seen: Fingerprint, /, *args: P.args, **kwargs: P.kwargs) -> Value:
            key = (path, *args, *kwargs.items())
            before = known.get(key)
            if before is not None and before[0] == seen:
                return before[1]
            began = time.time_ns()
            value = make(path, seen, *args, **kwargs)
            if abs(began - seen.ctime_ns) > SETTLED_NS:
                with lock:
                    known[key] = seen, value
                    if len(known) > most:
                        known.popitem(last=False)
            return value

        return found

    return decorate


def names(folder: Path) -> frozenset[str]:
    """Names of all that lies in a folder now; none where there is no folder.

    A list is kept only if it was made a while after the folder's time of change had been seen
    first: by then another change would have another time, whoever's clock it is.

    Raises:
        OSError: it can't be listed.
    """
    looked_at = time.monotonic()
    try:
        now = durable_files.fingerprint(folder)
    except FileNotFoundError:
        return frozenset()
    with _turn:
        seen, since, listed = _listings.get(folder, (None, looked_at, None))
    if seen != now:
        since, listed = looked_at, None
    if listed is None:
        try:
            with os.scandir(folder) as found:
                listed = frozenset(entry.name for entry in found)
        except FileNotFoundError:
            return frozenset()
        settled = looked_at - since >= SETTLED_NS / 1e9
        with _turn:
            _listings[folder] = now, since, listed if settled else None
            _listings.move_to_end(folder)
            if len(_listings) > _MOST_LISTINGS:
                _listings.popitem(last=False)
    return listed


_MOST_LISTINGS = 2_000
_listings: OrderedDict[Path, tuple[Fingerprint, float, frozenset[str] | None]] = OrderedDict()
_turn = threading.Lock()


@dataclass(slots=True)
class _Known:
    """What was found when folders and files looked so; not asked again `until`."""

    paths: Sequence[Path]
    looks: Sequence[Fingerprint | int]
    value: object
    until: float


@dataclass(frozen=True, slots=True)
class Folders:
    """Results by day and kinds of folder.

    A shard's raw folder changes when a fragment comes or goes. Of the other kinds the one file of a
    shard is looked at: a file that is changed in place leaves its folder as it is. What became
    unreadable, or readable again, is a change as well.

    A sensor's tick stats what a day has in each shard, and lists only what changed. Most days
    of a year change no more: one that has been quiet for an hour is looked at once in one to two
    minutes, in turns, so that a tick costs the same however many days there are.
    """

    _known: dict[tuple[dt.date, tuple[str, ...]], _Known] = field(default_factory=dict)

    def remembered(
        self,
        lake: Lake,
        day: dt.date,
        kinds: tuple[str, ...],
        look: Callable[[Lake, dt.date], Value],
    ) -> Value:
        """What `look` found when the day's files of these kinds looked as they do now.

        Of a quiet day: as they did one or two minutes ago. Ask with the same `look` for the same
        `kinds`, always.
        """
        known = self._known.get((day, kinds))
        if known is not None and time.monotonic() < known.until:
            return known.value  # type: ignore[return-value]  # what the same look found
        began = time.time_ns()
        paths = known.paths if known else _paths(lake, day, kinds)
        looks = [_look(path) for path in paths]
        changed = max(one.mtime_ns if isinstance(one, Fingerprint) else 0 for one in looks)
        if known is not None and known.looks == looks:
            known.until = _until(day, began - changed)
            return known.value  # type: ignore[return-value]  # what the same look found
        value = look(lake, day)
        # What changes twice within one step of the file system's clock looks the same.
        if changed < began - 2 * SETTLED_NS:
            self._known[day, kinds] = _Known(paths, looks, value, 0)
        return value


def _until(day: dt.date, quiet_ns: int) -> float:
    if quiet_ns < _QUIET_NS:
        return 0
    # Neighbours fall due one after the other, and not all in one tick.
    return time.monotonic() + _REST_SECONDS * (1 + day.toordinal() % 16 / 16)


_PLACES: dict[str, Callable[[Path, dt.date, int], Path]] = {
    RAW: lambda root, day, shard: layout.shard_folder(root, RAW, day, shard),
    HEARTBEATS: layout.consolidated_file,
    MINUTES: layout.minutes_file,
}


def _paths(lake: Lake, day: dt.date, kinds: Sequence[str]) -> list[Path]:
    return [_PLACES[kind](lake.root, day, shard) for kind in kinds for shard in range(lake.shards)]


def _look(path: Path) -> Fingerprint | int:
    """How it looks, or the number of the error that keeps us from looking."""
    try:
        return durable_files.fingerprint(path)
    except OSError as error:
        return error.errno or 0
