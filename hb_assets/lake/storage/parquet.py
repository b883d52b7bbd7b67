"""Parquet files as this lake writes them: compression, encodings, checksums and footer metadata.

Our own metadata is JSON under the footer's key `hb`.
"""

from __future__ import annotations

import base64
import io
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hb_assets.core.errors import DamagedFileError, HbError
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.layout import FragmentName
from hb_assets.lake.storage.order import neighbours, ranks

KEY = b"hb"
DIGEST = b"hb.digest"
_SCHEMA = b"ARROW:schema"
"""Where Arrow keeps a file's Arrow schema: its IPC message in base64 (Arrow's documentation of the
Parquet format). pyarrow itself would put dictionaries there, as they were written."""
ROW_GROUP = 65_536
"""Rows of a row group, about, each column of it one page: half as many answer a query about an
hour a little faster and compress worse, twice as many the other way round."""
_LEVEL, _LEVEL_OF_POSITIONS = 3, 6
"""zstd levels. Positions lie in runs that higher levels find; other columns hardly get smaller."""

_READ = 2**20


def _longest() -> int:
    """A number of rows that no row group reaches."""
    return ROW_GROUP + ROW_GROUP // 2


Metadata = TypeVar("Metadata", bound=msgspec.Struct)


class _Digest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """CRC-32 of a file's first `bytes` bytes (all its rows), and of our metadata in its footer.

    `footer` is that of the whole footer with zeros in its own place, 8 hex digits.
    """

    bytes: int
    crc32: int
    note: int = 0
    footer: str = "0" * 8


class _Sink(io.RawIOBase):
    """A file that is written from its start, and reckons the digest meanwhile.

    Whoever opened the file closes it, after the sink: one that is left to its finaliser is closed
    then, and flushes a file that is closed already.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.digest = _Digest(0, 0)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        written = self._file.write(data)
        part = memoryview(data).cast("B")[:written]
        self.digest = _Digest(self.digest.bytes + written, zlib.crc32(part, self.digest.crc32))
        return written

    def tell(self) -> int:
        return self.digest.bytes

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> None:
        """Write the footer's checksum into its place."""
        self._file.flush()
        end = _end_of(self._file)
        place = end.find(_PLACE) + len(_PLACE)
        self._file.seek(-len(end) + place, os.SEEK_END)
        self._file.write(f"{zlib.crc32(end):08x}".encode())
        self._file.flush()


_PLACE = b'"footer":"'
_TAIL = 8
"""Bytes behind the footer: its length and Parquet's magic (the Parquet format, file structure)."""


