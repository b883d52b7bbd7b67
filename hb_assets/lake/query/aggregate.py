"""Aggregates one user's readings into mean heart rates, one point per span of time and device.

The survivor of a key, device priority and the mean are computed over readings that lie in memory;
`user_scan` reads them, `query` handles days and pages. `minutes` has the same rule in SQL, for a
day of all users; a test compares the two. In DuckDB a query took ten times as long (decision 13).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hb_assets.core.schema import HEARTBEATS

GRANULARITIES: Mapping[str, int] = {
    "1s": 1_000,
    "1m": 60_000,
    "5m": 300_000,
    "1h": 3_600_000,
    "1d": 86_400_000,
}
"""Spans of a point by name, in milliseconds; each divides a day, so that no bucket spans two."""

POINTS: pa.Schema = pa.schema(
    [
        HEARTBEATS.field("timestamp").with_metadata({"comment": "start of the bucket"}),
        HEARTBEATS.field("heart_rate").with_metadata({"comment": "mean bpm, half rounded up"}),
        HEARTBEATS.field("device_id"),
    ]
)

Integers = npt.NDArray[np.integer]


@dataclass(frozen=True, slots=True)
class Readings:
    """Readings of one user as columns of one length.

    Attributes:
        timestamp: epoch milliseconds.
        heart_rate: bpm.
        device: positions in `devices`.
        devices: names of devices, each once.
        arrival: columns of the rows' identities, in the order of `schema.ARRIVAL`; empty where
            every key comes once.
    """

    timestamp: Integers
    heart_rate: Integers
    device: Integers
    devices: Sequence[str]
    arrival: tuple[Integers, ...] = ()

    def __len__(self) -> int:
        return len(self.timestamp)

    def taken(self, where: Integers | npt.NDArray[np.bool_] | slice) -> Readings:
        """The readings at these positions."""
        return Readings(
            self.timestamp[where],
            self.heart_rate[where],
            self.device[where],
            self.devices,
            tuple(column[where] for column in self.arrival),
        )


def joined(parts: Sequence[Readings]) -> Readings:
    """Concatenate readings (at least one part); all with arrivals, or none."""
    if len(parts) == 1:
        return parts[0]
    devices = list(dict.fromkeys(name for part in parts for name in part.devices))
    place = {name: at for at, name in enumerate(devices)}
    codes = [_codes(part, place) for part in parts]
    return Readings(
        np.concatenate([part.timestamp for part in parts]),
        np.concatenate([part.heart_rate for part in parts]),
        np.concatenate(codes),
        devices,
        tuple(map(np.concatenate, zip(*(part.arrival for part in parts), strict=True))),
    )


def _codes(readings: Readings, place: Mapping[str, int]) -> Integers:
    """The rows' devices as positions in `place`."""
    places = [place[name] for name in readings.devices]
    if places == list(range(len(places))):
        return readings.device
    return np.array(places, np.int32)[readings.device]


def points(
    readings: Readings, size_ms: int, priority: Sequence[str], *, every_device: bool = False
) -> pa.Table:
    """Aggregate readings into POINTS, in order of time and device.

    Args:
        readings: of one user, in any order, each key as often as it was delivered.
        size_ms: span of a bucket; its start is a multiple of it.
        priority: devices in order of trust; the others come last, by name.
        every_device: use all readings, not only those that device priority keeps.
    """
    if not len(readings):
        return POINTS.empty_table()
    readings = _ranked(readings, priority)
    at = readings.timestamp
    if not (at[1:] > at[:-1]).all():
        readings = _survivors(readings.taken(np.lexsort((readings.device, at))))
        if not every_device:
            readings = readings.taken(_first_of_each(readings.timestamp))
    return _means(readings, size_ms)


def _ranked(readings: Readings, priority: Sequence[str]) -> Readings:
    """The readings with devices in order of trust: a device's code is its rank."""
    place = {name: at for at, name in reversed(list(enumerate(priority)))}
    ranked = sorted(readings.devices, key=lambda name: (place.get(name, len(priority)), name))
    codes = _codes(readings, {name: at for at, name in enumerate(ranked)})
    return Readings(readings.timestamp, readings.heart_rate, codes, ranked, readings.arrival)


def _survivors(ordered: Readings) -> Readings:
    """The latest arrival of each key; rows are ordered by key."""
    if not ordered.arrival:
        return ordered
    again = (ordered.timestamp[1:] == ordered.timestamp[:-1]) & (
        ordered.device[1:] == ordered.device[:-1]
    )
    if not again.any():
        return ordered
    tied = np.flatnonzero(np.append(again, False) | np.insert(again, 0, False))
    few = ordered.taken(tied)
    by_arrival = np.lexsort((*reversed(few.arrival), few.device, few.timestamp))
    order = np.arange(len(ordered))
    order[tied] = tied[by_arrival]
    return ordered.taken(order[np.append(~again, True)])


def _first_of_each(sorted_values: Integers) -> npt.NDArray[np.bool_]:
    first = np.ones(len(sorted_values), bool)
    np.not_equal(sorted_values[1:], sorted_values[:-1], out=first[1:])
    return first


def _means(readings: Readings, size_ms: int) -> pa.Table:
    names = sorted(readings.devices)
    bucket, bpm = readings.timestamp // size_ms, readings.heart_rate
    if len(names) == 1:
        cell = bucket
    else:
        by_name = _codes(readings, {name: at for at, name in enumerate(names)})
        cell = bucket * len(names) + by_name
        order = np.argsort(cell, kind="stable")
        cell, bpm = cell[order], bpm[order]
    starts = np.flatnonzero(_first_of_each(cell))
    total = np.add.reduceat(bpm.astype(np.int64), starts)
    count = np.diff(starts, append=len(cell))
    start_ms = cell[starts] // len(names) * size_ms
    return pa.Table.from_arrays(
        [
            pa.array(start_ms).view(POINTS.field("timestamp").type),
            pa.array(((2 * total + count) // (2 * count)).astype(np.int16)),
            pa.array(names).take(pa.array(cell[starts] % len(names))),
        ],
        schema=POINTS,
    )
