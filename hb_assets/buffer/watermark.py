"""The watermark: per shard the entry id up to which every entry was acknowledged.

Belongs here: reading it. Doesn't belong here: what it is good for (`lake.consolidation`,
`lake.pruning`). An acknowledged entry is deleted, so that whatever lies below the oldest entry of
a stream was acknowledged; ids only grow, so that nothing new appears there.
"""

from __future__ import annotations

import redis.exceptions as failures

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client, unavailable
from hb_assets.buffer.roundtrip import exchange, script
from hb_assets.settings import Settings

_LAST_SEQ = 2**64 - 1


def watermarks(client: Client, settings: Settings) -> dict[int, tuple[int, int]]:
    """Per shard the watermark; shards that never had an entry are left out.

    Raises:
        BufferUnavailableError: Redis doesn't answer, or something else lies at a stream's key.
    """
    shards = range(settings.shards)
    try:
        replies = exchange(
            client, [script("watermark", (keys.stream(shard),), ()) for shard in shards]
        )
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    found = {}
    for shard, reply in zip(shards, replies, strict=True):
        if isinstance(reply, failures.RedisError):
            raise unavailable(reply, client, shard)
        oldest, last = reply
        if oldest:
            found[shard] = _before(*_id(oldest))
        elif last:
            found[shard] = _id(last)
    return found


def _id(text: bytes) -> tuple[int, int]:
    ms, _, seq = text.partition(b"-")
    return int(ms), int(seq)


def _before(ms: int, seq: int) -> tuple[int, int]:
    return (ms, seq - 1) if seq else (max(0, ms - 1), _LAST_SEQ)
