"""Checks of a file before it is published: pandera for values, DuckDB for what spans the file.

Dagster shows the checks under the names that they have here. A figure is a count or a bound of
something that is no health data; the values that failed are never shown (invariant 7). pandera and
Polars are imported where a check runs: the gateway, which only reads the lake, starts without them.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from hb_assets.core.errors import CheckFailedError
from hb_assets.core.record import shard_of
from hb_assets.core.schema import KEY, ORDER, TEXTS
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import parquet, verified
from hb_assets.lake.storage.engine import engine, figures
from hb_assets.lake.storage.order import neighbours, ranks

if TYPE_CHECKING:
    import polars as pl
    from pandera.polars import DataFrameSchema

SCHEMA_AND_RANGES = "schema_and_ranges"
PARTITION_DAY = "partition_day"
KEY_UNIQUE = "key_unique"
SORTED = "sorted"
COUNTS_ADD_UP = "counts_add_up"
HEARTBEAT_CHECKS = (SCHEMA_AND_RANGES, PARTITION_DAY, KEY_UNIQUE, SORTED, COUNTS_ADD_UP)
MINUTES_SCHEMA = "minutes_schema_and_ranges"
MINUTES_ADD_UP = "minutes_add_up"
MINUTE_CHECKS = (MINUTES_SCHEMA, MINUTES_ADD_UP)

DESCRIPTIONS = {
    SCHEMA_AND_RANGES: "columns, types, nulls, lengths and ranges are as the record says (pandera)",
    PARTITION_DAY: "every timestamp lies within the partition's UTC day (pandera), every user in its shard",
    KEY_UNIQUE: "(user_id, device_id, timestamp) is unique",
    SORTED: "rows are sorted by user_id, timestamp, device_id",
    COUNTS_ADD_UP: "distinct rows of the listed fragments = unique + superseded + erased; unique = rows",
    MINUTES_SCHEMA: "columns, types, nulls and ranges of the minutes (pandera)",
    MINUTES_ADD_UP: "the minutes count every consolidated reading once, and keep no more than all",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """Result of one check: whether it passed, counts that tell why, and one line when it didn't.

    Of the counts `rows` is how many rows there are and `bad_rows` how many failed.
    """

    name: str
    passed: bool
    figures: dict[str, int] = field(default_factory=dict)
    message: str = ""

    def words(self) -> tuple[str, str]:
        """What was expected and what was found, in words, of one file or of many together."""
        count = defaultdict(lambda: "0", {name: f"{n:,}" for name, n in self.figures.items()})
        rows, bad = count["rows"], count["bad_rows"]
        if self.name == COUNTS_ADD_UP:
            unique, superseded, erased = count["unique"], count["superseded"], count["erased"]
            in_files = count["rows_in_file"]
            return (
                f"{count['rows_in']} rows came in = unique + superseded + erased; unique = in files",
                f"{unique} unique + {superseded} superseded + {erased} erased; {in_files} in files",
            )
        if self.name == MINUTES_ADD_UP:
            return (
                f"minutes that count {count['readings']} readings, and keep no more",
                f"{count['counted']} counted, {count['kept']} kept, in {count['minutes']} minutes",
            )
        return f"{DESCRIPTIONS[self.name]}, in {rows} rows", f"{bad} bad rows"


def heartbeats(
    path: Path,
    day: dt.date,
    settings: Settings,
    new: Sequence[Path] | None = None,
    shard: tuple[int, int] | None = None,
) -> list[Figure]:
    """Check a file: schema, ranges, the day, order and unique keys.

    Args:
        path: the file, published or not.
        day: in which every timestamp has to lie.
        settings: for the engine that counts the keys of a file that isn't in order.
        new: files whose rows came in; all others were checked before they were published, and are
            bit for bit what they were. None: all rows are to be looked at.
        shard: in which every user has to belong, and how many there are.
    """
    from hb_assets.core import contracts

    rules = {
        SCHEMA_AND_RANGES: contracts.heartbeats_model(),
        PARTITION_DAY: contracts.day_model(day),
    }
    faults = {name: _Faults() for name in rules}
    with _turn:
        for rows in _rows([path] if new is None else new):
            for name, model in rules.items():
                faults[name].add(rows, model)
    sequence = _sequence(path)
    if sequence.disorder:
        with engine(settings) as connection, verified.relations(connection, {"rows": [path]}):
            (duplicates,) = figures(connection, _DUPLICATES)
        sequence = replace(sequence, duplicates=duplicates)
    of_values = [found.figure(name, sequence.rows) for name, found in faults.items()]
    if shard is not None:
        of_values[-1] = _with_users(of_values[-1], sequence.users, *shard)
    return [*of_values, *sequence.figures()]


def _with_users(figure: Figure, users: Collection[str], shard: int, shards: int) -> Figure:
    """The figure of PARTITION_DAY, failed where a user belongs to another shard."""
    strangers = sum(shard_of(user, shards) != shard for user in users)
    if not strangers:
        return figure
    counts = dict(figure.figures)
    for name in ("faults", "bad_rows"):
        counts[name] = counts.get(name, 0) + strangers  # each has one row at least
    said = [figure.message, f"{strangers} users belong to another shard"]
    return Figure(PARTITION_DAY, False, counts, "; ".join(filter(None, said)))


def passed(rows: int) -> list[Figure]:
    """The figures of a file with so many rows that passed `heartbeats`."""
    of_values = [_Faults().figure(name, rows) for name in (SCHEMA_AND_RANGES, PARTITION_DAY)]
    return [*of_values, *_Sequence(rows).figures()]


def minutes(path: Path) -> Figure:
    """Columns, types, nulls and ranges of minutes."""
    from hb_assets.core import contracts

    faults = _Faults()
    for rows in _rows([path]):
        faults.add(rows, contracts.minutes_model())
    return faults.figure(MINUTES_SCHEMA, parquet.footer(path).num_rows)


_AT_ONCE = 2**19
"""Rows that are checked at once: pandera takes some 20 ms for each time."""
_turn = threading.Lock()
"""One file after the other: Polars uses all cores by itself, and memory for each file."""


def _rows(paths: Sequence[Path]) -> Iterator[pl.DataFrame]:
    """Rows of these files, piece by piece; at least one piece, which may be empty."""
    if not paths:
        return
    with verified.scanned(paths) as (scan, rows):
        pieces = max(1, -(-rows // _AT_ONCE))
        bounds = [rows * piece // pieces for piece in range(pieces + 1)]
        for start, end in pairwise(bounds):
            yield scan.slice(start, end - start).collect()


@dataclass(slots=True)
class _Faults:
    """Failures that a pandera model found at full depth: columns and rules, never a value."""

    rules: set[str] = field(default_factory=set)
    bad_rows: int = 0

    def add(self, rows: pl.DataFrame, model: DataFrameSchema) -> None:
        """Validate further rows with the model."""
        from pandera.config import ValidationDepth, config_context
        from pandera.errors import SchemaErrors

        depth = ValidationDepth.SCHEMA_AND_DATA
        with config_context(validation_enabled=True, validation_depth=depth):
            try:
                model.validate(rows, lazy=True)
            except SchemaErrors as errors:
                self.rules |= {
                    f"{fault.schema.name}: {fault.check or fault.reason_code}"
                    for fault in errors.schema_errors
                }
                failed = errors.failure_cases["index"]  # null: what is wrong with a whole column
                self.bad_rows += rows.height if failed.null_count() else failed.n_unique()

    def figure(self, name: str, rows: int) -> Figure:
        """The result of the check, of a file with so many rows."""
        counts = {"rows": rows, "bad_rows": self.bad_rows, "faults": len(self.rules)}
        return Figure(name, not self.rules, counts, "; ".join(sorted(self.rules)[:5]))


@dataclass(frozen=True, slots=True)
class _Sequence:
    """How many rows are out of order, and how many repeat a key."""

    rows: int = 0
    disorder: int = 0
    duplicates: int = 0
    users: Collection[str] = ()

    def figures(self) -> list[Figure]:
        disorder, duplicates = self.disorder, self.duplicates
        return [
            Figure(
                KEY_UNIQUE,
                duplicates == 0,
                {"rows": self.rows, "bad_rows": duplicates},
                f"{duplicates} rows repeat a key" if duplicates else "",
            ),
            Figure(
                SORTED,
                disorder == 0,
                {"rows": self.rows, "bad_rows": disorder},
                f"{disorder} rows stand before a row they should follow" if disorder else "",
            ),
        ]


def _sequence(path: Path) -> _Sequence:
    """Compare each row of a file with the one before it: sorted duplicate keys are neighbours.

    Rows that lack a part of the key are left out: their schema is wrong already.
    """
    footer = parquet.footer(path)
    if not set(ORDER) <= set(footer.schema.names):
        return _Sequence(footer.num_rows)
    disorder = duplicates = 0
    users: set[str] = set()
    last: pa.Table | None = None
    with verified.opened(path, TEXTS) as file:
        for number in range(file.num_row_groups):
            group = file.read_row_group(number, columns=list(ORDER), use_threads=False)
            group = group.drop_null()
            for chunk in group["user_id"].chunks:
                users.update(chunk.dictionary.to_pylist())
            group = group if last is None else pa.concat_tables([last, group])
            last = group.slice(max(0, group.num_rows - 1))
            less, same = neighbours([ranks(group[name]) for name in ORDER])
            disorder += int(less.sum())
            duplicates += int(same.sum())
    return _Sequence(footer.num_rows, disorder, duplicates, users)


_DUPLICATES = f"""
SELECT coalesce(sum(n - 1), 0) FROM (
    SELECT count(*) AS n FROM rows GROUP BY {", ".join(KEY)}
)
"""


def counts_add_up(
    *, rows_in: int, unique: int, superseded: int, erased: int, rows_in_file: int
) -> Figure:
    """Check that the counts of one consolidated file add up.

    Args:
        rows_in: distinct rows of the fragments that the file lists, counted from them.
        unique: rows that survived, as the consolidation counted.
        superseded: rows that didn't, likewise.
        erased: rows that were forgotten, likewise.
        rows_in_file: rows that the file really has.
    """
    faults = []
    if rows_in != unique + superseded + erased:
        faults.append(f"{rows_in} rows came in, {unique} + {superseded} + {erased} went out")
    if rows_in_file != unique:
        faults.append(f"the file has {rows_in_file} rows, {unique} survived")
    counted = {
        "rows_in": rows_in,
        "unique": unique,
        "superseded": superseded,
        "erased": erased,
        "rows_in_file": rows_in_file,
        "bad_rows": abs(rows_in - unique - superseded - erased) + abs(rows_in_file - unique),
    }
    return Figure(COUNTS_ADD_UP, not faults, counted, "; ".join(faults))


def minutes_add_up(*, readings: int, counted: int, kept: int, rows: int) -> Figure:
    """Check that the counts of one minute-level file add up.

    Args:
        readings: rows of the consolidated file.
        counted: sum of `count` over the minutes.
        kept: sum of `kept_count` over the minutes.
        rows: minutes.
    """
    passed = readings == counted and kept <= counted and rows <= counted
    message = "" if passed else f"{readings} readings, {counted} counted, {kept} kept"
    counts = {"readings": readings, "counted": counted, "kept": kept, "minutes": rows}
    counts["bad_rows"] = abs(readings - counted) + max(0, kept - counted)
    return Figure(MINUTES_ADD_UP, passed, counts, message)


def require(results: Iterable[Figure], what: str) -> None:
    """Raise an error for a file that failed a check, so that it isn't published.

    Raises:
        CheckFailedError: names the file's day and shard, each failed check and its figures.
    """
    figures = tuple(results)
    failed = [figure for figure in figures if not figure.passed]
    if failed:
        faults = "; ".join(f"{figure.name}: {figure.message}" for figure in failed)
        raise CheckFailedError(
            f"{what} failed its checks and was not published: {faults}", figures=figures
        )


def summed(results: Sequence[Figure]) -> list[Figure]:
    """One figure per check over all shards of a day: counts added up, messages joined."""
    result: dict[str, Figure] = {}
    for figure in results:
        before = result.get(figure.name)
        if before is None:
            result[figure.name] = figure
            continue
        names = before.figures.keys() | figure.figures.keys()
        result[figure.name] = Figure(
            figure.name,
            before.passed and figure.passed,
            {n: before.figures.get(n, 0) + figure.figures.get(n, 0) for n in sorted(names)},
            "; ".join(text for text in (before.message, figure.message) if text),
        )
    return list(result.values())
