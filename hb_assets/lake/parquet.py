"""Parquet as this lake writes it: compression, encodings, and our own footer metadata.

Belongs here: writer options and the JSON under the footer's key `hb`. Doesn't belong here: where
files lie and which rows they hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import duckdb
import msgspec
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from hb_assets.errors import DamagedFileError, HbError
from hb_assets.lake import layout

KEY = b"hb"
ENGINE_ERRORS = (duckdb.Error, pl.exceptions.PolarsError, pa.ArrowException)
"""What reading rows out of a file may raise; `explained` makes one clear line of it."""
ROW_GROUP = 122_880
"""Rows of a row group: DuckDB's own, so that its scans run side by side."""

Note = TypeVar("Note", bound=msgspec.Struct)


@contextmanager
def writer(
    path: Path, schema: pa.Schema, sorted_by: Iterable[str] = ()
) -> Iterator[pq.ParquetWriter]:
    """A writer into a file that is there: a temp file that a pruner unlinked is not made again.

    Raises:
        FileNotFoundError: it isn't there.
    """
    dense = {
        field.name: "DELTA_BINARY_PACKED"
        for field in schema
        if pa.types.is_timestamp(field.type) or pa.types.is_uint64(field.type)
    }
    by_dictionary = [
        field.name
        for field in schema
        if field.name not in dense and not pa.types.is_binary(field.type)
    ]
    order = [pq.SortingColumn(schema.get_field_index(name)) for name in sorted_by]
    with path.open("r+b") as file:
        file.truncate()
        with pq.ParquetWriter(
            file,
            schema,
            compression="zstd",
            use_dictionary=by_dictionary,
            column_encoding=dense,
            sorting_columns=order or None,
            write_page_index=True,
        ) as out:
            yield out


def write(path: Path, table: pa.Table, note: msgspec.Struct, sorted_by: Iterable[str] = ()) -> None:
    """Write a whole table with its note in the footer."""
    with writer(path, table.schema, sorted_by) as out:
        out.add_key_value_metadata({KEY: msgspec.json.encode(note)})
        out.write_table(table, row_group_size=ROW_GROUP)


def footer(path: Path) -> pq.FileMetaData:
    """The file's footer.

    Raises:
        DamagedFileError: not a Parquet file, or cut short.
        FileNotFoundError: it isn't there (any more).
    """
    try:
        return pq.read_metadata(path)
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error)) from None


def note(path: Path, kind: type[Note]) -> Note:
    """Our own note in the file's footer. Raises as `footer` does."""
    found = (footer(path).metadata or {}).get(KEY)
    if found is None:
        raise damaged(path, "its footer has no note of ours")
    try:
        return msgspec.json.decode(found, type=kind)
    except msgspec.MsgspecError as error:
        raise damaged(path, str(error)) from None


def explained(error: Exception, paths: Iterable[Path]) -> HbError:
    """What an engine's error while it read `paths` means: which one is damaged, if any is."""
    for path in paths:
        try:
            with pq.ParquetFile(path) as file:
                for _ in file.iter_batches():
                    pass
        except FileNotFoundError:
            continue
        except (pa.ArrowException, OSError) as fault:
            return damaged(path, str(fault))
    # only its kind: the message of an engine's error may quote values
    return HbError(
        f"reading the lake failed ({type(error).__name__}); free memory (HB_DUCKDB_MEMORY) or disk space"
    )


_REMEDIES = {
    layout.RAW: "restore it from a copy, or move it away: what no consolidated file includes of it "
    "is lost then, and hb audit says how much",
    layout.HEARTBEATS: "move it away, then rebuild its day from raw fragments: "
    "hb consolidate DAY --rebuild",
    layout.QUARANTINE: "restore it from a copy, or move it away: its records are lost then, and hb "
    "audit says how many",
    layout.RELEASED: "restore it from a copy, or move it away: its records may be put back twice "
    "then, which changes nothing",
    layout.MINUTES: "move it away, then make it anew: hb consolidate DAY",
}


def damaged(path: Path, why: str) -> DamagedFileError:
    """One clear line about a file that can't be read, and what to do about this kind of file."""
    reason = why.splitlines()[0] if why else "unreadable"
    kind = next((part for part in reversed(path.parts) if part in _REMEDIES), "")
    remedy = _REMEDIES.get(kind, "restore it from a copy, or move it away")
    return DamagedFileError(f"{path} is damaged ({reason}); {remedy}")
