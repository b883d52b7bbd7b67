"""A simulated fleet of wearables: the sample that `hb up` sends, and the results to expect of it.

It makes the readings, what goes wrong with them in transit (repeats, corrections, late, out of
order, invalid), and the expected counts by day; `cli.sample` sends them. No clock and no hidden
randomness: the same `now_ms` gives the same bytes.
"""

from __future__ import annotations

import datetime as dt
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec

from hb_assets.core import days
from hb_assets.core.days import EPOCH, MS_PER_DAY
from hb_assets.core.record import BPM_RANGE, Heartbeat, TimeBounds

USERS = 50
DEVICES = ("device_a", "device_b")
DAYS_BACK = 2
SEED = 20250115

_MINUTE = 60_000
_RESTING_EVERY = 12 * _MINUTE
_EXERCISE_EVERY = 30_000
_POST_SIZE = 1000
_LAG = 5
"""A repeat or a correction comes 1 to 5 posts after the reading; late readings after all those."""


@dataclass(slots=True)
class Figures:
    """Counts of one day's heartbeats by outcome.

    sent = accepted + refused + quarantined, and accepted = unique + repeats + corrections.
    """

    sent: int = 0
    accepted: int = 0
    refused: int = 0
    unique: int = 0
    repeats: int = 0
    corrections: int = 0
    quarantined: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """One heartbeat as it travels: its JSON, the day it belongs to, whether it is valid."""

    data: bytes
    day: dt.date
    valid: bool


@dataclass(frozen=True, slots=True)
class ExternalEntry:
    """A stream entry that an external producer writes straight into Redis."""

    user_id: str
    lines: tuple[Line, ...]


@dataclass(slots=True)
class Fleet:
    """All traffic in its order, and the results to expect.

    `posts` go to the gateway as batches, `singles` one by one after them, `external` straight into
    Redis. `survivors` gives the one heart rate that stays of each key (user, device, epoch ms).
    """

    prefix: str
    posts: list[list[Line]] = field(default_factory=list)
    singles: list[Line] = field(default_factory=list)
    external: list[ExternalEntry] = field(default_factory=list)
    expected: dict[dt.date, Figures] = field(default_factory=dict)
    survivors: dict[tuple[str, str, int], int] = field(default_factory=dict)


def simulate(now_ms: int, bounds: TimeBounds) -> Fleet:
    """The fleet's traffic of today (up to `now_ms`) and two days back.

    Its user ids carry `now_ms`, so that a lake that holds earlier samples still adds up exactly.

    Args:
        now_ms: the present, epoch milliseconds.
        bounds: accepted timestamps; days before their start are left out.
    """
    chance = random.Random(SEED)
    moment = EPOCH + dt.timedelta(milliseconds=now_ms)
    fleet = Fleet(prefix=f"sample-{moment:%Y%m%dT%H%M%S}-")
    today = days.day_of(now_ms)
    shown = [today - dt.timedelta(days=back) for back in range(DAYS_BACK, -1, -1)]
    fleet.expected = {day: Figures() for day in shown if days.start_ms(day) >= bounds.start_ms}

    readings = [
        reading
        for number in range(USERS)
        for reading in _wearer(f"{fleet.prefix}u{number:02}", list(fleet.expected), now_ms, chance)
    ]
    readings.sort(key=lambda reading: (reading.timestamp_ms, reading.user_id, reading.device_id))
    for reading in readings:
        fleet.survivors[_key(reading)] = reading.heart_rate
        fleet.expected[days.day_of(reading.timestamp_ms)].unique += 1

    slots = _travel(fleet, readings, today, chance)
    _spoil(fleet, slots, now_ms, bounds, chance)
    for slot in slots:
        chance.shuffle(slot)
    fleet.posts = [slot for slot in slots if slot]
    _write_external(fleet, now_ms, chance)
    _count(fleet)
    return fleet


