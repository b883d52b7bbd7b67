"""Vitals: verdicts by thresholds; time counts from when something waits."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from hb_assets.buffer.depth import ShardDepth
from hb_assets.buffer.liveness import DAGSTER, Liveness
from hb_assets.core.settings import Settings
from hb_assets.pipeline import vitals

NOW = 1_736_935_200_000
SETTINGS = Settings(shards=2)


def shard(number: int = 0, *, waits: float | None = None, **known: Any) -> ShardDepth:
    """A shard whose oldest entry has waited for so many seconds."""
    nothing: dict[str, Any] = dict.fromkeys(ShardDepth.__slots__, 0)
    oldest = None if waits is None else NOW - round(waits * 1000)
    return ShardDepth(**nothing | {"shard": number, "oldest_ms": oldest, "idle_ms": ()} | known)


def signs(**ages: float) -> Liveness:
    """Beats of so many seconds ago; `drain_0` is that of shard 0."""
    beats = {name.replace("_", ":0"): NOW - round(age * 1000) for name, age in ages.items()}
    return Liveness(NOW, beats)


@pytest.mark.parametrize(
    ("state", "beats", "red"),
    [
        (shard(), {}, False),  # nothing waits, and no drain ever ran
        (shard(), {"drain_0": 9999}, False),
        (shard(waits=119), {}, False),
        (shard(waits=121), {}, True),
        (shard(waits=9999), {"drain_0": 119}, False),
        (shard(waits=9999), {"drain_0": 121}, True),
        (shard(waits=119), {"drain_0": 9999}, False),  # it came after a long silence
        (shard(waits=9999), {"drain_1": 1}, True),  # another shard's drain
        (shard(waits=9999), {"drain_0": -5}, False),  # Redis' clock was set back
    ],
)
def test_drain(state: ShardDepth, beats: dict[str, float], red: bool) -> None:
    line = vitals.drain([state], signs(**beats), SETTINGS)
    assert (line is not None) == red
    if line:
        assert "shard 00" in line
        assert "\n" not in line


def test_many_shards_are_one_short_line() -> None:
    states = [shard(number, waits=200 + number) for number in range(100)]
    line = vitals.drain(states, signs(), SETTINGS)
    assert line is not None
    assert "shards 00, 01, 02 and 97 more" in line
    assert "299 s" in line or "5 min" in line


@pytest.mark.parametrize(("waits", "red"), [(None, False), (599, False), (601, True)])
def test_backlog(waits: float | None, red: bool) -> None:
    assert bool(vitals.backlog([shard(waits=waits)], signs(drain_0=0), SETTINGS)) == red


@pytest.mark.parametrize(
    ("idle", "count"), [((), 0), ((179_000,), 0), ((181_000, 1000, 999_000), 2)]
)
def test_consumers(idle: tuple[int, ...], count: int) -> None:
    """A minute of HB_CLAIM_MIN_IDLE, in which another takes over, and two besides."""
    state = shard(1, idle_ms=idle)
    assert vitals.dead_consumers(state, SETTINGS) == count
    assert bool(vitals.consumers([state], Liveness(0), SETTINGS)) == bool(count)


@pytest.mark.parametrize(
    ("ages", "red"),
    [({}, False), ({"dagster": 119}, False), ({"dagster": 121}, True)],
)
def test_dagster(ages: dict[str, float], red: bool) -> None:
    assert bool(vitals.dagster(signs(**ages), SETTINGS)) == red


@pytest.mark.parametrize(("seconds", "red"), [(0.0, False), (3599.0, False), (3601.0, True)])
def test_consolidation(seconds: float, red: bool) -> None:
    day = dt.date(2025, 1, 15) if seconds else None
    line = vitals.consolidation(day, seconds, SETTINGS)
    assert (line is not None) == red


def test_a_stopped_sensor_names_itself_and_its_remedy() -> None:
    beats = {DAGSTER: 5_000, "stopped:drain": 5_000, "stopped:buffer": 4_000}
    seen = Liveness(6_000, beats)
    line = vitals.dagster(seen, SETTINGS)
    assert line is not None
    assert "drain is stopped" in line
    assert "`hb sensors start drain`" in line
    late = vitals.drain([shard(oldest_ms=0)], Liveness(1_000_000, beats), SETTINGS)
    assert late is not None
    assert "`hb sensors start drain`" in late
    assert "hb up" not in late
    assert vitals.dagster(Liveness(6_000, {**beats, DAGSTER: 5_500}), SETTINGS) is None
