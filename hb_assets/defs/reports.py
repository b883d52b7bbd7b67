"""The drain sensor's cursor, and which days' fragments it still has to report to Dagster.

Reports come from the lake, never from the memory of whoever wrote: fragments of a killed tick or
of an `hb drain` worker are found by the next tick. With several writers neither names nor mtimes
are monotone, so that the cursor keeps a digest of the fragment names for each day.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping

import msgspec

from hb_assets.core.errors import HbError
from hb_assets.defs.outcomes import line
from hb_assets.lake import inventory
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.catalog import Folders
from hb_assets.lake.storage.layout import RAW
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.alarms import Raised
from hb_assets.pipeline.drain import LONGEST_PAUSE, pause_after

PAUSE_SECONDS = 60
"""A day that changes all the time is reported so often: each report stays in the log for ever.

At every tick of a steady day it would be 17,000 a day, and a gigabyte a month.
"""
_DIGITS = 8
"""Of a digest, as many as the cursor keeps: it is stored with each of 17,000 ticks a day."""


class Cursor(msgspec.Struct, frozen=True):
    """The drain sensor's cursor: what was reported.

    `months` has digests by month (`2025-01`) and day of the month (`15`); `last` is the day that
    was reported last, behind which the next tick goes on; `recent` are the days that were reported
    within PAUSE_SECONDS, with when (epoch milliseconds); `alarms` are those that stand; `faults`
    of draining came in a row, so that it rests until `rest_until_ms` (epoch milliseconds).
    """

    last: str = ""
    recent: dict[str, int] = {}
    months: dict[str, dict[str, str]] = {}
    alarms: dict[str, Raised] = {}
    faults: int = 0
    rest_until_ms: int = 0

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """The cursor out of a sensor's context.

        A text that isn't one starts anew, which only means that days are reported again.
        """
        try:
            return msgspec.json.decode(text or "{}", type=cls)
        except msgspec.MsgspecError:
            return cls()

    def __str__(self) -> str:
        return msgspec.json.encode(self).decode()

    def digest(self, day: dt.date) -> str | None:
        """The digest that was reported of a day."""
        month, number = _keys(day)
        return self.months.get(month, {}).get(number)

    def pauses(self, day: dt.date, now_ms: int) -> bool:
        """Whether the day was reported a moment ago; a clock that was set back prolongs nothing."""
        at = self.recent.get(day.isoformat())
        return at is not None and _is_recent(at, now_ms)

    def advanced(
        self, reported: Mapping[dt.date, str], alarms: dict[str, Raised], now_ms: int
    ) -> Cursor:
        """The cursor after these days were reported now, in this order; no other day advances.

        Whether draining rests is as before.
        """
        months = {month: dict(digests) for month, digests in self.months.items()}
        last = self.last
        recent = {key: at for key, at in self.recent.items() if _is_recent(at, now_ms)}
        for day, digest in reported.items():
            month, number = _keys(day)
            months.setdefault(month, {})[number] = digest
            last = day.isoformat()
            recent[last] = now_ms
        return Cursor(last, recent, months, alarms, self.faults, self.rest_until_ms)

    def resting(self, now_ms: int) -> bool:
        """Whether draining rests after faults; a clock that was set back doesn't prolong it."""
        return 0 < self.rest_until_ms - now_ms <= LONGEST_PAUSE * 1000

    def after_drain(self, *, failed: bool, now_ms: int) -> Cursor:
        """The cursor after a try to drain: with each fault in a row it rests longer."""
        faults = self.faults + 1 if failed else 0
        rest = round(pause_after(faults) * 1000) if failed else 0
        return msgspec.structs.replace(self, faults=faults, rest_until_ms=rest and now_ms + rest)


def _keys(day: dt.date) -> tuple[str, str]:
    return f"{day:%Y-%m}", f"{day:%d}"


def _is_recent(at_ms: int, now_ms: int) -> bool:
    return 0 <= now_ms - at_ms < PAUSE_SECONDS * 1000


def unreported(
    lake: Lake,
    cursor: Cursor,
    folders: Folders,
    accepted: Callable[[dt.date], bool],
    now_ms: int,
    faults: dict[str, str],
) -> Iterator[tuple[dt.date, str]]:
    """Days whose fragments differ from what was reported, with the digest of the present ones.

    They begin behind the day that was reported last and wrap around, so that days which change all
    the time can't keep others waiting. Those that were reported a moment ago wait.

    Args:
        lake: which lake.
        cursor: what was reported.
        folders: what this process remembers of the lake.
        accepted: whether Dagster has a partition of the day.
        now_ms: the clock, epoch milliseconds.
        faults: gets the name and the message of an alarm for each day that can't be read; the
            others are reported all the same.
    """
    found = layout.days_of(lake.root, RAW)
    behind = [day for day in found if day.isoformat() > cursor.last]
    for day in [*behind, *found[: len(found) - len(behind)]]:
        if not accepted(day) or cursor.pauses(day, now_ms):
            continue
        try:
            now = folders.remembered(lake, day, (RAW,), inventory.raw_digest)[:_DIGITS]
        except (HbError, OSError) as error:
            faults[f"unreported:{day}"] = f"{day} can't be reported: {line(error)}"
            continue
        if now != cursor.digest(day):
            yield day, now