def _end_of(file: BinaryIO | pa.NativeFile) -> bytes:
    """The end of a file from its footer on; too little of it where its length is wrong."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    length = int.from_bytes(file.read(4), "little") + _TAIL
    file.seek(max(0, size - length))
    return file.read()


def _verify_end(file: BinaryIO | pa.NativeFile, path: Path) -> None:
    """Verify the footer before it is parsed: a damaged one may end the process.

    Files of older releases have no checksum there. Raises DamagedFileError.
    """
    end = _end_of(file)
    before, place, rest = end.partition(_PLACE)
    if not place:
        return
    zeros = b"0" * 8
    if rest[:8] != f"{zlib.crc32(before + place + zeros + rest[8:]):08x}".encode():
        raise damaged(path, "its footer isn't what was written")


class Writer:
    """Writes rows, then the footer with our metadata in it."""

    def __init__(self, sink: _Sink, schema: pa.Schema, sorted_by: Iterable[str]) -> None:
        self._sink = sink
        self._schema = schema
        self._sorted_by = tuple(sorted_by)
        self._out: pq.ParquetWriter | None = None
        self._waiting: list[pa.Table] = []

    def write(self, rows: pa.Table) -> None:
        """Write rows, in row groups of about ROW_GROUP: what isn't a whole one waits for more."""
        self._waiting.append(rows)
        if sum(part.num_rows for part in self._waiting) < _longest():
            return
        whole = pa.concat_tables(self._waiting)
        while whole.num_rows >= _longest():
            end = self._end_of_group(whole)
            self._write(whole.slice(0, end))
            whole = whole.slice(end)
        self._waiting = [whole]

    def close_with(self, metadata: msgspec.Struct) -> None:
        """Write what waits, and the footer; nothing can be written after that."""
        if any(part.num_rows for part in self._waiting):
            self._write(pa.concat_tables(self._waiting))
        out = self._out or self._open(self._schema.empty_table())
        said = msgspec.json.encode(metadata)
        digest = msgspec.structs.replace(self._sink.digest, note=zlib.crc32(said))
        out.add_key_value_metadata({KEY: said, DIGEST: msgspec.json.encode(digest)})
        out.close()
        self._sink.seal()

    def abandon(self) -> None:
        """Stop writing a file that isn't wanted any more; one that was closed stays as it is."""
        if self._out is not None:
            self._out.close()

    def _end_of_group(self, rows: pa.Table) -> int:
        """Where a row group ends best: between two users, so that a query reads few of them."""
        if not self._sorted_by:
            return ROW_GROUP
        shortest = ROW_GROUP // 2
        first = rows[self._sorted_by[0]].slice(shortest - 1, _longest() - shortest)
        _, same = neighbours([ranks(first)])
        ends = np.flatnonzero(~same[1:]) + shortest
        return int(ends[np.abs(ends - ROW_GROUP).argmin()]) if len(ends) else ROW_GROUP

    def _write(self, rows: pa.Table) -> None:
        """Write a row group."""
        # Dictionaries are written as they are where a row group has one a column.
        group = rows.unify_dictionaries().combine_chunks()
        out = self._out or self._open(group)
        out.write_table(group, row_group_size=group.num_rows)

    def _open(self, rows: pa.Table) -> pq.ParquetWriter:
        """Open the file, its encodings chosen for rows like these."""
        encodings = {
            field.name: encoding
            for field in rows.schema
            if (encoding := _encoding(field, rows)) is not None
        }
        plain = pa.schema(
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in self._schema
        )
        order = [pq.SortingColumn(self._schema.get_field_index(name)) for name in self._sorted_by]
        self._out = pq.ParquetWriter(
            self._sink,
            self._schema,
            compression="zstd",
            compression_level={
                field.name: _LEVEL_OF_POSITIONS if field.name == "arrival_pos" else _LEVEL
                for field in self._schema
            },
            use_dictionary=[
                field.name
                for field in self._schema
                if field.name not in encodings and not pa.types.is_binary(field.type)
            ],
            column_encoding=encodings,
            sorting_columns=order or None,
            max_rows_per_page=_longest(),
            write_page_checksum=True,
            store_schema=False,
        )
        self._out.add_key_value_metadata({_SCHEMA: base64.b64encode(plain.serialize())})
        return self._out


def _encoding(field: pa.Field, rows: pa.Table) -> str | None:
    """The encoding in which a column takes the least room; None stands for a dictionary.

    Instants and heart rates differ little from row to row. Entry ids repeat where a batch of one
    device holds many rows, and positions count up there: zstd finds both in plain numbers, whatever
    comes between. Where each row came alone, ids differ little, and positions follow no rule.
    """
    if pa.types.is_uint64(field.type):
        distinct = pc.count_distinct(rows[field.name]).as_py()
        if distinct * _SHARED > rows.num_rows:
            return _DIFFERENCES
        return None if distinct <= _FEW else _PLAIN
    if field.name == "arrival_pos":
        steps = np.diff(rows[field.name].to_numpy())
        return _PLAIN if 2 * int(np.count_nonzero(steps == 1)) > len(steps) else None
    if pa.types.is_timestamp(field.type) or field.name == "heart_rate":
        return _DIFFERENCES
    return None


_PLAIN, _DIFFERENCES = "PLAIN", "DELTA_BINARY_PACKED"
_FEW = 256
"""Distinct numbers whose places in a dictionary take a byte each."""
_SHARED = 16
"""Rows that share an entry id, on average, where batches hold rows of one device."""


