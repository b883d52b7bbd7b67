"""Folders: what this process remembers of the lake's days, as long as their folders don't change.

Belongs here: knowing without listing files that nothing happened. Doesn't belong here: what is
remembered.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from hb_assets.lake import layout
from hb_assets.lake.store import Lake

Value = TypeVar("Value")

_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, slots=True)
class Folders:
    """Results by day and kinds of folder.

    A sensor's tick stats the shard folders of every day, and lists only those that changed.
    """

    _known: dict[tuple[dt.date, tuple[str, ...]], tuple[Sequence[int], object]] = field(
        default_factory=dict
    )

    def remembered(
        self,
        lake: Lake,
        day: dt.date,
        kinds: tuple[str, ...],
        look: Callable[[Lake, dt.date], Value],
    ) -> Value:
        """What `look` found when the day's folders of these kinds looked as they do now.

        Ask with the same `look` for the same `kinds`, always.
        """
        began = time.time_ns()
        changed = [
            _changed_ns(lake, kind, day, shard) for kind in kinds for shard in range(lake.shards)
        ]
        known = self._known.get((day, kinds))
        if known is not None and known[0] == changed:
            return known[1]  # type: ignore[return-value]  # what the same look found
        value = look(lake, day)
        # A folder that changes twice within one step of the file system's clock looks the same.
        if max(changed) < began - _SETTLED_NS:
            self._known[day, kinds] = (changed, value)
        return value


def _changed_ns(lake: Lake, kind: str, day: dt.date, shard: int) -> int:
    try:
        return layout.shard_folder(lake.root, kind, day, shard).stat().st_mtime_ns
    except FileNotFoundError:
        return 0
