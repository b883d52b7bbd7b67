"""Pruning: deletes raw fragments that are no longer needed, and leftovers of crashes.

A fragment is deleted when all of this holds:

- the published file lists it, and its rows are, bit for bit, what was written;
- every entry that it came from is acknowledged (it lies below the file's watermark), so that its
  rows can only come again from a drainer that slept meanwhile, and would be known as replays;
- it was written longer ago than the grace period, for readers and for rebuilds;
- none of its rows lies in quarantine as well, where the audit still has to tell them apart;
- no fragment that may hold the same rows was set aside, and no loss of a consolidated file of its
  day and shard was accepted: a restore needs it then, to tell what came before.

The order of steps keeps consolidators from losing a row meanwhile (invariant 4): read the published
file; unlink the temp files of consolidators, who can't publish any more and start again; read the
published file a second time; delete what both of its versions list. A consolidator that creates its
temp file later reads a version that isn't older than the first, and publishes only if that version
was still the published one after it had listed raw. So whatever it read, the rows of a deleted
fragment are in it, by the fragment or by the file.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import duckdb

from hb_assets.core.errors import HbError
from hb_assets.core.schema import IDENTITY
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import Lock, Watermarks, no_lock
from hb_assets.lake.files import accepted_losses, fragments
from hb_assets.lake.files.consolidated import Current, current, mark_incomplete
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.integrity.damage import Gaps
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.durable_files import sync_file, sync_folder
from hb_assets.lake.storage.engine import engine
from hb_assets.lake.storage.layout import HEARTBEATS, QUARANTINE, RAW, FragmentName
from hb_assets.lake.storage.store import Lake

Allowed = Callable[[Fragment], bool]


@dataclass(frozen=True, slots=True)
class Pruned:
    """Counts of pruning: fragments deleted, their bytes, and leftovers of crashes removed.

    `faults` says, in one line each, where it couldn't.
    """

    fragments: int = 0
    bytes: int = 0
    leftovers: int = 0
    faults: tuple[str, ...] = ()

    def plus(self, other: Pruned) -> Pruned:
        """Both together."""
        return Pruned(
            self.fragments + other.fragments,
            self.bytes + other.bytes,
            self.leftovers + other.leftovers,
            self.faults + other.faults,
        )


def prune(
    lake: Lake,
    settings: Settings,
    *,
    days: Collection[dt.date] | None = None,
    lock: Lock = no_lock,
    dry_run: bool = False,
) -> Pruned:
    """Delete raw fragments that are no longer needed, and leftovers of crashes.

    A (day, shard) that can't be pruned doesn't stop the others.

    Args:
        lake: which lake.
        settings: RAW_KEEP, the grace period; memory and threads.
        days: only these; default all.
        lock: held around each shard, so that no consolidator's work is thrown away.
        dry_run: only count what would go.
    """
    allowed = _old(settings)
    total = Pruned() if dry_run else Pruned(leftovers=sweep(lake, settings))
    with engine(settings) as connection:
        for day in _days(lake, days):
            for shard in range(lake.shards):
                if not any(map(allowed, fragments.listed(lake, day, shard))):
                    continue
                with lock(day, shard):
                    total = total.plus(
                        prune_shard(lake, day, shard, connection, allowed, dry_run=dry_run)
                    )
    return total


def held_back(
    lake: Lake,
    settings: Settings,
    watermarks: Watermarks,
    days: Collection[dt.date] | None = None,
) -> dict[dt.date, list[int]]:
    """Days and shards where old fragments wait for a watermark that the buffer has reached.

    Args:
        lake: which lake.
        settings: RAW_KEEP.
        watermarks: the buffer's.
        days: only these; default all.
    """
    allowed = _old(settings)
    found: dict[dt.date, list[int]] = {}
    for day in _days(lake, days):
        for shard in range(lake.shards):
            old = [one for one in fragments.listed(lake, day, shard) if allowed(one)]
            try:
                published = current(lake, day, shard) if old else None
            except HbError:
                continue  # pruning or consolidating it says so
            if published is None:
                continue
            gaps = Gaps.of(lake, day, shard).unresolved(published.metadata)
            stuck = {name.source for name in gaps}  # no consolidation may pass them
            if any(
                one.name.source not in stuck
                and str(one.name) in published.names
                and published.metadata.mark(one.name.source)
                < one.name.last
                <= watermarks.get(one.name.source, (0, 0))
                for one in old
            ):
                found.setdefault(day, []).append(shard)
    return found


def _days(lake: Lake, days: Collection[dt.date] | None) -> list[dt.date]:
    return [day for day in layout.days_of(lake.root, RAW) if days is None or day in days]


def _old(settings: Settings) -> Allowed:
    latest = time.time() - settings.raw_keep.total_seconds()

    def allowed(fragment: Fragment) -> bool:
        try:
            return fragment.path.stat().st_mtime < latest
        except FileNotFoundError:
            return False

    return allowed


def prune_shard(
    lake: Lake,
    day: dt.date,
    shard: int,
    connection: duckdb.DuckDBPyConnection,
    allowed: Allowed,
    *,
    acknowledged: Watermarks | None = None,
    forgetting: bool = False,
    dry_run: bool = False,
) -> Pruned:
    """Delete fragments of one (day, shard), those of them that `allowed` lets go.

    Args:
        lake: which lake.
        day: which day.
        shard: which shard.
        connection: an engine.
        allowed: asked for each fragment that may go.
        acknowledged: what is known to be acknowledged beyond the file's watermark.
        forgetting: delete also what the audit or a restore still needs.
        dry_run: only count.
    """
    where = f"day {day.isoformat()}, shard {shard:02d}"
    try:
        first = current(lake, day, shard)
        old = _included(lake, first, day, shard, allowed, acknowledged or {})
        old = old if forgetting else _needless(lake, first, day, shard, old, connection)
        if not old or first is None:
            return Pruned()
        size = sum(one.bytes for one in old)
        if dry_run:
            return Pruned(len(old), size)
        fence(lake, day, shard)
        second = current(lake, day, shard)
        if second is None:
            return Pruned()
        parquet.verify(second.path)
        # whoever published it may have died, or failed, before its name was durable
        sync_file(second.path)
        sync_folder(second.path.parent)
        doomed = [one for one in old if str(one.name) in second.names]
        mark_incomplete(lake, day, shard)
        for fragment in doomed:
            fragment.path.unlink(missing_ok=True)
        if doomed:
            sync_folder(doomed[0].path.parent)
        return Pruned(len(doomed), size)
    except HbError as error:
        return Pruned(faults=(str(error),))
    except duckdb.Error as error:
        return Pruned(faults=(f"{where}: can't be pruned ({type(error).__name__})",))
    except FileNotFoundError:
        return Pruned(faults=(f"{where}: files went while it was pruned; the next time does it",))
    except OSError as error:
        return Pruned(faults=(f"{where}: can't be pruned ({error.strerror})",))


def fence(lake: Lake, day: dt.date, shard: int) -> int:
    """Unlink temp files of consolidators of a (day, shard): none of them can publish any more."""
    folder = layout.shard_folder(lake.root, HEARTBEATS, day, shard)
    temps = layout.temp_files(lake.root, folder)
    for path in temps:
        path.unlink(missing_ok=True)
    return len(temps)


def sweep(lake: Lake, settings: Settings) -> int:
    """Remove temp files that nobody has written for TEMP_KEEP: their process is dead.

    If it only slept it is fenced off: it can't publish, and starts again.
    """
    oldest = time.time() - settings.temp_keep.total_seconds()
    swept = 0
    for path in (lake.root / layout.TEMP).glob("*"):
        try:
            if path.stat().st_mtime < oldest:
                path.unlink()
                swept += 1
        except FileNotFoundError:
            continue
    return swept


def _included(
    lake: Lake,
    published: Current | None,
    day: dt.date,
    shard: int,
    allowed: Allowed,
    acknowledged: Watermarks,
) -> list[Fragment]:
    if published is None:
        return []
    return [
        one
        for one in fragments.listed(lake, day, shard)
        if str(one.name) in published.names
        and one.name.last
        <= max(published.metadata.mark(one.name.source), acknowledged.get(one.name.source, (0, 0)))
        and allowed(one)
    ]


def _needless(
    lake: Lake,
    published: Current | None,
    day: dt.date,
    shard: int,
    listed: Sequence[Fragment],
    connection: duckdb.DuckDBPyConnection,
) -> list[Fragment]:
    """The listed fragments that neither the audit nor a restore of a damaged file needs."""
    if not listed or accepted_losses.stems(lake, HEARTBEATS, day, shard):
        return []
    metadata = published.metadata if published else None
    lost = {*Gaps.of(lake, day, shard).lacking(metadata)}
    # put back, and not taken in yet
    excepted = map(FragmentName.parse, metadata.excepted if metadata else ())
    lost.update(name for name in excepted if name is not None)
    free = [one for one in listed if not any(one.name.overlaps(name) for name in lost)]
    return _apart(lake, free, connection)


_HELD = f"""
SELECT DISTINCT filename FROM raw
SEMI JOIN (SELECT {IDENTITY} FROM quarantine) AS quarantined
USING ({IDENTITY})
"""


def _apart(
    lake: Lake, listed: Sequence[Fragment], connection: duckdb.DuckDBPyConnection
) -> list[Fragment]:
    """The listed fragments without a row that lies in quarantine as well."""
    quarantined = [
        (name, path)
        for path in (lake.root / QUARANTINE).rglob("*.parquet")
        if (name := FragmentName.parse(path.name)) is not None
    ]
    near = {path for name, path in quarantined if any(one.name.overlaps(name) for one in listed)}
    if not near:
        return list(listed)
    raw = [one.path for one in listed]
    with verified.relations(connection, {"raw": raw, "quarantine": sorted(near)}):
        rows = connection.sql(_HELD).fetchall()
    held = {path for (path,) in rows}
    return [one for one in listed if str(one.path) not in held]
