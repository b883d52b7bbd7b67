"""UTC dates of event time, which are the partitions of the lake and of Dagster.

Arithmetic between epoch milliseconds, dates and partition keys. Nothing here reads a clock: callers
pass "now" as epoch milliseconds.
"""

from __future__ import annotations

import datetime as dt
import math

MS_PER_DAY = 86_400_000
EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_EPOCH_ORDINAL = dt.date(1970, 1, 1).toordinal()
LAST_MS = (dt.date.max.toordinal() - _EPOCH_ORDINAL + 1) * MS_PER_DAY - 1
"""The calendar's last millisecond, 9999-12-31T23:59:59.999Z."""


def day_of(epoch_ms: int) -> dt.date:
    """UTC date of `epoch_ms`; beyond the calendar's ends (0001 to 9999) the nearest date."""
    clamped = min(max(epoch_ms, -(_EPOCH_ORDINAL - 1) * MS_PER_DAY), LAST_MS)
    return dt.date.fromordinal(_EPOCH_ORDINAL + clamped // MS_PER_DAY)


def ms_of(moment: dt.datetime) -> int:
    """Epoch milliseconds of an instant (naive means UTC); finer digits are cut off."""
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    gap = moment - EPOCH
    return gap.days * MS_PER_DAY + gap.seconds * 1000 + gap.microseconds // 1000


def start_ms(day: dt.date) -> int:
    """Epoch milliseconds of the day's first instant, UTC."""
    return (day.toordinal() - _EPOCH_ORDINAL) * MS_PER_DAY


def end_ms(day: dt.date) -> int:
    """Epoch milliseconds of the first instant after the day, UTC."""
    return start_ms(day) + MS_PER_DAY


def days_between(first_ms: int, end_ms_exclusive: int) -> list[dt.date]:
    """Days that the half-open range [first_ms, end_ms_exclusive) touches, in order."""
    if end_ms_exclusive <= first_ms:
        return []
    first, last = day_of(first_ms), day_of(end_ms_exclusive - 1)
    return [first + dt.timedelta(days=n) for n in range((last - first).days + 1)]


def partitions_end_offset(max_future: dt.timedelta) -> int:
    """Daily partitions needed beyond yesterday: today, and as far as the future is accepted."""
    return 1 + math.ceil(max_future / dt.timedelta(days=1))


def parse_day(text: str) -> dt.date:
    """A partition key `YYYY-MM-DD`. Raises ValueError when it isn't one."""
    day = dt.date.fromisoformat(text)
    if day.isoformat() != text:
        raise ValueError(f"not a day like 2025-01-15: {text!r}")
    return day
