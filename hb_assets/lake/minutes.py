"""Minute-level heart rate: one row per user, minute and device, with and without device priority.

The rule is in SQL here, for a day of all users, and in `query.aggregate` for one user's readings; a
test compares the two. Sums and counts, not means, are stored, so that coarser spans add up from
them.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa

from hb_assets.core.errors import DamagedFileError
from hb_assets.core.schema import MINUTES as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.files import consolidated
from hb_assets.lake.files.consolidated import Current
from hb_assets.lake.integrity import checks, known_faults
from hb_assets.lake.integrity.checks import Figure
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.durable_files import TempFile
from hb_assets.lake.storage.engine import engine, figures
from hb_assets.lake.storage.store import FORMAT, Lake
from hb_assets.lake.storage.verified import ReplacedError

MINUTE_MS = 60_000
_UNLISTED = 1_000_000

# Reads from a relation named `readings`, which the caller puts in front (WITH readings AS ...).
# Device priority decides only between readings at exactly the same timestamp of one user; of
# those it keeps one: the first in the list, then by device_id.
AGGREGATE = f"""
SELECT user_id, minute, device_id,
    CAST(sum(heart_rate) AS BIGINT) AS sum, CAST(count(*) AS INTEGER) AS count,
    min(heart_rate) AS min, max(heart_rate) AS max,
    CAST(coalesce(sum(heart_rate) FILTER (kept), 0) AS BIGINT) AS kept_sum,
    CAST(count(*) FILTER (kept) AS INTEGER) AS kept_count,
    min(heart_rate) FILTER (kept) AS kept_min, max(heart_rate) FILTER (kept) AS kept_max
FROM (
    SELECT user_id, device_id, heart_rate,
        epoch_ms(timestamp) // {MINUTE_MS} * {MINUTE_MS} AS minute,
        row_number() OVER (
            PARTITION BY user_id, timestamp
            ORDER BY coalesce(nullif(list_position($priority, device_id), 0), {_UNLISTED}), device_id
        ) = 1 AS kept
    FROM readings
)
GROUP BY user_id, minute, device_id
ORDER BY user_id, minute, device_id
"""


class MinutesMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """Footer metadata of a minute-level file: the version it was made from, and the priority."""

    format: int
    day: str
    shard: int
    version: str = msgspec.field(name="edition")
    priority: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MinutesBuilt:
    """Counts of building a day's minutes: rows, readings, kept readings, bytes; and its checks."""

    day: dt.date
    rows: int = 0
    readings: int = 0
    kept: int = 0
    bytes: int = 0
    shards_written: int = 0
    figures: list[Figure] = field(default_factory=list)


def is_current(lake: Lake, day: dt.date, shard: int, priority: Sequence[str]) -> bool:
    """Whether the minutes were made from the published file, with this priority list."""
    published = consolidated.current(lake, day, shard)
    made = _note(lake, day, shard)
    if published is None or made is None:
        return published is None and made is None
    return made.version == published.metadata.version and made.priority == tuple(priority)


def _note(lake: Lake, day: dt.date, shard: int) -> MinutesMetadata | None:
    try:
        return parquet.metadata(layout.minutes_file(lake.root, day, shard), MinutesMetadata)
    except (FileNotFoundError, DamagedFileError):
        return None  # a damaged one is made anew as well


def build(
    lake: Lake,
    day: dt.date,
    settings: Settings,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> MinutesBuilt:
    """Rebuild a day's minutes, where they are stale, from its consolidated files.

    Raises:
        CheckFailedError: a new file failed its checks; the old one is still in place.
        DamagedFileError: a file can't be read.
    """
    shards = []
    with engine(settings) as connection:
        for shard in range(lake.shards):
            published = consolidated.current(lake, day, shard)
            if published is not None:
                try:
                    shards.append(_build_shard(lake, day, published, connection, settings))
                except DamagedFileError as error:
                    known_faults.notice(lake, error, day=day, shard=shard)
                    raise
                except parquet.engine_errors() as error:
                    paths = (published.path, layout.minutes_file(lake.root, day, shard))
                    raise parquet.explained(error, paths) from None
            if progress:
                progress(shard + 1, lake.shards)
    results = checks.summed([figure for shard in shards for figure in shard.figures])
    add_up = next((one for one in results if one.name == checks.MINUTES_ADD_UP), None)
    counted = add_up.figures if add_up else {}
    return MinutesBuilt(
        day=day,
        rows=counted.get("minutes", 0),
        readings=counted.get("readings", 0),
        kept=counted.get("kept", 0),
        bytes=sum(shard.path.stat().st_size for shard in shards),
        shards_written=sum(shard.written for shard in shards),
        figures=results,
    )


@dataclass(frozen=True, slots=True)
class _ShardResult:
    path: Path
    written: bool
    figures: list[Figure]


def _build_shard(
    lake: Lake,
    day: dt.date,
    published: Current,
    connection: duckdb.DuckDBPyConnection,
    settings: Settings,
) -> _ShardResult:
    shard = published.metadata.shard
    final = layout.minutes_file(lake.root, day, shard)
    if is_current(lake, day, shard, settings.device_priority):
        with suppress(DamagedFileError, ReplacedError):  # it is made anew
            return _ShardResult(final, False, _figures(final, published, connection))
    with TempFile(lake.root, final.parent) as temp:
        metadata = MinutesMetadata(
            format=FORMAT,
            day=day.isoformat(),
            shard=shard,
            version=published.metadata.version,
            priority=settings.device_priority,
        )
        replaced = False
        try:
            with (
                verified.relations(connection, {"readings": [published.path]}),
                parquet.writer(temp.path, SCHEMA, ("user_id", "minute", "device_id")) as out,
            ):
                priority = {"priority": list(settings.device_priority)}
                query = connection.sql(AGGREGATE, params=priority)
                for batch in query.to_arrow_reader(parquet.ROW_GROUP):
                    out.write(pa.Table.from_batches([batch]).cast(SCHEMA))
                out.close_with(metadata)
        except ReplacedError:
            replaced = True
        if replaced or not consolidated.is_published(lake, published, day, shard):
            overtaken_by = consolidated.current(lake, day, shard)
            if overtaken_by is not None:
                return _build_shard(lake, day, overtaken_by, connection, settings)
        results = _figures(temp.path, published, connection)
        checks.require(results, f"minutes of day {day.isoformat()}, shard {shard:02d}")
        temp.publish_replacing(final)
    return _ShardResult(final, True, results)


_TOTALS = """
SELECT coalesce(sum(count), 0), coalesce(sum(kept_count), 0), count(*) FROM minutes
"""


def _figures(path: Path, published: Current, connection: duckdb.DuckDBPyConnection) -> list[Figure]:
    with verified.relations(connection, {"minutes": [path]}):
        counted, kept, rows = figures(connection, _TOTALS)
    return [
        checks.minutes(path),
        checks.minutes_add_up(
            readings=published.metadata.unique, counted=counted, kept=kept, rows=rows
        ),
    ]
