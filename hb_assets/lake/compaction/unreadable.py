"""Unread fragments: which entries of pending ones came before with a fragment that nobody can read.

A drain that dies between the publication of a fragment and its acknowledgement leaves entries that
come again in another one. Where the first is consolidated by then and was damaged since, only the
published file can tell which of the second's rows it includes already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from hb_assets.core.schema import ARRIVAL, IDENTITY, KEY
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.storage import verified
from hb_assets.lake.storage.layout import FragmentName

if TYPE_CHECKING:
    import duckdb

# An entry is drained whole: all of its rows came before, or none. It can't have come before where
# the published file has no row of one of its keys that is as late; a forgotten user's rows tell
# nothing.
_CAME_BEFORE = f"""
SELECT arrival_ms, arrival_seq, arrival_shard
FROM new
JOIN unread ON arrival_shard = unread.source
    AND (arrival_ms, arrival_seq) BETWEEN (first_ms, first_seq) AND (last_ms, last_seq)
LEFT JOIN (SELECT {", ".join(KEY)}, row({IDENTITY}) AS latest FROM base) USING ({", ".join(KEY)})
GROUP BY ALL
HAVING bool_and(
    list_contains($erased, user_id)
    OR coalesce(latest >= row({", ".join(f"new.{name}" for name in ARRIVAL)}), false)
)
"""
_NAMES = pa.schema(
    [
        ("source", pa.int16()),
        *((name, pa.uint64()) for name in ("first_ms", "first_seq", "last_ms", "last_seq")),
    ]
)


def came_before(inputs: Inputs, connection: duckdb.DuckDBPyConnection) -> pa.Table:
    """Entries of the pending fragments whose rows the published file includes already.

    Columns: arrival_ms, arrival_seq, arrival_shard. Raises as `verified.relations`.
    """
    assert inputs.base is not None
    connection.register("unread", _names(inputs.unread))
    with verified.relations(connection, {"new": inputs.new, "base": [inputs.base]}):
        return connection.sql(_CAME_BEFORE, params={"erased": list(inputs.erased)}).to_arrow_table()


def _names(names: Sequence[FragmentName]) -> pa.Table:
    rows = [(name.source, *name.first, *name.last) for name in names]
    return pa.Table.from_pylist([dict(zip(_NAMES.names, row, strict=True)) for row in rows], _NAMES)
