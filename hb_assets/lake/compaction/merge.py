"""The merge: rows of a consolidated file and of pending fragments, into one row per key.

Belongs here: the survivor of a key, and the counts of all that isn't one. Doesn't belong here:
which files are merged (`inputs`), their sort (`columns`, `external_sort`), and how the result is
published (`consolidation`).

In rows that are sorted by key and arrival each key's chain of arrivals stands side by side: the
last is the survivor, each one before it is superseded by its neighbour, and a row with its
neighbour's identity is a replay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core.schema import ARRIVAL, KEY, ORDER
from hb_assets.core.schema import HEARTBEATS as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction import external_sort
from hb_assets.lake.compaction.external_sort import FLAGGED
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.storage import verified
from hb_assets.lake.storage.columns import ENCODED, TEXTS, Columns, Numbers, encoded, in_one_word


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


def merged(
    inputs: Inputs, rows: int, tally: Tally, settings: Settings, *, in_memory: bool
) -> Iterator[pa.Table]:
    """Survivors in order, table by table; `tally` is whole when the last one was taken.

    Their schema is ENCODED.

    Args:
        inputs: what to merge.
        rows: how many rows the pending fragments have.
        tally: counts what becomes of the rows.
        settings: bounds of the engine that sorts out of core, and what isn't plain.
        in_memory: whether there is room for `rows`.
    """
    if not (in_memory and inputs.plain):
        batches = external_sort.sorted_rows(inputs, settings)
        yield from map(encoded, _survivors(batches, tally))
        return
    new = Columns.of(verified.tables(inputs.new, TEXTS), rows)
    if inputs.base is None:
        yield from _settled(new, tally)
    else:
        yield from _into(inputs.base, new, tally)


def _into(base: Path, new: Columns, tally: Tally) -> Iterator[pa.Table]:
    """Merge rows into a published file, one row group after the other.

    A row group that no row falls into is passed on as it is.
    """
    twins = new.sort()
    done = 0
    with verified.opened(base, TEXTS) as file:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number, use_threads=False)
            end = new.place_after(_last_key(group))
            if end == done:
                tally.survivors += group.num_rows
                yield group.cast(ENCODED)
                continue
            part = new.table(slice(done, end))
            whole = None
            if end - done <= group.num_rows // _FEW and not _any_between(twins, done, end):
                whole = _put_between(group.cast(ENCODED), part)
            if whole is None:
                rows = group.num_rows + part.num_rows
                yield from _settled(Columns.of([group, part], rows), tally)
            else:
                tally.survivors += whole.num_rows
                yield whole
            done = end
    yield from _settled(Columns.of([new.table(slice(done, None))], new.rows - done), tally)


_FEW = 100
"""A row group takes in as much as a hundredth of its rows without a sort."""


def _any_between(places: Numbers, start: int, end: int) -> bool:
    first, behind = np.searchsorted(places, (start, end))
    return bool(first < behind)


def _put_between(group: pa.Table, rows: pa.Table) -> pa.Table | None:
    """A row group with a few rows more; None where one shares user and instant with another's."""
    count = group.num_rows
    both = Columns.of([group, rows], count + rows.num_rows, ORDER[:2])
    words = in_one_word([both.numbers[name] for name in ORDER[:2]])
    if words is None:
        return None
    places = np.searchsorted(words[:count], words[count:])
    if np.any(words[np.minimum(places, count - 1)] == words[count:]):
        return None
    pieces, start = [], 0
    for row, place in enumerate(places.tolist()):
        pieces += [group.slice(start, place - start), rows.slice(row, 1)]
        start = place
    return pa.concat_tables([*pieces, group.slice(start)])


def _last_key(rows: pa.Table) -> dict[str, object]:
    last = rows.slice(rows.num_rows - 1).select(ORDER)
    return {
        name: last[name][0].value if name not in TEXTS else last[name][0].as_py() for name in ORDER
    }


_BATCH = 2**15
"""Rows that leave memory at once."""


def _settled(rows: Columns, tally: Tally) -> Iterator[pa.Table]:
    """Survivors of rows in memory: only those that share their key are looked at."""
    twins = rows.sort()
    kept = np.ones(rows.rows, bool)
    if len(twins):
        kept[twins[:-1]] = ~_succeeded(rows.table(twins).cast(SCHEMA), tally).to_numpy()
    tally.survivors += int(kept.sum())
    for start in range(0, rows.rows, _BATCH):
        batch = slice(start, start + _BATCH)
        whole = kept[batch].all()
        yield rows.table(batch if whole else start + np.flatnonzero(kept[batch]))


def _survivors(batches: Iterable[pa.RecordBatch], tally: Tally) -> Iterator[pa.Table]:
    """Survivors of sorted rows, batch by batch.

    The last row of a batch waits for the next batch, which may open with its successor.
    """
    waiting: pa.Table | None = None
    for batch in batches:
        rows = pa.Table.from_batches([batch])
        rows = rows.cast(FLAGGED if "late" in rows.schema.names else SCHEMA)
        if waiting is not None:
            rows = pa.concat_tables([waiting, rows]).combine_chunks()
        if rows.num_rows == 0:
            continue
        waiting = rows.slice(rows.num_rows - 1)
        succeeded = _succeeded(rows, tally)
        yield from _kept(rows.slice(0, rows.num_rows - 1).filter(pc.invert(succeeded)), tally)
    if waiting is not None:
        yield from _kept(waiting, tally)


def _succeeded(rows: pa.Table, tally: Tally) -> pa.ChunkedArray:
    """Of each sorted row but the last whether the next has its key; counts what became of it."""
    this, following = rows.slice(0, rows.num_rows - 1), rows.slice(1)
    same_key = _equal(this, following, KEY)
    superseded = pc.and_not(same_key, _equal(this, following, ARRIVAL))
    if "late" in rows.schema.names:
        tally.uncounted += _count(pc.and_(superseded, this["late"]))
        superseded = pc.and_not(superseded, this["late"])
    repeats = _count(pc.and_(superseded, _equal(this, following, ("heart_rate",))))
    tally.repeats += repeats
    tally.corrections += _count(superseded) - repeats
    return same_key


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
