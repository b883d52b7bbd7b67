"""The drain: from the buffer into durable fragments, and only then acknowledged.

Belongs here: the cycle claim, decode, publish, acknowledge, and the loop around it; the drain
sensor's tick, `hb drain` and imports all call these same functions. Doesn't belong here: how
entries are claimed (`buffer.consumer`) and how files are made durable (`lake`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from hb_assets.buffer.consumer import Consumer
from hb_assets.lake import erased, fragments, quarantine, tombstones
from hb_assets.lake.decode import decode
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings


@dataclass(frozen=True, slots=True)
class Drained:
    """What draining did.

    `rows` went into fragments, `quarantined` records into quarantine; `entries` were acknowledged;
    `empty` when the last look found nothing to claim.
    """

    rows: int = 0
    quarantined: int = 0
    entries: int = 0
    fragments: int = 0
    unknown_fields: int = 0
    cycles: int = 0
    seconds: float = 0.0
    empty: bool = False

    def plus(self, other: Drained) -> Drained:
        """Both together; `empty` as the other one says."""
        return Drained(
            rows=self.rows + other.rows,
            quarantined=self.quarantined + other.quarantined,
            entries=self.entries + other.entries,
            fragments=self.fragments + other.fragments,
            unknown_fields=self.unknown_fields + other.unknown_fields,
            cycles=self.cycles + other.cycles,
            seconds=self.seconds + other.seconds,
            empty=other.empty,
        )


def drain_cycle(consumer: Consumer, lake: Lake, settings: Settings) -> Drained:
    """Claim one batch within DRAIN_MAX_ROWS and DRAIN_MAX_BYTES, and bring it into the lake.

    Raises:
        BufferUnavailableError: Redis doesn't answer. What was claimed stays pending.
        OSError: the lake can't be written. What was claimed stays pending; nothing is lost.
    """
    began = time.monotonic()
    entries = consumer.claim(settings.drain_max_rows, settings.drain_max_bytes)
    if not entries:
        return Drained(empty=True, seconds=time.monotonic() - began)
    decoded = decode(entries, settings)
    rows, forgotten = tombstones.withheld(lake, decoded.rows)
    records, forgotten_too = tombstones.withheld(lake, decoded.rejected)
    published = fragments.publish(lake, rows)
    quarantine.publish(lake, records)
    erased.publish(lake, settings, forgotten, forgotten_too)
    # Everything is durable now; a crash before this line means that the entries come again.
    consumer.acknowledge(list(zip(entries, decoded.counts, strict=True)))
    return Drained(
        rows=decoded.rows.num_rows,
        quarantined=decoded.rejected.num_rows,
        entries=len(entries),
        fragments=len(published),
        unknown_fields=decoded.unknown_fields,
        cycles=1,
        seconds=time.monotonic() - began,
    )


def drain(
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    *,
    seconds: float | None = None,
    until_empty: bool = False,
    follow: bool = False,
    stop: Callable[[], bool] = lambda: False,
    on_cycle: Callable[[Drained], None] = lambda _: None,
) -> Drained:
    """Drain cycle after cycle.

    Args:
        consumer: opened by the caller.
        lake: where to.
        settings: budgets of a cycle, and DRAIN_POLL.
        seconds: no new cycle starts after this time (None: no limit).
        until_empty: go on until nothing is undelivered and nothing pending, at any consumer.
        follow: go on for ever, resting DRAIN_POLL where there was nothing.
        stop: asked before every cycle.
        on_cycle: told the total so far after every cycle.

    Without `until_empty` and `follow` it ends when a claim finds nothing.

    Raises:
        BufferUnavailableError, OSError: as `drain_cycle`.
    """
    began = time.monotonic()
    total = Drained()
    while not stop() and (seconds is None or time.monotonic() - began < seconds):
        total = total.plus(drain_cycle(consumer, lake, settings))
        on_cycle(total)
        if not total.empty or follow:
            if total.empty:
                time.sleep(settings.drain_poll.total_seconds())
            continue
        if not until_empty or consumer.empty():
            break
        time.sleep(settings.drain_poll.total_seconds())
    return replace(total, seconds=time.monotonic() - began)
