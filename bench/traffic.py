"""Traffic generator: a day of heartbeats as they come in, of any size, the same every time.

Who sends how much, in which order it arrives, and what comes twice, is corrected or comes late.
`lakes` makes fragments of it, `backlogs` fills a buffer.

A reading about every nine seconds of each user, so that a larger day has more users and not busier
ones. Of all rows 5 % repeat another row and 1 % correct one; 2 % come late, up to six hours. Rows
are made flush by flush, as a drain writes them, so that memory doesn't grow with the day.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hb_assets.core import days
from hb_assets.core.record import BPM_RANGE, shard_of
from hb_assets.lake.ingest.decode import ROWS

Integers: TypeAlias = npt.NDArray[np.int64]

DAY = dt.date(2025, 1, 15)
GENERATION = 3
"""Raise it when other rows come out: what was made of those before is made anew."""
FLUSH_ROWS = 160_000
"""Rows of one flush of the drain, about."""
ENTRY_ROWS = 500
USER_ROWS = 10_000
"""Rows of a user, where all send as much."""
REPEATED, CORRECTED, LATE = 0.05, 0.01, 0.02
_FIRST = 1 - REPEATED - CORRECTED
"""Share of the rows that are the first of their key."""
_ZIPF = 1.1
"""With a thousand users or more, 14 to 18 % of a skewed day's rows are one user's."""
_SOON = 8
"""Flushes within which a repeat or a correction follows."""
_SHARDS = 16
_DEVICES = ("device_a", "device_b")


@dataclass(frozen=True, slots=True)
class _Readings:
    """Rows in columns: number of the user, milliseconds since the day began, bpm."""

    user: Integers
    instant: Integers
    bpm: Integers

    def __len__(self) -> int:
        return len(self.user)

    def at(self, which: npt.NDArray[np.bool_] | Integers) -> _Readings:
        """Some of them, or all in another order."""
        return _Readings(self.user[which], self.instant[which], self.bpm[which])


def _together(parts: list[_Readings]) -> _Readings:
    return _Readings(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("user", "instant", "bpm")
        )
    )


@dataclass(frozen=True)
class Traffic:
    """A day's traffic.

    Attributes:
        rows: how many, repeats and corrections included (reached to within one percent).
        skewed: users send as Zipf has it, one of them very much; else all alike.
        shuffled: what arrives together is spread over the whole day, and over all users; else each
            device sends in one batch, in time order, what it gathered since the last one.
        shards: of the buffer and the lake.
        people: how many users; 0: one for each USER_ROWS rows.
        flush_rows: rows of a flush, about.
    """

    rows: int
    skewed: bool = False
    shuffled: bool = False
    shards: int = _SHARDS
    people: int = 0
    flush_rows: int = FLUSH_ROWS

    @property
    def name(self) -> str:
        """A name for folders: what the traffic depends on."""
        kind = ("skewed" if self.skewed else "uniform", "shuffled" if self.shuffled else "in-order")
        return "-".join((str(self.rows), *kind, str(self.shards), str(GENERATION)))

    @property
    def unique(self) -> int:
        """Keys among the rows."""
        return int(self._counts.sum())

    @property
    def flushes(self) -> int:
        """How many flushes there are, but for one with what is left at the end."""
        return max(1, round(self.rows / self.flush_rows))

    @cached_property
    def users(self) -> list[str]:
        """Their names, in the order of their numbers and of their names alike."""
        people = self.people or max(self.shards, self.rows // USER_ROWS)
        return [f"user-{number:06}" for number in range(people)]

    @cached_property
    def shard_of_user(self) -> Integers:
        """Shard of each user."""
        return np.array([shard_of(user, self.shards) for user in self.users], np.int64)

    @cached_property
    def _counts(self) -> Integers:
        """Readings of each user."""
        share = np.ones(len(self.users))
        if self.skewed:
            share = 1 / np.arange(1, len(share) + 1) ** _ZIPF
        readings = self.rows * _FIRST * share / share.sum()
        return np.asarray(np.maximum(1, np.round(readings)), np.int64)

    def tables(self) -> Iterator[pa.Table]:
        """The rows of each flush, as `fragments.publish` takes them."""
        for number, (readings, chance) in enumerate(self._flushes()):
            if len(readings):
                yield self._arrived(readings, number, chance)

    def late(self, rows: int, shard: int | None = None) -> pa.Table:
        """One more flush, when the day is over: readings between those that were there.

        Args:
            rows: how many.
            shard: only of users of this shard.
        """
        chance = np.random.default_rng([GENERATION, self.flushes + 1])
        users = np.arange(len(self.users))
        if shard is not None:
            users = users[self.shard_of_user == shard]
        user = chance.choice(users, rows)
        # others have whole seconds or, where one user sends very much, are as many as the ms
        instant = chance.integers(0, days.MS_PER_DAY // 1000, rows) * 1000 + 501
        found = _Readings(user, instant, self._bpm(user, instant, chance))
        return self._arrived(found, self.flushes + 1, chance)

    def _flushes(self) -> Iterator[tuple[_Readings, np.random.Generator]]:
        """What each flush brings, and chance's next numbers."""
        later: dict[int, list[_Readings]] = {}
        for number in range(self.flushes):
            chance = np.random.default_rng([GENERATION, number])
            readings = self._taken(number, chance)
            fate = chance.random(len(readings))
            late = fate < LATE
            again = readings.at(chance.random(len(readings)) < REPEATED / _FIRST)
            corrected = readings.at(chance.random(len(readings)) < CORRECTED / _FIRST)
            other = np.where(corrected.bpm < BPM_RANGE[1], corrected.bpm + 1, corrected.bpm - 1)
            corrected = replace(corrected, bpm=other)
            for part, longest in (
                (readings.at(late), self.flushes // 4),
                (again, _SOON),
                (corrected, _SOON),
            ):
                self._postpone(part, number, longest, later, chance)
            yield _together([readings.at(~late), *later.pop(number, [])]), chance
        rest = later.pop(self.flushes, [])
        yield _together([self._none(), *rest]), np.random.default_rng([GENERATION, self.flushes])

    def _postpone(
        self,
        readings: _Readings,
        number: int,
        longest: int,
        later: dict[int, list[_Readings]],
        chance: np.random.Generator,
    ) -> None:
        """Deal readings out to this flush and those after it, or to one after the last."""
        due = number + chance.integers(0, longest, len(readings), endpoint=True)
        due = np.minimum(due, self.flushes)
        for flush in np.unique(due):
            later.setdefault(int(flush), []).append(readings.at(due == flush))

    def _none(self) -> _Readings:
        nothing = np.zeros(0, np.int64)
        return _Readings(nothing, nothing, nothing)

    def _taken(self, number: int, chance: np.random.Generator) -> _Readings:
        """Readings that come for the first time in this flush, were none late."""
        counts, flushes = self._counts, self.flushes
        if self.shuffled:
            first, step = np.full(len(counts), number), flushes
            many = np.maximum(0, -(-(counts - number) // flushes))
        else:
            first, step = counts * number // flushes, 1
            many = counts * (number + 1) // flushes - first
        user = np.repeat(np.arange(len(counts)), many)
        within = np.arange(len(user)) - np.repeat(np.cumsum(many) - many, many)
        order = first[user] + step * within
        every = counts[user]
        instant = order * days.MS_PER_DAY // every
        # devices send whole seconds, but for a user who has more readings than those
        instant = np.where(2 * every > days.MS_PER_DAY // 1000, instant, instant // 1000 * 1000)
        return _Readings(user, instant, self._bpm(user, instant, chance))

    def _bpm(self, user: Integers, instant: Integers, chance: np.random.Generator) -> Integers:
        """A level of each user that rises and falls in a quarter of an hour, and some noise."""
        phase = instant / 900_000 * 2 * np.pi + user
        level = 60 + user * 7 % 40 + 12 * np.sin(phase)
        return np.asarray(level + chance.integers(-2, 3, len(user)), np.int64)

    def _arrived(self, readings: _Readings, number: int, chance: np.random.Generator) -> pa.Table:
        """Rows with their identities: entries of one shard each, one after the other."""
        count, flushes = len(readings), self.flushes
        came = np.arange(count)
        if self.shuffled:
            readings = readings.at(chance.permutation(count))
        else:
            turn = chance.permutation(len(self.users))[readings.user]
            readings = readings.at(np.lexsort((readings.instant, turn)))
        shard = self.shard_of_user[readings.user]
        by_shard = np.argsort(shard, kind="stable")
        first = np.searchsorted(shard[by_shard], np.arange(self.shards))
        place = np.empty(count, np.int64)
        place[by_shard] = came - first[shard[by_shard]]
        position = place % ENTRY_ROWS
        # an entry's id is when its first row came; no two of a shard come in one millisecond
        head = by_shard[first[shard] + place - position]
        # a day that comes shuffled comes when it is over
        start = days.start_ms(DAY) + (days.MS_PER_DAY if self.shuffled else 0)
        window = days.MS_PER_DAY // flushes
        ms = start + 1000 + window * number + head * window // count
        key = (shard * len(self.users) + readings.user) * days.MS_PER_DAY + readings.instant
        order = np.argsort(key, kind="stable")
        user = pa.DictionaryArray.from_arrays(readings.user[order].astype(np.int32), self.users)
        device = pa.DictionaryArray.from_arrays(
            (readings.user[order] % 10 == 0).astype(np.int8), list(_DEVICES)
        )
        columns = {
            "user_id": user,
            "device_id": device,
            "timestamp": pa.array(days.start_ms(DAY) + readings.instant[order]),
            "heart_rate": pa.array(readings.bpm[order]),
            "arrival_ms": pa.array(ms[order]),
            "arrival_seq": pa.array(np.zeros(count, np.uint64)),
            "arrival_shard": pa.array(shard[order]),
            "arrival_pos": pa.array(position[order]),
            "shard": pa.array(shard[order]),
            "day": pa.array(np.full(count, days.start_ms(DAY) // days.MS_PER_DAY)),
        }
        return pa.table([columns[field.name].cast(field.type) for field in ROWS], ROWS)
