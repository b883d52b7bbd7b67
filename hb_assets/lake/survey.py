"""The survey: what the whole lake holds, in one look that costs little when little changed.

Belongs here: sums over all days, for metrics and health, and what is overdue. Doesn't belong here:
a single day (`inventory`), counting rows (`ledger`), and when a day is due (`policy`).
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass

from hb_assets.errors import DamagedFileError
from hb_assets.lake import inventory, policy
from hb_assets.lake.folders import Folders
from hb_assets.lake.inventory import DayState
from hb_assets.lake.layout import HEARTBEATS, MINUTES, RAW
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings

_BREATH_SECONDS = 0.001
"""Rest after each day whose files were read: requests are served by the same interpreter."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Sums over all days, as `inventory.DayState` has them.

    `overdue` is the day whose oldest pending fragment is farthest beyond the age at which it should
    have been consolidated, and `overdue_seconds` how far; `damaged` names days that can't be read,
    each in one line.
    """

    days: int = 0
    fragments: int = 0
    pending_fragments: int = 0
    pending_rows: int = 0
    rows: int = 0
    unique: int = 0
    repeats: int = 0
    corrections: int = 0
    replayed: int = 0
    rows_written: int = 0
    bytes: int = 0
    overdue: dt.date | None = None
    overdue_seconds: float = 0.0
    damaged: tuple[str, ...] = ()

    @property
    def write_amplification(self) -> float:
        """Rows that consolidations wrote, for each row that they took in; 0 before the first."""
        return self.rows_written / self.rows if self.rows else 0.0


class Surveyor:
    """Looks at a lake again and again; files of days that didn't change aren't opened again.

    A look stats the folders of every day; for one thread.
    """

    def __init__(self, lake: Lake, settings: Settings) -> None:
        self._lake = lake
        self._settings = settings
        self._folders = Folders()

    def look(self) -> Survey:
        """The lake now."""
        states: list[DayState] = []
        damaged: list[str] = []
        for day in inventory.days(self._lake):
            try:
                states.append(
                    self._folders.remembered(
                        self._lake, day, (RAW, HEARTBEATS, MINUTES), self._read
                    )
                )
            except DamagedFileError as error:
                damaged.append(str(error))
            except FileNotFoundError:
                continue  # pruned while it was looked at: the next look has it
        return summed(states, self._settings, damaged)

    def _read(self, lake: Lake, day: dt.date) -> DayState:
        time.sleep(_BREATH_SECONDS)
        return inventory.day_state(lake, day, self._settings)


def summed(states: Sequence[DayState], settings: Settings, damaged: Sequence[str] = ()) -> Survey:
    """The survey of these days, and of such as can't be read."""

    def total(name: str) -> int:
        return sum(getattr(state, name) for state in states)

    now_ms = time.time_ns() // 1_000_000
    late = [(policy.overdue_seconds(one, now_ms, settings), one.day) for one in states]
    seconds, day = max(late, default=(0.0, None))
    return Survey(
        days=len(states) + len(damaged),
        fragments=total("fragments"),
        pending_fragments=total("pending_fragments"),
        pending_rows=total("pending_rows"),
        rows=total("rows"),
        unique=total("unique"),
        repeats=total("repeats"),
        corrections=total("corrections"),
        replayed=total("replayed"),
        rows_written=total("rows_written"),
        bytes=total("bytes"),
        overdue=day if seconds > 0 else None,
        overdue_seconds=seconds,
        damaged=tuple(damaged),
    )
