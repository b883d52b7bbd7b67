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
from hb_assets.lake.tombstones import Cutoffs
from hb_assets.schema import ARRIVAL, KEY, ORDER
from hb_assets.schema import HEARTBEATS as SCHEMA


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is merged.

    Attributes:
        base: the published file, if there is one.
        new: pending fragments.
        included: fragments that `base` includes and that may hold rows of `new`, after a drain that
            died between publication and acknowledgement; survivors alone wouldn't tell.
        erased_before: lists of identities that were counted as erased before they came here.
        watermark: per source shard the entry id up to which `base` includes every row there ever
            was: such a row can only come again.
        erased: users whose rows are to go, each with the latest arrival that goes by source shard.
    """

    base: Path | None
    new: Sequence[Path]
    included: Sequence[Path] = ()
    erased_before: Sequence[Path] = ()
    watermark: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    erased: Mapping[str, Cutoffs] = field(default_factory=dict)

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
            return cls(None, paths, erased_before=known)
        listed = base.names
        included = [
            one.path
            for one in raw
            if str(one.name) in listed and any(one.name.overlaps(other.name) for other in new)
        ]
        again = {one.name.source for one in new if base.note.reaches(one.name)}
        watermark = {source: base.note.watermark[source] for source in again}
        return cls(base.path, paths, included, known, watermark)


@dataclass(slots=True)
class Tally:
    """What became of the rows; those that no counter has were replays.

    `uncounted` rows are another delivery's: below the watermark, or erased before they came here.
    """

    survivors: int = 0
    repeats: int = 0
    corrections: int = 0
    erased: int = 0
    uncounted: int = 0

    @property
    def superseded(self) -> int:
        """Rows that a later arrival of the same key replaced."""
        return self.repeats + self.corrections


_COLUMNS = ", ".join(SCHEMA.names)
_IDENTITY = ", ".join(ARRIVAL)
_ROW = ", ".join((*KEY, *ARRIVAL))
_SORT = ", ".join((*ORDER, *ARRIVAL))
_FLAGGED: pa.Schema = pa.schema(
    [*SCHEMA, pa.field("late", pa.bool_()), pa.field("gone", pa.bool_())]
)
_LATE = (
    "coalesce(arrival_ms < mark.ms OR (arrival_ms = mark.ms AND arrival_seq <= mark.seq), false)"
)
_GONE = (
    "coalesce(arrival_ms < erased.ms OR (arrival_ms = erased.ms AND arrival_seq <= erased.seq), "
    "false)"
)
_FORGOTTEN = """
LEFT JOIN erased ON delivered.user_id = erased.forgotten AND arrival_shard = erased.source
"""
_BASE = "SELECT *, false AS late FROM read_parquet($base, hive_partitioning = false)"
# An identity alone might be another row's, where a server that lost its last ids gave them again.
_UNKNOWN = f"""
 ANTI JOIN (
    SELECT {_ROW} FROM read_parquet($included, hive_partitioning = false)
 ) AS known USING ({_ROW})
"""
_ERASED_BEFORE = f"""
 LEFT JOIN (
    SELECT DISTINCT {_IDENTITY}, true AS counted
    FROM read_parquet($erased_before, hive_partitioning = false)
 ) AS before USING ({_IDENTITY})
"""
# Each part is there only where it is needed: most merges know of nothing that comes again.
_NEW = {
    (late, included, erased): f"""
SELECT arrived.*,
    {_LATE if late else "false"} OR {"coalesce(counted, false)" if erased else "false"} AS late
FROM read_parquet($new, hive_partitioning = false) AS arrived
{"LEFT JOIN mark ON arrived.arrival_shard = mark.source" if late else ""}
{_ERASED_BEFORE if erased else ""} {_UNKNOWN if included else ""}
"""
    for late in (False, True)
    for included in (False, True)
    for erased in (False, True)
}
_FRESH = {
    kind: f"SELECT count(*) FROM (SELECT DISTINCT {_ROW} FROM ({new}) WHERE NOT late)"
    for kind, new in _NEW.items()
}
_ROWS = {
    (base, kind): " UNION ALL BY NAME ".join(
        [*([_BASE] if base else []), *([_NEW[kind]] if kind is not None else [])]
    )
    for base in (False, True)
    for kind in (None, *_NEW)
    if base or kind is not None
}
# Of two rows with one identity the one that was counted already stands last.
_SORTED = {
    (which, flagged, forgotten): f"""
SELECT {_COLUMNS}
    {", late" if flagged else ""}
    {f", {_GONE} AS gone" if forgotten else ""}
    {", false AS gone" if flagged and not forgotten else ""}
FROM ({rows}) AS delivered {_FORGOTTEN if forgotten else ""}
ORDER BY {_SORT} {", late DESC" if flagged else ""}
"""
    for which, rows in _ROWS.items()
    for flagged, forgotten in ((False, False), (True, False), (True, True))
}
_MARKS = pa.schema([("source", pa.int16()), ("ms", pa.uint64()), ("seq", pa.uint64())])
_ERASED = pa.schema([("forgotten", pa.string()), *_MARKS])


def merged(
    inputs: Inputs, connection: duckdb.DuckDBPyConnection, tally: Tally
) -> Iterator[pa.Table]:
    """Survivors in order, table by table; `tally` is whole when the last one was taken."""
    yield from _survivors(_sorted(inputs, connection), tally)


def fresh_rows(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> int:
    """Distinct rows of the pending fragments that `base` doesn't include yet."""
    if not inputs.new:
        return 0
    _register(inputs, connection)
    return figures(connection, _FRESH[_kind(inputs)], _parameters(inputs, base=False))[0]


def _kind(inputs: Inputs) -> tuple[bool, bool, bool]:
    return bool(inputs.watermark), bool(inputs.included), bool(inputs.erased_before)


def _register(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> None:
    if inputs.watermark:
        connection.register("mark", _marks(inputs.watermark))
    if inputs.erased:
        connection.register("erased", _erased(inputs.erased))


def _parameters(inputs: Inputs, *, base: bool) -> dict[str, list[str]]:
    files = {"new": inputs.new}
    if inputs.new:
        files |= {"included": inputs.included, "erased_before": inputs.erased_before}
    if base and inputs.base is not None:
        files["base"] = [inputs.base]
    return {name: [str(path) for path in paths] for name, paths in files.items() if paths}


def _sorted(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> Iterator[pa.RecordBatch]:
    which = inputs.base is not None, _kind(inputs) if inputs.new else None
    flagged = bool(inputs.erased or inputs.watermark or inputs.erased_before)
    _register(inputs, connection)
    rows = connection.sql(
        _SORTED[which, flagged, bool(inputs.erased)], params=_parameters(inputs, base=True)
    )
    yield from rows.to_arrow_reader(parquet.ROW_GROUP)


def _marks(watermark: Mapping[int, tuple[int, int]]) -> pa.Table:
    rows = [{"source": source, "ms": ms, "seq": seq} for source, (ms, seq) in watermark.items()]
    return pa.Table.from_pylist(rows, schema=_MARKS)


def _erased(erased: Mapping[str, Cutoffs]) -> pa.Table:
    rows = [
        {"forgotten": user, "source": source, "ms": ms, "seq": seq}
        for user, cutoffs in erased.items()
        for source, (ms, seq) in cutoffs.items()
    ]
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
            tally.uncounted += _count(pc.and_(superseded, this["late"]))
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
        gone = _count(survivors["gone"])
        counted = _count(pc.and_not(survivors["gone"], survivors["late"]))
        tally.erased += counted
        tally.uncounted += gone - counted
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
