"""The partitions: UTC days of event time, from the earliest day that the lake ever held.

A new installation begins today. Its first day is kept in a file of its own under HB_HOME, so that
it never moves later: Dagster fails backfills whose days are gone.
"""

from __future__ import annotations

import datetime as dt
from contextlib import suppress

import dagster as dg

from hb_assets.core import days, private_files
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.layout import HEARTBEATS, RAW

TAG = "dagster/partition"
"""Run tag that names the run's day; runs of one day exclude each other (dagster.yaml)."""


def first_day(settings: Settings, now_ms: int) -> dt.date:
    """The first partition: the earliest of today, the kept day and the days in the lake.

    Nothing is created. What can't be read counts for nothing.

    Args:
        settings: HB_HOME and the lake's folder.
        now_ms: the clock, epoch milliseconds.
    """
    found = [days.day_of(now_ms)]
    with suppress(OSError, ValueError):
        found.append(days.parse_day(settings.first_day_file.read_text(encoding="ascii").strip()))
    for kind in (RAW, HEARTBEATS):
        with suppress(OSError):
            found += layout.days_of(settings.lake_dir, kind)[:1]
    return max(min(found), days.EPOCH.date())  # a stray folder must not make a million partitions


def keep_first_day(settings: Settings, first: dt.date) -> None:
    """Keep this day as the first one, unless an earlier one is kept. Raises OSError."""
    path = settings.first_day_file
    try:
        kept = days.parse_day(path.read_text(encoding="ascii").strip())
    except (FileNotFoundError, ValueError):
        kept = None
    if kept is None or first < kept:
        private_files.make_folder(path.parent)
        private_files.replace(path, f"{first}\n".encode("ascii"))


def daily(first: dt.date, settings: Settings) -> dg.DailyPartitionsDefinition:
    """One partition a day, from the first one as far ahead as MAX_FUTURE lets heartbeats be."""
    return dg.DailyPartitionsDefinition(
        start_date=first.isoformat(),
        end_offset=days.partitions_end_offset(settings.max_future),
        timezone="UTC",
    )


def has(day: dt.date, first: dt.date, now_ms: int, settings: Settings) -> bool:
    """Whether `daily` has a partition of the day now.

    Dagster's own answer walks its calendar for each day that is asked about, in every tick.

    Args:
        day: UTC.
        first: the first partition of the loaded definitions.
        now_ms: the clock, epoch milliseconds.
        settings: MAX_FUTURE.
    """
    beyond = dt.timedelta(days=days.partitions_end_offset(settings.max_future))
    return first <= day < days.day_of(now_ms) + beyond


def waiting(first: dt.date, now: dt.date) -> str | None:
    """A message about days before the loaded definitions' first one; None where there are none.

    Args:
        first: the first partition of the loaded definitions.
        now: what it would be if they were loaded now.
    """
    if now >= first:
        return None
    return (
        f"the lake holds days since {now}, the loaded partitions begin at {first}: earlier days wait "
        "until the definitions are loaded again, which `hb up` does by itself"
    )
