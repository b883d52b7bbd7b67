"""The merge: rows of a consolidated file and of pending fragments, into one row per key.

DuckDB sorts the rows by key and arrival, so that each key's chain of arrivals stands side by side,
and tells by the next row what becomes of each: the last of a chain survives, each one before it is
superseded by its neighbour, and a row with its neighbour's identity is a replay. What doesn't fit
into the engine's memory is spilled to disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core.schema import ARRIVAL, ENCODED, IDENTITY, KEY, ORDER, TEXTS
from hb_assets.core.schema import HEARTBEATS as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction import row_groups
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.row_groups import RowGroups
from hb_assets.lake.compaction.unreadable import came_before
from hb_assets.lake.files.tombstones import Cutoffs
from hb_assets.lake.storage import verified
from hb_assets.lake.storage.engine import engine, figures

if TYPE_CHECKING:
    import duckdb


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


def merged(inputs: Inputs, tally: Tally, settings: Settings) -> Iterator[pa.Table]:
    """Survivors in order, table by table; `tally` is whole when the last one was taken.

    Their schema is ENCODED.

    Args:
        inputs: what to merge.
        tally: counts what becomes of the rows.
        settings: bounds of the engine.

    Raises:
        DamagedFileError: a file isn't what was written.
        FileNotFoundError: one isn't there (any more), or was replaced meanwhile.
        OSError: the disk can't be read.
    """
    with ExitStack() as stack:
        connection = stack.enter_context(engine(settings))
        stack.enter_context(_pending(inputs, connection))
        if inputs.base is None:
            yield from _survivors(inputs, None, connection, tally)
            return
        with verified.relations(connection, {"base": [inputs.base]}, numbered=True):
            file = stack.enter_context(verified.opened(inputs.base, TEXTS))
            contested, others = row_groups.split(file, connection)
        survivors = _survivors(inputs, contested, connection, tally)
        yield from row_groups.in_order(survivors, _counted(others.encoded(), tally))


def fresh_rows(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> int:
    """Distinct rows of the pending fragments that `base` doesn't include yet."""
    with _pending(inputs, connection):
        return figures(connection, _FRESH)[0]


# -- what comes in

_COLUMNS = ", ".join(SCHEMA.names)
_ROW = ", ".join((*KEY, *ARRIVAL))
# `late` is a row that counts elsewhere, or came before. An identity alone might be another row's,
# where a server that lost its last ids gave them again.
_ARRIVED = f"""
SELECT {_COLUMNS}, coalesce(
    counted OR arrival_ms < mark.ms OR (arrival_ms = mark.ms AND arrival_seq <= mark.seq), false
) AS late
FROM new AS arrived
LEFT JOIN mark ON arrived.arrival_shard = mark.source
LEFT JOIN (SELECT DISTINCT {IDENTITY}, true AS counted FROM erased_before) AS before
    USING ({IDENTITY})
ANTI JOIN (SELECT {_ROW} FROM included) AS known USING ({_ROW})
ANTI JOIN came_before USING (arrival_ms, arrival_seq, arrival_shard)
"""
_FRESH = f"SELECT count(*) FROM (SELECT DISTINCT {_ROW} FROM ({_ARRIVED}) WHERE NOT late)"
_GONE = (
    "coalesce(arrival_ms < erased.ms OR (arrival_ms = erased.ms AND arrival_seq <= erased.seq), "
    "false)"
)
_ROWS = f"""
SELECT {_COLUMNS}, late, {_GONE} AS gone
FROM ({_ARRIVED} UNION ALL SELECT {_COLUMNS}, false FROM base) AS delivered
LEFT JOIN erased ON delivered.user_id = erased.forgotten AND arrival_shard = erased.source
"""
_PLAIN_ROWS = f"""
SELECT {_COLUMNS}, false AS late, false AS gone
FROM (SELECT {_COLUMNS} FROM new UNION ALL SELECT {_COLUMNS} FROM base)
"""


