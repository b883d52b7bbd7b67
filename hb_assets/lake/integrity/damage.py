"""Damage: finds files that don't hold what belongs in their place, and sets them aside.

Nothing is deleted: a file that is set aside keeps its name under `damaged/`, so that a whole copy
can be put back.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core import days
from hb_assets.core.errors import DamagedFileError
from hb_assets.core.record import ID_LENGTH, shard_of
from hb_assets.core.schema import BOUNDS, TEXTS
from hb_assets.core.schema import HEARTBEATS as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.files import accepted_losses, fragments
from hb_assets.lake.files.consolidated import ConsolidatedMetadata, current, mark_incomplete
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.integrity import checks
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.durable_files import make_folder, sync_folder
from hb_assets.lake.storage.layout import DAMAGED, HEARTBEATS, RAW, FragmentName
from hb_assets.lake.storage.store import Lake

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """The place of a file of a (day, shard); `kind` is a folder of the lake."""

    kind: str
    day: dt.date
    shard: int

    @classmethod
    def of(cls, lake: Lake, path: Path) -> Place | None:
        """The place of a path in the lake; None for another kind of file."""
        if not path.is_relative_to(lake.root):
            return None
        parts = path.relative_to(lake.root).parts
        if len(parts) != _DEPTH or parts[0] not in (RAW, HEARTBEATS):
            return None
        day, shard = layout.day_of_folder(parts[1]), parts[2].removeprefix("shard=")
        if day is None or not shard.isdigit() or int(shard) >= lake.shards:
            return None
        return cls(parts[0], day, int(shard))


_DEPTH = 4
"""Parts of a path in the lake: kind, day, shard, name."""


def examine(lake: Lake, path: Path, settings: Settings) -> None:
    """Verify that a fragment or consolidated file holds what belongs in its place, row by row.

    A checksum tells that a file is what somebody wrote; this tells whether it is what we write.

    Raises:
        DamagedFileError: it doesn't.
        FileNotFoundError: it isn't there (any more).
        OSError: the disk can't be read.
    """
    place = Place.of(lake, path)
    if place is not None:
        examine_at(lake, path, place, settings)


def examine_at(lake: Lake, path: Path, place: Place, settings: Settings) -> None:
    """Verify a file that is to be put into a place. Raises as `examine`."""
    name = FragmentName.parse(path.name)
    parquet.verify(path)
    if name is not None:
        fragments.verify_place(Fragment(name, path), place.day, place.shard)
    else:
        metadata = parquet.metadata(path, ConsolidatedMetadata)
        wrong = metadata.contradictions(place.day, place.shard, parquet.footer(path).num_rows)
        if wrong:
            raise parquet.damaged(path, "; ".join(wrong))
    parquet.verify_footer(path, SCHEMA)
    for rows in _row_groups(path):
        why = unfit(rows, place, lake.shards, name)
        if why is not None:
            raise parquet.damaged(path, why)
    if name is None:
        failed = [one for one in checks.heartbeats(path, place.day, settings) if not one.passed]
        if failed:
            raise parquet.damaged(path, "; ".join(f"{one.name}: {one.message}" for one in failed))


def _row_groups(path: Path) -> Iterator[pa.Table]:
    with verified.opened(path) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, use_threads=False)


def unfit(rows: pa.Table, place: Place, shards: int, name: FragmentName | None) -> str | None:
    """Why rows can't belong in this place, in a few words without any of their values."""
    if any(rows[field.name].null_count for field in SCHEMA if not field.nullable):
        return "a value is missing"
    texts = ((name, *ID_LENGTH, pc.utf8_length(rows[name])) for name in TEXTS)
    first, behind = days.start_ms(place.day), days.end_ms(place.day)
    bounds = [
        *texts,
        *((name, *bounds, rows[name]) for name, bounds in BOUNDS.items()),
        ("timestamp", first, behind - 1, rows["timestamp"].cast(pa.int64())),
        ("arrival_shard", 0, shards - 1, rows["arrival_shard"]),
        ("arrival_pos", 0, 2**31 - 1, rows["arrival_pos"]),
    ]
    if name is not None:
        bounds += [
            ("arrival_shard", name.source, name.source, rows["arrival_shard"]),
            ("arrival_ms", name.first[0], name.last[0], rows["arrival_ms"]),
        ]
    for column, least, most, values in bounds:
        found = pc.min_max(values).as_py()
        if found["min"] is not None and not least <= found["min"] <= found["max"] <= most:
            return f"{column} is out of bounds"
    users = pc.unique(rows["user_id"]).to_pylist()
    if any(shard_of(user, shards) != place.shard for user in users):
        return "a user belongs to another shard"
    return None


