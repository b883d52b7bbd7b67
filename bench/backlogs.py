"""Buffers filled with a day's traffic, and the cost of only reading them.

Streams are filled fast, by the project's own appends. Draining is measured in `drains`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeAlias

import duckdb
import pyarrow as pa
import redis

from bench.measure import FailedMeasurementError, Found
from bench.ways import settings_in
from hb_assets.buffer import connection, keys, server
from hb_assets.buffer.consumer import Entry
from hb_assets.buffer.producer import Producer
from hb_assets.core.settings import Settings

Raw: TypeAlias = tuple[int, bytes, dict[bytes, bytes]]
"""Shard, id and fields of an entry."""

_BARE = "bare"
_APPEND_ENTRIES = 100
# as record.encode writes it
_ENTRIES = """
SELECT arrival_shard, string_agg(
    '{"user_id":"' || user_id || '","device_id":"' || device_id
    || '","timestamp_ms":' || epoch_ms(timestamp) || ',"heart_rate":' || heart_rate || '}',
    chr(10) ORDER BY arrival_pos
) AS data
FROM rows GROUP BY arrival_shard, arrival_ms, arrival_seq ORDER BY arrival_ms, arrival_seq
"""


def fill(settings: Settings, tables: Iterable[pa.Table], entry_rows: int = 500) -> int:
    """Append rows, as `Traffic.tables` makes them, in entries of so many; how many they were."""
    settings = settings.model_copy(update={"entry_max_heartbeats": entry_rows})
    producer = Producer(connection.connect(settings), settings)
    count = 0
    with duckdb.connect() as engine:
        for table in tables:
            engine.register("rows", table)
            entries = engine.sql(_ENTRIES).fetchall()
            for start in range(0, len(entries), _APPEND_ENTRIES):
                lines: dict[int, list[bytes]] = {}
                for shard, data in entries[start : start + _APPEND_ENTRIES]:
                    lines.setdefault(shard, []).extend(data.encode().split(b"\n"))
                failed = [error for error in producer.append(lines).values() if error]
                if failed:
                    raise FailedMeasurementError(f"the buffer can't be filled: {failed[0]}")
            count += table.num_rows
    return count


def bare(home: str, step: int) -> Found:
    """XREADGROUP by a group of its own, `step` entries at a time; the data is thrown away."""
    rows = 0
    for entries in read(settings_in(Path(home)), step):
        rows += sum(int(fields[b"n"]) for _, _, fields in entries)
    return {"rows": rows}


def read(settings: Settings, step: int) -> Iterator[list[Raw]]:
    """About `step` entries at a time, evenly of all shards, in one round trip; no more is done."""
    streams = {shard: keys.stream(shard) for shard in range(settings.shards)}
    count = max(1, step // settings.shards)
    with contextlib.closing(redis.Redis.from_url(server.url(settings), protocol=2)) as client:
        for stream in streams.values():
            client.xgroup_create(stream, _BARE, id="0", mkstream=True)
        while streams:
            with client.pipeline(transaction=False) as pipe:
                for stream in streams.values():
                    pipe.xreadgroup(_BARE, "one", {stream: ">"}, count=count)
                replies = dict(zip(list(streams), pipe.execute(), strict=True))
            found = []
            for shard, reply in replies.items():
                if reply:
                    found += [(shard, id_, fields) for id_, fields in reply[0][1]]
                else:
                    client.xgroup_destroy(streams.pop(shard), _BARE)
            if found:
                yield found


def entry(raw: Raw) -> Entry:
    """An entry as the drain's consumer hands it out."""
    shard, id_, fields = raw
    ms, _, seq = id_.partition(b"-")
    return Entry(shard, int(ms), int(seq), fields[b"data"], int(fields[b"n"]), 1)
