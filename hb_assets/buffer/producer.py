"""Producers that append heartbeats to the buffer, within its bound.

They make entries out of lines and send them, for threads (`Producer`) and for an event loop
(`AsyncProducer`). The caller decides what to do when the buffer refuses: the gateway answers, an
import waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, overload

import redis.exceptions as failures
from typing_extensions import override

from hb_assets.buffer import keys
from hb_assets.buffer.clock import ServerClock
from hb_assets.buffer.connection import AsyncClient, Client, address, unavailable
from hb_assets.buffer.durability import Confirmation, verified, verified_async
from hb_assets.buffer.rate_limit import Limiter
from hb_assets.buffer.receipts import Receipts
from hb_assets.buffer.roundtrip import Command, HeldConnection, exchange_confirmed, script
from hb_assets.core.errors import BufferFullError, BufferUnavailableError, HbError
from hb_assets.core.settings import Settings

Lines: TypeAlias = Mapping[int, Sequence[bytes]]
"""JSON texts, each without a line end, by shard; `Joined` where they are one text already."""
Outcomes: TypeAlias = dict[int, HbError | None]
"""By shard None (stored, as durably as HB_DURABILITY says) or why that isn't known."""

_log = logging.getLogger(__name__)

_APART_SECONDS = 0.0005
"""Seconds between starts of round trips while several calls share one: a command costs as much for
one heartbeat as for fifty. A single caller never waits for it."""
_ROUND_TRIP_HEARTBEATS = 50_000
"""About how many heartbeats a micro-batch takes along; what waits behind leaves with the next."""


class Joined(Sequence[bytes]):
    """Lines that are one text already, without a line end behind the last.

    The text is split only when its lines are iterated over.
    """

    __slots__ = ("_count", "text")

    def __init__(self, count: int, text: bytes) -> None:
        self._count = count
        self.text = text

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> bytes: ...

    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...

    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        return self.text.split(b"\n")[index]

    @override
    def __iter__(self) -> Iterator[bytes]:
        return iter(self.text.split(b"\n"))


class Producer:
    """Appends where `client` connects to; as safe for threads as a client is.

    It has connections of its own, each verified as `durability.verified` does. `clock` is what
    timestamps have to be judged by before they are appended.
    """

    def __init__(self, client: Client, settings: Settings) -> None:
        self._client = verified(client, settings)
        self._bound = Bound.of(settings)
        self._receipts = Receipts(settings)
        self.clock = ServerClock()

    def close(self) -> None:
        """Close its connections; the caller's client stays open."""
        self._client.close()

    def append(self, lines_by_shard: Lines) -> Outcomes:
        """Append all lines in one round trip; those of a shard are stored all or none.

        Returns:
            Per shard None when stored, BufferFullError (nothing stored, try later), or
            BufferUnavailableError (not known to be stored, or not confirmed by the replicas that
            HB_REPLICAS asks for; sending again is harmless).
        """
        shards = [shard for shard, lines in lines_by_shard.items() if lines]
        known = self._receipts.known()
        sends = [_Send(s, len(lines_by_shard[s]), [lines_by_shard[s]], []) for s in shards]
        outcomes: Outcomes = dict.fromkeys(lines_by_shard)
        try:
            commands = [self._bound.command(sends, known)] if sends else []
            found = exchange_confirmed(self._client, commands, self._bound.confirm)
        except (failures.RedisError, OSError) as error:
            found = [(error, None)]
        replies = _by_send(sends, found)
        confirmed: _Confirmed = []
        for shard, reply in zip(shards, replies, strict=True):
            added = len(lines_by_shard[shard])
            outcomes[shard] = self._bound.outcome(shard, added, reply, self._client)
            _hear(reply, self.clock)
            if outcomes[shard] is None:
                confirmed.append((shard, reply))
        set_back = _receive(confirmed, self._receipts, self._client)
        if set_back:
            try:
                self._client.connection_pool.disconnect()
                self._client.ping()
            except (failures.RedisError, OSError) as error:
                outcomes.update((s, unavailable(error, self._client, s)) for s in set_back)
        return outcomes


