"""The merge: rows of a consolidated file and of pending fragments, into one row per key.

Belongs here: the survivor of a key, and the counts of all that isn't one. Doesn't belong here:
which files are merged, and how the result is published (`consolidation`).

DuckDB sorts rows by key and arrival, out of core if need be; one pass over the sorted stream then
sees each key's chain of arrivals side by side: the last is the survivor, each one before it is
superseded by its neighbour, and a row with its neighbour's identity is a replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.lake import erased, parquet
from hb_assets.lake.consolidated import Current
from hb_assets.lake.engine import figures
from hb_assets.lake.fragments import Fragment
from hb_assets.lake.store import Lake
from hb_assets.schema import ARRIVAL, KEY, ORDER
from hb_assets.schema import HEARTBEATS as SCHEMA


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is merged.

    Attributes:
        base: the published file, if there is one.
        new: pending fragments.
        included: files whose identities are no news where they may come in `new`: fragments that
            `base` includes, after a drain that died between publication and acknowledgement
            (survivors alone wouldn't tell), and lists of identities that were erased.
        watermark: per source shard the entry id up to which `base` includes every row there ever
            was: such a row can only come again.
        erased: users whose rows are to go, each with the latest arrival (epoch ms) that goes.
    """

    base: Path | None
    new: Sequence[Path]
    included: Sequence[Path] = ()
    watermark: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    erased: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls, lake: Lake, base: Current | None, new: Sequence[Fragment], raw: Sequence[Fragment]
    ) -> Inputs:
        """The published file and pending fragments, with what may know rows of theirs already.

        Args:
            lake: which lake.
            base: the published file, if there is one.
            new: pending fragments.
            raw: all fragments that are there.
        """
        paths = [one.path for one in new]
        known = erased.near(lake, [one.name for one in new])
        if base is None:
            return cls(None, paths, known)
        listed = base.names
        included = known + [
            one.path
            for one in raw
            if str(one.name) in listed and any(one.name.overlaps(other.name) for other in new)
        ]
        again = {one.name.source for one in new if base.note.reaches(one.name)}
        watermark = {source: base.note.watermark[source] for source in again}
        return cls(base.path, paths, included, watermark)


@dataclass(slots=True)
class Tally:
    """What became of the rows; those that neither counter has were replays."""

    survivors: int = 0
    repeats: int = 0
    corrections: int = 0
    erased: int = 0

    @property
    def superseded(self) -> int:
        """Rows that a later arrival of the same key replaced."""
        return self.repeats + self.corrections


_COLUMNS = ", ".join(SCHEMA.names)
_IDENTITY = ", ".join(ARRIVAL)
_SORT = ", ".join((*ORDER, *ARRIVAL))
_FLAGGED: pa.Schema = pa.schema(
    [*SCHEMA, pa.field("late", pa.bool_()), pa.field("gone", pa.bool_())]
)
_BASE = "SELECT *, false AS late FROM read_parquet($base, hive_partitioning = false)"
_NEW = (
    "SELECT arrived.*, {late} AS late FROM read_parquet($new, hive_partitioning = false) AS arrived"
)
_LATE = (
    "coalesce(arrival_ms < mark.ms OR (arrival_ms = mark.ms AND arrival_seq <= mark.seq), false)"
)
_MARK = " LEFT JOIN mark ON arrived.arrival_shard = mark.source"
_UNKNOWN = f"""
 ANTI JOIN (SELECT {_IDENTITY} FROM read_parquet($included, hive_partitioning = false)) AS known
 USING ({_IDENTITY})
"""
_MARKS = pa.schema([("source", pa.int16()), ("ms", pa.uint64()), ("seq", pa.uint64())])
_ERASED = pa.schema([("user_id", pa.string()), ("cutoff", pa.uint64())])


def merged(
    inputs: Inputs, connection: duckdb.DuckDBPyConnection, tally: Tally
) -> Iterator[pa.Table]:
    """Survivors in order, table by table; `tally` is whole when the last one was taken."""
    yield from _survivors(_sorted(inputs, connection), tally)


