"""Appending an entry as an external producer does, with a plain XADD of the field `data`.

For samples, tests and documentation. Our own appends (`producer`) respect the buffer's bound and
record how many heartbeats an entry holds.
"""

from __future__ import annotations

import redis.exceptions as failures

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client, unavailable


def append(client: Client, shard: int, data: bytes) -> None:
    """Append one entry: newline-delimited JSON in `data`, without `n` and without a bound.

    Raises:
        BufferUnavailableError: Redis didn't take it.
    """
    try:
        client.xadd(keys.stream(shard), {"data": data})
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client, shard) from None
