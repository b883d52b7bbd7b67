"""No row of a file that isn't what was written, by whatever engine, at whatever moment."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import hb_assets
from hb_assets.core.errors import DamagedFileError
from hb_assets.core.schema import HEARTBEATS
from hb_assets.core.settings import Settings
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.storage import parquet, verified
from hb_assets.lake.storage.engine import engine
from hb_assets.lake.storage.store import Lake
from hb_assets.lake.storage.verified import ReplacedError
from hb_assets_tests.lake.deliveries import NOON, deliver, entry, line

PACKAGE = Path(hb_assets.__file__).parent
GATE = {PACKAGE / "lake" / "storage" / "verified.py", PACKAGE / "lake" / "storage" / "parquet.py"}
USERS_FILES = {*(PACKAGE / "pipeline" / "importing").rglob("*.py")}
READERS = {
    *("read_parquet", "scan_parquet", "parquet_scan", "from_parquet"),
    *("ParquetFile", "ParquetDataset", "read_table", "read_metadata", "dataset"),
}


def readers_in(path: Path) -> Iterator[str]:
    """Names of functions that read Parquet files, as code or within a text (SQL)."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in READERS:
            yield node.attr
        if isinstance(node, ast.alias) and node.name in READERS:
            yield node.name
    for text in texts:
        if isinstance(text, str):
            yield from (name for name in READERS if f"{name}(" in text)


def test_nobody_else_reads_parquet_files() -> None:
    """Of the lake; those that users import are none of it."""
    others = sorted({*PACKAGE.rglob("*.py")} - GATE - USERS_FILES)
    assert {str(path): found for path in others if (found := sorted(readers_in(path)))} == {}
    assert {*readers_in(PACKAGE / "lake" / "storage" / "verified.py")} == {
        "read_parquet",
        "scan_parquet",
        "ParquetFile",
    }


@pytest.fixture
def path(lake: Lake, settings: Settings) -> Path:
    lines = [line(at=NOON + n, bpm=60 + n % 50) for n in range(500)]
    return deliver(lake, settings, entry(lines))[0].path


@contextmanager
def with_pyarrow(path: Path, _: Settings) -> Iterator[Callable[[], int]]:
    with verified.opened(path) as file:
        yield lambda: int(file.read().num_rows)


@contextmanager
def with_duckdb(path: Path, settings: Settings) -> Iterator[Callable[[], int]]:
    with engine(settings) as connection, verified.relations(connection, {"rows": [path]}):
        yield lambda: int(connection.sql("SELECT count(heart_rate) FROM rows").fetchall()[0][0])


WAYS = pytest.mark.parametrize("way", [with_pyarrow, with_duckdb])


def flip(path: Path, place: int) -> None:
    """In place, as a disk does, with the times that it had."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@WAYS
def test_a_whole_file_is_read(path: Path, settings: Settings, way: Any) -> None:
    with way(path, settings) as count:
        assert count() == 500


@WAYS
def test_no_flipped_bit_is_read(path: Path, settings: Settings, way: Any) -> None:
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        flip(path, place)
        with pytest.raises(DamagedFileError) as raised, way(path, settings):
            pytest.fail("it must not be read")
        assert raised.value.path == path
        path.write_bytes(whole)


@WAYS
def test_files_of_the_last_release_are_held_to_their_file_checksum(
    lake: Lake, settings: Settings, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no page checksums."""
    writer = pq.ParquetWriter

    def plain(*arguments: Any, **named: Any) -> Any:
        return writer(*arguments, **{**named, "write_page_checksum": False})

    monkeypatch.setattr(pq, "ParquetWriter", plain)
    [one] = deliver(lake, settings, entry([line(at=NOON + n) for n in range(500)]))
    with way(one.path, settings) as count:
        assert count() == 500
    flip(one.path, one.bytes // 3)
    with pytest.raises(DamagedFileError), way(one.path, settings):
        pytest.fail("it must not be read")


@WAYS
def test_a_change_while_it_is_read_is_noticed(path: Path, settings: Settings, way: Any) -> None:
    whole = path.read_bytes()

    def read() -> None:
        with way(path, settings) as count:
            path.write_bytes(whole)  # new times
            count()

    with pytest.raises((DamagedFileError, ReplacedError)):
        read()


@WAYS
def test_pruning_while_it_is_read_is_no_fault(path: Path, settings: Settings, way: Any) -> None:
    with way(path, settings) as count:
        assert count() == 500
        path.unlink()


def test_a_file_that_replaces_a_verified_one_is_not_read_for_it(
    path: Path, settings: Settings, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())

    def read() -> None:
        with with_duckdb(path, settings) as count:
            other.replace(path)
            count()

    with pytest.raises(ReplacedError):
        read()


@pytest.mark.parametrize("replaced", [True, False])
def test_what_an_engine_says_of_two_files_is_not_believed(
    path: Path, settings: Settings, tmp_path: Path, replaced: bool
) -> None:
    """It opens a file again for its rows, and those of another one don't fit the first footer."""
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes())

    def read() -> None:
        with with_duckdb(path, settings):
            if replaced:
                other.replace(path)
            raise duckdb.IOException("no magic bytes")

    with pytest.raises(ReplacedError if replaced else duckdb.IOException):
        read()


def test_damaged_files_may_be_left_out(path: Path, lake: Lake, settings: Settings) -> None:
    [sound] = deliver(lake, settings, entry([line()], 1))
    flip(path, 100)
    told: list[DamagedFileError] = []
    files = {"rows": [path, sound.path], "others": [path]}
    with engine(settings) as connection, verified.relations(connection, files, told.append) as left:
        assert left == {"rows": [sound.path]}
        assert connection.sql("SELECT count(*) FROM rows").fetchall() == [(1,)]
    assert [error.path for error in told] == [path, path]


def test_pages_are_held_to_their_checksums_though_the_file_looks_the_same(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that rots changes no time: what lies in a page is noticed all the same.

    Not only where it can't be unpacked any more: any other bytes would be other heart rates.
    """
    seen, footer = verified.whole(path)
    monkeypatch.setattr(verified, "_seen", lambda _: seen)

    def read() -> pa.Table:
        with verified.reopened(path, seen, (), footer) as file:
            return file.read_row_group(0)

    whole = read()
    column = footer.row_group(0).column(HEARTBEATS.get_field_index("heart_rate"))
    end = column.data_page_offset + column.total_compressed_size
    noticed = 0
    for place in range(column.data_page_offset, end):
        flip(path, place)
        try:
            assert read().equals(whole)
        except DamagedFileError:
            noticed += 1
        flip(path, place)
    assert noticed > 0


@pytest.mark.parametrize("kind", ["flipped", "cut", "longer"])
def test_every_byte_of_a_consolidated_file_counts(tmp_path: Path, path: Path, kind: str) -> None:
    """Its name has no checksum: rows and footer have one each, and nothing may be between."""
    file = tmp_path / "rows"
    file.touch()
    with verified.opened(path) as found:
        parquet.write(file, found.read().cast(HEARTBEATS), ConsolidatedMetadata.nothing())
    whole = file.read_bytes()
    parquet.verify(file)
    for place in range(len(whole)):
        changed = {
            "flipped": whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :],
            "cut": whole[:place],
            "longer": whole[:place] + b"\0" + whole[place:],
        }[kind]
        file.write_bytes(changed)
        with pytest.raises(DamagedFileError):
            parquet.verify(file)
