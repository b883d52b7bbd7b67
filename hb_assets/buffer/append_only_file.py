"""Rewriting the server's append-only file, and searching the buffer for a text.

A rewrite removes what was deleted from the keys from the log on disk as well, which is what
forgetting a user needs. How durable the log is, is checked in `durability`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import redis.exceptions as failures

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client, unavailable
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.settings import Settings

_POLL_SECONDS = 0.05
_PAGE = 200


def rewrite(client: Client, seconds: float = 300) -> bool:
    """Have the append-only file written anew, and wait for it.

    Returns:
        False where the server keeps none.

    Raises:
        BufferUnavailableError: Redis doesn't answer, forbids it, or didn't get it done in time.
    """
    deadline = time.monotonic() + seconds
    try:
        if not _persistence(client).get("aof_enabled"):
            return False
        _wait(client, deadline)  # one that began before we were asked may hold what is gone now
        client.bgrewriteaof()
        _wait(client, deadline)
        if _persistence(client).get("aof_last_bgrewrite_status") != "ok":
            raise BufferUnavailableError(
                "Redis could not rewrite its append-only file; see its log"
            )
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    return True


def _wait(client: Client, deadline: float) -> None:
    while True:
        found = _persistence(client)
        if not found["aof_rewrite_in_progress"] and not found["aof_rewrite_scheduled"]:
            return
        if time.monotonic() > deadline:
            raise BufferUnavailableError("Redis is still rewriting its append-only file")
        time.sleep(_POLL_SECONDS)


def _persistence(client: Client) -> dict[str, object]:
    return dict(client.info("persistence"))


def mentions(client: Client, settings: Settings, texts: Iterable[bytes]) -> bool:
    """Whether any buffered entry holds one of these texts; reads all that is buffered.

    Raises:
        BufferUnavailableError: Redis doesn't answer.
    """
    wanted = tuple(texts)
    try:
        for shard in range(settings.shards):
            start = b"-"
            while page := client.execute_command(  # type: ignore[no-untyped-call]  # theirs
                "XRANGE", keys.stream(shard), start, "+", "COUNT", _PAGE
            ):
                for _, fields in page:
                    if any(text in value for value in fields.values() for text in wanted):
                        return True
                start = b"(" + page[-1][0]
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    return False
