"""The drain: writes the buffer's entries into durable fragments, and only then acknowledges them.

One cycle claims, decodes, publishes and acknowledges. The drain sensor's tick, `hb drain` and
imports all call these functions: the cycle, how long it gathers entries before, which entries are
suspected of killing drainers, and the loop around it with its pauses. Entries are claimed by
`buffer.consumer`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from threading import Event
from typing import Literal, Self

import numpy as np

from hb_assets.buffer import liveness
from hb_assets.buffer.consumer import Consumer, Entry
from hb_assets.core.settings import Settings
from hb_assets.lake.files import erased, fragments, quarantine, tombstones
from hb_assets.lake.ingest import isolation
from hb_assets.lake.ingest.decode import Decoded, pieces
from hb_assets.lake.storage.store import Lake

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds of rest after a fault: doubled with each one in a row, up to this."""
_LOOK = 0.2
"""Longest sleep, in seconds, between two looks at `stop`."""
_LOOK_BACK = 5.0
"""Seconds after which a batch is claimed with nothing in hand: what the dead left comes then."""
_LEAST_AHEAD = 4
"""Batches that are claimed ahead in between at least, however long each takes."""


def pause_after(faults: int) -> float:
    """Seconds to rest after so many faults in a row (at least one)."""
    return min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(faults - 1, 16))


@dataclass(frozen=True, slots=True)
class Drained:
    """Counts of what was drained.

    `rows` went into fragments, `quarantined` records into quarantine; `entries` were acknowledged;
    `empty` when the last cycle brought all that it found, and found all that there was.
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
        """The sum of both; `empty` is the other one's."""
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


Ended = Literal["rows", "bytes", "entries", "all", "age"]
"""What ended the gathering of a batch: a bound, all there was, or how long its oldest waited."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Entries that are claimed, and what ended their claim."""

    entries: Sequence[Entry]
    ended: Ended


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
    entries = consumer.claim(settings.drain_max_rows, settings.drain_max_bytes)
    return _cycle(consumer, lake, settings, _Batch(entries, consumer.ended))


def _cycle(consumer: Consumer, lake: Lake, settings: Settings, batch: _Batch) -> Drained:
    if not batch.entries:
        consumer.mark_alive()
        return Drained(empty=True)
    began = time.monotonic()
    suspects = [entry for entry in batch.entries if entry.deliveries > settings.poison_deliveries]
    others: Sequence[Entry] = batch.entries
    if suspects:
        others = [entry for entry in others if entry.deliveries <= settings.poison_deliveries]
    done, reasons = Drained(), Counter[str]()
    if others:
        done = _bring(consumer, lake, settings, others, pieces(others, settings), reasons)
    for suspect, decoded in isolation.examine(suspects, settings):
        done = done.plus(_bring(consumer, lake, settings, [suspect], decoded, reasons))
    caught_up = batch.ended in ("all", "age") and done.entries == len(batch.entries)
    done = replace(done, cycles=1, seconds=time.monotonic() - began, empty=caught_up)
    consumer.mark_alive(_counts(done, batch.ended, reasons))
    return done


def _counts(done: Drained, ended: Ended, reasons: Counter[str]) -> Counter[str]:
    """Counts of a cycle for `liveness`, if it drained anything."""
    counts = liveness.timed("drain", done.seconds)
    counts["drained_rows"] = done.rows
    counts["drained_entries"] = done.entries
    counts["drained_fragments"] = done.fragments
    counts["drained_unknown_fields"] = done.unknown_fields
    counts[liveness.label("drain_flushes", ended)] = 1
    for reason, records in reasons.items():
        counts[liveness.label("quarantined", reason)] = records
    return counts


def _bring(
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    entries: Sequence[Entry],
    decoded: Iterable[Decoded],
    reasons: Counter[str],
) -> Drained:
    done = Drained(entries=len(entries))
    counts = np.zeros(len(entries), np.int64)
    with ThreadPoolExecutor(1, "writer") as writer:
        writing: Future[Drained] | None = None
        for part in decoded:
            if writing is not None:
                done = done.plus(writing.result())
            counts += part.counts
            writing = writer.submit(_write, lake, settings, part, reasons)
        if writing is not None:
            done = done.plus(writing.result())
    # Everything is durable now; a crash before this line means that the entries come again.
    consumer.acknowledge(zip(entries, counts.tolist(), strict=True))
    return done


def _write(lake: Lake, settings: Settings, part: Decoded, reasons: Counter[str]) -> Drained:
    """Write one decoded part durably, while the next one is being decoded."""
    kept, forgotten = tombstones.withheld(lake, part.rows)
    rejected, forgotten_too = tombstones.withheld(lake, part.rejected)
    published = fragments.publish(lake, kept)
    quarantine.publish(lake, rejected)
    erased.publish(lake, settings, forgotten, forgotten_too)
    reasons.update(rejected["reason"].to_pylist())
    return Drained(
        rows=kept.num_rows,
        quarantined=rejected.num_rows,
        fragments=len(published),
        unknown_fields=part.unknown_fields,
    )


