"""Threads that answer queries, beside the event loop that accepts heartbeats.

Each query goes from lake and buffer to the bytes of its answer.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import msgspec
import pyarrow as pa

from hb_assets.buffer import contents
from hb_assets.buffer.connection import Client
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.gateway.reads.formats import ENCODERS, Body
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.query import series
from hb_assets.lake.query.series import Query
from hb_assets.lake.storage.store import Lake

_SWITCH_SECONDS = 0.0005
"""Seconds after which a reader yields the GIL to the waiting loop; Python's default is 5 ms."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A query, the format of its answer, and whether buffered heartbeats belong to it.

    `page_at` makes the address of the page that begins at an instant (epoch milliseconds).
    """

    query: Query
    media_type: str
    fresh: bool
    page_at: Callable[[int], str]


class Reply(NamedTuple):
    """The encoded answer, the address of the next page where there is one, and warnings."""

    body: bytes
    next: str | None
    warnings: tuple[str, ...]


class Readers:
    """A pool of readers of one lake and one buffer."""

    def __init__(self, lake: Lake, client: Client, settings: Settings) -> None:
        self._lake, self._client, self._settings = lake, client, settings
        sys.setswitchinterval(_SWITCH_SECONDS)
        # More of them than cores would only take time from each other and from the loop.
        self._pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "readers")

    async def reply(self, asked: Asked) -> Reply:
        """Answer a query.

        Raises:
            DamagedFileError: a file of the lake can't be read.
            BufferUnavailableError: Redis can't be asked for what is buffered.
            BufferTooLargeError: more is buffered than HB_FRESH_MAX_BYTES.
        """
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._reply, asked)

    def close(self) -> None:
        """Shut the pool down; no more queries are accepted."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _reply(self, asked: Asked) -> Reply:
        query = asked.query
        # The buffer first: what leaves it meanwhile is in the lake by then, at worst in both.
        buffered = self._buffered(query.user_id) if asked.fresh else None
        page = series.answer(self._lake, query, self._settings, buffered)
        following = None if page.next_ms is None else asked.page_at(page.next_ms)
        warnings = tuple(fault.summary for fault in page.warnings)
        body = Body(query.user_id, page.points, following, warnings)
        return Reply(ENCODERS[asked.media_type](body), following, warnings)

    def _buffered(self, user_id: str) -> pa.Table | None:
        shard = shard_of(user_id, self._lake.shards)
        # Our own appends are canonical: a name is written in one way.
        name = msgspec.json.encode(user_id)
        entries = [
            entry
            for entry in contents.that_may_concern(self._client, shard, self._settings)
            if entry.own is None or name in (entry.data or b"")
        ]
        return decode(entries, self._settings).rows if entries else None
