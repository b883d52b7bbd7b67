"""Stores accepted heartbeats in Redis or, while it is away, in the spool.

It decides per shard between the two, and shares the spool's commits between concurrent requests.
While the spool holds anything of a shard, its new heartbeats go to the spool too, whichever
process put it there: so a heartbeat that is sent after another one was answered arrives after it.
`spool.replay` brings them from there to Redis.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import TypeAlias

from hb_assets.buffer.producer import AsyncProducer, Lines, Outcomes
from hb_assets.core.errors import BufferUnavailableError, SpoolUnavailableError, UnconfirmedError
from hb_assets.gateway.spool.queue import ALL_FREE, CLOSING, Spool
from hb_assets.gateway.spool.replay import Replayer

_COMMIT_BYTES = 16 * 2**20
"""About how much one commit takes along; what waits behind leaves with the next."""
_CLOSING_SECONDS = 0.25
"""How long a heartbeat waits for the last ones before it to reach Redis, before it queues up."""
_CLOSING_POLL_SECONDS = 0.002

_log = logging.getLogger(__name__)


class Intake:
    """Appends from one event loop, to Redis or to the spool."""

    def __init__(self, producer: AsyncProducer, spool: Spool, replayer: Replayer) -> None:
        self._producer = producer
        self._spool = spool
        self._replayer = replayer
        self._thread = ThreadPoolExecutor(1, "spool")
        self._waiting: list[_Call] = []
        self._writer: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._broken = False
        self._unconfirmed = False

    async def store(self, lines_by_shard: Lines) -> Outcomes:
        """Store lines by shard.

        Returns:
            For each shard None, once Redis or the spool has them as durably as they can, or why
            they are not stored: BufferFullError, UnconfirmedError, SpoolFullError or
            SpoolUnavailableError.
        """
        replayer, marks = self._replayer, self._spool.queued()
        if not replayer.away and marks == ALL_FREE:  # kept short: the way of every request
            outcomes = await self._producer.append(lines_by_shard)
            if not self._unconfirmed and not any(outcomes.values()):
                return outcomes
            return await self._with_spool(lines_by_shard, outcomes)
        if not replayer.away and any(marks[shard] == CLOSING for shard in lines_by_shard):
            marks = await self._closed()
        behind = {s: ls for s, ls in lines_by_shard.items() if replayer.away or marks[s]}
        direct = {s: ls for s, ls in lines_by_shard.items() if s not in behind}
        queued = asyncio.create_task(self._put(behind)) if behind else None
        outcomes = {}
        if direct:
            outcomes |= await self._with_spool(direct, await self._producer.append(direct))
        if queued is not None:
            outcomes |= await queued
        return outcomes

    async def _with_spool(self, lines_by_shard: Lines, outcomes: Outcomes) -> Outcomes:
        """Spool what Redis, unreachable, didn't take; returns the outcomes after that.

        What replicas didn't confirm isn't for the spool: this one disk is less than was asked for.
        """
        unconfirmed = [e for e in outcomes.values() if isinstance(e, UnconfirmedError)]
        # One line when it begins and one when it is over, however many requests meet it.
        if unconfirmed and not self._unconfirmed:
            _log.warning("%s", unconfirmed[0])
            self._unconfirmed = True
        elif self._unconfirmed and not any(outcomes.values()):
            _log.info("the replicas confirm again")
            self._unconfirmed = False
        lost = {
            s: e
            for s, e in outcomes.items()
            if isinstance(e, BufferUnavailableError) and not isinstance(e, UnconfirmedError)
        }
        if lost:
            self._replayer.lost(next(iter(lost.values())))
            outcomes.update(await self._put({s: lines_by_shard[s] for s in lost}))
        return outcomes

    async def close(self) -> None:
        """Wait for the commits that are under way."""
        if self._writer is not None:
            await self._writer
        self._thread.shutdown()

    async def _closed(self) -> bytes:
        """Wait until no shard is CLOSING, or for too long; the marks. Callers share the wait."""
        if self._closing is None or self._closing.done():
            self._closing = asyncio.create_task(self._wait_closed(), name="spool-closing")
        await asyncio.shield(self._closing)
        return self._spool.queued()

    async def _wait_closed(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING_SECONDS):
                # another process changes the marks, so that there is no event to wait for
                while CLOSING in self._spool.queued() and not self._replayer.away:  # noqa: ASYNC110
                    await asyncio.sleep(_CLOSING_POLL_SECONDS)

    async def _put(self, lines_by_shard: Lines) -> Outcomes:
        """Put lines into the spool, in its next commit."""
        future: asyncio.Future[Outcomes] = asyncio.get_running_loop().create_future()
        self._waiting.append((lines_by_shard, future))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(), name="spool-write")
        return await future

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch = self._take()
            calls = [lines_by_shard for lines_by_shard, _ in batch]
            try:
                outcomes = await loop.run_in_executor(self._thread, self._spool.put, calls)
            except SpoolUnavailableError as error:
                self._tell(error)
                outcomes = [dict.fromkeys(call, error) for call in calls]
            except Exception as error:  # noqa: BLE001  # a caller must never wait for ever
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            else:
                self._tell(None)
            for (_, future), outcome in zip(batch, outcomes, strict=True):
                if not future.done():
                    future.set_result(outcome)

    def _take(self) -> list[_Call]:
        taken = size = 0
        for lines_by_shard, _ in self._waiting:
            taken += 1
            size += sum(sum(map(len, lines)) for lines in lines_by_shard.values())
            if size >= _COMMIT_BYTES:
                break
        batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
        return batch

    def _tell(self, error: SpoolUnavailableError | None) -> None:
        # One line when it breaks and one when it is mended, however many requests meet it.
        if error is not None and not self._broken:
            _log.error("alarm spool (error): %s", error)
        elif error is None and self._broken:
            _log.info("the spool can be written again")
        self._broken = error is not None


_Call: TypeAlias = tuple[Lines, "asyncio.Future[Outcomes]"]
