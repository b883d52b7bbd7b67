"""The backend: what the gateway's handlers work with, opened and closed together.

The producer, the spool, the API keys, the client that depth and health are read by, the lake, its
readers, and the limits on threads that wait for them. It knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Awaitable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hb_assets.buffer import connection, depth, durability, liveness
from hb_assets.buffer.depth import Depths
from hb_assets.buffer.liveness import Liveness
from hb_assets.buffer.producer import AsyncProducer, Lines, Outcomes
from hb_assets.buffer.rate_limit import Limiter
from hb_assets.core.errors import BufferUnavailableError, SpoolUnavailableError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth.access import Access
from hb_assets.gateway.http.bodies import Room
from hb_assets.gateway.ingest.intake import Intake
from hb_assets.gateway.observability.probes import LIMIT_SECONDS, Probe
from hb_assets.gateway.reads.readers import Asked, Readers, Reply
from hb_assets.gateway.spool.queue import Holdings, Spool
from hb_assets.gateway.spool.replay import Replayer
from hb_assets.lake.storage.layout import HEARTBEATS, RAW
from hb_assets.lake.storage.store import Lake
from hb_assets.lake.survey import Survey, Surveyor

SURVEY_SECONDS = 15.0
"""How long a survey of the lake counts, and longer where it would take more of a core than this:"""
SURVEY_SHARE = 0.005

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Backend:
    """Producer, buffer client and lake of one gateway process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limiter = Limiter()
        self.room = Room(settings.bodies_max_bytes)
        self.access = Access(settings)
        self._spool: Spool | None = None
        self._survey: Survey | None = None
        self._intake: Intake | None = None
        self._away = False

    @contextlib.asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Open everything; at the end, finish the appends that are under way and close.

        Redis may be away when the spool remembers it as durable enough: after a restart in the
        middle of an outage the gateway goes on with the spool.

        Raises:
            BufferUnavailableError: Redis doesn't answer, or isn't as durable as HB_DURABILITY.
            LakeMismatchError: the lake has another shard count or format.
            SettingsError: the spool has another shard count or format; the API keys can't be read.
        """
        self._probes = ThreadPoolExecutor(8, "probes")  # a thread each: one that hangs is alone
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._probes.shutdown, wait=False, cancel_futures=True)
            await stack.enter_async_context(self.access.watched())
            self._client = connection.connect(self.settings)
            stack.callback(self._client.close)
            if self.settings.spool_max_bytes:
                self._spool = Spool(self.settings)
                stack.callback(self._spool.close)
                replayer = Replayer(self._client, self._spool, self.settings)
                await asyncio.to_thread(replayer.prepare)
            else:
                await asyncio.to_thread(connection.ping, self._client)
                await asyncio.to_thread(durability.require, self._client, self.settings)
            self._lake = await asyncio.to_thread(Lake.open, self.settings)
            self._readers = Readers(self._lake, self._client, self.settings)
            stack.callback(self._readers.close)
            self._make_probes()
            client = connection.connect_async(self.settings)
            stack.push_async_callback(client.aclose)
            self._producer = AsyncProducer(client, self.settings, self.limiter)
            await self._producer.start()
            if self._spool is not None:
                replayer.start()
                stack.push_async_callback(asyncio.to_thread, replayer.stop)
                self._intake = Intake(self._producer, self._spool, replayer)
                stack.push_async_callback(self._intake.close)
            stack.push_async_callback(self._producer.close)
            yield

    def store(self, lines: Lines) -> Awaitable[Outcomes]:
        """Store lines by shard, in Redis or the spool; the outcome by shard, None for stored."""
        return self._store(lines) if self._intake is None else self._intake.store(lines)

    async def _store(self, lines: Lines) -> Outcomes:
        outcome = await self._producer.append(lines)
        away = next((e for e in outcome.values() if isinstance(e, BufferUnavailableError)), None)
        # One line when Redis goes and one when it is back, however many requests meet it.
        if away is not None and not self._away:
            _log.warning("%s", away)
            self._away = True
        elif self._away and away is None:
            _log.info("the buffer answers again")
            self._away = False
        return outcome

    async def holdings(self) -> Holdings | None:
        """What the spool holds; None when there is none.

        Raises:
            SpoolUnavailableError: it can't be used, or doesn't answer in time.
        """
        if self._spool is None:
            return None
        try:
            return await self._ask_spool.answer(self._probes)
        except TimeoutError:
            raise SpoolUnavailableError(
                f"spool: its disk didn't answer within {LIMIT_SECONDS:g} s"
            ) from None

    def now_ms(self) -> int:
        """The clock that timestamps are judged by: Redis', as the drain will see it."""
        return self._producer.clock.now_ms()

    def clock_warnings(self) -> list[str]:
        """One line when Redis' clock and this machine's are far apart."""
        return self._producer.clock.warnings()

    async def reply(self, asked: Asked) -> Reply:
        """Answer a query from the lake and maybe the buffer. Raises as `Readers`."""
        return await self._readers.reply(asked)

    async def depths(self) -> Depths:
        """Depth of each shard.

        Raises:
            BufferUnavailableError: Redis doesn't answer, or not in time.
        """
        return await self._of_redis(self._ask_depths)

    async def standing(self) -> durability.Standing:
        """Whether HB_DURABILITY holds now. Raises BufferUnavailableError as `depths` does."""
        return await self._of_redis(self._ask_standing)

    async def signs(self) -> Liveness:
        """Liveness timestamps and counts of other processes. Raises BufferUnavailableError."""
        return await self._of_redis(self._ask_signs)

    async def disk(self) -> Disk:
        """The state of the lake's disk: whether it takes a byte, out of sight, and what is free.

        Raises:
            OSError: the lake can't be read.
            TimeoutError: not in time.
        """
        return await self._ask_lake.answer(self._probes)

    async def survey(self) -> Survey | None:
        """The latest survey of the lake; None before the first."""
        with contextlib.suppress(TimeoutError):
            survey = await self._ask_survey.answer(self._probes)
            if survey is not self._survey:
                self._tell(survey)
            self._survey = survey
        return self._survey

    def _tell(self, survey: Survey) -> None:
        """Log one line for each fault of the lake that is new or resolved."""
        before = {fault.message: fault for fault in self._survey.faults} if self._survey else {}
        found = {fault.message: fault for fault in survey.faults}
        for message, fault in found.items():
            if message not in before:
                _log.error("alarm lake_%s (error): %s", fault.kind, message)
        for message, fault in before.items():
            if message not in found:
                _log.info("alarm lake_%s (resolved): over: %s", fault.kind, message)

    def _make_probes(self) -> None:
        client, lake, settings = self._client, self._lake, self.settings
        self._ask_depths = Probe(lambda: depth.depths(client, settings))
        self._ask_standing = Probe(lambda: durability.standing(client, settings))
        self._ask_signs = Probe(lambda: liveness.read(client))
        self._ask_lake = Probe(lambda: _look_at_disk(lake))
        self._ask_survey = Probe(
            Surveyor(lake, settings).survey, fresh=SURVEY_SECONDS, limit=1.0, share=SURVEY_SHARE
        )
        if self._spool is not None:
            spool = self._spool
            self._ask_spool = Probe(lambda: _look_at_spool(spool, settings))

    async def _of_redis(self, probe: Probe[T]) -> T:
        try:
            return await probe.answer(self._probes)
        except TimeoutError:
            raise BufferUnavailableError(
                f"Redis didn't answer within {LIMIT_SECONDS:g} s"
            ) from None


@dataclass(frozen=True, slots=True)
class Disk:
    """The lake's disk: its free bytes, and why nothing can be written there, if so."""

    free: int
    unwritable: str | None = None


def _look_at_disk(lake: Lake) -> Disk:
    for folder in (lake.root, lake.root / RAW, lake.root / HEARTBEATS):
        try:
            os.scandir(folder).close()
        except FileNotFoundError:
            if folder == lake.root:
                raise
    free = shutil.disk_usage(lake.root).free
    try:
        _write_a_byte(lake.root)
    except OSError as error:
        return Disk(free, f"the lake's folder can't be written: {error.strerror}")
    return Disk(free)


def _look_at_spool(spool: Spool, settings: Settings) -> Holdings:
    """What the spool holds, and whether it can take more. Raises SpoolUnavailableError."""
    held = spool.holdings()
    try:
        _write_a_byte(settings.spool_dir)
    except OSError as error:
        raise SpoolUnavailableError(
            f"spool: {settings.spool_dir} can't be written ({error.strerror})"
        ) from None
    return held


def _write_a_byte(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(b"\0")
