"""Partitions: which days have one."""

from __future__ import annotations

import datetime as dt

import pytest

from hb_assets import days
from hb_assets.defs import partitions
from hb_assets.settings import Settings

NOW_MS = days.start_ms(dt.date(2025, 3, 1)) + 12 * 3_600_000


@pytest.mark.parametrize("at_ms", [NOW_MS, days.start_ms(dt.date(2025, 3, 1))])
@pytest.mark.parametrize("future", ["0s", "1s", "24h", "25h", "7d"])
def test_a_day_has_a_partition_when_dagster_says_so(future: str, at_ms: int) -> None:
    settings = Settings(start_date="2025-01-15", max_future=future)
    now = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC)
    keys = set(partitions.daily(settings).get_partition_keys(current_time=now))
    for number in range(-2, 60):
        day = settings.start_date + dt.timedelta(days=number)
        assert partitions.has(day, at_ms, settings) == (day.isoformat() in keys)