@contextmanager
def opened(
    source: BinaryIO | pa.NativeFile,
    path: Path,
    texts: Sequence[str] = (),
    metadata: pq.FileMetaData | None = None,
) -> Iterator[pq.ParquetFile]:
    """An open file of the lake for pyarrow, which checks each page that it reads.

    It doesn't check a page's header: `verified` has verified the whole file before.

    Args:
        source: the file.
        path: of the file, for messages.
        texts: columns of text to read as dictionaries, as they are stored.
        metadata: its footer, if it was read already.

    Raises:
        DamagedFileError: it isn't what was written.
        HbError: memory is short.
        OSError: the disk can't be read.
    """
    metadata = _footer(source, path) if metadata is None else metadata
    try:
        with pq.ParquetFile(
            source,
            metadata=metadata,
            read_dictionary=list(texts),
            page_checksum_verification=True,
        ) as file:
            yield file
    except UNREADABLE as error:
        raise meaning(error, path) from None


@contextmanager
def writer(path: Path, schema: pa.Schema, sorted_by: Iterable[str] = ()) -> Iterator[Writer]:
    """A writer into a file that is there: a temp file that a pruner unlinked is not made again.

    Args:
        path: the file.
        schema: of the rows to write; readers get plain columns for its dictionaries.
        sorted_by: columns that the rows are sorted by.

    Raises:
        FileNotFoundError: it isn't there.
    """
    with path.open("r+b") as file, _Sink(file) as sink:
        file.truncate()
        out = Writer(sink, schema, sorted_by)
        try:
            yield out
        finally:
            out.abandon()


def write(
    path: Path, table: pa.Table, metadata: msgspec.Struct, sorted_by: Iterable[str] = ()
) -> None:
    """Write a whole table with our metadata in the footer."""
    with writer(path, table.schema, sorted_by) as out:
        out.write(table)
        out.close_with(metadata)


def footer(path: Path) -> pq.FileMetaData:
    """The file's footer.

    Raises:
        DamagedFileError: not a Parquet file, or cut short.
        FileNotFoundError: it isn't there (any more).
        OSError: the disk can't be read.
    """
    with path.open("rb") as file:
        return _footer(file, path)


def _footer(file: BinaryIO | pa.NativeFile, path: Path) -> pq.FileMetaData:
    _verify_end(file, path)
    file.seek(0)
    try:
        return pq.read_metadata(file)
    except UNREADABLE as error:
        raise meaning(error, path) from None


def metadata(path: Path, kind: type[Metadata]) -> Metadata:
    """Our own metadata in the file's footer. Raises as `footer` does."""
    return metadata_in(footer(path), path, kind)