class _Claims:
    """Batches, each claimed in a thread while the one before is brought into the lake.

    So Redis, the network and the reading of replies cost no time of their own; memory holds two
    batches. What lies ahead when a cycle fails stays pending, and is claimed again.
    """

    def __init__(
        self, consumer: Consumer, settings: Settings, stop: Callable[[], bool], *, wait: bool
    ) -> None:
        self._consumer = consumer
        self._settings = settings
        self._stop = stop
        self._wait = wait
        self._thread = ThreadPoolExecutor(1, "claims")
        self._ahead: Future[_Batch] | None = None
        self._given_up = Event()
        self._looked_back = 0.0
        self._since = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()
        self._thread.shutdown()

    @property
    def ahead(self) -> bool:
        """Whether the next batch is claimed already, or being claimed."""
        return self._ahead is not None

    def next(self) -> _Batch:
        """The next batch; without entries when there is nothing to claim.

        Raises:
            BufferUnavailableError: Redis doesn't answer.
        """
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            return ahead.result()
        self._looked_back = time.monotonic()
        self._since = 0
        return self._gathered(self._consumer.claim)

    def look_ahead(self, batch: _Batch) -> None:
        """Begin to claim the batch after this one, where that is sensible."""
        # What the dead and failed cycles left is for a claim that has nothing in hand.
        due = self._since >= _LEAST_AHEAD and time.monotonic() - self._looked_back > _LOOK_BACK
        more = self._wait or batch.ended not in ("all", "age")
        if more and not due and not self._consumer.behind:
            self._given_up.clear()
            self._since += 1
            self._ahead = self._thread.submit(self._gathered, self._consumer.claim_ahead)

    def give_up(self) -> None:
        """Abandon what was claimed ahead; a later claim gets it again."""
        if self._ahead is not None:
            self._given_up.set()
            wait([self._ahead])
            self._ahead = None

    def _gathered(self, claim: Callable[[int, int], list[Entry]]) -> _Batch:
        consumer, settings = self._consumer, self._settings
        entries = claim(settings.drain_max_rows, settings.drain_max_bytes)
        ended: Ended = consumer.ended
        if not self._wait or not entries:
            return _Batch(entries, ended)
        # Another drainer takes over what is pending for too long, and a cycle is seen at its end.
        bounds = [settings.drain_max_wait, settings.claim_min_idle / 4]
        if settings.health_drain_age:
            bounds.append(settings.health_drain_age / 4)
        longest = min(bounds).total_seconds()
        end = time.monotonic() + longest - max(0.0, consumer.age(entries))
        while ended == "all" and not self._stop() and not self._given_up.is_set():
            if (left := end - time.monotonic()) <= 0:
                return _Batch(entries, "age")
            time.sleep(min(left, settings.drain_poll.total_seconds(), _LOOK))
            entries += consumer.claim_more()
            ended = consumer.ended
        return _Batch(entries, ended)


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
        settings: budgets of a cycle, DRAIN_MAX_WAIT and DRAIN_POLL.
        seconds: no new cycle starts after this time, but for one that is claimed already (None: no
            limit).
        until_empty: go on until nothing is undelivered and nothing pending, at any consumer.
        follow: go on for ever. While there is little, gather it for DRAIN_MAX_WAIT; rest DRAIN_POLL
            where there was nothing, and longer and longer after a fault (a full disk, a Redis that
            is away, an error of ours).
        stop: asked before every cycle, while it gathers, and while it rests. What is claimed by
            then is brought.
        on_cycle: told the total so far after every cycle.
        on_fault: told of each fault that `follow` goes on after.

    Without `until_empty` and `follow` it ends with a cycle that brought all there was: at low load
    what comes meanwhile is better gathered for the next call.

    Raises:
        BufferUnavailableError, OSError, HbError: as `drain_cycle`; with `follow` nothing at all.
    """
    began = time.monotonic()
    total = Drained()
    faults = 0

    def over() -> bool:
        return stop() or (seconds is not None and time.monotonic() - began >= seconds)

    with _Claims(consumer, settings, stop, wait=follow) as claims:
        while claims.ahead or not over():
            try:
                batch = claims.next()
                if batch.entries and not over():
                    claims.look_ahead(batch)
                total = total.plus(_cycle(consumer, lake, settings, batch))
            except Exception as error:
                if not follow:
                    raise
                claims.give_up()
                faults += 1
                on_fault(error)
                _rest(pause_after(faults), stop)
                continue
            faults = 0
            on_cycle(total)
            if not follow and total.empty and (not until_empty or consumer.empty()):
                break
            if not batch.entries:
                time.sleep(settings.drain_poll.total_seconds())
    return replace(total, seconds=time.monotonic() - began)


def _rest(seconds: float, stop: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not stop() and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, _LOOK))
