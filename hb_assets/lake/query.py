"""Questions to the lake: one user's heart rate over time, every durable heartbeat included.

Belongs here: a question, its days one by one, and the page of points that answers it. Doesn't
belong here: files (`rows`), the rule behind a point (`buckets`), HTTP, and reading the buffer.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from hb_assets import days
from hb_assets.errors import DamagedFileError, HbError
from hb_assets.lake import buckets, inventory, rows, tombstones
from hb_assets.lake.buckets import GRANULARITIES, POINTS, joined
from hb_assets.lake.rows import Wanted
from hb_assets.lake.store import Lake
from hb_assets.record import shard_of
from hb_assets.settings import Settings

_ATTEMPTS = 10
_MANY_DAYS = 400
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked.

    Attributes:
        user_id: whose heart rate.
        start_ms: first instant, epoch milliseconds.
        end_ms: first instant after the range.
        device_id: all readings of this device; None: readings that device priority keeps.
        granularity: span of a point, a name in GRANULARITIES.
        limit: most points of the answer; None: all of them. The points of one bucket are never
            parted, so that one bucket of many devices may hold more.
    """

    user_id: str
    start_ms: int
    end_ms: int
    device_id: str | None = None
    granularity: str = "1m"
    limit: int | None = None

    @property
    def size_ms(self) -> int:
        """Span of a point in milliseconds."""
        return GRANULARITIES[self.granularity]

    def whole_buckets(self) -> tuple[int, int]:
        """The range grown to whole buckets: its start rounded down, its end up."""
        size = self.size_ms
        return self.start_ms // size * size, -(-self.end_ms // size) * size


@dataclass(frozen=True, slots=True)
class Page:
    """Points (buckets.POINTS) in order of time and device; `next_ms`: where those left out begin.

    Ask the same question from `next_ms` on for the next page; None: this is the last one.
    """

    points: pa.Table
    next_ms: int | None = None


def answer(
    lake: Lake, question: Question, settings: Settings, buffered: pa.Table | None = None
) -> Page:
    """The points of a question, as far as its limit lets them.

    Args:
        lake: which lake.
        question: what is asked.
        settings: for DEVICE_PRIORITY.
        buffered: rows that aren't in the lake yet, as `decode.Decoded.rows`; they have to be read
            before this call, so that none is missed on its way into the lake.

    Raises:
        DamagedFileError: a file can't be read.
        HbError: memory is short.
    """
    if buffered is not None:
        buffered = buffered.filter(pc.equal(buffered["user_id"], question.user_id))
    found: list[pa.Table] = []
    count = 0
    for points in _days_points(lake, question, settings, buffered):
        found.append(points)
        count += points.num_rows
        if question.limit is not None and count > question.limit:
            page = _cut(pa.concat_tables(found), question.limit)
            if page is not None:
                return page
    return Page(pa.concat_tables(found) if found else POINTS.empty_table())


def nearest(
    lake: Lake, question: Question, settings: Settings
) -> tuple[dt.datetime | None, dt.datetime | None]:
    """The last point before a question's range, and the first one after it; None: there is none.

    Each day that the lake holds is asked, from the range outwards; most cost a look into a few
    footers. A day that can't be read is passed over: this is for people who wonder where to look.
    """
    start_ms, end_ms = question.whole_buckets()
    known = inventory.days(lake)

    def of(day: dt.date, first: int, last: int, at: int) -> dt.datetime | None:
        first, last = max(first, days.start_ms(day)), min(last, days.end_ms(day))
        if first >= last:
            return None
        try:
            points = answer(lake, replace(question, start_ms=first, end_ms=last), settings).points
        except (HbError, OSError):
            return None
        found: dt.datetime | None = points["timestamp"][at].as_py() if points.num_rows else None
        return found

    before = (of(day, 0, start_ms, -1) for day in reversed(known))
    after = (of(day, end_ms, days.LAST_MS, 0) for day in known)
    return next(filter(None, before), None), next(filter(None, after), None)


def _days_points(
    lake: Lake, question: Question, settings: Settings, buffered: pa.Table | None
) -> Iterator[pa.Table]:
    """Points of each day: no bucket spans two of them."""
    start_ms, end_ms = question.whole_buckets()
    shard = shard_of(question.user_id, lake.shards)
    for day in _days(lake, start_ms, end_ms, buffered):
        first, last = max(start_ms, days.start_ms(day)), min(end_ms, days.end_ms(day))

        def ask(day: dt.date = day, first: int = first, last: int = last) -> pa.Table:
            forgotten = tombstones.of_user(lake, question.user_id)
            wanted = Wanted(
                question.user_id,
                first,
                last,
                question.device_id,
                forgotten.cutoffs if forgotten else None,
            )
            held = [] if buffered is None else rows.in_table(buffered, wanted)
            found = rows.of_user(lake, day, shard, wanted, identified=bool(held)) + held
            if not found:
                return POINTS.empty_table()
            return buckets.points(
                joined(found),
                question.size_ms,
                settings.device_priority,
                every_device=question.device_id is not None,
            )

        yield _until_still(ask)


def _days(lake: Lake, start_ms: int, end_ms: int, buffered: pa.Table | None) -> list[dt.date]:
    """Days of the range; of a long range those of which there is anything, which may be few."""
    if end_ms - start_ms <= _MANY_DAYS * days.MS_PER_DAY:
        return days.days_between(start_ms, end_ms)
    known = set(inventory.days(lake))
    if buffered is not None:
        numbers = buffered["day"].unique().to_pylist()
        known |= {days.day_of(number * days.MS_PER_DAY) for number in numbers}
    first, last = days.day_of(start_ms), days.day_of(end_ms - 1)
    return [day for day in sorted(known) if first <= day <= last]


def _cut(points: pa.Table, limit: int) -> Page | None:
    """The first `limit` of more points, or fewer: up to the end of a bucket.

    A first bucket that holds more by itself makes a page; None while nothing else is known.
    """
    starts = points["timestamp"].cast(pa.int64()).to_numpy()
    keep = int(starts.searchsorted(starts[limit]))
    if keep == 0:
        keep = int(starts.searchsorted(starts[0], "right"))
    return Page(points.slice(0, keep), int(starts[keep])) if keep < len(starts) else None


def _until_still(ask: Callable[[], Answer]) -> Answer:
    """Ask again when a file vanished or was replaced meanwhile: its rows are elsewhere now."""
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except FileNotFoundError as error:
            if attempt == _ATTEMPTS - 1:
                raise DamagedFileError(f"the lake can't be read: {_first_line(error)}") from None
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
