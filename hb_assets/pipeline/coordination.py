"""Coordination of consolidation and pruning with the buffer and with each other.

It reads the watermarks and makes the locks that `lake.compaction.consolidation` and
`lake.compaction.pruning` take as arguments, and counts what was done, for metrics. None of it is
needed for safety: without a watermark raw is only kept longer, without a lock work may be done
twice.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hb_assets.buffer import connection, liveness, server
from hb_assets.buffer.connection import Client
from hb_assets.buffer.lease import Leases
from hb_assets.buffer.watermark import watermarks
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction import consolidation
from hb_assets.lake.compaction.consolidation import (
    Consolidated,
    Lock,
    Progress,
    Watermarks,
    no_lock,
)
from hb_assets.lake.storage.locks import FileLocks
from hb_assets.lake.storage.store import Lake

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Coordination:
    """Watermarks read from the buffer, and the lock to hold around a (day, shard).

    `client` is None when the buffer can't be reached: nothing is counted then.
    """

    watermarks: Watermarks
    lock: Lock
    client: Client | None = None

    def consolidate(
        self,
        lake: Lake,
        day: dt.date,
        settings: Settings,
        *,
        rebuild: bool = False,
        rewrite: bool = False,
        shards: Sequence[int] | None = None,
        progress: Progress | None = None,
    ) -> Consolidated:
        """Consolidate a day with these watermarks and locks, and count it."""
        began = time.monotonic()
        written, outcome = 0, "failed"
        try:
            done = consolidation.consolidate(
                lake,
                day,
                settings,
                rebuild=rebuild,
                rewrite=rewrite,
                shards=shards,
                watermarks=self.watermarks,
                lock=self.lock,
                progress=progress,
            )
            written, outcome = done.written, "failed" if done.failed else "done"
        finally:
            self._count(time.monotonic() - began, outcome, written)
        return done

    def _count(self, seconds: float, outcome: str, written: int) -> None:
        if self.client is None:
            return
        counts = liveness.timed("consolidation", seconds)
        counts[liveness.label("consolidations", outcome)] = 1
        counts["consolidated_rows"] = written
        try:
            liveness.mark_alive(self.client, (), counts)
        except HbError as error:
            _log.debug("not counted: %s", error)


@contextmanager
def coordinated(lake: Lake, settings: Settings, *, start_server: bool) -> Iterator[Coordination]:
    """The coordination as of now; without watermarks where the buffer can't be reached.

    Args:
        lake: whose locks.
        settings: HB_LOCKS says which kind.
        start_server: start the embedded server for the time of this, if it isn't running.
    """
    marks: Watermarks = {}
    client: Client | None = None
    with ExitStack() as stack:
        try:
            if start_server:
                stack.enter_context(server.borrowed(settings))
            client = connection.connect(settings)
            stack.callback(client.close)
            marks = watermarks(client, settings)
        except HbError as error:
            _log.warning("the buffer's watermark isn't known, so that raw is kept: %s", error)
        yield Coordination(marks, _lock(lake, settings, client), client)


def _lock(lake: Lake, settings: Settings, client: Client | None) -> Lock:
    if settings.locks == "file":
        return FileLocks(lake, settings)
    if settings.locks == "redis" and client is not None:
        return Leases(client, settings)
    return no_lock
