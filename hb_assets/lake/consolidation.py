"""Consolidation: pending fragments of a day into one deduplicated, sorted file per shard.

Belongs here: the merge, the survivor of a key, the counts, and the order of steps that keeps two
consolidators at once from losing a row (invariant 4). Doesn't belong here: reading what is
published (`consolidated`), when a day is due (`policy`), minutes, and deleting fragments.

DuckDB sorts rows by key and arrival, out of core if need be; one pass over the sorted stream then
sees each key's chain of arrivals side by side: the last is the survivor, each one before it is
superseded by its neighbour, and a row with its neighbour's identity is a replay.
"""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.errors import DamagedFileError, HbError
from hb_assets.lake import checks, fragments, layout, parquet
from hb_assets.lake.checks import Figure
from hb_assets.lake.consolidated import ConsolidatedNote, Current, current, is_published, pending
from hb_assets.lake.engine import engine
from hb_assets.lake.files import TempFile
from hb_assets.lake.fragments import Fragment
from hb_assets.lake.layout import FragmentName
from hb_assets.lake.store import FORMAT, Lake
from hb_assets.schema import ARRIVAL, KEY, ORDER
from hb_assets.schema import HEARTBEATS as SCHEMA
from hb_assets.settings import Settings


@dataclass(frozen=True, slots=True)
class Consolidated:
    """What a consolidation of a day did, and how the day stands now.

    `rows` to `replayed` are the day's totals; `written` counts rows that this run wrote, in
    `shards_written` files; `pending` fragments were taken in; `figures` are the checks' results,
    summed over the shards.
    """

    day: dt.date
    rows: int = 0
    unique: int = 0
    superseded: int = 0
    repeats: int = 0
    corrections: int = 0
    replayed: int = 0
    written: int = 0
    shards_written: int = 0
    pending: int = 0
    bytes: int = 0
    figures: list[Figure] = field(default_factory=list)


Progress = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""


