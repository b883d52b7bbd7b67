"""Consumer of the buffer: claims entries, and acknowledges those that are durable in the lake.

It manages the consumer group, knows who owns which entry, and takes over from dead consumers. The
loop around it and its budgets of time are in `pipeline.drain`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import msgspec
import redis.exceptions as failures

from hb_assets.buffer import keys, liveness
from hb_assets.buffer.clock import ServerClock
from hb_assets.buffer.connection import Client, is_wrong_type, unavailable
from hb_assets.buffer.roundtrip import Command, exchange, script
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.processes import Identity
from hb_assets.core.settings import Settings

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_STEP_ENTRIES = 2048
"""Most entries that one read asks for, however small they are."""
_FIRST_STEP_ENTRIES = 256
"""Entries of the first read, before their size is known; each further read asks for more."""
_STEP_GROWTH = 4
_MOST_ENTRIES = 50_000
"""Entries of one claim: with one heartbeat each, a larger one would be at Redis for seconds."""
_ENTRY_BYTES = 64 * 1024
"""What an entry of 500 heartbeats weighs, about: the first step's guess."""
_PAGE = 100
_ACKNOWLEDGE_ENTRIES = 2000
_ALIVE_SECONDS = 5.0
"""An idle drain sets its liveness timestamp this often at least, and four times within
HB_HEALTH_DRAIN_AGE."""


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One claimed stream entry; made in a tenth of a dataclass's time, since there are many.

    `data` is None when the entry lacks the field; `own` is its field `n`: the heartbeats that our
    append counted, None for an external entry; `deliveries` counts this one too.
    """

    shard: int
    ms: int
    seq: int
    data: bytes | None
    own: int | None
    deliveries: int

    @property
    def id(self) -> str:
        """The entry's id in its stream."""
        return f"{self.ms}-{self.seq}"

    @property
    def rows(self) -> int:
        """Heartbeats in it, as far as that can be told without decoding."""
        if self.own is not None:
            return self.own
        return 0 if self.data is None else self.data.count(b"\n") + 1

    @property
    def size(self) -> int:
        """Bytes of data."""
        return 0 if self.data is None else len(self.data)