def metadata_in(found: pq.FileMetaData, path: Path, kind: type[Metadata]) -> Metadata:
    """Our own metadata in a footer that was read from `path`. Raises DamagedFileError."""
    said, _ = _sealed(path, found)
    try:
        return msgspec.json.decode(said, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from None


def _sealed(path: Path, found: pq.FileMetaData) -> tuple[bytes, _Digest]:
    """Our metadata in a footer, verified, and the digest beside it."""
    pairs = found.metadata or {}
    said, sealed = pairs.get(KEY), pairs.get(DIGEST)
    if said is None or sealed is None:
        raise damaged(path, "its footer has no metadata of ours")
    try:
        digest = msgspec.json.decode(sealed, type=_Digest)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from None
    if zlib.crc32(said) != digest.note:
        raise damaged(path, "the metadata in its footer isn't what was written")
    return said, digest


def verify(path: Path) -> None:
    """Verify that a file is, bit for bit, what was written.

    Raises:
        DamagedFileError: it isn't, or the file can't be read at all.
        FileNotFoundError: it isn't there (any more).
        OSError: the disk can't be read.
    """
    with path.open("rb") as file:
        verify_open(file, path)


def verify_open(file: BinaryIO | pa.NativeFile, path: Path) -> pq.FileMetaData:
    """Verify that an open file is, bit for bit, what was written; returns its footer.

    A fragment, and what else lies in files of such names, has the checksum of all of its bytes in
    its name; others have those of rows and footer in their footers.

    Raises:
        DamagedFileError: it isn't.
        OSError: the disk can't be read.
    """
    name = FragmentName.parse(path.name)
    if name is not None:
        if not name.seals(file):
            raise damaged(path, "its bytes aren't those that were written")
        return _footer(file, path)
    found = _footer(file, path)
    _, digest = _sealed(path, found)
    file.seek(0)
    crc32, left = 0, digest.bytes
    while left and (part := file.read(min(left, _READ))):
        crc32, left = zlib.crc32(part, crc32), left - len(part)
    if left or crc32 != digest.crc32:
        raise damaged(path, "its rows aren't what was written")
    if file.seek(0, os.SEEK_END) != digest.bytes + len(_end_of(file)):
        raise damaged(path, "there is more in it than was written")
    return found


def verify_footer(path: Path, schema: pa.Schema) -> None:
    """Verify what the footer says of the rows: columns, their least and greatest values.

    It reads all rows: readers skip parts of the file by what the footer says.

    Raises: as `verify`.
    """
    with path.open("rb") as source, opened(source, path) as file:
        if not file.schema_arrow.equals(schema):
            raise damaged(path, "its columns aren't those that were written")
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            rows = file.read_row_group(number)
            for index, name in enumerate(schema.names):
                said = group.column(index).statistics
                if said is None or not said.has_min_max:
                    continue
                found = pc.min_max(rows[name]).as_py()
                if (said.min, said.max) != (found["min"], found["max"]):
                    raise damaged(path, f"its footer is wrong about the column {name}")


UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What pyarrow raises for bytes that aren't Parquet, and for a disk that can't be read."""


def meaning(error: Exception, path: Path) -> HbError | OSError:
    """The error of ours for one that pyarrow raised while it read `path`.

    A disk's fault has a number, and memory may be free again: what can't be read now may be read
    later.
    """
    if isinstance(error, MemoryError | pa.ArrowCancelled):
        return _starved(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error
    return damaged(path, str(error))


def engine_errors() -> tuple[type[Exception], ...]:
    """Exceptions that reading rows of a file may raise; `explained` makes one clear line of them.

    Asked for once something was raised: importing these takes longer than many a command.
    """
    import duckdb
    import polars as pl

    return duckdb.Error, pl.exceptions.PolarsError, pa.ArrowException


def explained(error: Exception, paths: Iterable[Path]) -> HbError:
    """The error of ours for one that an engine raised while it read `paths`: which is damaged.

    Raises:
        OSError: the disk can't be read.
    """
    for path in paths:
        try:
            verify(path)
        except FileNotFoundError:
            continue
        except DamagedFileError as fault:
            return fault
    return _starved(error)


def _starved(error: Exception) -> HbError:
    # only its kind: the message of an engine's error may quote values
    return HbError(
        f"reading the lake failed ({type(error).__name__}); free memory (HB_DUCKDB_MEMORY) or "
        "disk space"
    )


_REMEDIES = {
    layout.RAW: "hb consolidate DAY sets it aside, so that the others go on; hb damaged restore puts "
    "a whole copy back",
    layout.HEARTBEATS: "hb consolidate DAY makes it anew while raw fragments have all of it; else "
    "hb damaged restore puts a whole copy back, hb damaged accept keeps what is sound of it",
    layout.QUARANTINE: "restore it from a copy, or move it away: its records are lost then, and hb "
    "audit says how many",
    layout.RELEASED: "restore it from a copy, or move it away: its records may be put back twice "
    "then, which changes nothing",
    layout.MINUTES: "hb consolidate DAY makes it anew",
    layout.TOMBSTONES: "restore it from a copy: without it heartbeats of a user who was forgotten "
    "may be read again",
}


def damaged(path: Path, why: str) -> DamagedFileError:
    """One clear line about a file that can't be read, and what to do about this kind of file."""
    reason = why.splitlines()[0] if why else "unreadable"
    kind = next((part for part in reversed(path.parts) if part in _REMEDIES), "")
    remedy = _REMEDIES.get(kind, "restore it from a copy, or move it away")
    return DamagedFileError(f"{path} is damaged ({reason}); {remedy}", path=path)
