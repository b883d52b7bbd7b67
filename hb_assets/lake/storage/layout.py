"""Names of the lake's folders and files, which are built and parsed only here.

Paths of days, shards and entry ids, and which days have a folder. No part of a name comes from a
record's text (invariant 7).
"""

from __future__ import annotations

import datetime as dt
import os
import re
import secrets
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from hb_assets.core.days import parse_day

RAW = "raw"
HEARTBEATS = "heartbeats"
MINUTES = "minutes"
QUARANTINE = "quarantine"
RELEASED = "released"
ERASED = "erased"
PRUNED = "pruned"
TOMBSTONES = "tombstones"
DAMAGED = "damaged"
ACCEPTED = "accepted"
FAULTS = "faults"
TEMP = "tmp"
"""Where files lie that aren't published yet: beside the datasets, so that no reader sees them."""

_FRAGMENT = re.compile(
    r"part-(?P<source>\d{2})-(?P<first_ms>\d+)-(?P<first_seq>\d+)"
    r"-(?P<last_ms>\d+)-(?P<last_seq>\d+)-(?P<random>[0-9a-f]{16})\.parquet",
    re.ASCII,
)


@dataclass(frozen=True, slots=True, order=True)
class FragmentName:
    """A fragment's name: source shard and range of entry ids. Sorts by arrival."""

    first: tuple[int, int]
    last: tuple[int, int]
    source: int
    random: str

    @classmethod
    def new(cls, source: int, first: tuple[int, int], last: tuple[int, int]) -> FragmentName:
        """A name that was never used: 64 random bits stand at its end."""
        return cls(first, last, source, secrets.token_hex(8))

    @classmethod
    def covering(cls, rows: pa.Table) -> FragmentName:
        """A new name for rows (with their identities) that came by one source shard."""
        ms, seq = rows["arrival_ms"].to_numpy(), rows["arrival_seq"].to_numpy()
        first, last = ms.min(), ms.max()
        return cls.new(
            int(rows["arrival_shard"][0].as_py()),
            (int(first), int(seq[ms == first].min())),
            (int(last), int(seq[ms == last].max())),
        )

    @staticmethod
    def is_one(name: str) -> bool:
        """Whether a file name is a fragment's."""
        return _FRAGMENT.fullmatch(name) is not None

    @classmethod
    def parse(cls, name: str) -> FragmentName | None:
        """The parts of a file name, or None where it isn't a fragment's."""
        match = _FRAGMENT.fullmatch(name)
        if match is None:
            return None
        first = (int(match["first_ms"]), int(match["first_seq"]))
        last = (int(match["last_ms"]), int(match["last_seq"]))
        return cls(first, last, int(match["source"]), match["random"])

    def sealed(self, path: Path) -> FragmentName:
        """The same name with the file's CRC-32 as the second half of its random part."""
        with path.open("rb") as file:
            return replace(self, random=self.random[:8] + _crc32(file))

    def seals(self, file: BinaryIO | pa.NativeFile) -> bool:
        """Whether an open file has the bytes that it had when this name was sealed."""
        return self.random[8:] == _crc32(file)

    def __str__(self) -> str:
        first, last = self.first, self.last
        return f"part-{self.source:02d}-{first[0]}-{first[1]}-{last[0]}-{last[1]}-{self.random}.parquet"

    def overlaps(self, other: FragmentName) -> bool:
        """Whether both may hold the same rows: one source, and ranges of ids that touch."""
        same_source = self.source == other.source
        return same_source and self.first <= other.last and other.first <= self.last


def _crc32(file: BinaryIO | pa.NativeFile) -> str:
    file.seek(0)
    crc32 = 0
    while part := file.read(2**20):
        crc32 = zlib.crc32(part, crc32)
    return f"{crc32:08x}"


def day_folder(root: Path, kind: str, day: dt.date) -> Path:
    """Folder of one day of one kind, e.g. `raw/day=2025-01-15`."""
    return root / kind / f"day={day.isoformat()}"


def shard_folder(root: Path, kind: str, day: dt.date, shard: int) -> Path:
    """Folder of one (day, shard) of one kind, e.g. `raw/day=2025-01-15/shard=00`."""
    return day_folder(root, kind, day) / f"shard={shard:02d}"


def consolidated_file(root: Path, day: dt.date, shard: int) -> Path:
    """The one consolidated file of a (day, shard)."""
    return shard_folder(root, HEARTBEATS, day, shard) / "heartbeats.parquet"


def minutes_file(root: Path, day: dt.date, shard: int) -> Path:
    """The one minute-level file of a (day, shard)."""
    return shard_folder(root, MINUTES, day, shard) / "minutes.parquet"


def pruned_mark(root: Path, day: dt.date, shard: int) -> Path:
    """The file that says that raw fragments of a (day, shard) were pruned."""
    return shard_folder(root, PRUNED, day, shard) / "pruned.json"


def set_aside(root: Path, where: Path) -> Path:
    """Where a damaged file goes that lay at `where` in the lake.

    A fragment keeps its name, which nothing else ever has; other names come again.
    """
    unique = "" if FragmentName.parse(where.name) else f"-{secrets.token_hex(4)}"
    return root / DAMAGED / where.with_name(f"{where.stem}{unique}{where.suffix}")


def temp_file(root: Path, folder: Path) -> Path:
    """A new name under `tmp/` for a file that will be published in `folder`, and says so."""
    return root / TEMP / f"{_temp_prefix(root, folder)}{secrets.token_hex(8)}"


def temp_files(root: Path, folder: Path) -> list[Path]:
    """Files under `tmp/` that are about to be published in `folder`."""
    return sorted((root / TEMP).glob(f"{_temp_prefix(root, folder)}*"))


def _temp_prefix(root: Path, folder: Path) -> str:
    return "".join(f"{part}-" for part in folder.relative_to(root).parts) or "lake-"


def day_of_folder(name: str) -> dt.date | None:
    """The day of a folder named `day=YYYY-MM-DD`, or None."""
    if not name.startswith("day="):
        return None
    try:
        return parse_day(name.removeprefix("day="))
    except ValueError:
        return None


def place_of(path: Path) -> tuple[dt.date, int] | None:
    """Day and shard of a file by the folders that it lies in; None where they name none."""
    day, shard = day_of_folder(path.parent.parent.name), path.parent.name.removeprefix("shard=")
    return None if day is None or not shard.isdigit() else (day, int(shard))


def days_of(root: Path, kind: str) -> list[dt.date]:
    """Days that have a folder of this kind, in order."""
    try:
        with os.scandir(root / kind) as found:
            named = (day_of_folder(entry.name) for entry in found)
            return sorted(day for day in named if day is not None)
    except FileNotFoundError:
        return []
