"""Maintenance that keeps the lake from only growing: pruning, sweeping, and raising watermarks.

The `maintenance` job and `hb prune` call it; the work itself is in `lake.compaction.pruning` and
`lake.compaction.consolidation`.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from dataclasses import dataclass

from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.lake import minutes
from hb_assets.lake.compaction import pruning
from hb_assets.lake.compaction.pruning import Pruned
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.coordination import Coordination


@dataclass(frozen=True, slots=True)
class Maintained:
    """Counts of what was done: fragments pruned, their bytes, leftovers of crashes removed.

    `renewed` counts consolidated files that were written anew, only to raise their watermark.
    """

    fragments: int
    bytes: int
    leftovers: int
    renewed: int
    faults: tuple[str, ...]


def maintain(
    lake: Lake,
    settings: Settings,
    known: Coordination,
    *,
    days: Collection[dt.date] | None = None,
    dry_run: bool = False,
) -> Maintained:
    """Prune raw, and remove what crashes left behind.

    A file that was published while entries of its fragments were still to be acknowledged has a
    watermark below them. Nothing may be pending there ever after, so that it is renewed here.

    Args:
        lake: which lake.
        settings: RAW_KEEP, TEMP_KEEP, memory and threads.
        known: watermarks and locks.
        days: only these; default all.
        dry_run: only count what would go.
    """
    done = pruning.prune(lake, settings, days=days, lock=known.lock, dry_run=dry_run)
    renewed = 0
    for day, shards in pruning.held_back(lake, settings, known.watermarks, days).items():
        renewed += len(shards)
        if dry_run:
            continue
        done = done.plus(_renew(lake, day, shards, settings, known))
    return Maintained(done.fragments, done.bytes, done.leftovers, renewed, done.faults)


def _renew(
    lake: Lake, day: dt.date, shards: list[int], settings: Settings, known: Coordination
) -> Pruned:
    try:
        known.consolidate(lake, day, settings, rewrite=True, shards=shards).require()
        minutes.build(lake, day, settings)
    except (HbError, OSError) as error:
        return Pruned(faults=(str(error),))
    return pruning.prune(lake, settings, days=[day], lock=known.lock)
