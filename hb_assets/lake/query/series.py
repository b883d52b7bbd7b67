"""Queries of one user's heart rate over time, every durable heartbeat included.

A query is answered day by day. A day whose consolidated file is damaged is answered from raw
fragments as long as they hold all of it, with a warning; a day that can't be answered ends the page
before it. Heartbeats that are known to be missing are a warning as well. Files are read by
`user_scan`, points are computed by `aggregate`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError, HbError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.files import tombstones
from hb_assets.lake.integrity import damage, known_faults
from hb_assets.lake.integrity.damage import Place
from hb_assets.lake.integrity.known_faults import Fault
from hb_assets.lake.query import aggregate, user_scan
from hb_assets.lake.query.aggregate import GRANULARITIES, POINTS, Readings, joined
from hb_assets.lake.query.user_scan import Wanted
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.layout import HEARTBEATS
from hb_assets.lake.storage.store import Lake

_ATTEMPTS = 10
_MANY_DAYS = 400
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Query:
    """A query: one user's heart rate over a range of time.

    Attributes:
        user_id: whose heart rate.
        start_ms: first instant, epoch milliseconds.
        end_ms: first instant after the range.
        device_id: all readings of this device; None: readings that device priority keeps.
        granularity: span of a point, a name in GRANULARITIES.
        limit: most points of the answer; None: all of them. The points of one bucket are never
            split, so that one bucket of many devices may hold more.
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
    """Points in order of time and device, and where those left out begin.

    Attributes:
        points: as aggregate.POINTS.
        next_ms: where the query of the next page begins; None: this is the last one.
        warnings: what is wrong with the days of these points: heartbeats that are missing, or a
            damaged file that raw fragments stood in for.
        ended_by: why the day at `next_ms` can't be answered, where that is what ended the page.
    """

    points: pa.Table
    next_ms: int | None = None
    warnings: tuple[Fault, ...] = ()
    ended_by: DamagedFileError | None = None


def answer(lake: Lake, query: Query, settings: Settings, buffered: pa.Table | None = None) -> Page:
    """The points that answer a query, up to its limit.

    Args:
        lake: which lake.
        query: the query.
        settings: for DEVICE_PRIORITY.
        buffered: rows that aren't in the lake yet, as `decode.Decoded.rows`; they have to be read
            before this call, so that none is missed on its way into the lake.

    Raises:
        DamagedFileError: the first day can't be answered; it names the day and the shard.
        HbError: memory is short.
    """
    if buffered is not None:
        buffered = buffered.filter(pc.equal(buffered["user_id"], query.user_id))
    start_ms, end_ms = query.whole_buckets()
    shard = shard_of(query.user_id, lake.shards)
    found: list[pa.Table] = []
    warnings: list[Fault] = []
    count = 0
    for day in _days(lake, start_ms, end_ms, buffered):
        first, last = max(start_ms, days.start_ms(day)), min(end_ms, days.end_ms(day))
        asked = _Day(lake, day, shard, first, last, query, settings, buffered)
        try:
            points, faults = _until_still(asked.answer)
        except DamagedFileError as error:
            error.day, error.shard = day, shard
            known_faults.notice(lake, error, day=day, shard=shard)
            if first == start_ms:
                raise
            return Page(_joined(found), first, tuple(warnings), error)
        found.append(points)
        warnings += faults
        count += points.num_rows
        if query.limit is not None and count > query.limit:
            page = _cut(_joined(found), query.limit)
            if page is not None:
                return replace(page, warnings=tuple(warnings))
    return Page(_joined(found), warnings=tuple(warnings))


def nearest(
    lake: Lake, query: Query, settings: Settings
) -> tuple[dt.datetime | None, dt.datetime | None]:
    """The last point before a query's range, and the first one after it; None: there is none.

    Each day that the lake holds is asked, from the range outwards; most cost a look into a few
    footers. A day that can't be read is passed over: this is for people who wonder where to look.
    """
    start_ms, end_ms = query.whole_buckets()
    known = inventory.days(lake)

    def of(day: dt.date, first: int, last: int, at: int) -> dt.datetime | None:
        first, last = max(first, days.start_ms(day)), min(last, days.end_ms(day))
        if first >= last:
            return None
        try:
            points = answer(lake, replace(query, start_ms=first, end_ms=last), settings).points
        except (HbError, OSError):
            return None
        found: dt.datetime | None = points["timestamp"][at].as_py() if points.num_rows else None
        return found

    before = (of(day, 0, start_ms, -1) for day in reversed(known))
    after = (of(day, end_ms, days.LAST_MS, 0) for day in known)
    return next(filter(None, before), None), next(filter(None, after), None)


