"""The consolidated file of a (day, shard), as it is published.

Belongs here: what its footer says, and so which fragments are pending. Doesn't belong here: making
one (`consolidation`).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hb_assets.lake import layout, parquet
from hb_assets.lake.fragments import Fragment
from hb_assets.lake.store import Lake


class ConsolidatedNote(msgspec.Struct, frozen=True, kw_only=True):
    """What a consolidated file's footer says of it. Counts are cumulative: they outlive pruning.

    `fragments` are the fragments it includes; what it doesn't list is pending. `rows` distinct
    rows came in, of which `unique` survived and `superseded` didn't (`repeats` + `corrections`);
    `replayed` rows came again with an identity that was there already. `edition` is new with every
    publication; `rows_written` counts all rows that publications of this file wrote.
    """

    format: int
    day: str
    shard: int
    edition: str
    fragments: tuple[str, ...]
    rows: int
    unique: int
    superseded: int
    repeats: int
    corrections: int
    replayed: int
    rows_written: int


@dataclass(frozen=True, slots=True)
class Current:
    """A published consolidated file."""

    path: Path
    note: ConsolidatedNote

    @property
    def names(self) -> frozenset[str]:
        """Names of the fragments it includes."""
        return frozenset(self.note.fragments)


def current(lake: Lake, day: dt.date, shard: int) -> Current | None:
    """The published file of a (day, shard), or None. Raises DamagedFileError."""
    path = layout.consolidated_file(lake.root, day, shard)
    try:
        return Current(path, parquet.note(path, ConsolidatedNote))
    except FileNotFoundError:
        return None


def is_published(lake: Lake, seen: Current | None, day: dt.date, shard: int) -> bool:
    """Whether what was published when `seen` was read still is.

    A note and its rows are read one after the other; ask this after both, and read again if not.
    """
    now = current(lake, day, shard)
    return (now and now.note.edition) == (seen and seen.note.edition)


def pending(published: Current | None, raw: Sequence[Fragment]) -> list[Fragment]:
    """Fragments that the published file doesn't include."""
    names = published.names if published else frozenset()
    return [fragment for fragment in raw if str(fragment.name) not in names]
