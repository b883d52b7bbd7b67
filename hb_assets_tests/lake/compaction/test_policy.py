"""When a day is due: a table of cases."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from hb_assets.core import days
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.policy import due
from hb_assets.lake.inventory import DayState
from hb_assets_tests.lake.deliveries import DAY

NOW = days.start_ms(DAY) + days.MS_PER_DAY // 2
MINUTE = 60_000


def state(**known: Any) -> DayState:
    nothing: dict[str, Any] = dict.fromkeys(DayState.__slots__, 0)
    nothing |= {"day": DAY, "oldest_pending_ms": None, "minutes_current": True}
    return DayState(**(nothing | known))


def pending(rows: int, *, minutes: float = 0, fragments: int = 1, **known: Any) -> DayState:
    age = {"oldest_pending_ms": NOW - round(minutes * MINUTE)}
    return state(
        pending_rows=rows, pending_fragments=fragments, most_pending=fragments, **age, **known
    )


YESTERDAY, TOMORROW = DAY - dt.timedelta(days=1), DAY + dt.timedelta(days=1)


@pytest.mark.parametrize(
    ("found", "why"),
    [
        (state(), None),
        (state(unique=5), None),
        (state(unique=5, minutes_current=False), "minutes are stale"),
        (state(unique=0, minutes_current=False), None),
        (pending(99), None),
        (pending(100), "100 rows are pending"),
        (pending(100, unique=400), "100 rows are pending"),
        (pending(100, unique=401), None),
        (pending(101, unique=404), "101 rows are pending"),
        (pending(1, fragments=10), None),
        (pending(1, fragments=11), "11 fragments of one shard are pending"),
        (pending(1, minutes=15), None),
        (pending(1, minutes=16), None),
        (pending(1, minutes=15, day=YESTERDAY), None),
        (pending(1, minutes=16, day=YESTERDAY), "the oldest pending fragment is 16 min old"),
        (pending(1, minutes=360), None),
        (pending(1, minutes=361), "the oldest pending fragment is 361 min old"),
        (pending(1, minutes=361, day=TOMORROW), "the oldest pending fragment is 361 min old"),
        (pending(1, minutes=-5, day=YESTERDAY), None),
    ],
)
def test_due(found: DayState, why: str | None) -> None:
    settings = Settings(consolidate_min_rows=100, consolidate_ratio=0.25, max_pending_fragments=10)
    assert due(found, NOW, settings) == why


@pytest.mark.parametrize(("minutes", "is_due"), [(1, False), (15, False), (16, True)])
def test_a_day_that_has_just_ended_waits_for_its_stragglers(minutes: int, is_due: bool) -> None:
    """Hours-old rows of it don't have it written at midnight, and once more soon after."""
    midnight = days.end_ms(YESTERDAY)
    oldest = midnight - 5 * 60 * MINUTE
    found = state(day=YESTERDAY, pending_rows=1, pending_fragments=1, oldest_pending_ms=oldest)
    assert (due(found, midnight + minutes * MINUTE, Settings()) is not None) == is_due