def _joined(found: list[pa.Table]) -> pa.Table:
    return pa.concat_tables(found) if found else POINTS.empty_table()


@dataclass(frozen=True, slots=True)
class _Day:
    """A query's part of one day: no bucket spans two of them."""

    lake: Lake
    day: dt.date
    shard: int
    first_ms: int
    end_ms: int
    query: Query
    settings: Settings
    buffered: pa.Table | None

    def answer(self) -> tuple[pa.Table, list[Fault]]:
        """The day's points, and what is wrong with them."""
        user, device = self.query.user_id, self.query.device_id
        forgotten = tombstones.of_user(self.lake, user)
        cutoffs = forgotten.cutoffs if forgotten else None
        wanted = Wanted(user, self.first_ms, self.end_ms, device, cutoffs)
        held = [] if self.buffered is None else user_scan.in_table(self.buffered, wanted)
        found, faults = self._rows(wanted, identified=bool(held))
        found += held
        if not found:
            return POINTS.empty_table(), faults
        points = aggregate.points(
            joined(found),
            self.query.size_ms,
            self.settings.device_priority,
            every_device=device is not None,
        )
        return points, faults

    def _rows(self, wanted: Wanted, *, identified: bool) -> tuple[list[Readings], list[Fault]]:
        """The day's rows; from raw alone where the consolidated file is damaged and raw has all."""
        lake, day, shard = self.lake, self.day, self.shard
        try:
            found = user_scan.of_user(lake, day, shard, wanted, identified=identified)
        except DamagedFileError as error:
            path = layout.consolidated_file(lake.root, day, shard)
            place = Place(HEARTBEATS, day, shard)
            if error.path != path or not damage.raw_has_all(lake, path, place):
                raise
            found = user_scan.of_user(
                lake, day, shard, wanted, identified=identified, raw_alone=True
            )
            known_faults.notice(lake, error, day=day, shard=shard)
            message = f"raw fragments stood in for the consolidated file: {error}"
            stood_in = Fault("damaged", day, shard, None, path, message)
            losses = known_faults.losses(lake, day, shard)
            return found, [stood_in, *(one for one in losses if one.path != path)]
        return found, known_faults.losses(lake, day, shard)


def _days(lake: Lake, start_ms: int, end_ms: int, buffered: pa.Table | None) -> list[dt.date]:
    """Days of the range; of a long range only those that have data, which may be few."""
    if end_ms - start_ms <= _MANY_DAYS * days.MS_PER_DAY:
        return days.days_between(start_ms, end_ms)
    known = set(inventory.days(lake))
    if buffered is not None:
        numbers = buffered["day"].unique().to_pylist()
        known |= {days.day_of(number * days.MS_PER_DAY) for number in numbers}
    first, last = days.day_of(start_ms), days.day_of(end_ms - 1)
    return [day for day in sorted(known) if first <= day <= last]


def _cut(points: pa.Table, limit: int) -> Page | None:
    """The first `limit` points, or fewer: up to the end of a bucket.

    A first bucket that holds more by itself makes a page; None while nothing else is known.
    """
    starts = points["timestamp"].cast(pa.int64()).to_numpy()
    keep = int(starts.searchsorted(starts[limit]))
    if keep == 0:
        keep = int(starts.searchsorted(starts[0], "right"))
    return Page(points.slice(0, keep), int(starts[keep])) if keep < len(starts) else None


def _until_still(ask: Callable[[], Answer]) -> Answer:
    """Run `ask` again when a file vanished or was replaced: its rows are elsewhere now."""
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except FileNotFoundError as error:
            if attempt == _ATTEMPTS - 1:
                raise DamagedFileError(f"the lake can't be read: {_first_line(error)}") from None
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
