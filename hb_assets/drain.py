"""The drain: from the buffer into durable fragments, and only then acknowledged.

Belongs here: the cycle claim, decode, publish, acknowledge, who is a suspect, and the loop around
it with its pauses; the drain sensor's tick, `hb drain` and imports all call these same functions.
Doesn't belong here: how entries are claimed (`buffer.consumer`) and how files are made durable
(`lake`).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from hb_assets.buffer import beats
from hb_assets.buffer.consumer import Consumer, Entry
from hb_assets.lake import erased, fragments, isolation, quarantine, tombstones
from hb_assets.lake.decode import Decoded, pieces
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds of rest after a fault: doubled with each one in a row, up to this."""
_LOOK = 0.2
"""Longest sleep, in seconds, between two looks at `stop`."""


def pause_after(faults: int) -> float:
    """Seconds to rest after so many faults in a row (at least one)."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(faults - 1, 16))


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

    Entries that were handed out more often than POISON_DELIVERIES are suspects: they come after the
    others are acknowledged, each decoded alone in a process of its own. That count proves nothing
    by itself (kills, full disks and slow drainers raise it too); what that process makes of them
    counts.

    Raises:
        BufferUnavailableError: Redis doesn't answer. What was claimed stays pending.
        OSError: the lake can't be written. What was claimed stays pending; nothing is lost.
        HbError: suspects can't be decoded. They stay pending.
    """
    began = time.monotonic()
    entries = consumer.claim(settings.drain_max_rows, settings.drain_max_bytes)
    if not entries:
        consumer.beat()
        return Drained(empty=True, seconds=time.monotonic() - began)
    suspects = [entry for entry in entries if entry.deliveries > settings.poison_deliveries]
    others = [entry for entry in entries if entry.deliveries <= settings.poison_deliveries]
    done, reasons = Drained(), Counter[str]()
    if others:
        done = _bring(consumer, lake, settings, others, pieces(others, settings), reasons)
    for suspect, decoded in isolation.examine(suspects, settings):
        done = done.plus(_bring(consumer, lake, settings, [suspect], decoded, reasons))
    done = replace(done, cycles=1, seconds=time.monotonic() - began)
    consumer.beat(_counts(done, consumer.ended, reasons))
    return done


def _counts(done: Drained, ended: str, reasons: Counter[str]) -> Counter[str]:
    """What others see of a cycle that drained anything."""
    counts = beats.timed("drain", done.seconds)
    counts["drained_rows"] = done.rows
    counts["drained_entries"] = done.entries
    counts["drained_fragments"] = done.fragments
    counts["drained_unknown_fields"] = done.unknown_fields
    counts[beats.label("drain_flushes", ended)] = 1
    for reason, records in reasons.items():
        counts[beats.label("quarantined", reason)] = records
    return counts


def _bring(
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    entries: Sequence[Entry],
    decoded: Iterable[Decoded],
    reasons: Counter[str],
) -> Drained:
    rows = quarantined = published = unknown_fields = 0
    counts = []
    for part in decoded:
        kept, forgotten = tombstones.withheld(lake, part.rows)
        rejected, forgotten_too = tombstones.withheld(lake, part.rejected)
        published += len(fragments.publish(lake, kept))
        quarantine.publish(lake, rejected)
        erased.publish(lake, settings, forgotten, forgotten_too)
        counts.append(part.counts)
        rows += kept.num_rows
        quarantined += rejected.num_rows
        reasons.update(rejected["reason"].to_pylist())
        unknown_fields += part.unknown_fields
    totals = map(sum, zip(*counts, strict=True))
    # Everything is durable now; a crash before this line means that the entries come again.
    consumer.acknowledge(list(zip(entries, totals, strict=True)))
    return Drained(
        rows=rows,
        quarantined=quarantined,
        entries=len(entries),
        fragments=published,
        unknown_fields=unknown_fields,
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
    on_fault: Callable[[Exception], None] = lambda _: None,
) -> Drained:
    """Drain cycle after cycle.

    Args:
        consumer: opened by the caller.
        lake: where to.
        settings: budgets of a cycle, and DRAIN_POLL.
        seconds: no new cycle starts after this time (None: no limit).
        until_empty: go on until nothing is undelivered and nothing pending, at any consumer.
        follow: go on for ever, resting DRAIN_POLL where there was nothing, and longer and longer
            after a fault (a full disk, a Redis that is away, an error of ours).
        stop: asked before every cycle, and while it rests.
        on_cycle: told the total so far after every cycle.
        on_fault: told of each fault that `follow` goes on after.

    Without `until_empty` and `follow` it ends when a claim finds nothing.

    Raises:
        BufferUnavailableError, OSError, HbError: as `drain_cycle`; with `follow` nothing at all.
    """
    began = time.monotonic()
    total = Drained()
    faults = 0
    while not stop() and (seconds is None or time.monotonic() - began < seconds):
        try:
            total = total.plus(drain_cycle(consumer, lake, settings))
        except Exception as error:
            if not follow:
                raise
            faults += 1
            on_fault(error)
            _rest(pause_after(faults), stop)
            continue
        faults = 0
        on_cycle(total)
        if not total.empty or follow:
            if total.empty:
                time.sleep(settings.drain_poll.total_seconds())
            continue
        if not until_empty or consumer.empty():
            break
        time.sleep(settings.drain_poll.total_seconds())
    return replace(total, seconds=time.monotonic() - began)


def _rest(seconds: float, stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not stop() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK))
