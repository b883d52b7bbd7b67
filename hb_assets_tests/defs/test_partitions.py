"""Partitions: which days have one."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest

from hb_assets.core import days
from hb_assets.core.settings import Settings
from hb_assets.defs import partitions

TODAY = dt.date(2025, 3, 1)
FIRST = dt.date(2025, 1, 15)
NOW_MS = days.start_ms(TODAY) + 12 * 3_600_000


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def hold(settings: Settings, day: str, kind: str = "raw") -> Path:
    folder = settings.lake_dir / kind / f"day={day}"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("at_ms", [NOW_MS, days.start_ms(TODAY)])
@pytest.mark.parametrize("future", ["0s", "1s", "24h", "25h", "7d"])
def test_a_day_has_a_partition_when_dagster_says_so(future: str, at_ms: int) -> None:
    settings = Settings(max_future=future)
    now = dt.datetime.fromtimestamp(at_ms / 1000, dt.UTC)
    keys = set(partitions.daily(FIRST, settings).get_partition_keys(current_time=now))
    for number in range(-2, 60):
        day = FIRST + dt.timedelta(days=number)
        assert partitions.has(day, FIRST, at_ms, settings) == (day.isoformat() in keys)


def test_a_new_installation_begins_today_and_asking_creates_nothing(settings: Settings) -> None:
    assert partitions.first_day(settings, NOW_MS) == TODAY
    assert not settings.home_dir.exists()


@pytest.mark.parametrize("kind", ["raw", "heartbeats"])
def test_it_begins_with_the_earliest_day_that_the_lake_holds(settings: Settings, kind: str) -> None:
    hold(settings, "2025-02-03", kind)
    hold(settings, "2025-03-02")
    assert partitions.first_day(settings, NOW_MS) == dt.date(2025, 2, 3)


def test_it_never_moves_later(settings: Settings) -> None:
    for day in ("2025-02-03", "2025-02-07"):
        partitions.keep_first_day(settings, days.parse_day(day))
    hold(settings, "2025-02-05")
    assert partitions.first_day(settings, NOW_MS) == dt.date(2025, 2, 3)
    partitions.keep_first_day(settings, dt.date(2025, 1, 31))
    assert partitions.first_day(settings, NOW_MS) == dt.date(2025, 1, 31)


def test_a_lake_that_cant_be_read_keeps_the_last_known_one(settings: Settings) -> None:
    partitions.keep_first_day(settings, dt.date(2025, 2, 3))
    settings.lake_dir.write_text("no folder")
    assert partitions.first_day(settings, NOW_MS) == dt.date(2025, 2, 3)
    settings.first_day_file.write_text("no day")
    assert partitions.first_day(settings, NOW_MS) == TODAY


def test_a_stray_folder_makes_no_million_partitions(settings: Settings) -> None:
    hold(settings, "0001-01-01")
    assert partitions.first_day(settings, NOW_MS) == dt.date(1970, 1, 1)


def test_days_that_wait_for_a_reload_are_told() -> None:
    assert partitions.waiting(FIRST, FIRST) is None
    said = partitions.waiting(FIRST, dt.date(2025, 1, 3))
    assert said is not None
    assert "since 2025-01-03" in said
    assert "begin at 2025-01-15" in said
