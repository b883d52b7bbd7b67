"""Folders: what this process remembers of the lake's days, as long as their folders don't change.

Belongs here: knowing without listing files that nothing happened. Doesn't belong here: what is
remembered.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from hb_assets.lake import layout
from hb_assets.lake.store import Lake

Value = TypeVar("Value")

_SETTLED_NS = 2_000_000_000
_QUIET_NS = 3_600_000_000_000
_REST_SECONDS = 60


@dataclass(slots=True)
class _Known:
    """What was found when the folders had last changed at these times; not asked again `until`."""

    folders: Sequence[str]
    changed: Sequence[int]
    value: object
    until: float


@dataclass(frozen=True, slots=True)
class Folders:
    """Results by day and kinds of folder.

    A sensor's tick stats the shard folders of a day, and lists only those that changed. Most days
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
        """What `look` found when the day's folders of these kinds looked as they do now.

        Of a quiet day: as they did one or two minutes ago. Ask with the same `look` for the same
        `kinds`, always.
        """
        known = self._known.get((day, kinds))
        if known is not None and time.monotonic() < known.until:
            return known.value  # type: ignore[return-value]  # what the same look found
        began = time.time_ns()
        folders = known.folders if known else _folders(lake, day, kinds)
        changed = [_changed_ns(folder) for folder in folders]
        if known is not None and known.changed == changed:
            known.until = _until(day, began - max(changed))
            return known.value  # type: ignore[return-value]  # what the same look found
        value = look(lake, day)
        # A folder that changes twice within one step of the file system's clock looks the same.
        if max(changed) < began - _SETTLED_NS:
            self._known[day, kinds] = _Known(folders, changed, value, 0)
        return value


def _until(day: dt.date, quiet_ns: int) -> float:
    if quiet_ns < _QUIET_NS:
        return 0
    # Neighbours fall due one after the other, and not all in one tick.
    return time.monotonic() + _REST_SECONDS * (1 + day.toordinal() % 16 / 16)


def _folders(lake: Lake, day: dt.date, kinds: Sequence[str]) -> list[str]:
    return [
        str(layout.shard_folder(lake.root, kind, day, shard))
        for kind in kinds
        for shard in range(lake.shards)
    ]


def _changed_ns(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns  # noqa: PTH116  # making a Path takes longer than this
    except FileNotFoundError:
        return 0