def _wearer(
    user_id: str, shown: list[dt.date], now_ms: int, chance: random.Random
) -> Iterator[Heartbeat]:
    """Readings of one user: a resting rate of their own, its daily wave, and exercise."""
    resting = max(50.0, chance.gauss(62, 7))
    fitness = chance.uniform(55, 95)
    bias = chance.uniform(-2, 3)
    for day in shown:
        start = days.start_ms(day)
        bout = None
        if chance.random() < 0.6:
            hour = chance.choice((6.5, 12.2, 17.5, 18.5))
            bout_start = start + int((hour + chance.uniform(0, 1.5)) * 60) * _MINUTE
            bout = (bout_start, bout_start + chance.randint(20, 60) * _MINUTE)
        instants = [
            start + n * _RESTING_EVERY + chance.randrange(0, _RESTING_EVERY // 2, 1000)
            for n in range(MS_PER_DAY // _RESTING_EVERY)
        ]
        if bout is not None:
            instants = [at for at in instants if not bout[0] <= at < bout[1]]
            instants += range(bout[0], min(bout[1], start + MS_PER_DAY), _EXERCISE_EVERY)
        for instant in sorted(instants):
            rate = _rate(instant - start, resting, fitness, bout and (instant - bout[0], bout))
            for device in DEVICES:
                # half of the second device's readings fall on the first one's very instant
                later = 0 if device == DEVICES[0] else chance.choice((0, 1)) * 1731
                at = instant + later
                if at > now_ms or days.day_of(at) != day:
                    continue
                own = rate + chance.gauss(0, 1.5) + (bias if device != DEVICES[0] else 0)
                yield Heartbeat(user_id, device, at, _bpm(own))


def _rate(
    of_day_ms: int,
    resting: float,
    fitness: float,
    bout: tuple[int, tuple[int, int]] | None,
) -> float:
    """Heart rate at an instant of the day: lowest about 4:00, highest about 16:00."""
    hour = of_day_ms / 3_600_000
    rate = resting - 7 * math.cos((hour - 4) / 24 * 2 * math.pi)
    if bout is not None:
        since, (start, end) = bout
        if 0 <= since < end - start:
            warm_up = 1 - math.exp(-since / (4 * _MINUTE))
            rate += fitness * warm_up * (1 + 0.08 * math.sin(since / (3 * _MINUTE)))
        elif end - start <= since:
            rate += fitness * math.exp(-(since - (end - start)) / (9 * _MINUTE))
    return rate


def _bpm(rate: float) -> int:
    return min(max(round(rate), BPM_RANGE[0] + 5), BPM_RANGE[1] - 5)


def _travel(
    fleet: Fleet, readings: list[Heartbeat], today: dt.date, chance: random.Random
) -> list[list[Line]]:
    """Lines by post: late readings come last, repeats and corrections after what they repeat."""
    posts = -(-len(readings) // _POST_SIZE)
    slots: list[list[Line]] = [[] for _ in range(posts + _LAG + 2)]
    for number, reading in enumerate(readings):
        day = days.day_of(reading.timestamp_ms)
        slot = number // _POST_SIZE
        fate = chance.random()
        if fate < 0.03 and day < today:
            slots[posts + _LAG + chance.randrange(2)].append(_line(reading))
            continue
        slots[slot].append(_line(reading))
        if fate >= 0.97:
            again = reading
            if fate < 0.98:
                shift = chance.choice((-3, -2, -1, 1, 2, 3))
                again = msgspec.structs.replace(reading, heart_rate=reading.heart_rate + shift)
                fleet.survivors[_key(again)] = again.heart_rate
                fleet.expected[day].corrections += 1
            else:
                fleet.expected[day].repeats += 1
            slots[slot + chance.randint(1, _LAG)].append(_line(again))
    return slots


def _spoil(
    fleet: Fleet,
    slots: list[list[Line]],
    now_ms: int,
    bounds: TimeBounds,
    chance: random.Random,
) -> None:
    """Invalid heartbeats, as devices send them: off the wrist, clock reset, broken firmware."""
    for day in fleet.expected:
        for number in range(40):
            chance.choice(slots).append(_invalid(fleet, number % 7, day, now_ms, bounds, chance))
        for number in range(3):
            fleet.singles.append(_invalid(fleet, number, day, now_ms, bounds, chance))


def _invalid(
    fleet: Fleet,
    kind: int,
    day: dt.date,
    now_ms: int,
    bounds: TimeBounds,
    chance: random.Random,
) -> Line:
    user_id = f"{fleet.prefix}u{chance.randrange(USERS):02}"
    at = days.start_ms(day) + chance.randrange(MS_PER_DAY)
    sent: dict[str, object] = {
        "user_id": user_id,
        "device_id": chance.choice(DEVICES),
        "timestamp_ms": at,
        "heart_rate": chance.randint(60, 90),
    }
    if kind == 0:
        sent["heart_rate"] = 0
    elif kind == 1:
        del sent["device_id"]
    elif kind == 2:
        sent["timestamp_ms"] = now_ms + bounds.future_ms + 30 * MS_PER_DAY
    elif kind == 3:
        sent["timestamp_ms"] = bounds.start_ms - 1 - chance.randrange(MS_PER_DAY)
    elif kind == 4:
        sent["heart_rate"] = "n/a"
    elif kind == 5:
        sent["heart_rate"] = 255
    else:
        return Line(msgspec.json.encode(sent)[:-9], day, valid=False)  # cut off on its way
    return Line(msgspec.json.encode(sent), day, valid=False)


def _write_external(fleet: Fleet, now_ms: int, chance: random.Random) -> None:
    """Entries of an external producer: one valid heartbeat each among invalid lines."""
    for day in fleet.expected:
        user_id = f"{fleet.prefix}external"
        at = min(days.start_ms(day) + 1000 * chance.randrange(3600), now_ms)
        good = Heartbeat(user_id, "strap", at, 71)
        fleet.survivors[_key(good)] = good.heart_rate
        fleet.expected[day].unique += 1
        bad = (
            msgspec.json.encode(
                {"user_id": user_id, "device_id": "strap", "timestamp_ms": at, "heart_rate": 0}
            ),
            msgspec.json.encode({"user_id": user_id, "timestamp_ms": at + 1, "heart_rate": 72}),
            f"{user_id};strap;{day};73".encode(),
        )
        lines = [_line(good)] + [Line(data, day, valid=False) for data in bad]
        chance.shuffle(lines)
        fleet.external.append(ExternalEntry(user_id, tuple(lines)))


def _count(fleet: Fleet) -> None:
    for line in [line for post in fleet.posts for line in post] + fleet.singles:
        figures = fleet.expected[line.day]
        figures.sent += 1
        figures.accepted += line.valid
        figures.refused += not line.valid
    for entry in fleet.external:
        for line in entry.lines:
            figures = fleet.expected[line.day]
            figures.sent += 1
            figures.accepted += line.valid
            figures.quarantined += not line.valid


def _key(reading: Heartbeat) -> tuple[str, str, int]:
    return reading.user_id, reading.device_id, reading.timestamp_ms


def _line(reading: Heartbeat) -> Line:
    """Devices speak ISO 8601; our canonical form has epoch milliseconds."""
    moment = EPOCH + dt.timedelta(milliseconds=reading.timestamp_ms)
    return Line(
        msgspec.json.encode(
            {
                "user_id": reading.user_id,
                "device_id": reading.device_id,
                "timestamp": f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03}Z",
                "heart_rate": reading.heart_rate,
            }
        ),
        days.day_of(reading.timestamp_ms),
        valid=True,
    )