def set_aside(lake: Lake, error: DamagedFileError, settings: Settings) -> str | None:
    """Move a damaged file away, where its place is better empty; one line about it.

    A fragment always may: its rows can't be read anyway, and those of its neighbours are waiting
    behind it. A consolidated file may as long as every fragment that it includes is there: raw has
    all of it then, and readers go on with raw. None where the file has to stay, or is sound (what
    failed while it was read was something else).

    Raises:
        OSError: it can't be read or moved.
    """
    path = error.path
    place = None if path is None else Place.of(lake, path)
    if path is None or place is None or is_sound_at(lake, path, place, settings):
        return None
    if place.kind == HEARTBEATS:
        if not raw_has_all(lake, path, place):
            return None
        rescue = "it is made anew from raw fragments"
    elif _is_included(lake, path, place.day, place.shard):
        # before it goes: a rebuild would lack its rows
        mark_incomplete(lake, place.day, place.shard)
        rescue = "its rows are in the consolidated file, which can't be made anew from raw any more"
    else:
        rescue = "its rows are missing until hb damaged restore puts a whole copy in its place"
    target = move_aside(lake, path)
    if target is None:
        return f"{path} was damaged; another process has moved it away"
    if is_sound_at(lake, target, place, settings):
        # A whole copy came into its place after we had looked. It stays here until it is linked
        # there: under tmp/ a forget could remove it.
        with suppress(FileExistsError):
            os.link(target, path)
            sync_folder(path.parent)
        target.unlink(missing_ok=True)
        return f"{path} was damaged; another process has put a whole copy in its place"
    said = f"{path} was damaged and is now {target}: {rescue}"
    _log.error("%s", said)
    return said


def move_aside(lake: Lake, path: Path) -> Path | None:
    """Move a file under `damaged/`, durably; its new path, None where another has moved it."""
    target = layout.set_aside(lake.root, path.relative_to(lake.root))
    make_folder(target.parent, lake.root)
    try:
        path.rename(target)
    except FileNotFoundError:
        return None
    sync_folder(target.parent)
    sync_folder(path.parent)
    return target


def is_sound_at(lake: Lake, path: Path, place: Place, settings: Settings) -> bool:
    """Whether a file is there and holds what belongs in a place. Raises OSError."""
    try:
        examine_at(lake, path, place, settings)
    except (FileNotFoundError, DamagedFileError):
        return False
    return True


def raw_has_all(lake: Lake, path: Path, place: Place) -> bool:
    """Whether raw still has all that a consolidated file includes, as far as that can be told."""
    if layout.pruned_mark(lake.root, place.day, place.shard).exists():
        return False
    try:
        metadata = parquet.metadata(path, ConsolidatedMetadata)
    except (DamagedFileError, FileNotFoundError):
        return True
    there = {str(one.name) for one in fragments.listed(lake, place.day, place.shard)}
    return not metadata.pruned and there.issuperset(metadata.fragments)


def _is_included(lake: Lake, path: Path, day: dt.date, shard: int) -> bool:
    name = FragmentName.parse(path.name)
    try:
        published = current(lake, day, shard)
    except DamagedFileError:
        return False
    return published is not None and name is not None and str(name) in published.names


@dataclass(frozen=True, slots=True)
class Gaps:
    """Fragments of a (day, shard) that were set aside, and those whose loss was accepted."""

    set_aside: frozenset[FragmentName]
    accepted: frozenset[FragmentName]

    @classmethod
    def of(cls, lake: Lake, day: dt.date, shard: int) -> Gaps:
        """The gaps that a (day, shard) has now."""
        folder = layout.shard_folder(lake.root / DAMAGED, RAW, day, shard)
        names = (FragmentName.parse(path.name) for path in folder.glob("*.parquet"))
        set_aside = frozenset(name for name in names if name is not None)
        return cls(set_aside, accepted_losses.fragments(lake, day, shard))

    def lacking(self, metadata: ConsolidatedMetadata | None) -> frozenset[FragmentName]:
        """The fragments whose rows the file with this metadata doesn't include."""
        names = self.set_aside | self.accepted
        return (
            names if metadata is None else frozenset(n for n in names if not metadata.includes(n))
        )

    def unresolved(self, metadata: ConsolidatedMetadata | None) -> frozenset[FragmentName]:
        """The fragments of `lacking` whose loss nobody has accepted."""
        return self.lacking(metadata) - self.accepted
