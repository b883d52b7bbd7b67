"""Days: borders at midnight UTC, at the calendar's ends, and before 1970."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hb_assets.core import days

dates = st.dates()
instants = st.integers(-(2**63), 2**63)


@given(dates)
def test_a_day_holds_its_first_and_last_millisecond(day: dt.date) -> None:
    assert days.day_of(days.start_ms(day)) == day
    assert days.day_of(days.end_ms(day) - 1) == day
    assert days.end_ms(day) - days.start_ms(day) == days.MS_PER_DAY


@given(st.dates(max_value=dt.date.max - dt.timedelta(days=1)))
def test_the_next_day_starts_where_a_day_ends(day: dt.date) -> None:
    assert days.day_of(days.end_ms(day)) == day + dt.timedelta(days=1)
    assert days.end_ms(day) == days.start_ms(day + dt.timedelta(days=1))


@given(st.datetimes(timezones=st.just(dt.UTC)))
def test_the_day_is_the_date_in_utc(moment: dt.datetime) -> None:
    assert days.day_of((moment - days.EPOCH) // dt.timedelta(milliseconds=1)) == moment.date()


@given(instants)
def test_any_instant_has_a_day(epoch_ms: int) -> None:
    day = days.day_of(epoch_ms)
    inside = days.start_ms(day) <= epoch_ms < days.end_ms(day)
    assert inside or day in (dt.date.min, dt.date.max)


def test_known_borders() -> None:
    assert days.day_of(0) == dt.date(1970, 1, 1)
    assert days.day_of(-1) == dt.date(1969, 12, 31)
    assert days.day_of(1_736_899_199_999) == dt.date(2025, 1, 14)
    assert days.day_of(1_736_899_200_000) == dt.date(2025, 1, 15)
    assert days.day_of(days.LAST_MS) == dt.date.max
    assert days.start_ms(dt.date(2024, 3, 1)) - days.start_ms(dt.date(2024, 2, 28)) == (
        2 * days.MS_PER_DAY
    )


@given(
    st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)),
    st.integers(0, days.MS_PER_DAY - 1),
    st.integers(1, 40 * days.MS_PER_DAY),
)
def test_a_range_touches_each_day_between_once(day: dt.date, offset: int, length: int) -> None:
    first = days.start_ms(day) + offset
    touched = days.days_between(first, first + length)
    assert touched[0] == days.day_of(first)
    assert touched[-1] == days.day_of(first + length - 1)
    assert touched == [touched[0] + dt.timedelta(days=n) for n in range(len(touched))]


def test_the_end_of_a_range_is_outside() -> None:
    day = dt.date(2025, 1, 15)
    start, end = days.start_ms(day), days.end_ms(day)
    assert days.days_between(start, end) == [day]
    assert days.days_between(start, end + 1) == [day, dt.date(2025, 1, 16)]
    assert days.days_between(start, start) == []
    assert days.days_between(end, start) == []


@pytest.mark.parametrize(
    ("max_future", "offset"),
    [
        (dt.timedelta(0), 1),
        (dt.timedelta(milliseconds=1), 2),
        (dt.timedelta(hours=24), 2),
        (dt.timedelta(hours=24, milliseconds=1), 3),
        (dt.timedelta(days=7), 8),
    ],
)
def test_partitions_reach_as_far_as_the_future_is_accepted(
    max_future: dt.timedelta, offset: int
) -> None:
    assert days.partitions_end_offset(max_future) == offset


@given(dates)
def test_partition_keys_come_back_as_they_were(day: dt.date) -> None:
    assert days.parse_day(day.isoformat()) == day


@pytest.mark.parametrize(
    "text", ["", "today", "20250115", "2025-W03-3", "2025-1-15", "2025-02-30", "2025-01-15T00:00"]
)
def test_other_texts_are_no_partition_keys(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        days.parse_day(text)
