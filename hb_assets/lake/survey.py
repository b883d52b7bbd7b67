"""Survey of the whole lake: sums over all days for metrics and health, cheap when little changed.

A gateway makes it beside its requests, in the same interpreter: raw fragments are told by their
names alone, and of consolidated files only the footers of new ones are read. A single day in full
is in `inventory`, counting rows in `ledger`.
"""

from __future__ import annotations

import datetime as dt
import os
import time

from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.compaction import policy
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.files.counts import Counts
from hb_assets.lake.integrity import known_faults
from hb_assets.lake.integrity.known_faults import Fault
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.catalog import Folders
from hb_assets.lake.storage.layout import HEARTBEATS, RAW, FragmentName
from hb_assets.lake.storage.store import Lake

_BREATH_SECONDS = 0.001
"""Rest after each day that was read: requests are served by the same interpreter."""


class Survey(Counts, kw_only=True):
    """Sums over all days; cumulative ones as `consolidated.ConsolidatedMetadata` has them.

    `overdue` is the day whose oldest pending fragment is farthest beyond the age at which it should
    have been consolidated, and `overdue_seconds` how far. `faults` are the known ones
    (`known_faults.faults`): the sums are those of all files that can be read.
    """

    days: int = 0
    fragments: int = 0
    pending_fragments: int = 0
    pending_bytes: int = 0
    bytes: int = 0
    overdue: dt.date | None = None
    overdue_seconds: float = 0.0
    faults: tuple[Fault, ...] = ()

    @property
    def write_amplification(self) -> float:
        """Rows that consolidations wrote, for each row that they took in; 0 before the first."""
        return self.rows_written / self.rows if self.rows else 0.0


class _Day(Counts, kw_only=True):
    """Sums of one day; `oldest_pending_ms` as in `inventory.DayState`."""

    fragments: int = 0
    pending_fragments: int = 0
    pending_bytes: int = 0
    bytes: int = 0
    oldest_pending_ms: int | None = None


class Surveyor:
    """Surveys a lake repeatedly; days that didn't change aren't read again.

    A look stats the folders of every day, of those that were quiet for an hour now and then; for
    one thread.
    """

    def __init__(self, lake: Lake, settings: Settings) -> None:
        self._lake = lake
        self._settings = settings
        self._folders = Folders()

    def survey(self) -> Survey:
        """Survey the lake now."""
        found = {
            day: self._folders.remembered(self._lake, day, (RAW, HEARTBEATS), _read)
            for day in inventory.days_found(self._lake, [])
        }
        sums = {
            name: sum(getattr(one, name) for one in found.values())
            for name in _Day.__struct_fields__
            if name != "oldest_pending_ms"
        }
        oldest = ((day, one.oldest_pending_ms) for day, one in found.items())
        now_ms = time.time_ns() // 1_000_000
        overdue, seconds = policy.most_overdue(oldest, now_ms, self._settings)
        return Survey(
            days=len(found),
            overdue=overdue,
            overdue_seconds=seconds,
            faults=tuple(known_faults.faults(self._lake)),
            **sums,
        )


def _read(lake: Lake, day: dt.date) -> _Day:
    """Sums of what can be read of the day; `known_faults.faults` says what can't."""
    time.sleep(_BREATH_SECONDS)
    told: list[str] = []
    sums = _Day()
    oldest_ns = None
    for shard in range(lake.shards):
        # raw first: a fragment that is consolidated and pruned meanwhile isn't called pending
        raw: list[os.DirEntry[str]] = []
        listed: frozenset[str] = frozenset()
        with inventory.noted(told, layout.shard_folder(lake.root, RAW, day, shard)):
            raw = _fragments(lake, day, shard)
        with inventory.noted(told, layout.consolidated_file(lake.root, day, shard)):
            published = inventory.published(lake, day, shard)
            listed = _take_in(sums, *published) if published else frozenset()
        with inventory.noted(told, layout.shard_folder(lake.root, RAW, day, shard)):
            for entry in raw:
                if entry.name in listed:
                    continue
                try:
                    seen = entry.stat()
                except FileNotFoundError:
                    continue
                sums.pending_fragments += 1
                sums.pending_bytes += seen.st_size
                oldest_ns = min(oldest_ns or seen.st_mtime_ns, seen.st_mtime_ns)
        sums.fragments += len(raw)
    sums.oldest_pending_ms = None if oldest_ns is None else oldest_ns // 1_000_000
    return sums


def _fragments(lake: Lake, day: dt.date, shard: int) -> list[os.DirEntry[str]]:
    with os.scandir(layout.shard_folder(lake.root, RAW, day, shard)) as found:
        return [entry for entry in found if FragmentName.is_one(entry.name)]


def _take_in(sums: _Day, metadata: ConsolidatedMetadata, size: int) -> frozenset[str]:
    """Add a consolidated file to the sums; returns the fragments that it lists."""
    sums.bytes += size
    sums.add(metadata)
    return frozenset(metadata.fragments)
