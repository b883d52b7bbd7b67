"""The rule that decides when a day is due for consolidation, as pure functions.

It keeps write amplification down (a day is rewritten when its pending rows are a fair share of it)
and late data from waiting for ever. Runs are requested and tracked by the consolidation sensor
(`defs.sensors.consolidation`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from hb_assets.core.days import day_of, end_ms
from hb_assets.core.settings import Settings
from hb_assets.lake.inventory import DayState


def due(state: DayState, now_ms: int, settings: Settings) -> str | None:
    """Why the day should be consolidated now, in a few words; None when it shouldn't.

    Args:
        state: how the day stands.
        now_ms: the clock, epoch milliseconds.
        settings: the CONSOLIDATE_* thresholds and MAX_PENDING_FRAGMENTS.
    """
    if state.pending_fragments == 0:
        if state.unique and not state.minutes_current:
            return "minutes are stale"
        return None
    enough = max(settings.consolidate_min_rows, settings.consolidate_ratio * state.unique)
    if state.pending_rows >= enough:
        return f"{state.pending_rows} rows are pending"
    if state.most_pending > settings.max_pending_fragments:
        return f"{state.most_pending} fragments of one shard are pending"
    oldest_ms = state.oldest_pending_ms
    if oldest_ms is not None and overdue_seconds(state.day, oldest_ms, now_ms, settings) > 0:
        age_ms = now_ms - oldest_ms
        return f"the oldest pending fragment is {age_ms // 60_000} min old"
    return None


def overdue_seconds(
    day: dt.date, oldest_pending_ms: int | None, now_ms: int, settings: Settings
) -> float:
    """Seconds that a day's oldest pending fragment is beyond its CONSOLIDATE_MAX_AGE; 0: it isn't.

    That age begins when the day has ended: stragglers of its last minutes then come along, instead
    of having the day written once more.
    """
    if oldest_pending_ms is None:
        return 0.0
    since_ms, most = oldest_pending_ms, settings.consolidate_max_age_today
    if day < day_of(now_ms):
        since_ms, most = max(since_ms, end_ms(day)), settings.consolidate_max_age
    return max(0.0, (now_ms - since_ms) / 1000 - most.total_seconds())


def most_overdue(
    oldest: Iterable[tuple[dt.date, int | None]], now_ms: int, settings: Settings
) -> tuple[dt.date | None, float]:
    """The day whose oldest pending fragment is overdue most, and by how many seconds.

    (None, 0) when none is beyond its age.
    """
    late = [(overdue_seconds(day, ms, now_ms, settings), day) for day, ms in oldest]
    seconds, day = max(late, default=(0.0, None))
    return (day, seconds) if seconds > 0 else (None, 0.0)
