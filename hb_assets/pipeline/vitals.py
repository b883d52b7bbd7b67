"""Checks whether drains, consolidation and Dagster keep up, by their liveness timestamps.

/health, `hb status` and the buffer sensor share these verdicts, each by a threshold of the settings
(HB_HEALTH_...; 0 turns it off), in lines without any user's data. The figures come from
`buffer.liveness`, `buffer.depth` and `lake.survey`; `alarms` sends what is found.

Time counts from when something waits. A drain that never ran is no fault as long as nothing is
there to be drained: who starts it may be waiting for a healthy gateway.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence

from hb_assets.buffer.depth import ShardDepth
from hb_assets.buffer.liveness import DAGSTER, Liveness, drained
from hb_assets.core.settings import Settings

_SHOWN = 3


def drain(states: Sequence[ShardDepth], signs: Liveness, settings: Settings) -> str | None:
    """Fault of shards where entries wait and no drain has looked for too long; None if fine."""
    most = settings.health_drain_age
    found = {}
    for state in states:
        waiting = neglected_seconds(state, signs)
        if _beyond(waiting, most):
            found[state.shard] = waiting
    if not found:
        return None
    return (
        f"no drain for {_longest(found.values())}: entries wait in {_shards(found)}: "
        f"{_drain_remedy(signs)}, or see their logs (HB_HEALTH_DRAIN_AGE={_text(most)})"
    )


def _drain_remedy(signs: Liveness) -> str:
    if "drain" in signs.stopped:
        return "Dagster's drain sensor is stopped: `hb sensors start drain`"
    return "start `hb up` or `hb drain --follow`"


def neglected_seconds(state: ShardDepth, signs: Liveness) -> float:
    """How long entries have waited without a drain that looked for them; 0 where none waits."""
    if state.oldest_ms is None:
        return 0.0
    since = max(state.oldest_ms, signs.seen_ms.get(drained(state.shard), 0))
    return max(0.0, (signs.now_ms - since) / 1000)


def backlog(states: Sequence[ShardDepth], signs: Liveness, settings: Settings) -> str | None:
    """Fault of shards whose oldest entry waits for too long, whoever looked at it."""
    most = settings.health_entry_age
    found = {}
    for state in states:
        age = 0.0 if state.oldest_ms is None else (signs.now_ms - state.oldest_ms) / 1000
        if _beyond(age, most):
            found[state.shard] = age
    if not found:
        return None
    return (
        f"the oldest entry has waited for {_longest(found.values())} in {_shards(found)}: the drain "
        f"is too slow, or fails (HB_HEALTH_ENTRY_AGE={_text(most)})"
    )


def consumers(states: Sequence[ShardDepth], signs: Liveness, settings: Settings) -> str | None:
    """Fault of shards whose dead drainers hold entries that nobody takes over."""
    most = settings.health_consumer_idle
    found = [state.shard for state in states if dead_consumers(state, settings)]
    if not found:
        return None
    return (
        f"drainers are gone with claimed entries of {_shards(found)}, and no other takes them over: "
        f"{_drain_remedy(signs)} "
        f"(HB_HEALTH_CONSUMER_IDLE={_text(most)})"
    )


def dead_consumers(state: ShardDepth, settings: Settings) -> int:
    """Consumers of a shard that hold entries and weren't heard of for too long."""
    patience = settings.claim_min_idle.total_seconds()
    return sum(
        _beyond(idle / 1000 - patience, settings.health_consumer_idle) for idle in state.idle_ms
    )


def dagster(signs: Liveness, settings: Settings) -> str | None:
    """Fault of Dagster: a sensor is stopped, or Dagster was there once and ticks no more."""
    if stopped := signs.stopped:
        names = " ".join(stopped)
        many = f"sensors {', '.join(stopped)} are" if len(stopped) > 1 else f"sensor {names} is"
        return f"Dagster's {many} stopped, and stays so until `hb sensors start {names}`"
    most = settings.health_dagster_age
    age = signs.age(DAGSTER)
    if age is None or not _beyond(age, most):
        return None
    return (
        f"no tick of Dagster's sensors for {_duration(age)}: see to its daemon and code server "
        "(`hb up`), and whether all sensors are stopped (`hb sensors list`); "
        f"where it isn't used any more set HB_HEALTH_DAGSTER_AGE=0 (now {_text(most)})"
    )


def consolidation(day: dt.date | None, seconds: float, settings: Settings) -> str | None:
    """Fault of a day that should have been consolidated so many seconds ago.

    Args:
        day: the one that is overdue most, None when none is
        (`lake.compaction.policy.most_overdue`).
        seconds: how long it is.
        settings: the threshold.
    """
    most = settings.health_consolidation_delay
    if day is None or not _beyond(seconds, most):
        return None
    return (
        f"day {day.isoformat()} should have been consolidated {_duration(seconds)} ago: see its runs in Dagster, or try "
        f"`hb consolidate --pending` (HB_HEALTH_CONSOLIDATION_DELAY={_text(most)})"
    )


def space(free: int, settings: Settings) -> str | None:
    """Fault of a lake's disk that is nearly full; `free` in bytes."""
    least = settings.health_free_space
    if free >= least:
        return None
    return (
        f"the lake's disk has {free // 2**20:,} MiB free: make room "
        f"(HB_HEALTH_FREE_SPACE={least // 2**20:,} MiB)"
    )


def _beyond(seconds: float, most: dt.timedelta) -> bool:
    return bool(most) and seconds > most.total_seconds()


def _longest(seconds: Iterable[float]) -> str:
    return _duration(max(seconds))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.0f} h"


def _text(threshold: dt.timedelta) -> str:
    return f"{threshold.total_seconds():g}s"


def _shards(shards: Iterable[int]) -> str:
    """`shard 03`, or the first few of them and how many more."""
    numbers = sorted(shards)
    named = ", ".join(f"{number:02d}" for number in numbers[:_SHOWN])
    more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
    return f"shard{'s' if len(numbers) > 1 else ''} {named}{more}"
