"""Coordination: what a consolidation and a pruning know of the buffer and of each other.

Belongs here: the watermarks and the locks that `lake.consolidation` and `lake.pruning` receive as
arguments. Doesn't belong here: their work. Neither is needed for safety: without a watermark raw is
only kept longer, without a lock work may be done twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from hb_assets.buffer import connection, server
from hb_assets.buffer.connection import Client
from hb_assets.buffer.lease import Leases
from hb_assets.buffer.watermark import watermarks
from hb_assets.errors import HbError
from hb_assets.lake.consolidation import Lock, Watermarks, no_lock
from hb_assets.lake.locks import FileLocks
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Coordination:
    """Watermarks read from the buffer, and the lock to hold around a (day, shard)."""

    watermarks: Watermarks
    lock: Lock


@contextmanager
def coordinated(lake: Lake, settings: Settings, *, start_server: bool) -> Iterator[Coordination]:
    """What is known now. A buffer that can't be reached is one of which nothing is known.

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
        yield Coordination(marks, _lock(lake, settings, client))


def _lock(lake: Lake, settings: Settings, client: Client | None) -> Lock:
    if settings.locks == "file":
        return FileLocks(lake, settings)
    if settings.locks == "redis" and client is not None:
        return Leases(client, settings)
    return no_lock
