"""Questions to the lake: one user's minute-level heart rate, every durable heartbeat included.

Belongs here: reading consolidated files together with pending fragments (invariant 5). Doesn't
belong here: HTTP, and what still lies in the buffer.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import duckdb

from hb_assets import days
from hb_assets.errors import DamagedFileError
from hb_assets.lake import consolidated, fragments, inventory, parquet, tombstones
from hb_assets.lake.consolidated import Current
from hb_assets.lake.engine import engine
from hb_assets.lake.minutes import AGGREGATE, MINUTE_MS
from hb_assets.lake.store import Lake
from hb_assets.record import shard_of
from hb_assets.schema import ARRIVAL
from hb_assets.settings import Settings

_ATTEMPTS = 10
_MANY_DAYS = 400
Answer = TypeVar("Answer")


class Point(NamedTuple):
    """Mean heart rate of one device in one minute: `minute_ms` is its start, epoch ms."""

    minute_ms: int
    heart_rate: int
    device_id: str


_USER = {
    forgotten: f"""
WITH readings AS (
    SELECT user_id, device_id, timestamp,
        arg_max(heart_rate, row({", ".join(ARRIVAL)})) AS heart_rate
    FROM read_parquet($paths, hive_partitioning = false) AS delivered
    {tombstones.NOT_REACHED if forgotten else ""}
    WHERE user_id = $user
        AND timestamp >= make_timestamptz($start * 1000)
        AND timestamp < make_timestamptz($end * 1000)
    GROUP BY user_id, device_id, timestamp
)
"""
    for forgotten in (False, True)
}


def whole_minutes(start_ms: int, end_ms: int) -> tuple[int, int]:
    """The range grown to whole minutes: its start rounded down, its end up."""
    return start_ms // MINUTE_MS * MINUTE_MS, -(-end_ms // MINUTE_MS) * MINUTE_MS


def minute_points(
    lake: Lake,
    user_id: str,
    start_ms: int,
    end_ms: int,
    device_id: str | None,
    settings: Settings,
) -> list[Point]:
    """One point per minute and device, by minute and device.

    Args:
        lake: which lake.
        user_id: whose heart rate.
        start_ms: first instant, epoch milliseconds; rounded down to its minute.
        end_ms: first instant after the range; rounded up to a minute.
        device_id: all readings of this device; None: readings that device priority keeps.
        settings: for DEVICE_PRIORITY, memory and threads.

    Raises:
        DamagedFileError: a file can't be read.
    """
    start_ms, end_ms = whole_minutes(start_ms, end_ms)

    def ask() -> list[Point]:
        shard = shard_of(user_id, lake.shards)
        forgotten = tombstones.of_user(lake, user_id)
        paths, published = _files(lake, shard, start_ms, end_ms)
        if not paths:
            return []
        with engine(settings) as connection:
            try:
                if forgotten:
                    connection.register("cutoffs", tombstones.table(forgotten.cutoffs))
                rows = connection.sql(
                    _USER[forgotten is not None] + AGGREGATE,
                    params={
                        "paths": paths,
                        "user": user_id,
                        "start": start_ms,
                        "end": end_ms,
                        "priority": list(settings.device_priority),
                    },
                ).fetchall()
            except duckdb.IOException:
                raise
            except duckdb.Error as error:
                raise parquet.explained(error, map(Path, paths)) from None
        for day, seen in published.items():
            if not consolidated.is_published(lake, seen, day, shard):
                raise _MovedError(f"day {day.isoformat()} is being consolidated all the time")
        return _points(rows, device_id)

    return _until_still(ask)


class _MovedError(Exception):
    """A file was replaced between the reading of its note and of its rows."""


def _files(
    lake: Lake, shard: int, start_ms: int, end_ms: int
) -> tuple[list[str], dict[dt.date, Current]]:
    """Files that hold every durable row of the shard's days, and those of them that are replaced.

    Raw is listed first (invariant 5).
    """
    paths = []
    replaced = {}
    for day in _days(lake, start_ms, end_ms):
        raw = fragments.listed(lake, day, shard)
        published = consolidated.current(lake, day, shard)
        if published is not None:
            paths.append(str(published.path))
            replaced[day] = published
        paths += [str(one.path) for one in consolidated.pending(published, raw)]
    return paths, replaced


def _days(lake: Lake, start_ms: int, end_ms: int) -> list[dt.date]:
    """Days of the range; of a long range those that the lake holds, which may be far fewer."""
    if end_ms - start_ms <= _MANY_DAYS * days.MS_PER_DAY:
        return days.days_between(start_ms, end_ms)
    first, last = days.day_of(start_ms), days.day_of(end_ms - 1)
    return [day for day in inventory.days(lake) if first <= day <= last]


def _until_still(ask: Callable[[], Answer]) -> Answer:
    """Ask again when a file vanished or was replaced meanwhile: its rows are elsewhere now."""
    for attempt in range(_ATTEMPTS):
        try:
            return ask()
        except (duckdb.IOException, FileNotFoundError, _MovedError) as error:
            if attempt == _ATTEMPTS - 1:
                raise DamagedFileError(f"the lake can't be read: {_first_line(error)}") from None
    raise AssertionError("unreachable")


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _points(rows: Sequence[tuple[Any, ...]], device_id: str | None) -> list[Point]:
    points = []
    for _, minute, device, all_sum, all_count, _, _, kept_sum, kept_count, _, _ in rows:
        if device_id is None:
            total, count = kept_sum, kept_count
        elif device == device_id:
            total, count = all_sum, all_count
        else:
            continue
        if count:  # the mean, half rounded up
            points.append(Point(minute, (2 * total + count) // (2 * count), device))
    return points
