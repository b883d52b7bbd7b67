"""Reading what lies in the buffer without claiming it: entries that nobody has acknowledged yet."""

from __future__ import annotations

from typing import Any

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client
from hb_assets.buffer.consumer import Entry
from hb_assets.buffer.roundtrip import exchange_by_shard, script
from hb_assets.core.errors import BufferTooLargeError
from hb_assets.core.settings import Settings

_PAGE_ENTRIES = 50
_PAGE_BYTES = 2**20
"""What one call reads of a stream, so that Redis does other things in between."""


def that_may_concern(client: Client, shard: int, settings: Settings) -> list[Entry]:
    """Entries that may hold heartbeats of this shard's users: its own stream's, and external ones.

    Our own appends go to the stream of the users' shard; another producer may use any stream.
    What is acknowledged meanwhile may be missing: read the lake after this, not before.

    Raises:
        BufferUnavailableError: Redis doesn't answer, or something else lies at a shard's key.
        BufferTooLargeError: there is more of it than HB_FRESH_MAX_BYTES.
    """
    found: list[Entry] = []
    left = settings.fresh_max_bytes
    starts = dict.fromkeys(range(settings.shards), "-")
    while starts:
        commands = [
            script(
                "peek",
                keys.of_shard(one),
                (start, _PAGE_ENTRIES, _PAGE_BYTES, 0 if one == shard else 1),
            )
            for one, start in starts.items()
        ]
        replies = exchange_by_shard(client, starts, commands).whole()
        following = {}
        for one, (start, page) in replies.items():
            entries = [_entry(one, *fields) for fields in page]
            left -= sum(entry.size for entry in entries)
            found += entries
            if start:
                following[one] = start.decode()
        if left < 0:
            raise BufferTooLargeError(
                "the buffer holds more than a query may read of it "
                f"({settings.fresh_max_bytes:,} bytes, HB_FRESH_MAX_BYTES)"
            )
        starts = following
    return found


def _entry(shard: int, entry_id: bytes, own: bytes, data: Any) -> Entry:
    ms, _, seq = entry_id.partition(b"-")
    return Entry(shard, int(ms), int(seq), data, int(own) if own else None, 0)
