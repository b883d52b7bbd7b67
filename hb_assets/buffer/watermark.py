"""The watermark of each shard: the entry id up to which every entry was acknowledged.

An acknowledged entry is deleted, so that whatever lies below the oldest entry of a stream was
acknowledged; ids only grow, so that nothing new appears there. For an empty stream the server's
clock gives the id below which nothing more will come. Consolidation and pruning use it
(`lake.compaction`).
"""

from __future__ import annotations

from collections.abc import Mapping

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client
from hb_assets.buffer.roundtrip import Replies, exchange_by_shard, script
from hb_assets.core.settings import Settings

_LAST_SEQ = 2**64 - 1


def watermarks(client: Client, settings: Settings) -> dict[int, tuple[int, int]]:
    """The watermark by shard; a shard where something else lies at the key has none.

    Raises:
        BufferUnavailableError: Redis doesn't answer.
    """
    return {
        shard: _before(*_id(oldest)) if oldest else max(_id(last), _before(int(now), 0))
        for shard, (oldest, last, now) in _ends(client, settings).by_shard.items()
    }


def latest(client: Client, settings: Settings) -> dict[int, tuple[int, int]]:
    """By shard the last entry id that its stream ever gave: whatever comes has a later one.

    Raises:
        BufferUnavailableError: Redis doesn't answer, or something else lies at a stream's key.
    """
    return {shard: _id(last) for shard, (_, last, _) in _ends(client, settings).whole().items()}


def passed(client: Client, settings: Settings, ids: Mapping[int, tuple[int, int]]) -> bool:
    """Whether every entry up to these ids is acknowledged.

    Raises:
        BufferUnavailableError: as `latest`.
    """
    return all(
        not oldest or _id(oldest) > ids.get(shard, (0, 0))
        for shard, (oldest, _, _) in _ends(client, settings).whole().items()
    )


def _ends(client: Client, settings: Settings) -> Replies:
    """By shard the oldest entry's id or b"", the last id ever given, and the clock (epoch ms)."""
    shards = range(settings.shards)
    commands = [script("watermark", (keys.stream(shard),), ()) for shard in shards]
    return exchange_by_shard(client, shards, commands)


def _id(text: bytes) -> tuple[int, int]:
    ms, _, seq = text.partition(b"-")
    return int(ms), int(seq)


def _before(ms: int, seq: int) -> tuple[int, int]:
    return (ms, seq - 1) if seq else (max(0, ms - 1), _LAST_SEQ)