class AsyncProducer:
    """Appends from one event loop; concurrent calls share entries and round trips.

    While one round trip is under way, calls queue up, and leave together in the next; what
    `limiter` has to charge goes along, or alone while nothing is appended. `clock` as `Producer`
    has it.
    """

    def __init__(
        self, client: AsyncClient, settings: Settings, limiter: Limiter | None = None
    ) -> None:
        self._client = verified_async(client, settings)
        self._connection = HeldConnection(self._client)
        self._bound = Bound.of(settings)
        self._receipts = Receipts(settings)
        self._limiter = limiter or Limiter()
        self.clock = ServerClock()
        self._waiting: list[_Call] = []
        self._wake: asyncio.Event = asyncio.Event()
        self._limiter.wake = self._wake.set
        self._flusher: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Start the task that sends; call it in the loop that `append` is called in."""
        with contextlib.suppress(failures.RedisError, OSError):  # our own clock has to do then
            [(reply, _)] = await self._connection.exchange_confirmed([("TIME",)], ())
            if not isinstance(reply, failures.RedisError):
                seconds, micros = map(int, reply)
                self.clock.hear(seconds * 1000 + micros // 1000)
        self._flusher = asyncio.create_task(self._flush_for_ever(), name="buffer-flush")

    async def close(self) -> None:
        """Send what waits, then stop. The caller's client stays open."""
        self._closed = True
        self._wake.set()
        if self._flusher is not None:
            await self._flusher
            self._flusher = None
        await self._connection.close()
        await self._client.aclose()

    def append(self, lines_by_shard: Lines) -> asyncio.Future[Outcomes]:
        """As `Producer.append`, in the next round trip."""
        future: asyncio.Future[Outcomes] = asyncio.get_running_loop().create_future()
        if self._closed or self._flusher is None:
            closed = BufferUnavailableError("the gateway is stopping: send again in a moment")
            future.set_result(dict.fromkeys(lines_by_shard, closed))
        else:
            self._waiting.append((lines_by_shard, future))
            self._wake.set()
        return future

    async def _flush_for_ever(self) -> None:
        pause = 0.0
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._waiting or self._limiter.due:
                if pause > 0:
                    await asyncio.sleep(pause)
                began = time.monotonic()
                batch = self._take()
                try:
                    await self._flush(batch)
                except Exception as error:  # noqa: BLE001  # a caller must never wait for ever
                    for _, future in batch:
                        if not future.done():
                            future.set_exception(error)
                pause = _APART_SECONDS - (time.monotonic() - began) if len(batch) > 1 else 0.0
            if self._closed:
                return

    def _take(self) -> list[_Call]:
        heartbeats = taken = 0
        for lines_by_shard, _ in self._waiting:
            taken += 1
            heartbeats += sum(map(len, lines_by_shard.values()))
            if heartbeats >= _ROUND_TRIP_HEARTBEATS:
                break
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    async def _flush(self, batch: list[_Call]) -> None:
        sends = list(self._sends(batch))
        known = self._receipts.known()
        charges, charged = self._limiter.charges()
        commands = [*charges, self._bound.command(sends, known)] if sends else charges
        try:
            found = await self._connection.exchange_confirmed(commands, self._bound.confirm)
        except (failures.RedisError, OSError) as error:
            found = [(error, None)] * len(commands)
        self._limiter.hear(charged, (reply for reply, _ in found[: len(charges)]))
        replies = _by_send(sends, found[len(charges) :])
        failed: dict[tuple[int, int], HbError] = {}
        confirmed: _Confirmed = []
        for send, reply in zip(sends, replies, strict=True):
            outcome = self._bound.outcome(send.shard, send.count, reply, self._client)
            _hear(reply, self.clock)
            if outcome is not None:
                failed.update(((call, send.shard), outcome) for call in send.calls)
            else:
                confirmed.append((send.shard, reply))
        set_back = _receive(confirmed, self._receipts, self._client)
        if set_back:
            failed.update(await self._verify_anew([s for s in sends if s.shard in set_back]))
        for number, (lines_by_shard, future) in enumerate(batch):
            if future.done():
                continue
            outcomes: Outcomes = dict.fromkeys(lines_by_shard)
            if failed:
                for shard in outcomes:
                    outcomes[shard] = failed.get((number, shard))
            future.set_result(outcomes)

    async def _verify_anew(self, sends: Sequence[_Send]) -> dict[tuple[int, int], HbError]:
        """The error for sends that found Redis set back, when it isn't durable enough any more."""
        try:
            await self._connection.close()
            await self._client.connection_pool.disconnect()
            await self._client.ping()
        except (failures.RedisError, OSError) as error:
            return {
                (call, send.shard): unavailable(error, self._client, send.shard)
                for send in sends
                for call in send.calls
            }
        return {}

    def _sends(self, batch: list[_Call]) -> Iterator[_Send]:
        """Group calls into sends: small calls of a shard together, a large one by itself.

        A call so large that it doesn't fit must not take its neighbours' heartbeats down with it.
        """
        shared: dict[int, _Send] = {}
        for number, (lines_by_shard, _) in enumerate(batch):
            for shard, lines in lines_by_shard.items():
                count = len(lines)
                if count > self._bound.entry_heartbeats:
                    yield _Send(shard, count, [lines], [number])
                elif count:
                    send = shared.get(shard)
                    if send is None:
                        send = shared[shard] = _Send(shard, 0, [], [])
                    send.count += count
                    send.parts.append(lines)
                    send.calls.append(number)
        yield from shared.values()


