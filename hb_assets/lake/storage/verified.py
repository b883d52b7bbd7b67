"""Verified reads: rows of the lake's Parquet files, none of a file that isn't what was written.

Every read of rows goes through here. A file is verified whole, by the CRC-32 in a fragment's name
or in the footer, before anybody gets a row of it; pyarrow checks each page once more as it reads
it. DuckDB and Polars check no checksum at all: they get the names of files that were verified just
now, as `relations`, and as `scanned`. Readers that ask for the same file again and again take
`whole` once (`catalog`), and then `reopened`: the file is verified again when it looks changed, its
pages each time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from hb_assets.core.errors import DamagedFileError
from hb_assets.lake.storage import parquet
from hb_assets.lake.storage.durable_files import Fingerprint, fingerprint

if TYPE_CHECKING:
    import duckdb
    import polars as pl

VerifiedFile: TypeAlias = pq.ParquetFile
"""An open file that was found to be what was written."""


class ReplacedError(FileNotFoundError):
    """The file that was verified isn't the one that was read: try again."""


@contextmanager
def opened(path: Path, texts: Sequence[str] = ()) -> Iterator[VerifiedFile]:
    """Open a file for reading rows with pyarrow, once it is verified.

    Args:
        path: the file.
        texts: columns of text to read as dictionaries, as they are stored.

    Raises:
        DamagedFileError: it isn't what was written.
        FileNotFoundError: it isn't there (any more).
        HbError: memory is short.
        OSError: the disk can't be read.
    """
    with _file(path) as source:
        seen = _seen(source)
        footer = parquet.verify_open(source, path)
        with parquet.opened(source, path, texts, footer) as file:
            yield file
        if not _seen(source).has_bytes_of(seen):
            raise parquet.damaged(path, "it changed while it was read")


def tables(paths: Iterable[Path], texts: Sequence[str] = ()) -> Iterator[pa.Table]:
    """All rows of files, file by file. Arguments and errors as of `opened`."""
    for path in paths:
        with opened(path, texts) as file:
            rows = file.read(use_threads=False)
        yield rows


@contextmanager
def relations(
    connection: duckdb.DuckDBPyConnection,
    files: Mapping[str, Iterable[Path]],
    on_damage: Callable[[DamagedFileError], None] | None = None,
    *,
    numbered: bool = False,
) -> Iterator[Mapping[str, list[Path]]]:
    """Context with verified files as relations of an engine, by these names.

    Their column `filename` is the path. Names without any file aren't there: what is there, with
    its files, is what the block gets.

    Args:
        connection: the engine.
        files: of each name.
        on_damage: told of each damaged file, which is left out; by default it ends it all.
        numbered: whether there is a column `file_row_number` as well.

    Raises:
        DamagedFileError: a file isn't what was written.
        FileNotFoundError: one isn't there (any more), or was replaced meanwhile.
        OSError: the disk can't be read.
    """
    seen: dict[Path, Fingerprint] = {}
    sound: dict[str, list[Path]] = {}
    for name, paths in files.items():
        for path in paths:
            try:
                if path not in seen:
                    seen[path], _ = whole(path)
            except DamagedFileError as error:
                if on_damage is None:
                    raise
                on_damage(error)
            else:
                sound.setdefault(name, []).append(path)
    with ExitStack() as stack:
        for name, paths in sound.items():
            _relate(connection, name, paths, numbered=numbered)
            stack.callback(connection.unregister, name)
        with _unchanged(seen):
            yield sound


@contextmanager
def scanned(paths: Sequence[Path]) -> Iterator[tuple[pl.LazyFrame, int]]:
    """Context with verified files (at least one) for Polars, and how many rows they have.

    Raises:
        DamagedFileError: a file isn't what was written.
        FileNotFoundError: one isn't there (any more), or was replaced meanwhile.
        OSError: the disk can't be read.
    """
    import polars as pl

    found = {path: whole(path) for path in paths}
    rows = sum(footer.num_rows for _, footer in found.values())
    with _unchanged({path: seen for path, (seen, _) in found.items()}):
        yield pl.scan_parquet(list(paths), hive_partitioning=False), rows


@contextmanager
def _unchanged(seen: Mapping[Path, Fingerprint]) -> Iterator[None]:
    """Raises ReplacedError when a file was replaced during the block, also when an engine failed.

    An engine that opens the path twice reads two different files, and calls that a broken one.
    """
    try:
        yield
    except parquet.engine_errors():
        for path, before in seen.items():
            _require_unchanged(path, before)
        raise
    for path, before in seen.items():
        _require_unchanged(path, before)


def _require_unchanged(path: Path, before: Fingerprint) -> None:
    try:
        now = fingerprint(path)
    except FileNotFoundError:
        return  # pruned meanwhile: what was read of it counts
    if not now.has_bytes_of(before):
        raise ReplacedError(f"{path} was replaced while it was read")


def _relate(
    connection: duckdb.DuckDBPyConnection, name: str, paths: Sequence[Path], *, numbered: bool
) -> None:
    rows = connection.read_parquet(
        list(map(str, paths)), hive_partitioning=False, filename=True, file_row_number=numbered
    )
    connection.register(name, rows)


def whole(path: Path) -> tuple[Fingerprint, pq.FileMetaData]:
    """Verify a file whole; how it looks, and its footer.

    Raises:
        DamagedFileError: it isn't what was written.
        FileNotFoundError: it isn't there (any more).
        OSError: the disk can't be read.
    """
    with path.open("rb") as file:
        return Fingerprint.of(os.fstat(file.fileno())), parquet.verify_open(file, path)


def _file(path: Path) -> pa.OSFile:
    return pa.OSFile(str(path))


def _seen(source: pa.OSFile) -> Fingerprint:
    return Fingerprint.of(os.fstat(source.fileno()))


@contextmanager
def reopened(
    path: Path, seen: Fingerprint, texts: Sequence[str], footer: pq.FileMetaData | None = None
) -> Iterator[VerifiedFile]:
    """Open a file that was verified when it looked like `seen`; pages are checked when read.

    Raises:
        ReplacedError: it looks different.
        DamagedFileError: a page, or the footer, isn't what was written.
        FileNotFoundError: it isn't there (any more).
        OSError: the disk can't be read.
    """
    with _file(path) as source:
        if _seen(source) != seen:
            raise ReplacedError(f"{path} is being replaced all the time")
        with parquet.opened(source, path, texts, footer) as file:
            yield file
        if not _seen(source).has_bytes_of(seen):
            raise ReplacedError(f"{path} changed while it was read")