def consolidate(
    lake: Lake,
    day: dt.date,
    settings: Settings,
    *,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> Consolidated:
    """Consolidate a day, shard by shard; shards with nothing pending are only checked.

    A shard that fails doesn't stop the others; the first failure is raised at the end.

    Args:
        lake: which lake.
        day: which day.
        settings: for memory and threads.
        rebuild: start from raw fragments alone instead of the published file.
        progress: called after each shard.

    Raises:
        CheckFailedError: a new file failed its checks; the published one is still in place.
        DamagedFileError: a file can't be read, or a rebuild lacks fragments that were pruned.
        FencedError: a pruner fenced us off; start again.
    """
    shards = []
    failure: HbError | None = None
    with engine(settings) as connection:
        for shard in range(lake.shards):
            try:
                shards.append(_consolidate_shard(lake, day, shard, connection, rebuild))
            except HbError as error:
                failure = failure or error
            except parquet.ENGINE_ERRORS as error:
                failure = failure or parquet.explained(error, _paths(lake, day, shard))
            if progress:
                progress(shard + 1, lake.shards)
    if failure:
        raise failure
    return _summary(day, [shard for shard in shards if shard is not None])


def _paths(lake: Lake, day: dt.date, shard: int) -> list[Path]:
    raw = fragments.listed(lake, day, shard)
    return [layout.consolidated_file(lake.root, day, shard), *(fragment.path for fragment in raw)]


@dataclass(frozen=True, slots=True)
class _ShardResult:
    note: ConsolidatedNote
    written: int
    pending: int
    bytes: int
    figures: list[Figure]


def _summary(day: dt.date, shards: Sequence[_ShardResult]) -> Consolidated:
    def total(name: str) -> int:
        return sum(getattr(shard.note, name) for shard in shards)

    return Consolidated(
        day=day,
        rows=total("rows"),
        unique=total("unique"),
        superseded=total("superseded"),
        repeats=total("repeats"),
        corrections=total("corrections"),
        replayed=total("replayed"),
        written=sum(shard.written for shard in shards),
        shards_written=sum(shard.written > 0 for shard in shards),
        pending=sum(shard.pending for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        figures=checks.summed([figure for shard in shards for figure in shard.figures]),
    )


def _consolidate_shard(
    lake: Lake, day: dt.date, shard: int, connection: duckdb.DuckDBPyConnection, rebuild: bool
) -> _ShardResult | None:
    final = layout.consolidated_file(lake.root, day, shard)
    raw = fragments.listed(lake, day, shard)
    if not rebuild:
        # A look without a temp file: most shards of most runs have nothing to do.
        published = current(lake, day, shard)
        if not pending(published, raw):
            result = _unchanged(published, raw, connection)
            if is_published(lake, published, day, shard):
                return result
    with TempFile(lake.root, final.parent) as temp:
        # The order of these three is invariant 4: a pruner that deletes what the file of another
        # consolidator lists has unlinked this temp file first.
        published = _base(lake, day, shard, rebuild)
        raw = fragments.listed(lake, day, shard)
        new = pending(published, raw)
        written_before = published.note.rows_written if published else 0
        if rebuild:
            written_before = _require_all(lake, day, shard, raw)
        if not new and published is None:
            return None
        note = _merge(temp.path, published, new, raw, connection, day, shard, written_before)
        if not rebuild and not is_published(lake, published, day, shard):
            # Overtaken: the rows that were read needn't be those that the note speaks of.
            return _consolidate_shard(lake, day, shard, connection, rebuild)
        figures = _figures(temp.path, note, raw, connection, day)
        checks.require(figures, f"day {day.isoformat()}, shard {shard:02d}")
        size = temp.path.stat().st_size
        temp.publish_replacing(final)
    return _ShardResult(note, note.unique, len(new), size, figures)


def _base(lake: Lake, day: dt.date, shard: int, rebuild: bool) -> Current | None:
    return None if rebuild else current(lake, day, shard)


def _require_all(lake: Lake, day: dt.date, shard: int, raw: Sequence[Fragment]) -> int:
    """A rebuild starts from raw, so that it needs every fragment that was ever included.

    Returns the published file's `rows_written`, 0 where it can't be read.
    """
    try:
        published = current(lake, day, shard)
    except DamagedFileError:
        return 0
    if published is None:
        return 0
    gone = published.names - {str(one.name) for one in raw}
    if gone:
        raise DamagedFileError(
            f"day {day.isoformat()}, shard {shard:02d} can't be rebuilt: {len(gone)} of its raw "
            "fragments were pruned; consolidate it without --rebuild"
        )
    return published.note.rows_written


def _unchanged(
    published: Current | None, raw: Sequence[Fragment], connection: duckdb.DuckDBPyConnection
) -> _ShardResult | None:
    if published is None:
        return None
    day = dt.date.fromisoformat(published.note.day)
    figures = _figures(published.path, published.note, raw, connection, day)
    return _ShardResult(published.note, 0, 0, published.path.stat().st_size, figures)


def _figures(
    path: Path,
    note: ConsolidatedNote,
    raw: Sequence[Fragment],
    connection: duckdb.DuckDBPyConnection,
    day: dt.date,
) -> list[Figure]:
    names = frozenset(note.fragments)
    listed = [fragment for fragment in raw if str(fragment.name) in names]
    whole = len(listed) == len(names)
    rows_in = fragments.distinct_rows(connection, listed) if whole else note.rows
    in_order, unique = checks.order_and_key(connection, path)
    return [
        checks.schema_and_ranges(path),
        checks.partition_day(path, day),
        unique,
        in_order,
        checks.counts_add_up(
            rows_in=rows_in,
            unique=note.unique,
            superseded=note.superseded,
            rows_in_file=parquet.footer(path).num_rows,
        ),
    ]


_COLUMNS = ", ".join(SCHEMA.names)
_IDENTITY = ", ".join(ARRIVAL)
_SORT = ", ".join((*ORDER, *ARRIVAL))
_MERGE = f"""
SELECT {_COLUMNS} FROM (
    SELECT {_COLUMNS} FROM read_parquet($base, hive_partitioning = false)
    UNION ALL
    SELECT {_COLUMNS} FROM read_parquet($new, hive_partitioning = false)
) ORDER BY {_SORT}
"""
# A fragment that was included already may hold rows that a pending one brings again, after a drain
# that died between publication and acknowledgement; survivors alone wouldn't tell.
_MERGE_WITHOUT_REPLAYS = f"""
SELECT {_COLUMNS} FROM (
    SELECT {_COLUMNS} FROM read_parquet($base, hive_partitioning = false)
    UNION ALL
    SELECT {_COLUMNS} FROM read_parquet($new, hive_partitioning = false) AS arrived
    ANTI JOIN (SELECT {_IDENTITY} FROM read_parquet($included, hive_partitioning = false)) AS known
    USING ({_IDENTITY})
) ORDER BY {_SORT}
"""
_FIRST = f"SELECT {_COLUMNS} FROM read_parquet($new, hive_partitioning = false) ORDER BY {_SORT}"


def _merge(
    path: Path,
    published: Current | None,
    new: Sequence[Fragment],
    raw: Sequence[Fragment],
    connection: duckdb.DuckDBPyConnection,
    day: dt.date,
    shard: int,
    written_before: int,
) -> ConsolidatedNote:
    """Write the merged file to `path`; return its note, which stands in its footer as well."""
    before = published.note if published else None
    arrived = sum(fragment.rows for fragment in new)
    counter = _Counter()
    with parquet.writer(path, SCHEMA, ORDER) as out:
        for batch in _survivors(_sorted(published, new, raw, connection), counter):
            out.write_table(batch, row_group_size=parquet.ROW_GROUP)
        unique = counter.survivors
        superseded = counter.repeats + counter.corrections
        # Rows that the anti-join dropped never reached the counter: what is missing are replays.
        replayed = arrived + (before.unique if before else 0) - unique - superseded
        note = ConsolidatedNote(
            format=FORMAT,
            day=day.isoformat(),
            shard=shard,
            edition=secrets.token_hex(8),
            fragments=tuple(
                sorted({*(before.fragments if before else ()), *(str(one.name) for one in new)})
            ),
            rows=(before.rows if before else 0) + arrived - replayed,
            unique=unique,
            superseded=(before.superseded if before else 0) + superseded,
            repeats=(before.repeats if before else 0) + counter.repeats,
            corrections=(before.corrections if before else 0) + counter.corrections,
            replayed=(before.replayed if before else 0) + replayed,
            rows_written=written_before + unique,
        )
        out.add_key_value_metadata({parquet.KEY: msgspec.json.encode(note)})
    return note


def _sorted(
    published: Current | None,
    new: Sequence[Fragment],
    raw: Sequence[Fragment],
    connection: duckdb.DuckDBPyConnection,
) -> Iterator[pa.RecordBatch]:
    query, parameters = _FIRST, {"new": [str(fragment.path) for fragment in new]}
    if published is not None:
        query = _MERGE
        parameters["base"] = [str(published.path)]
        included = _included_again(published, new, raw)
        if included:
            query = _MERGE_WITHOUT_REPLAYS
            parameters["included"] = [str(fragment.path) for fragment in included]
    yield from connection.sql(query, params=parameters).to_arrow_reader(parquet.ROW_GROUP)


def _included_again(
    published: Current, new: Sequence[Fragment], raw: Sequence[Fragment]
) -> list[Fragment]:
    names: list[FragmentName] = [fragment.name for fragment in new]
    listed = published.names
    return [
        fragment
        for fragment in raw
        if str(fragment.name) in listed and any(fragment.name.overlaps(name) for name in names)
    ]


@dataclass(slots=True)
class _Counter:
    survivors: int = 0
    repeats: int = 0
    corrections: int = 0


def _survivors(batches: Iterator[pa.RecordBatch], counter: _Counter) -> Iterator[pa.Table]:
    """Survivors of sorted rows, batch by batch.

    The last row of a batch waits for the next batch, which may open with its successor.
    """
    waiting: pa.Table | None = None
    for batch in batches:
        rows = pa.Table.from_batches([batch]).cast(SCHEMA)
        if waiting is not None:
            rows = pa.concat_tables([waiting, rows]).combine_chunks()
        if rows.num_rows == 0:
            continue
        waiting = rows.slice(rows.num_rows - 1)
        this, following = rows.slice(0, rows.num_rows - 1), rows.slice(1)
        same_key = _equal(this, following, KEY)
        replay = pc.and_(same_key, _equal(this, following, ARRIVAL))
        superseded = pc.and_not(same_key, replay)
        repeat = pc.and_(superseded, _equal(this, following, ("heart_rate",)))
        survivors = this.filter(pc.invert(same_key))
        counter.survivors += survivors.num_rows
        repeats = _count(repeat)
        counter.repeats += repeats
        counter.corrections += _count(superseded) - repeats
        if survivors.num_rows:
            yield survivors
    if waiting is not None:
        counter.survivors += 1
        yield waiting


def _equal(this: pa.Table, following: pa.Table, names: Sequence[str]) -> pa.ChunkedArray:
    result = pc.equal(this[names[0]], following[names[0]])
    for name in names[1:]:
        result = pc.and_(result, pc.equal(this[name], following[name]))
    return result


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags).as_py() or 0)
