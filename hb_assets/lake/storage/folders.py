"""Cache of results about the lake's days, valid until their folders change.

A shard's raw folder changes when a fragment comes or goes. Of the other kinds the one file of a
shard is looked at: a file that is changed in place leaves its folder as it is. What became
unreadable, or readable again, is a change as well.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hb_assets.lake.storage import durable_files, layout
from hb_assets.lake.storage.durable_files import Look
from hb_assets.lake.storage.layout import HEARTBEATS, MINUTES, RAW
from hb_assets.lake.storage.store import Lake

Value = TypeVar("Value")

_SETTLED_NS = 2_000_000_000
_QUIET_NS = 3_600_000_000_000
_REST_SECONDS = 60


@dataclass(slots=True)
class _Known:
    """A cached result, and how folders and files looked then; not checked again `until`."""

    paths: Sequence[Path]
    looks: Sequence[Look | int]
    value: object
    until: float


@dataclass(frozen=True, slots=True)
class Folders:
    """Cache of results by day and kinds of folder.

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
        """The result of `look`, cached while the day's files of these kinds look the same.

        For a quiet day: the same as one or two minutes ago. Pass the same `look` for the same
        `kinds`, always.
        """
        known = self._known.get((day, kinds))
        if known is not None and time.monotonic() < known.until:
            return known.value  # type: ignore[return-value]  # what the same look found
        began = time.time_ns()
        paths = known.paths if known else _paths(lake, day, kinds)
        looks = [_look(path) for path in paths]
        changed = max(one.mtime_ns if isinstance(one, Look) else 0 for one in looks)
        if known is not None and known.looks == looks:
            known.until = _until(day, began - changed)
            return known.value  # type: ignore[return-value]  # what the same look found
        value = look(lake, day)
        # What changes twice within one step of the file system's clock looks the same.
        if changed < began - _SETTLED_NS:
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


def _look(path: Path) -> Look | int:
    """How a path looks, or the number of the error of its stat."""
    try:
        return durable_files.look(path)
    except OSError as error:
        return error.errno or 0
