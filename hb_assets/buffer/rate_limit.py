"""Rate limiting by the generic cell rate algorithm (GCRA), shared between processes through Redis.

Whom to limit, and what a refused client is told, is in `gateway.auth.rate_limits`.

GCRA (ITU-T I.371, the "virtual scheduling" form) keeps one number a subject, its theoretical
arrival time TAT: when all that it sent would have come at the allowed rate. A request of cost c is
admitted while

    max(TAT, now) + c * window / quota - now <= window

and then moves TAT on by c * window / quota: a burst of one quota, then quota / window sustained.

A process decides by the TATs it knows, without asking, and charges what it admitted to Redis in
the round trip that carries the append; the script adds it to the TAT there, atomically, and answers
with the sum of all processes, which is what this one knows from then on. A TAT only moves on, so
what a process knows is never too strict. While Redis is away, it goes on by its own knowledge.
Decision 17 says how far several processes can be off.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from math import ceil
from typing import Any, NamedTuple

from hb_assets.buffer import keys
from hb_assets.buffer.roundtrip import Command, script
from hb_assets.core.record import shard_of

_CHARGED_SHARE = 0.01
"""Part of its quota that a subject may use before it is charged: less traffic for Redis."""
_MOST_CHARGES = 1000
"""Most subjects that one round trip charges."""
_MOST_KNOWN = 200_000
"""Subjects of a policy that are remembered, in about 50 MB; the nearest to a full quota are
forgotten first."""


class Policy:
    """A limit for each subject: `quota` at once, and `quota` in each `window_us` microseconds.

    `interval_us` is what a cost of 1 moves the theoretical arrival time on by, `owing_us` from when
    on a subject has to be charged.
    """

    __slots__ = ("_shards", "_subjects", "interval_us", "name", "owing_us", "quota", "window_us")

    def __init__(self, name: str, quota: int, window_us: int, shards: int) -> None:
        self.name = name
        self.quota = quota
        self.window_us = window_us
        self.interval_us = window_us / quota
        self.owing_us = window_us * _CHARGED_SHARE
        self._shards = shards
        self._subjects: dict[str, Subject] = {}

    def subject(self, whom: str) -> Subject:
        """State of one subject; `whom` is a clear name, which is only kept as a hash."""
        found = self._subjects.get(whom)
        if found is None:
            if len(self._subjects) >= _MOST_KNOWN:
                self._forget()
            found = self._subjects[whom] = Subject(self, shard_of(whom, self._shards), whom)
        return found

    def subjects(self, whom: Iterable[str]) -> list[Subject]:
        """States of many subjects, in their order."""
        known, subject = self._subjects.get, self.subject
        return [known(one) or subject(one) for one in whom]

    def _forget(self) -> None:
        """Forget the half of the subjects that is nearest to a full quota."""
        furthest = sorted(self._subjects.items(), key=lambda item: -item[1].arrival_us)
        self._subjects = dict(furthest[: _MOST_KNOWN // 2])


class Subject:
    """One subject of a policy, and its theoretical arrival time by the limiter's clock.

    `owed_us` is the part of it that wasn't charged yet, `shard` whose hash tag its key has.
    """

    __slots__ = ("arrival_us", "digest", "owed_us", "policy", "shard")

    def __init__(self, policy: Policy, shard: int, whom: str) -> None:
        self.policy = policy
        self.shard = shard
        self.digest = hashlib.blake2b(whom.encode(), digest_size=16).hexdigest()
        self.arrival_us = 0.0
        self.owed_us = 0.0


class Denial(NamedTuple):
    """A refusal: which subject has to wait, and for how many seconds."""

    subject: Subject
    seconds: float


class Limiter:
    """Rate limiter of one event loop, which also charges Redis; not for several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._due: dict[Subject, None] = {}
        self.wake: Callable[[], None] = lambda: None
        """Called when something is to be charged: whoever sends charges sets it."""

    @property
    def due(self) -> bool:
        """Whether something is to be charged."""
        return bool(self._due)

    def admit(self, wanted: Sequence[tuple[Subject, int]]) -> Denial | None:
        """Admit a request with a cost for each subject, or return the subject that has to wait.

        A request that one subject refuses costs none of them. A cost above a whole quota is
        admitted when all of the quota is there, and has to be worked off: else it never would be.
        """
        now = self._clock() * 1e6
        for subject, cost in wanted:
            if subject.arrival_us > now:
                policy = subject.policy
                cost_us = min(cost * policy.interval_us, policy.window_us)
                early_us = subject.arrival_us + cost_us - policy.window_us - now
                if early_us > 0:
                    return Denial(subject, early_us / 1e6)
        for subject, cost in wanted:
            if subject.arrival_us < now:  # whatever it owed was worked off meanwhile
                subject.arrival_us, subject.owed_us = now, 0.0
            policy = subject.policy
            cost_us = cost * policy.interval_us
            subject.arrival_us += cost_us
            subject.owed_us += cost_us
            if subject.owed_us >= policy.owing_us:
                self._due[subject] = None
                self.wake()
        return None

    def admit_each(self, policy: Policy, wanted: Mapping[str, int]) -> dict[str, Denial]:
        """Admit the costs of many subjects, each all or none; return those that have to wait.

        As `admit`, without a call and a look at the clock for each: a batch may be of as many
        users as it has heartbeats.
        """
        now = self._clock() * 1e6
        interval_us, window_us, owing_us = policy.interval_us, policy.window_us, policy.owing_us
        denied = {}
        for (whom, cost), subject in zip(wanted.items(), policy.subjects(wanted), strict=True):
            cost_us = cost * interval_us
            arrival_us = subject.arrival_us
            if arrival_us < now:  # whatever he owed was worked off meanwhile
                arrival_us, owed_us = now, cost_us
            else:
                early_us = arrival_us + min(cost_us, window_us) - window_us - now
                if early_us > 0:
                    denied[whom] = Denial(subject, early_us / 1e6)
                    continue
                owed_us = subject.owed_us + cost_us
            subject.arrival_us = arrival_us + cost_us
            subject.owed_us = owed_us
            if owed_us >= owing_us:
                self._due[subject] = None
                self.wake()
        return denied

    def is_low(self, subjects: Iterable[Subject]) -> bool:
        """Whether one of them has less than half of its quota left."""
        now = self._clock() * 1e6
        return any(one.arrival_us - now > one.policy.window_us / 2 for one in subjects)

    def states(self, subjects: Iterable[Subject]) -> list[tuple[str, int, int]]:
        """By subject its policy, what is left of its quota, and the seconds until all is back."""
        now = self._clock() * 1e6
        found = []
        for subject in subjects:
            policy = subject.policy
            ahead_us = subject.arrival_us - now
            if ahead_us <= 0:
                found.append((policy.name, policy.quota, 0))
            else:
                left = int((policy.window_us - ahead_us) / policy.interval_us)
                found.append((policy.name, max(0, left), ceil(ahead_us / 1e6)))
        return found

    def charges(self) -> tuple[list[Command], list[list[Subject]]]:
        """Commands that charge what is due, and the subjects of each, in order of its replies."""
        if not self._due:
            return [], []
        by_shard: defaultdict[int, list[Subject]] = defaultdict(list)
        for subject in list(islice(self._due, _MOST_CHARGES)):
            del self._due[subject]
            by_shard[subject.shard].append(subject)
        commands: list[Command] = []
        for shard, subjects in by_shard.items():
            names = [keys.limit(shard, one.policy.name, one.digest) for one in subjects]
            commands.append(script("charge", names, [round(one.owed_us) for one in subjects]))
            for subject in subjects:
                subject.owed_us = 0.0
        return commands, list(by_shard.values())

    def hear(self, charged: Iterable[Sequence[Subject]], replies: Iterable[Any]) -> None:
        """Update the subjects from the replies to `charges`; one that isn't a list is an error."""
        now = self._clock() * 1e6
        for subjects, reply in zip(charged, replies, strict=True):
            if isinstance(reply, list):
                for subject, ahead_us in zip(subjects, reply, strict=True):
                    known = now + ahead_us + subject.owed_us
                    subject.arrival_us = max(subject.arrival_us, known)
