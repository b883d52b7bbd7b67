"""A consolidated day laid out in several ways: file size, and the cost of queries.

Row groups, encodings and compression to compare. The layout that is in use is in
hb_assets/lake/storage/parquet.py.

Each layout is queried by our own reader and by DuckDB, which has a day's file to itself as any
user's notebook would.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import msgspec
import pyarrow.parquet as pq

from bench.measure import Found
from bench.traffic import DAY
from hb_assets.core import days
from hb_assets.core.schema import HEARTBEATS
from hb_assets.core.settings import Settings
from hb_assets.lake.query import series
from hb_assets.lake.query.series import Query
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake

_QUESTIONS = 60
_HOUR_MS = 3_600_000


_ALL = HEARTBEATS.names
_DIFFERENCES = "DELTA_BINARY_PACKED"
_CHOSEN = {
    "timestamp": _DIFFERENCES,
    "heart_rate": _DIFFERENCES,
    "arrival_ms": "PLAIN",
    "arrival_pos": "PLAIN",
}
"""What isn't named is written by dictionary."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A file layout: the options that differ from the others'."""

    row_group: int = 65_536
    page: int = 65_536
    compression: str = "zstd"
    level: int | dict[str, int] | None = field(
        default_factory=lambda: {name: 6 if name == "arrival_pos" else 3 for name in _ALL}
    )
    encodings: dict[str, str] = field(default_factory=lambda: _CHOSEN)
    page_index: bool = False
    more: dict[str, Any] = field(default_factory=dict)


def _encoded(**encodings: str) -> Variant:
    """The encodings in use but for these columns; DICTIONARY can't be set as an encoding."""
    both = {**_CHOSEN, **encodings}
    return Variant(encodings={name: one for name, one in both.items() if one != "DICTIONARY"})


VARIANTS: dict[str, Variant | None] = {
    "as it is": None,
    "row groups of 65,536, a page each": Variant(),
    "row groups of 16,384": Variant(row_group=16_384),
    "row groups of 32,768": Variant(row_group=32_768),
    "row groups of 122,880": Variant(row_group=122_880, page=122_880),
    "row groups of 245,760": Variant(row_group=245_760, page=245_760),
    "row groups of 1,048,576, pages of 122,880": Variant(row_group=2**20, page=122_880),
    "pages of 20,000": Variant(page=20_000),
    "pages of 20,000 with a page index": Variant(page=20_000, page_index=True),
    "zstd at level 1": Variant(level=1),
    "zstd at level 3": Variant(level=3),
    "zstd at level 6": Variant(level=6),
    "zstd at level 9": Variant(level=9),
    "not compressed": Variant(compression="none", level=None),
    "snappy": Variant(compression="snappy", level=None),
    "dictionaries for all": Variant(encodings={}),
    "entry ids by dictionary": _encoded(arrival_ms="DICTIONARY"),
    "entry ids by differences": _encoded(arrival_ms=_DIFFERENCES),
    "positions by dictionary": _encoded(arrival_pos="DICTIONARY"),
    "positions by differences": _encoded(arrival_pos=_DIFFERENCES),
    "positions by byte streams": _encoded(arrival_pos="BYTE_STREAM_SPLIT"),
    "heart rates by dictionary": _encoded(heart_rate="DICTIONARY"),
    "data pages of version 2": Variant(more={"data_page_version": "2.0"}),
    "bloom filter of users": Variant(
        more={"bloom_filter_options": {"user_id": {"ndv": 2000, "fpp": 0.01}}}
    ),
}


def asked(lake: str, home: str, name: str) -> Found:
    """Write the lake's consolidated day in a variant's layout, and run queries on it."""
    settings = Settings(home=Path(home), lake=str(Path(home) / "lake"))
    again = Lake.open(settings)
    size, written = 0, 0.0
    for shard in range(again.shards):
        source = layout.consolidated_file(Path(lake), DAY, shard)
        if source.exists():
            to = layout.consolidated_file(again.root, DAY, shard)
            to.parent.mkdir(parents=True)
            written += _written(source, to, VARIANTS[name])
            size += to.stat().st_size
    files = str(layout.day_folder(again.root, layout.HEARTBEATS, DAY) / "*" / "*.parquet")
    connection = duckdb.connect()
    users = [
        user
        for (user,) in connection.sql(
            "SELECT DISTINCT user_id FROM read_parquet($files) ORDER BY ALL",
            params={"files": files},
        ).fetchall()
    ]
    chance = random.Random(5)
    chosen = [(chance.choice(users), chance.randrange(23) * _HOUR_MS) for _ in range(_QUESTIONS)]
    start = days.start_ms(DAY)

    def ours(user: str, first: int, last: int) -> None:
        series.answer(again, Query(user, start + first, start + last), settings)

    def by_duckdb(user: str, first: int) -> None:
        connection.sql(
            """
            SELECT epoch_ms(timestamp) // 60000 AS minute, avg(heart_rate)
            FROM read_parquet($files) WHERE user_id = $user
            AND timestamp >= make_timestamptz($first) AND timestamp < make_timestamptz($last)
            GROUP BY ALL
            """,
            params={
                "files": files,
                "user": user,
                "first": (start + first) * 1000,
                "last": (start + first + _HOUR_MS) * 1000,
            },
        ).fetchall()

    def scan() -> None:
        connection.sql(
            "SELECT user_id, avg(heart_rate) FROM read_parquet($files) GROUP BY ALL",
            params={"files": files},
        ).fetchall()

    return {
        "bytes": size,
        "write_seconds": written,
        "hour_ms": _median([partial(ours, user, at, at + _HOUR_MS) for user, at in chosen]),
        "day_ms": _median([partial(ours, user, 0, days.MS_PER_DAY) for user, _ in chosen[:20]]),
        "duckdb_hour_ms": _median([partial(by_duckdb, *one) for one in chosen[:20]]),
        "duckdb_scan_ms": _median([scan] * 3),
    }


def _written(source: Path, to: Path, variant: Variant | None) -> float:
    """Rewrite a file; returns CPU seconds. It keeps the footer metadata, which our reader needs."""
    if variant is None:
        to.hardlink_to(source)
        return 0.0
    rows = pq.read_table(source, partitioning=None)
    said = pq.read_metadata(source).metadata
    began = time.process_time()
    with pq.ParquetWriter(
        to,
        rows.schema,
        compression=variant.compression,
        compression_level=variant.level,
        use_dictionary=[name for name in _ALL if name not in variant.encodings],
        column_encoding=variant.encodings or None,
        max_rows_per_page=variant.page,
        write_page_index=variant.page_index,
        **variant.more,
    ) as out:
        out.write_table(rows, row_group_size=variant.row_group)
        # A footer's own checksum, which this one's isn't, is looked at wherever there is one.
        digest = msgspec.json.decode(said[parquet.DIGEST], type=dict[str, Any])
        del digest["footer"]
        out.add_key_value_metadata(
            {parquet.KEY: said[parquet.KEY], parquet.DIGEST: msgspec.json.encode(digest)}
        )
    return time.process_time() - began


def _median(asks: list[Callable[[], None]]) -> float:
    """Median milliseconds, with each query run once before."""
    times = []
    for ask in asks:
        ask()
        began = time.perf_counter()
        ask()
        times.append((time.perf_counter() - began) * 1000)
    return statistics.median(times)
