"""Files, pipes and compression: whatever comes, what could be read of it is taken."""

from __future__ import annotations

import gzip
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from hb_assets.core.errors import ImportFileError
from hb_assets.pipeline.importing.sources import format_of
from hb_assets_tests.lake.deliveries import NOON, line
from hb_assets_tests.pipeline.importing.reading import HEADER, of, read
from hb_assets_tests.pipeline.importing.test_parquet_file import whole, written

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COUNT = 20_000
LINES = b"".join(line(f"user {n}", at=NOON + n) + b"\n" for n in range(COUNT))
ROWS = HEADER + b"".join(b"u%d,d,2025-01-15T12:00:00Z,75\n" % n for n in range(COUNT))
PACKED: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "zst": zstd.compress}


def test_format_by_name() -> None:
    names = {
        "a.ndjson": "ndjson",
        "b.JSONL.gz": "ndjson",
        "A.JSON": "ndjson",
        "B.NDJSON.GZ": "ndjson",
        "c.csv": "csv",
        "c.tsv.zst": "csv",
        "d.parquet.Gz": "parquet",
    }
    assert {name: format_of(Path(name)) for name in names} == names
    for name in ("activities.txt.gz", "-", "/dev/stdin"):
        with pytest.raises(ImportFileError, match="--format"):
            format_of(Path(name))


@pytest.mark.parametrize("kind", PACKED)
def test_compressed(tmp_path: Path, kind: str) -> None:
    pack = PACKED[kind]
    for name, content in (("a.ndjson", LINES), ("a.csv", ROWS)):
        found = of(tmp_path / f"{name}.{kind.upper()}", pack(content))
        assert (len(found.heartbeats), found.done.fault) == (COUNT, None)
    table = written(tmp_path / "a.parquet").read_bytes()
    assert whole(of(tmp_path / f"b.parquet.{kind}", pack(table)))
    # the content tells, not the name
    assert of(tmp_path / "c.ndjson", pack(line())).bpm == [75]


@pytest.mark.parametrize("kind", PACKED)
def test_several_compressed_members(tmp_path: Path, kind: str) -> None:
    middle = LINES.index(b"\n", len(LINES) // 2) + 5
    packed = PACKED[kind](LINES[:middle]) + PACKED[kind](LINES[middle:])
    found = of(tmp_path / f"a.ndjson.{kind}", packed)
    assert (len(found.heartbeats), found.done.fault) == (COUNT, None)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", ["a.ndjson", "a.csv"])
def test_cut_short(tmp_path: Path, kind: str, name: str) -> None:
    """What is before the cut is taken, and the cut is named."""
    content = LINES if name == "a.ndjson" else ROWS
    packed = PACKED[kind](content)
    found = of(tmp_path / f"{name}.{kind}", packed[: len(packed) - 9])
    assert "can't be read to its end" in found.fault
    assert "ended before the end" in found.fault
    assert COUNT // 2 < len(found.heartbeats) <= COUNT
    assert found.refused == []  # the record that was cut in two isn't taken for one


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("flipped.ndjson.gz", gzip.compress(LINES)),
        ("flipped.csv.zst", zstd.compress(ROWS)),
        ("flipped.parquet.gz", gzip.compress(LINES)),
        ("garbage.ndjson.gz", gzip.compress(line("secret")) + b"garbage"),
    ],
)
def test_damaged(tmp_path: Path, name: str, content: bytes) -> None:
    if name.startswith("flipped"):
        content = content[:30] + bytes([content[30] ^ 0xFF]) + content[31:]
    assert of(tmp_path / name, content).fault


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "No such file" in read(tmp_path / "a.ndjson").fault
    (tmp_path / "b.ndjson").mkdir()
    assert "Is a directory" in read(tmp_path / "b.ndjson").fault


@pytest.mark.parametrize(
    ("form", "content"),
    [("ndjson", line()), ("csv", HEADER + b"u1,d,2025-01-15T12:00:00Z,75"), ("ndjson", b"")],
)
def test_a_named_pipe(tmp_path: Path, form: str, content: bytes) -> None:
    """It can't seek, and comes in pieces."""
    path = tmp_path / "pipe"
    os.mkfifo(path)

    def write() -> None:
        with path.open("wb", buffering=0) as pipe:
            for at in range(len(content)):
                pipe.write(content[at : at + 1])

    writer = threading.Thread(target=write)
    writer.start()
    found = read(path, form)  # type: ignore[arg-type]  # one of the formats
    writer.join()
    assert (found.bpm, found.done.fault) == ([75] if content else [], None)


def test_parquet_through_a_pipe(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    content = written(tmp_path / "a.parquet").read_bytes()
    writer = threading.Thread(target=lambda: path.write_bytes(content))
    writer.start()
    found = read(path, "parquet")
    writer.join()
    assert whole(found)
