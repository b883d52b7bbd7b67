"""Partitions: UTC days of event time.

Belongs here: how the settings bound them. Doesn't belong here: arithmetic with days (`days`).
"""

from __future__ import annotations

import datetime as dt

import dagster as dg

from hb_assets import days
from hb_assets.settings import Settings

TAG = "dagster/partition"
"""Run tag that names the run's day; runs of one day exclude each other (dagster.yaml)."""


def daily(settings: Settings) -> dg.DailyPartitionsDefinition:
    """One partition a day, from START_DATE as far ahead as MAX_FUTURE lets heartbeats be."""
    return dg.DailyPartitionsDefinition(
        start_date=settings.start_date.isoformat(),
        end_offset=days.partitions_end_offset(settings.max_future),
        timezone="UTC",
    )


def has(day: dt.date, now_ms: int, settings: Settings) -> bool:
    """Whether `daily` has a partition of the day now.

    Dagster's own answer walks its calendar for each day that is asked about, in every tick.

    Args:
        day: UTC.
        now_ms: the clock, epoch milliseconds.
        settings: START_DATE and MAX_FUTURE.
    """
    beyond = dt.timedelta(days=days.partitions_end_offset(settings.max_future))
    return settings.start_date <= day < days.day_of(now_ms) + beyond