@contextmanager
def _pending(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
    """Register the pending fragments, and what tells that a row came before, with an engine."""
    for name in ("new", "base", "included", "erased_before"):
        connection.register(name, SCHEMA.empty_table())
    connection.register("mark", _marks(inputs.watermark))
    connection.register("erased", _erased(inputs.erased))
    entries = came_before(inputs, connection) if inputs.unread else _ENTRIES.empty_table()
    connection.register("came_before", entries)
    files = {"new": inputs.new, "included": inputs.included, "erased_before": inputs.erased_before}
    with verified.relations(connection, files):
        yield


_MARKS = pa.schema([("source", pa.int16()), ("ms", pa.uint64()), ("seq", pa.uint64())])
_ERASED = pa.schema([("forgotten", pa.string()), *_MARKS])
_ENTRIES = pa.schema(
    [SCHEMA.field(name) for name in ("arrival_ms", "arrival_seq", "arrival_shard")]
)


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


# -- the sort, and what becomes of each row

_SURVIVES, _REPEAT, _CORRECTION, _REPLAY, _UNCOUNTED, _ERASE = range(6)
_COUNTERS = {
    _SURVIVES: "survivors",
    _REPEAT: "repeats",
    _CORRECTION: "corrections",
    _UNCOUNTED: "uncounted",
    _ERASE: "erased",
}
_NEXT = {name: f"next_{name}" for name in (*KEY, *ARRIVAL, "heart_rate")}
_LEADS = ", ".join(f"lead({name}) OVER () AS {following}" for name, following in _NEXT.items())
_OTHER_KEY = " OR ".join(f"{_NEXT[name]} IS DISTINCT FROM {name}" for name in KEY)
_SAME_ARRIVAL = " AND ".join(f"{_NEXT[name]} = {name}" for name in ARRIVAL)
_TYPED = ", ".join(f"{name}::{name}s AS {name}" if name in TEXTS else name for name in SCHEMA.names)
# lead() over an ordered subquery is a streaming window: it holds one row, and not all of them. Of
# two rows with one identity the one that was counted already stands last.
FATES = {
    plain: f"""
SELECT {_COLUMNS}, CAST(CASE
    WHEN {_OTHER_KEY} THEN CASE
        WHEN NOT gone THEN {_SURVIVES} WHEN late THEN {_UNCOUNTED} ELSE {_ERASE} END
    WHEN {_SAME_ARRIVAL} THEN {_REPLAY}
    WHEN late THEN {_UNCOUNTED}
    WHEN {_NEXT["heart_rate"]} = heart_rate THEN {_REPEAT}
    ELSE {_CORRECTION} END AS UTINYINT) AS fate
FROM (
    SELECT *, {_LEADS} FROM (
        SELECT {_TYPED}, late, gone FROM ({rows})
        ORDER BY {", ".join((*ORDER, *ARRIVAL))}, late DESC
    )
)
"""
    for plain, rows in ((True, _PLAIN_ROWS), (False, _ROWS))
}
"""All rows by key and arrival, each with its `fate`, where inputs are plain, and where not."""
BATCH = 2**15
"""Rows that leave the engine at once."""


def _survivors(
    inputs: Inputs,
    base: RowGroups | None,
    connection: duckdb.DuckDBPyConnection,
    tally: Tally,
) -> Iterator[pa.Table]:
    """Survivors among the pending rows and those of some row groups, in order."""
    if base is not None:
        connection.register("base", base.reader(TEXTS))
    make_types(connection)
    if base is not None:
        connection.register("base", base.reader())
    for batch in connection.sql(FATES[inputs.plain]).to_arrow_reader(BATCH):
        for one in pc.value_counts(batch["fate"]).to_pylist():
            if counter := _COUNTERS.get(one["values"]):
                setattr(tally, counter, getattr(tally, counter) + one["counts"])
        rows = pa.Table.from_batches([batch])
        rows = rows.filter(pc.equal(rows["fate"], _SURVIVES)).select(SCHEMA.names)
        if rows.num_rows:
            yield _encoded(rows)


def _counted(survivors: Iterator[pa.Table], tally: Tally) -> Iterator[pa.Table]:
    for rows in survivors:
        tally.survivors += rows.num_rows
        yield rows


_MOST_IDS = 2**14
"""Distinct texts of ENUM types: they lie in memory, can't be spilled, and come with each batch."""
_DISTINCT = f"""
SELECT {", ".join(TEXTS)}
FROM (SELECT {", ".join(TEXTS)} FROM new UNION ALL SELECT {", ".join(TEXTS)} FROM base)
GROUP BY GROUPING SETS ({", ".join(f"({name})" for name in TEXTS)})
LIMIT $most
"""
_ENUM = {
    name: f"CREATE TEMP TYPE {name}s AS ENUM "
    f"(SELECT {name} FROM texts WHERE {name} IS NOT NULL ORDER BY {name})"
    for name in TEXTS
}
_TEXT = {name: f"CREATE TEMP TYPE {name}s AS VARCHAR" for name in TEXTS}


def make_types(connection: duckdb.DuckDBPyConnection) -> None:
    """Make a type for each column of text: an ENUM of its distinct texts, if they aren't too many.

    Numbers are sorted faster than texts. The types are the connection's own, and go with it.

    Args:
        connection: an engine with the relations `new` and `base`.
    """
    texts = connection.sql(_DISTINCT, params={"most": _MOST_IDS + 1}).to_arrow_table()
    connection.register("texts", texts)
    for name in TEXTS:
        few = 0 < texts.num_rows <= _MOST_IDS
        connection.execute((_ENUM if few else _TEXT)[name])


def _encoded(rows: pa.Table) -> pa.Table:
    """Rows in the schema ENCODED."""
    columns = [
        _trimmed(rows[field.name]) if field.name in TEXTS else rows[field.name].cast(field.type)
        for field in ENCODED
    ]
    return pa.Table.from_arrays(columns, schema=ENCODED)


_SMALL = 1024
"""Texts that a dictionary may hold without need."""


def _trimmed(texts: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """Texts as a dictionary that holds few others: each row group is written with its own."""
    if not pa.types.is_dictionary(texts.type):
        return texts.dictionary_encode()
    whole = texts.combine_chunks()
    low, high = pc.min_max(whole.indices).as_py().values()
    if high - low >= max(len(whole), _SMALL):
        return whole.dictionary_decode().dictionary_encode()
    indices = pc.subtract(whole.indices.cast(pa.int32()), low)
    return pa.DictionaryArray.from_arrays(indices, whole.dictionary.slice(low, high - low + 1))