def fresh_rows(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> int:
    """Distinct rows of the pending fragments that `base` doesn't include yet."""
    if not inputs.new:
        return 0
    new, parameters = _new(inputs, connection)
    query = f"SELECT count(*) FROM (SELECT DISTINCT {_IDENTITY} FROM ({new}) WHERE NOT late)"
    return figures(connection, query, parameters)[0]


def _new(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> tuple[str, dict[str, list[str]]]:
    """Rows of pending fragments but for those that an included one has; with a flag `late`."""
    query = _NEW.format(late=_LATE if inputs.watermark else "false")
    parameters = {"new": [str(path) for path in inputs.new]}
    if inputs.watermark:
        connection.register("mark", _marks(inputs.watermark))
        query += _MARK
    if inputs.included:
        query += _UNKNOWN
        parameters["included"] = [str(path) for path in inputs.included]
    return query, parameters


def _sorted(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> Iterator[pa.RecordBatch]:
    parts: list[str] = []
    parameters: dict[str, list[str]] = {}
    if inputs.base is not None:
        parts.append(_BASE)
        parameters["base"] = [str(inputs.base)]
    if inputs.new:
        new, of_new = _new(inputs, connection)
        parts.append(new)
        parameters.update(of_new)
    rows = f"({' UNION ALL BY NAME '.join(parts)}) AS delivered"
    columns, order = _COLUMNS, _SORT
    if inputs.erased or inputs.watermark:
        gone = "false"
        if inputs.erased:
            connection.register("erased", _erased(inputs.erased))
            rows += " LEFT JOIN erased USING (user_id)"
            gone = "coalesce(arrival_ms <= erased.cutoff, false)"
        columns += f", late, {gone} AS gone"
        # Of two rows with one identity the one that was counted already stands last.
        order += ", late DESC"
    query = f"SELECT {columns} FROM {rows} ORDER BY {order}"
    yield from connection.sql(query, params=parameters).to_arrow_reader(parquet.ROW_GROUP)


def _marks(watermark: Mapping[int, tuple[int, int]]) -> pa.Table:
    rows = [{"source": source, "ms": ms, "seq": seq} for source, (ms, seq) in watermark.items()]
    return pa.Table.from_pylist(rows, schema=_MARKS)


def _erased(erased: Mapping[str, int]) -> pa.Table:
    rows = [{"user_id": user, "cutoff": cutoff} for user, cutoff in erased.items()]
    return pa.Table.from_pylist(rows, schema=_ERASED)


def _survivors(batches: Iterator[pa.RecordBatch], tally: Tally) -> Iterator[pa.Table]:
    """Survivors of sorted rows, batch by batch.

    The last row of a batch waits for the next batch, which may open with its successor.
    """
    waiting: pa.Table | None = None
    for batch in batches:
        rows = pa.Table.from_batches([batch])
        rows = rows.cast(_FLAGGED if "late" in rows.schema.names else SCHEMA)
        if waiting is not None:
            rows = pa.concat_tables([waiting, rows]).combine_chunks()
        if rows.num_rows == 0:
            continue
        waiting = rows.slice(rows.num_rows - 1)
        this, following = rows.slice(0, rows.num_rows - 1), rows.slice(1)
        same_key = _equal(this, following, KEY)
        superseded = pc.and_not(same_key, _equal(this, following, ARRIVAL))
        if "late" in rows.schema.names:
            # It was counted when it came first.
            superseded = pc.and_not(superseded, this["late"])
        repeats = _count(pc.and_(superseded, _equal(this, following, ("heart_rate",))))
        tally.repeats += repeats
        tally.corrections += _count(superseded) - repeats
        yield from _kept(this.filter(pc.invert(same_key)), tally)
    if waiting is not None:
        yield from _kept(waiting, tally)


def _kept(survivors: pa.Table, tally: Tally) -> Iterator[pa.Table]:
    """Survivors but for those that are erased, which are counted where they came first."""
    if "gone" in survivors.schema.names:
        tally.erased += _count(pc.and_not(survivors["gone"], survivors["late"]))
        survivors = survivors.filter(pc.invert(survivors["gone"])).select(SCHEMA.names)
    tally.survivors += survivors.num_rows
    if survivors.num_rows:
        yield survivors


def _equal(this: pa.Table, following: pa.Table, names: Sequence[str]) -> pa.ChunkedArray:
    result = pc.equal(this[names[0]], following[names[0]])
    for name in names[1:]:
        result = pc.and_(result, pc.equal(this[name], following[name]))
    return result


def _count(flags: pa.ChunkedArray) -> int:
    return int(pc.sum(flags).as_py() or 0)
