"""Partitions: UTC days of event time.

Belongs here: how the settings bound them. Doesn't belong here: arithmetic with days (`days`).
"""

from __future__ import annotations

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