def _by_send(sends: Sequence[_Send], found: Sequence[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Split the reply to all sends into one for each, with what confirms it."""
    if not sends:
        return []
    [(reply, confirmation)] = found
    replies = reply if isinstance(reply, list) else [reply] * len(sends)
    return [(one, confirmation) for one in replies]


def _hear(replies: tuple[Any, Any], clock: ServerClock) -> None:
    reply, _ = replies
    if not isinstance(reply, Exception) and reply[0] == 1:
        clock.hear(reply[1])


def _receive(
    confirmed: _Confirmed, receipts: Receipts, client: Client | AsyncClient
) -> frozenset[int]:
    """Keep the receipts of confirmed appends; return shards whose ledger was below an earlier one.

    The durability of a server that was set back has to be verified anew.
    """
    appended: dict[int, int] = {}
    set_back = set()
    for shard, ((_, _, count, gone), _) in confirmed:
        appended[shard] = max(count, appended.get(shard, 0))
        if gone:
            set_back.add(shard)
            _log.error(
                "Redis at %s was set back: %d heartbeats that it had confirmed are no longer in "
                "shard %02d; `hb audit` tells how many of them are missing in the lake",
                *(address(client), gone, shard),
            )
    if appended:
        receipts.enter(appended)
    return frozenset(set_back)


_Confirmed: TypeAlias = list[tuple[int, tuple[Any, Any]]]
"""Shards with the replies to their appends."""
_Call: TypeAlias = tuple[Lines, "asyncio.Future[Outcomes]"]


@dataclass(slots=True)
class _Send:
    """Lines of one shard, stored all or none: `count` lines in parts, of the calls numbered so."""

    shard: int
    count: int
    parts: list[Sequence[bytes]]
    calls: list[int]

    def entries(self, most: int) -> list[tuple[int, bytes]]:
        """Number of lines and data of each entry, of `most` lines or less.

        A part is cut only when it is larger than an entry.
        """
        if self.count <= most:
            return [(self.count, _joined(self.parts))]
        found: list[tuple[int, bytes]] = []
        held: list[Sequence[bytes]] = []
        count = 0
        for part in self.parts:
            for piece in _cut(part, most):
                if count + len(piece) > most:
                    found.append((count, _joined(held)))
                    held, count = [], 0
                held.append(piece)
                count += len(piece)
        return [*found, (count, _joined(held))]


def _cut(part: Sequence[bytes], most: int) -> list[Sequence[bytes]]:
    if len(part) <= most:
        return [part]
    lines = list(part)
    return [lines[start : start + most] for start in range(0, len(lines), most)]


def _joined(parts: Sequence[Sequence[bytes]]) -> bytes:
    return b"\n".join(
        [part.text if isinstance(part, Joined) else b"\n".join(part) for part in parts]
    )


@dataclass(frozen=True, slots=True)
class Bound:
    """How much one shard may hold (heartbeats; bytes of NDJSON), and how it is appended to.

    `entry_heartbeats` is how large an entry may be, `confirmation` who has to confirm an append.
    """

    heartbeats: int
    size: int
    entry_heartbeats: int
    retry_after: float
    confirmation: Confirmation | None = None

    @classmethod
    def of(cls, settings: Settings) -> Bound:
        """The buffer's bound, divided evenly among the shards."""
        return cls(
            max(1, settings.buffer_max_heartbeats // settings.shards),
            max(1, settings.buffer_max_bytes // settings.shards),
            settings.entry_max_heartbeats,
            # Room appears with the drain's next tick, not sooner.
            float(settings.drain_sensor_interval),
            Confirmation.of(settings),
        )

    @property
    def confirm(self) -> Sequence[Command]:
        """Commands to send after the appends, which confirm them."""
        return self.confirmation.commands if self.confirmation else ()

    def command(self, sends: Sequence[_Send], known: Sequence[int]) -> Command:
        """The script call that makes all of the sends; `known` as `Receipts.known` has it."""
        arguments: list[bytes | int] = [self.heartbeats, self.size]
        names: list[str] = []
        size = self.entry_heartbeats
        for send in sends:
            names += keys.of_shard(send.shard)
            entries = send.entries(size)
            arguments += (known[send.shard], len(entries))
            for entry in entries:
                arguments += entry
        return script("append", names, arguments)

    def outcome(
        self, shard: int, added: int, replies: tuple[Any, Any], client: Client | AsyncClient
    ) -> HbError | None:
        """Outcome of appending `added` heartbeats, by the script's reply and that to `confirm`."""
        reply, confirmed = replies
        if isinstance(reply, failures.OutOfMemoryError):
            return BufferFullError(
                f"buffer: Redis is out of memory (its maxmemory) at shard {shard:02d}: drain it, "
                "or give it more",
                retry_after=self.retry_after,
            )
        if isinstance(reply, (failures.RedisError, OSError)):
            return unavailable(reply, client, shard)
        if reply[0] == 1:
            if self.confirmation is None:
                return None
            return self.confirmation.outcome(shard, confirmed, client)
        if added > self.heartbeats:
            remedy = "send smaller batches, or raise HB_BUFFER_MAX_HEARTBEATS"
        else:
            remedy = (
                "try again later; if it stays full, see to the drain, or raise "
                "HB_BUFFER_MAX_HEARTBEATS and HB_BUFFER_MAX_BYTES"
            )
        return BufferFullError(
            f"buffer full: shard {shard:02d} holds {reply[1]:,} of {self.heartbeats:,} heartbeats "
            f"and {reply[2]:,} of {self.size:,} bytes, no room for {added:,} more: {remedy}",
            retry_after=self.retry_after,
        )
