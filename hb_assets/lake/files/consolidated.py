"""The published consolidated file of a (day, shard): its footer metadata, and which fragments pend.

`compaction.consolidation` makes it.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hb_assets.core.errors import DamagedFileError
from hb_assets.lake.files.counts import Counts
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.storage import checksummed_json, layout, parquet
from hb_assets.lake.storage.durable_files import TempFile, sync_folder
from hb_assets.lake.storage.layout import FragmentName
from hb_assets.lake.storage.store import FORMAT, Lake


class ConsolidatedMetadata(Counts, kw_only=True):
    """Footer metadata of a consolidated file, and its counts.

    `fragments` are the fragments it includes; what it doesn't list is pending. It includes `pruned`
    more, which aren't there any more: of each source shard every row up to the entry id in
    `watermark` is included. `version` (in the file `edition`) is new with every publication.

    Of the fragments in `excepted` rows are included only up to the entry id that stands there:
    their loss was accepted before the watermark passed them. `losses` names the accepted losses of
    earlier files of this place, which this file was made without.
    """

    format: int
    day: str
    shard: int
    version: str = msgspec.field(name="edition")
    fragments: tuple[str, ...]
    pruned: int = 0
    watermark: dict[int, tuple[int, int]] = msgspec.field(default_factory=dict)
    excepted: dict[str, tuple[int, int]] = msgspec.field(default_factory=dict)
    losses: tuple[str, ...] = ()

    @classmethod
    def nothing(cls) -> ConsolidatedMetadata:
        """The metadata of a file that was never written: nothing came in."""
        return cls(format=FORMAT, day="", shard=0, version="", fragments=())

    def mark(self, source: int) -> tuple[int, int]:
        """The watermark of a source shard; below every entry id where there is none."""
        return self.watermark.get(source, (0, 0))

    def mark_of(self, name: FragmentName) -> tuple[int, int]:
        """The entry id up to which the fragment's rows are included, listed or not."""
        return self.excepted.get(str(name), self.mark(name.source))

    def includes(self, name: FragmentName) -> bool:
        """Whether the fragment's rows are in the file, by its list or as one that was pruned."""
        return str(name) in self.fragments or name.last <= self.mark_of(name)

    def contradictions(self, day: dt.date, shard: int, rows_in_file: int) -> list[str]:
        """Contradictions between the metadata and a file at this place with so many rows."""
        wrong = []
        if (self.day, self.shard) != (day.isoformat(), shard):
            wrong.append(f"it is the file of day {self.day}, shard {self.shard:02d}")
        if self.rows != self.unique + self.superseded + self.erased:
            wrong.append(
                f"{self.rows:,} rows came in, {self.unique:,} unique + {self.superseded:,} "
                f"superseded + {self.erased:,} erased"
            )
        if self.superseded != self.repeats + self.corrections:
            wrong.append(
                f"{self.superseded:,} superseded, {self.repeats:,} repeats + "
                f"{self.corrections:,} corrections"
            )
        if rows_in_file != self.unique:
            wrong.append(f"the file has {rows_in_file:,} rows, {self.unique:,} are unique")
        return wrong

    def reaches(self, name: FragmentName) -> bool:
        """Whether the fragment may hold rows at or below the watermark."""
        return name.first <= self.mark_of(name)


@dataclass(frozen=True, slots=True)
class Current:
    """A published consolidated file."""

    path: Path
    metadata: ConsolidatedMetadata

    @property
    def names(self) -> frozenset[str]:
        """Names of the fragments it includes."""
        return frozenset(self.metadata.fragments)


def current(lake: Lake, day: dt.date, shard: int) -> Current | None:
    """The published file of a (day, shard), or None.

    Raises:
        DamagedFileError: it can't be read, or it is gone although raw alone hasn't all of it.
    """
    path = layout.consolidated_file(lake.root, day, shard)
    try:
        return Current(path, parquet.metadata(path, ConsolidatedMetadata))
    except FileNotFoundError:
        mark = layout.pruned_mark(lake.root, day, shard)
        if not mark.exists():
            return None
        if path.exists():  # published and pruned meanwhile
            return current(lake, day, shard)
        raise DamagedFileError(
            f"{path} is gone, and raw fragments that it included were pruned: hb damaged restore "
            f"puts a copy in its place, hb damaged accept goes on with what raw still holds"
        ) from None


class _Mark(msgspec.Struct, frozen=True):
    format: int
    since_ms: int


def mark_incomplete(lake: Lake, day: dt.date, shard: int) -> None:
    """Record, durably, that raw alone no longer has all of a (day, shard). See `current`."""
    path = layout.pruned_mark(lake.root, day, shard)
    if path.exists():
        sync_folder(path.parent)  # whoever made it may not have got so far
        return
    with TempFile(lake.root, path.parent) as temp:
        checksummed_json.write(temp.path, _Mark(FORMAT, int(time.time() * 1000)))
        temp.publish_replacing(path)


def incomplete_since(lake: Lake, day: dt.date, shard: int) -> int | None:
    """When it was recorded that raw alone no longer has all of a (day, shard), epoch milliseconds.

    None where it wasn't; 0 where the record can't be read.
    """
    try:
        return checksummed_json.read(layout.pruned_mark(lake.root, day, shard), _Mark).since_ms
    except FileNotFoundError:
        return None
    except DamagedFileError:
        return 0


def mark_complete(lake: Lake, day: dt.date, shard: int) -> None:
    """Undo `mark_incomplete`: the loss of what raw lacks was accepted. Durable on return."""
    path = layout.pruned_mark(lake.root, day, shard)
    path.unlink(missing_ok=True)
    sync_folder(path.parent)


def is_published(lake: Lake, seen: Current | None, day: dt.date, shard: int) -> bool:
    """Whether what was published when `seen` was read still is.

    Metadata and rows are read one after the other; ask this after both, and read again if not.
    """
    now = current(lake, day, shard)
    return (now and now.metadata.version) == (seen and seen.metadata.version)


def pending(published: Current | None, raw: Sequence[Fragment]) -> list[Fragment]:
    """Fragments that the published file doesn't include."""
    names = published.names if published else frozenset()
    return [fragment for fragment in raw if str(fragment.name) not in names]
