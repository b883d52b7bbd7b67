"""Rate limits: how much a subject may send, by the generic cell rate algorithm (GCRA).

Belongs here: the algorithm, what this process knows of each subject, and the charges by which
processes and machines share that in Redis. Doesn't belong here: who the subjects are, and what a
refused client is told (`gateway.limits`).

GCRA (ITU-T I.371, the "virtual scheduling" form) keeps one number a subject, its theoretical
arrival time TAT: when all that it sent would have come at the allowed rate. A request of cost c is
admitted while

    max(TAT, now) + c * window / quota - now <= window

and then moves TAT on by c * window / quota: a quota at once, and then quota / window for ever.

A process decides by the TATs it knows, without asking, and charges what it admitted to Redis in
the round trip that carries the append; the script adds it to the TAT there, atomically, and answers
with the sum of all processes, which is what this one knows from then on. A TAT only moves on, so
what a process knows is never too strict. While Redis is away, it goes on by its own knowledge.
Decision 17 says how far several processes can be off.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from hb_assets.buffer import keys
from hb_assets.buffer.roundtrip import Command, script

_CHARGED_SHARE = 0.01
"""What a subject may use up of its quota before it is charged: much less traffic for Redis."""
_MOST_CHARGES = 1000
"""How many subjects one round trip charges."""
_MOST_KNOWN = 200_000
"""Subjects that are remembered, in about 30 MB; the nearest to a full quota are forgotten first."""


class Policy:
    """At most `quota` at once, and `quota` in each `window_us` microseconds.

    `interval_us` is what a cost of 1 moves the theoretical arrival time on by, `owing_us` from when
    on it has to be charged. Compared by identity, to be quick in a key.
    """

    __slots__ = ("interval_us", "name", "owing_us", "quota", "window_us")

    def __init__(self, name: str, quota: int, window_us: int) -> None:
        self.name = name
        self.quota = quota
        self.window_us = window_us
        self.interval_us = window_us / quota
        self.owing_us = window_us * _CHARGED_SHARE


class Subject(NamedTuple):
    """Whom a policy limits: `shard` is whose hash tag its key has, `digest` never a clear name."""

    policy: Policy
    shard: int
    digest: str


class Denial(NamedTuple):
    """Who has to wait, and for how many seconds."""

    subject: Subject
    seconds: float


@dataclass(slots=True)
class _Known:
    arrival_us: float
    owed_us: float = 0.0


class Limiter:
    """What one event loop knows and owes; not for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: dict[Subject, _Known] = {}
        self._due: dict[Subject, _Known] = {}

    @property
    def due(self) -> bool:
        """Whether something is to be charged."""
        return bool(self._due)

    def admit(self, wanted: Sequence[tuple[Subject, int]]) -> Denial | None:
        """Admit a request that costs each subject so much, or say whom it has to wait for.

        It costs nobody anything unless all admit it. What costs more than a whole quota is admitted
        when all of the quota is there, and has to be worked off: it never would be otherwise.
        """
        now = self._clock() * 1e6
        known_of = self._known
        for subject, cost in wanted:
            known = known_of.get(subject)
            if known is not None and known.arrival_us > now:
                policy = subject.policy
                cost_us = min(cost * policy.interval_us, policy.window_us)
                early_us = known.arrival_us + cost_us - policy.window_us - now
                if early_us > 0:
                    return Denial(subject, early_us / 1e6)
        for subject, cost in wanted:
            self._take(subject, cost, now)
        return None

    def _take(self, subject: Subject, cost: int, now: float) -> None:
        policy = subject.policy
        known = self._known.get(subject)
        if known is None:
            if len(self._known) >= _MOST_KNOWN:
                self._forget(now)
            known = self._known[subject] = _Known(now)
        elif known.arrival_us < now:  # whatever it owed was worked off meanwhile
            known.arrival_us, known.owed_us = now, 0.0
        cost_us = cost * policy.interval_us
        known.arrival_us += cost_us
        known.owed_us += cost_us
        if known.owed_us >= policy.owing_us:
            self._due[subject] = known

    def state(self, subject: Subject) -> tuple[int, int]:
        """What is left of the subject's quota now, and in how many seconds it has all of it."""
        policy = subject.policy
        known = self._known.get(subject)
        ahead_us = 0.0 if known is None else known.arrival_us - self._clock() * 1e6
        if ahead_us <= 0:
            return policy.quota, 0
        return max(0, int((policy.window_us - ahead_us) / policy.interval_us)), ceil(ahead_us / 1e6)

    def charges(self) -> tuple[list[Command], list[list[Subject]]]:
        """Commands that charge what is due, and whom each charges, in the order of its replies."""
        by_shard: defaultdict[int, list[Subject]] = defaultdict(list)
        for subject in list(islice(self._due, _MOST_CHARGES)):
            by_shard[subject.shard].append(subject)
        commands: list[Command] = []
        for shard, subjects in by_shard.items():
            arguments = []
            for subject in subjects:
                known = self._due.pop(subject)
                arguments.append(round(known.owed_us))
                known.owed_us = 0.0
            names = [keys.limit(shard, one.policy.name, one.digest) for one in subjects]
            commands.append(script("charge", names, arguments))
        return commands, list(by_shard.values())

    def hear(self, charged: Iterable[Sequence[Subject]], replies: Iterable[Any]) -> None:
        """Learn from the replies to `charges`; what isn't a list was an error and tells nothing."""
        now = self._clock() * 1e6
        for subjects, reply in zip(charged, replies, strict=True):
            if not isinstance(reply, list):
                continue
            for subject, ahead_us in zip(subjects, reply, strict=True):
                known = self._known.get(subject)
                if known is not None:
                    known.arrival_us = max(known.arrival_us, now + ahead_us + known.owed_us)

    def _forget(self, now: float) -> None:
        """Forget who has all of its quota again, or else the half that is nearest to it."""
        self._known = {s: known for s, known in self._known.items() if known.arrival_us > now}
        if len(self._known) >= _MOST_KNOWN:
            furthest = sorted(self._known.items(), key=lambda item: -item[1].arrival_us)
            self._known = dict(furthest[: _MOST_KNOWN // 2])
        self._due = {s: known for s, known in self._due.items() if s in self._known}
