"""Liveness timestamps and work counters that drains, consolidations and sensors leave in Redis.

By them a gateway (or any other process, on any machine) knows what others do. `pipeline.vitals`
decides when a timestamp is too old. Counts are written after the work: a kill between the two
loses the count and nothing else, so that whatever has to add up is counted in the ledger instead.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis.exceptions as failures

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client, address, is_wrong_type, unavailable
from hb_assets.buffer.roundtrip import exchange, script
from hb_assets.core.errors import BufferUnavailableError

DAGSTER = "dagster"
"""Name of the timestamp of a sensor's tick: daemon and code server run, and reach Redis."""
BOUNDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
"""Upper bounds of the buckets, in seconds, that pieces of work are counted in."""
BEYOND = "inf"
"""The bucket above all bounds."""

_KEYS = (keys.BEATS, keys.COUNTS)


@dataclass(frozen=True, slots=True)
class Liveness:
    """Liveness timestamps (`seen_ms`) by name, and `now_ms`; epoch milliseconds of Redis' clock."""

    now_ms: int
    seen_ms: Mapping[str, int] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)

    def age(self, name: str) -> float | None:
        """Seconds since this liveness timestamp; None when there is none."""
        at = self.seen_ms.get(name)
        return None if at is None else max(0.0, (self.now_ms - at) / 1000)

    @property
    def stopped(self) -> list[str]:
        """Names of Dagster's sensors that were stopped when one of them ticked last."""
        ticked = self.seen_ms.get(DAGSTER, 0)
        prefix = stopped("")
        return sorted(
            name.removeprefix(prefix)
            for name, at in self.seen_ms.items()
            if name.startswith(prefix) and at >= ticked
        )

    def labelled(self, name: str) -> dict[str, int]:
        """Counts of this name by the value of its label."""
        prefix = label(name, "")
        return {
            count.removeprefix(prefix): number
            for count, number in self.counts.items()
            if count.startswith(prefix)
        }


def drained(shard: int) -> str:
    """Name of the liveness timestamp of a drain that has looked at this shard."""
    return f"drain:{shard:02d}"


def stopped(sensor: str) -> str:
    """Name of the timestamp of a tick that has seen this sensor of Dagster's stopped."""
    return f"stopped:{sensor}"


def label(name: str, value: str) -> str:
    """Name of the field that counts one value of a label."""
    return f"{name}:{value}"


def timed(name: str, seconds: float) -> Counter[str]:
    """The counts of one piece of work: its microseconds (`<name>_us`), and its bucket by bound."""
    at = bisect_left(BOUNDS, seconds)
    bound = f"{BOUNDS[at]:g}" if at < len(BOUNDS) else BEYOND
    return Counter({f"{name}_us": round(seconds * 1_000_000), label(f"{name}_le", bound): 1})


def mark_alive(client: Client, names: Iterable[str], counts: Mapping[str, int]) -> int:
    """Set the liveness timestamps `names` to now, and add to counts; one round trip.

    Returns:
        Redis' clock, epoch milliseconds.

    Raises:
        BufferUnavailableError: Redis doesn't answer, or something else lies at a key.
    """
    names = list(names)
    arguments: list[str | bytes | int] = [len(names), *names]
    for name, number in counts.items():
        if number:
            arguments += (name, number)
    return int(_call(client, "mark_alive", arguments))


def read(client: Client) -> Liveness:
    """Read all liveness timestamps and counts at one instant.

    Raises:
        BufferUnavailableError: as `mark_alive`.
    """
    now_ms, found, counted = _call(client, "liveness", ())
    return Liveness(now_ms, _numbers(found), _numbers(counted))


def _call(client: Client, name: str, arguments: Iterable[str | bytes | int]) -> Any:
    try:
        [reply] = exchange(client, [script(name, _KEYS, tuple(arguments))])
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    if isinstance(reply, failures.RedisError):
        if is_wrong_type(reply):
            raise BufferUnavailableError(
                f"Redis at {address(client)} holds something else at {keys.BEATS} or {keys.COUNTS}, "
                "where hashes belong: delete or rename those keys"
            )
        raise unavailable(reply, client)
    return reply


def _numbers(pairs: list[bytes]) -> dict[str, int]:
    """A hash's fields, without what isn't a number: we don't write such."""
    return {
        name.decode(errors="replace"): int(value)
        for name, value in zip(pairs[::2], pairs[1::2], strict=True)
        if value.lstrip(b"-").isdigit()
    }
