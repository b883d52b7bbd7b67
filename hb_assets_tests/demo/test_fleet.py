"""The simulated fleet: the same bytes every time, and expectations that a plain model confirms."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from dataclasses import asdict
from functools import cache

import pytest

from hb_assets.core import days, record
from hb_assets.core.record import Heartbeat, TimeBounds
from hb_assets.demo import fleet

NOON = days.start_ms(dt.date(2025, 1, 15)) + days.MS_PER_DAY // 2
BOUNDS = TimeBounds.of(dt.date(2020, 1, 1), dt.timedelta(hours=24))
simulated = cache(fleet.simulate)
"""Each simulation once: none changes, and it takes a second."""


def test_same_now_same_bytes() -> None:
    first, second = simulated(NOON, BOUNDS), fleet.simulate(NOON, BOUNDS)
    assert first.posts == second.posts
    assert first.singles == second.singles
    assert first.external == second.external
    assert first.expected == second.expected


def test_another_run_has_users_of_its_own() -> None:
    first, second = simulated(NOON, BOUNDS), simulated(NOON + 1000, BOUNDS)
    assert not first.survivors.keys() & second.survivors.keys()


@pytest.mark.parametrize("of_day", [1, days.MS_PER_DAY // 2, days.MS_PER_DAY - 1])
def test_expectations_agree_with_a_plain_model(of_day: int) -> None:
    now = days.start_ms(dt.date(2025, 1, 15)) + of_day
    made = simulated(now, BOUNDS)
    found: dict[dt.date, fleet.Figures] = defaultdict(fleet.Figures)
    latest: dict[tuple[str, str, int], int] = {}

    def arrive(line: fleet.Line, *, external: bool) -> None:
        figures = found[line.day]
        figures.sent += 1
        heartbeat, _ = record.parse(line.data, now, BOUNDS)
        assert isinstance(heartbeat, Heartbeat) == line.valid
        if not isinstance(heartbeat, Heartbeat):
            figures.quarantined += external
            figures.refused += not external
            return
        assert days.day_of(heartbeat.timestamp_ms) == line.day
        assert heartbeat.timestamp_ms <= now
        figures.accepted += 1
        key = (heartbeat.user_id, heartbeat.device_id, heartbeat.timestamp_ms)
        if key not in latest:
            figures.unique += 1
        elif latest[key] == heartbeat.heart_rate:
            figures.repeats += 1
        else:
            figures.corrections += 1
        latest[key] = heartbeat.heart_rate

    for line in [line for post in made.posts for line in post] + made.singles:
        arrive(line, external=False)
    for entry in made.external:
        for line in entry.lines:
            arrive(line, external=True)

    assert {day: asdict(figures) for day, figures in found.items()} == {
        day: asdict(figures) for day, figures in made.expected.items()
    }
    assert latest == made.survivors


def test_holds_everything_that_can_happen_on_the_way() -> None:
    made = simulated(NOON, BOUNDS)
    assert len({user for user, device, _ in made.survivors if device != "strap"}) == fleet.USERS
    assert len(made.expected) == fleet.DAYS_BACK + 1
    for figures in made.expected.values():
        assert min(asdict(figures).values()) > 0
    sent = sum(figures.sent for figures in made.expected.values())
    assert 30_000 <= sent <= 60_000
    instants = defaultdict(set)
    for user, device, at in made.survivors:
        instants[user, at].add(device)
    assert sum(len(devices) > 1 for devices in instants.values()) > 1000
    reasons = {
        refusal.reason
        for post in made.posts
        for line in post
        if isinstance(refusal := record.parse(line.data, NOON, BOUNDS)[0], record.Refusal)
    }
    assert len(reasons) >= 6


def test_heart_rates_are_those_of_people() -> None:
    rates = sorted(simulated(NOON, BOUNDS).survivors.values())
    assert 35 <= rates[0] <= 55
    assert 60 <= rates[len(rates) // 2] <= 110
    assert 140 <= rates[-1] <= 210


def test_days_before_the_start_are_left_out() -> None:
    bounds = TimeBounds.of(dt.date(2025, 1, 15), dt.timedelta(hours=24))
    made = simulated(NOON, bounds)
    assert list(made.expected) == [dt.date(2025, 1, 15)]