class Consumer:
    """One member of the consumer group; for one thread that claims and one that acknowledges.

    Use it as `open`, then any number of `claim` and `acknowledge`, then `close`. What was claimed
    and not acknowledged is handed out again: by this consumer's next `claim`, or by another one's
    when this process is dead, or the entry has been pending for HB_CLAIM_MIN_IDLE. Whoever works on
    something claims with `claim_ahead` meanwhile.
    """

    def __init__(self, client: Client, settings: Settings, name: str | None = None) -> None:
        self.name = name if name is not None else _new_name()
        self.lost = 0
        """Entries that somebody deleted while they were pending: data loss."""
        self.unusable: dict[int, str] = {}
        """Shards that are left out, and why: something else lies at one of their keys."""
        self.ended: Literal["rows", "bytes", "entries", "all"] = "all"
        """What ended the last claim: one of its bounds, or all there was is claimed."""
        self.behind = False
        """Whether entries may be pending for us that only `claim` hands out."""
        self._client = client
        self._shards = range(settings.shards)
        self._min_idle_ms = int(settings.claim_min_idle.total_seconds() * 1000)
        self._entry_rows = settings.entry_max_heartbeats
        self._next_sweep = 0.0
        watched = settings.health_drain_age.total_seconds()
        self._alive_seconds = min(_ALIVE_SECONDS, watched / 4 or _ALIVE_SECONDS)
        self._next_alive = 0.0
        self._clock = ServerClock()
        self._first_shard = 0
        self._budget = _Budget(1, 1, 1)
        self._surplus: list[Entry] = []
        _open[self.name] = self

    def open(self) -> None:
        """Create the groups where they are missing, and adopt entries that nobody would hand out.

        Such a gap (delivered, not pending, still there) is what a consumer deleted by hand leaves.

        Raises:
            BufferUnavailableError: Redis doesn't answer.
        """
        self._look_at(self._shards)
        self._without_unusable(self._shards, self._adopt_gaps)
        self._clock.ask(self._client)

    def claim(
        self, max_rows: int, max_bytes: int, shards: Iterable[int] | None = None
    ) -> list[Entry]:
        """Claim entries: first what a dead consumer or a failed cycle left, then new ones.

        All that an earlier claim returned and that was not acknowledged is returned again. A shard
        where something else lies at a key is left out (`unusable`), and looked at again later.

        Args:
            max_rows: bound of the heartbeats in the entries.
            max_bytes: bound of their bytes of data. A single entry may pass both bounds.
            shards: the streams to read; default all, by turns.

        Raises:
            BufferUnavailableError: as `open`.
        """
        if time.monotonic() >= self._next_sweep and self.unusable:
            self._look_at(list(self.unusable))

        def claim(turns: Sequence[int]) -> list[Entry]:
            self._begin(max_rows, max_bytes)
            self._surplus = []
            self.behind = True
            claimed = self._read(self._inherit(turns), left=True)
            self.behind = not self._budget.open
            return claimed + self._read_new(turns)

        return self._without_unusable(self._turns(shards), claim)

    def claim_ahead(self, max_rows: int, max_bytes: int) -> list[Entry]:
        """Claim only new entries, while those of an earlier claim aren't acknowledged yet.

        Bounds, errors and `ended` as with `claim`.
        """
        self._begin(max_rows, max_bytes)
        return self.claim_more()

    def claim_more(self) -> list[Entry]:
        """Claim new entries that still fit into the bounds of the last claim, as a part of it.

        Errors and `ended` as with `claim`.
        """
        surplus, self._surplus = self._surplus, []
        return self._take(surplus) + self._without_unusable(self._turns(), self._read_new)

    def _begin(self, max_rows: int, max_bytes: int) -> None:
        self._budget = _Budget(max_rows, max_bytes, self._entry_rows)
        self.ended = self._budget.ended

    def _turns(self, shards: Iterable[int] | None = None) -> list[int]:
        turns = list(self._shards if shards is None else shards)
        first = self._first_shard % max(1, len(turns))
        self._first_shard += 1
        return turns[first:] + turns[:first]

    def _take(self, entries: Sequence[Entry]) -> list[Entry]:
        """The entries that fit into the bounds; the next claim of new ones begins with the rest."""
        taken = self._budget.take(entries)
        self.ended = self._budget.ended
        self._surplus += entries[len(taken) :]
        return taken

    def age(self, entries: Iterable[Entry]) -> float:
        """Seconds since the oldest of these entries arrived, by Redis' clock; 0 of none."""
        now_ms = self._clock.now_ms()
        return (now_ms - min((entry.ms for entry in entries), default=now_ms)) / 1000

    def acknowledge(self, counts: Iterable[tuple[Entry, int]]) -> int:
        """Delete entries that are durable in the lake, and enter them in the ledger.

        Args:
            counts: entries, each with the heartbeats that the drain found in it.

        Returns:
            How many entries were deleted by this call; the others somebody else had deleted before.

        Raises:
            BufferUnavailableError: some are not known to be acknowledged; they'll be handed out
                again unless they were.
        """
        lots: dict[tuple[int, int, int, int], list[bytes]] = {}
        for entry, count in counts:
            own = entry.own
            alike = (entry.shard, -1 if own is None else own, count, entry.size)
            lot = lots.get(alike)
            if lot is None:
                lot = lots[alike] = []
            lot.append(b"%d-%d" % (entry.ms, entry.seq))
        calls = [
            (shard, script("acknowledge", _names(shard), (keys.GROUP, *arguments)))
            for shard, arguments in _acknowledgements(lots)
        ]
        try:
            return sum(self._exchange(calls))
        except _UnusableError as error:
            return sum(reply for reply in error.replies if isinstance(reply, int))

    def mark_alive(self, counts: Mapping[str, int] | None = None) -> None:
        """Set the shards' liveness timestamps, now that what was claimed is done, and count it.

        Without counts at most once in a while. Never raises: this must not hold up the work.
        """
        if not counts and time.monotonic() < self._next_alive:
            return
        self._next_alive = time.monotonic() + self._alive_seconds
        seen = [liveness.drained(shard) for shard in self._shards if shard not in self.unusable]
        try:
            self._clock.hear(liveness.mark_alive(self._client, seen, counts or {}))
        except BufferUnavailableError as error:
            _log.debug("not marked alive: %s", error)

    def empty(self) -> bool:
        """Whether nothing is undelivered and nothing is pending, in any shard that can be used."""
        return self._without_unusable(self._shards, self._empty)

    def _empty(self, shards: Sequence[int]) -> bool:
        states = self._exchange(
            [
                (shard, script("depth", (keys.stream(shard), keys.ledger(shard)), (keys.GROUP,)))
                for shard in shards
            ]
        )
        gaps = []
        for shard, (entries, _, pending, _, undelivered, *_) in zip(shards, states, strict=True):
            if entries and not pending and not undelivered:
                gaps.append(shard)
        self._adopt_gaps(gaps)
        return all(not entries and not pending for entries, _, pending, *_ in states)

    def close(self) -> None:
        """Delete this consumer from the groups where it has nothing pending."""
        _open.pop(self.name, None)
        try:
            listed = exchange(self._client, [_list_consumers(shard) for shard in self._shards])
            idle = [
                shard
                for shard, reply in zip(self._shards, listed, strict=True)
                if not isinstance(reply, Exception) and _consumers(reply).get(self.name) == 0
            ]
            exchange(
                self._client,
                [
                    ("XGROUP", "DELCONSUMER", keys.stream(shard), keys.GROUP, self.name)
                    for shard in idle
                ],
            )
        except (failures.RedisError, OSError) as error:
            _log.debug("consumer's name left behind: %s", unavailable(error, self._client))

    def _without_unusable(
        self, shards: Sequence[int], work: Callable[[Sequence[int]], _Result]
    ) -> _Result:
        """Run `work` on these shards; one that proves unusable doesn't hinder the rest."""
        while True:
            try:
                return work([shard for shard in shards if shard not in self.unusable])
            except _UnusableError:
                continue

    def _look_at(self, shards: Sequence[int]) -> None:
        """Find out which of these shards can be used, and make their groups."""
        for shard in shards:
            self.unusable.pop(shard, None)
        self._without_unusable(shards, self._create_groups)
        # before anything is claimed that could never be acknowledged
        ledgers = [(shard, ("HLEN", keys.ledger(shard))) for shard in shards]
        with suppress(_UnusableError):
            self._exchange([call for call in ledgers if call[0] not in self.unusable])

    def _inherit(self, shards: Sequence[int]) -> list[int]:
        """Take over what the dead left; returns shards where something is pending for us."""
        group = (keys.GROUP, self.name)
        calls: list[tuple[int, Command]] = []
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = time.monotonic() + self._min_idle_ms / 4000
            calls = [
                (shard, script("sweep", _names(shard), (*group, self._min_idle_ms)))
                for shard in shards
            ]
            self._count_lost(calls, self._exchange(calls))
        listed = [
            _consumers(reply)
            for reply in self._exchange([(shard, _list_consumers(shard)) for shard in shards])
        ]
        dead = {name for name in set().union(*listed) if name != self.name and _is_dead(name)}
        calls = [
            (shard, script("takeover", _names(shard), (keys.GROUP, name, self.name)))
            for shard, names in zip(shards, listed, strict=True)
            for name in sorted(dead & names.keys())
        ]
        moved = self._count_lost(calls, self._exchange(calls))
        return [
            shard
            for shard, names in zip(shards, listed, strict=True)
            if names.get(self.name) or shard in moved
        ]

    def _count_lost(
        self, calls: Sequence[tuple[int, Command]], replies: Sequence[tuple[int, int]]
    ) -> set[int]:
        moved_to_us = set()
        for (shard, _), (moved, lost) in zip(calls, replies, strict=True):
            self._note_lost(shard, lost)
            if moved:
                moved_to_us.add(shard)
        return moved_to_us

    def _note_lost(self, shard: int, entries: int) -> None:
        if entries:
            self.lost += entries
            _log.error(
                "data loss: %d entries of %s were deleted while they were pending",
                entries,
                keys.stream(shard),
            )

    def _read(self, shards: Sequence[int], *, left: bool) -> list[Entry]:
        """Read in growing steps: what is pending for us (`left`), or new entries."""
        claimed: list[Entry] = []
        after = dict.fromkeys(shards, "0-0" if left else ">")
        waiting = list(shards)
        while waiting and self._budget.open:
            step = self._budget.entries()
            turn = waiting[:step]
            count = max(1, step // len(turn))
            replies = self._exchange(
                [(shard, self._read_group(shard, after[shard], count)) for shard in turn]
            )
            waiting = waiting[len(turn) :]
            for shard, reply in zip(turn, replies, strict=True):
                raw = reply[0][1] if reply else []
                claimed += self._take(self._left(shard, raw) if left else _new(shard, raw))
                if len(raw) == count:
                    waiting.append(shard)
                    if left:
                        after[shard] = raw[-1][0].decode()
        return claimed

    def _read_new(self, shards: Sequence[int]) -> list[Entry]:
        behind, self.behind = (
            self.behind,
            True,
        )  # what a failing round trip has claimed is lost here
        claimed = self._read(shards, left=False)
        self.behind = behind
        return claimed

    def _read_group(self, shard: int, after: str, count: int) -> Command:
        group = ("XREADGROUP", "GROUP", keys.GROUP, self.name, "COUNT", count)
        return (*group, "STREAMS", keys.stream(shard), after)

    def _left(self, shard: int, raw: Sequence[Any]) -> list[Entry]:
        """Pending entries with their delivery counts; those that are gone are struck off."""
        if not raw:
            return []
        stream = keys.stream(shard)
        gone = [id_ for id_, fields in raw if not fields]
        if gone:
            strike = script("strike", _names(shard), (keys.GROUP, *gone))
            [lost] = self._exchange([(shard, strike)])
            self._note_lost(shard, lost)
        listing = ("XPENDING", stream, keys.GROUP, raw[0][0], raw[-1][0], len(raw), self.name)
        [pending] = self._exchange([(shard, listing)])
        deliveries = {id_: count for id_, _, _, count in pending}
        return [_entry(shard, id_, f, deliveries.get(id_, 1)) for id_, f in raw if f]

    def _create_groups(self, shards: Iterable[int]) -> None:
        calls = [(shard, script("group", (keys.stream(shard),), (keys.GROUP,))) for shard in shards]
        self._check(calls, self._round_trip(calls), allowed="BUSYGROUP")

    def _adopt_gaps(self, shards: Iterable[int]) -> None:
        starts = dict.fromkeys(shards, "-")
        while starts:
            heir = (keys.GROUP, self.name)
            calls = [
                (shard, script("gaps", (keys.stream(shard),), (*heir, start, _PAGE)))
                for shard, start in starts.items()
            ]
            for (shard, _), (found, following) in zip(calls, self._exchange(calls), strict=True):
                if found:
                    _log.warning("%d entries of %s: handed out again", found, keys.stream(shard))
                starts[shard] = following.decode()
            starts = {shard: start for shard, start in starts.items() if start}

    def _exchange(self, calls: Sequence[tuple[int, Command]]) -> list[Any]:
        """One round trip; a group that is gone (FLUSHALL, a new server) is made anew, once."""
        replies = self._round_trip(calls)
        gone = [i for i, reply in enumerate(replies) if _is_group_gone(reply)]
        if gone:
            self._create_groups({calls[i][0] for i in gone})
            for i, reply in zip(gone, self._round_trip([calls[i] for i in gone]), strict=True):
                replies[i] = reply
        self._check(calls, replies)
        return replies

    def _round_trip(self, calls: Sequence[tuple[int, Command]]) -> list[Any]:
        try:
            return exchange(self._client, [command for _, command in calls])
        except (failures.RedisError, OSError) as error:
            raise unavailable(error, self._client) from None

    def _check(
        self, calls: Sequence[tuple[int, Command]], replies: Sequence[Any], allowed: str = "-"
    ) -> None:
        unusable = {}
        for (shard, _), reply in zip(calls, replies, strict=True):
            if not isinstance(reply, failures.RedisError) or str(reply).startswith(allowed):
                continue
            fault = unavailable(reply, self._client, shard)
            if not is_wrong_type(reply):
                raise fault
            unusable[shard] = str(fault)
        if unusable:
            self.unusable |= unusable
            raise _UnusableError(replies)


class _UnusableError(Exception):
    """Something else lies at a shard's key; `replies` are those of all commands."""

    def __init__(self, replies: Sequence[Any]) -> None:
        super().__init__()
        self.replies = replies


_open: WeakValueDictionary[str, Consumer] = WeakValueDictionary()
"""Consumers of this process by name; a name of this process that isn't here is dead."""


class _Budget:
    """Rows and bytes of one claim, and how many entries a next read may ask for."""

    def __init__(self, max_rows: int, max_bytes: int, entry_rows: int) -> None:
        self.open = True
        self.ended: Literal["rows", "bytes", "entries", "all"] = "all"
        self._rows, self._bytes, self._entries = max_rows, max_bytes, _MOST_ENTRIES
        self._any = False
        # Until entries were seen they are taken to be full ones of our own.
        self._largest_rows, self._largest_bytes = 0, 0
        self._step = max(
            1, min(_FIRST_STEP_ENTRIES, max_rows // entry_rows, max_bytes // _ENTRY_BYTES)
        )

    def entries(self) -> int:
        step = self._step
        if self._any:
            step = min(
                step,
                self._entries,
                self._rows // max(1, self._largest_rows),
                self._bytes // max(1, self._largest_bytes),
            )
            self._step = min(_STEP_ENTRIES, self._step * _STEP_GROWTH)
        return max(1, step)

    def take(self, entries: Sequence[Entry]) -> list[Entry]:
        """The first of the entries that fit."""
        for number, entry in enumerate(entries):
            own, size = entry.own, entry.size
            rows = entry.rows if own is None else own
            if self._any and (rows > self._rows or size > self._bytes or self._entries <= 0):
                self._close(rows > self._rows, size > self._bytes)
            if not self.open:
                return [*entries[:number]]
            self._any = True
            self._rows -= rows
            self._bytes -= size
            self._entries -= 1
            if rows > self._largest_rows:
                self._largest_rows = rows
            if size > self._largest_bytes:
                self._largest_bytes = size
            if self._rows <= 0 or self._bytes <= 0 or self._entries <= 0:
                self._close(self._rows <= 0, self._bytes <= 0)
        return [*entries]

    def _close(self, rows: bool, size: bool) -> None:
        if self.open and (rows or size or self._entries <= 0):
            self.open = False
            self.ended = "rows" if rows else "bytes" if size else "entries"


def _acknowledgements(
    lots: Mapping[tuple[int, int, int, int], Sequence[bytes]],
) -> Iterator[tuple[int, list[bytes | int]]]:
    """Lots grouped by shard into calls, each with as many lots as one call may take."""
    arguments: list[bytes | int] = []
    shard, room = -1, 0
    for (of, *alike), ids in sorted(lots.items()):
        for start in range(0, len(ids), _ACKNOWLEDGE_ENTRIES):
            some = ids[start : start + _ACKNOWLEDGE_ENTRIES]
            if of != shard or len(some) > room:
                if arguments:
                    yield shard, arguments
                arguments, shard, room = [], of, _ACKNOWLEDGE_ENTRIES
            arguments += (*alike, len(some), *some)
            room -= len(some)
    if arguments:
        yield shard, arguments


def _names(shard: int) -> tuple[str, str]:
    return keys.stream(shard), keys.ledger(shard)


def _new(shard: int, raw: Sequence[Any]) -> list[Entry]:
    return [_entry(shard, id_, fields, 1) for id_, fields in raw]


def _entry(shard: int, id_: bytes, fields: Sequence[bytes], deliveries: int) -> Entry:
    ms, _, seq = id_.partition(b"-")
    data: bytes | None
    if len(fields) == 4 and fields[0] == b"data" and fields[2] == b"n":  # as we append them
        data, n = fields[1], fields[3]
    else:
        named = dict(zip(fields[::2], fields[1::2], strict=True))
        data, n = named.get(b"data"), named.get(b"n", b"")
    own = int(n) if n.isdigit() and len(n) < _N_DIGITS else None
    return Entry(shard, int(ms), int(seq), data, own, deliveries)


_N_DIGITS = 10


def _is_group_gone(reply: Any) -> bool:
    return isinstance(reply, failures.ResponseError) and (
        str(reply).startswith("NOGROUP") or str(reply).startswith("no such key")
    )


def _list_consumers(shard: int) -> Command:
    return ("XINFO", "CONSUMERS", keys.stream(shard), keys.GROUP)


def _consumers(reply: Sequence[Sequence[Any]]) -> dict[str, int]:
    """Pending entries by consumer."""
    found = {}
    for pairs in reply:
        info = dict(zip(pairs[::2], pairs[1::2], strict=True))
        found[info[b"name"].decode(errors="replace")] = info[b"pending"]
    return found


def _host() -> str:
    """This machine, down to what tells processes of two containers with one name apart."""
    try:
        namespace = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        namespace = 0
    return f"{socket.gethostname()}/{namespace}"


def _new_name() -> str:
    own = Identity.of(os.getpid())
    return f"{_host()}:{own.pid}:{own.started}:{secrets.token_hex(4)}"


def _is_dead(name: str) -> bool:
    """Whether the name is that of a process of this host which is gone."""
    host, *rest = name.rsplit(":", 3)
    if len(rest) != 3 or host != _host() or not rest[0].isdigit():
        return False
    named = Identity(int(rest[0]), rest[1])
    if named == Identity.of(os.getpid()):
        return name not in _open
    return named.lives() is False
