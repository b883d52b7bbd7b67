"""The sort of a merge in DuckDB: out of core, and for rows that aren't plain.

Belongs here: SQL that sorts rows by key and arrival, and marks those that came before, or whose
user was forgotten. Doesn't belong here: which row of a key survives (`merge`), and the sort in
memory (`columns`), which most merges take.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from hb_assets.core.schema import ARRIVAL, IDENTITY, KEY, ORDER
from hb_assets.core.schema import HEARTBEATS as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.unread import came_before
from hb_assets.lake.files.tombstones import Cutoffs
from hb_assets.lake.storage import parquet, verified
from hb_assets.lake.storage.engine import engine, figures

if TYPE_CHECKING:
    import duckdb

_COLUMNS = ", ".join(SCHEMA.names)
_ROW = ", ".join((*KEY, *ARRIVAL))
_SORT = ", ".join((*ORDER, *ARRIVAL))
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
_BASE = "SELECT *, false AS late FROM base"
# An identity alone might be another row's, where a server that lost its last ids gave them again.
_UNKNOWN = f"""
 ANTI JOIN (
    SELECT {_ROW} FROM included
 ) AS known USING ({_ROW})
"""
_ERASED_BEFORE = f"""
 LEFT JOIN (
    SELECT DISTINCT {IDENTITY}, true AS counted
    FROM erased_before
 ) AS before USING ({IDENTITY})
"""
_UNREAD = """
 ANTI JOIN came_before USING (arrival_ms, arrival_seq, arrival_shard)
"""
# Each part is there only where it is needed: most merges know of nothing that comes again.
_NEW = {
    (late, included, unread, erased): f"""
SELECT arrived.*,
    {_LATE if late else "false"} OR {"coalesce(counted, false)" if erased else "false"} AS late
FROM new AS arrived
{"LEFT JOIN mark ON arrived.arrival_shard = mark.source" if late else ""}
{_ERASED_BEFORE if erased else ""} {_UNKNOWN if included else ""} {_UNREAD if unread else ""}
"""
    for late in (False, True)
    for included in (False, True)
    for unread in (False, True)
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
FLAGGED: pa.Schema = pa.schema(
    [*SCHEMA, pa.field("late", pa.bool_()), pa.field("gone", pa.bool_())]
)
_MARKS = pa.schema([("source", pa.int16()), ("ms", pa.uint64()), ("seq", pa.uint64())])
_ERASED = pa.schema([("forgotten", pa.string()), *_MARKS])


_turn = threading.Lock()
"""One sort after the other: each may take all of HB_DUCKDB_MEMORY."""


def sorted_rows(inputs: Inputs, settings: Settings) -> Iterator[pa.RecordBatch]:
    """All rows by key and arrival, in batches; with the columns of FLAGGED where some aren't plain.

    `late` is a row that counts elsewhere, or came before; `gone` is a forgotten user's.
    """
    with _turn, engine(settings) as connection:
        yield from _sorted(inputs, connection)


def _sorted(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> Iterator[pa.RecordBatch]:
    which = inputs.base is not None, _kind(inputs) if inputs.new else None
    flagged = bool(inputs.erased or inputs.watermark or inputs.erased_before)
    _register(inputs, connection)
    with verified.relations(connection, _files(inputs, base=True)):
        rows = connection.sql(_SORTED[which, flagged, bool(inputs.erased)])
        yield from rows.to_arrow_reader(parquet.ROW_GROUP)


def fresh_rows(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> int:
    """Distinct rows of the pending fragments that `base` doesn't include yet."""
    if not inputs.new:
        return 0
    _register(inputs, connection)
    with verified.relations(connection, _files(inputs, base=False)):
        return figures(connection, _FRESH[_kind(inputs)])[0]


def _kind(inputs: Inputs) -> tuple[bool, bool, bool, bool]:
    known = inputs.watermark, inputs.included, inputs.unread, inputs.erased_before
    late, included, unread, erased = map(bool, known)
    return late, included, unread, erased


def _register(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> None:
    if inputs.watermark:
        connection.register("mark", _marks(inputs.watermark))
    if inputs.unread:
        connection.register("came_before", came_before(inputs, connection))
    if inputs.erased:
        connection.register("erased", _erased(inputs.erased))


def _files(inputs: Inputs, *, base: bool) -> dict[str, Sequence[Path]]:
    """The files of a query by their names in it."""
    files = {"new": inputs.new}
    if inputs.new:
        files |= {"included": inputs.included, "erased_before": inputs.erased_before}
    if base and inputs.base is not None:
        files["base"] = [inputs.base]
    return files


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
