"""Entries as a producer without our library writes them: a plain XADD of the field `data`.

Belongs here: that one command, for samples, tests and documentation. Doesn't belong here: our own
appends (`producer`), which know the bound and say how many heartbeats they hold.
"""

from __future__ import annotations

import redis.exceptions as failures

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client, unavailable


def append(client: Client, shard: int, data: bytes) -> None:
    """Add one entry: newline-delimited JSON in `data`, without `n` and without a bound.

    Raises:
        BufferUnavailableError: Redis didn't take it.
    """
    try:
        client.xadd(keys.stream(shard), {"data": data})
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client, shard) from None
