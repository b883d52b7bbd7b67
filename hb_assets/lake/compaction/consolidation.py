"""Consolidation: pending fragments of a day into one deduplicated, sorted file per shard.

Shards are worked on side by side, a thread each, as cores and memory allow; one that fails keeps no
other from being published. The order of steps here is what keeps two consolidators and a pruner at
once from losing a row (invariant 4). A file that turns out to be damaged is set aside in the same
run, where raw fragments allow it. The merge itself is in `merge`.
"""

from __future__ import annotations

import datetime as dt
import os
import secrets
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

import msgspec
import pyarrow as pa

from hb_assets.core.errors import CheckFailedError, DamagedFileError, FencedError, HbError
from hb_assets.core.schema import ENCODED, ORDER
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.merge import Tally, merged
from hb_assets.lake.files import accepted_losses, fragments, tombstones
from hb_assets.lake.files.consolidated import (
    ConsolidatedMetadata,
    Current,
    current,
    is_published,
    pending,
)
from hb_assets.lake.files.counts import Counts
from hb_assets.lake.files.fragments import Fragment
from hb_assets.lake.integrity import checks, damage, known_faults
from hb_assets.lake.integrity.checks import Figure
from hb_assets.lake.integrity.damage import Gaps
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.durable_files import TempFile
from hb_assets.lake.storage.layout import HEARTBEATS, FragmentName
from hb_assets.lake.storage.store import FORMAT, Lake
from hb_assets.lake.storage.verified import ReplacedError


@dataclass(frozen=True, slots=True)
class ShardFailure:
    """Why a shard's file wasn't published; what was published before is still in place.

    `message` is one line; `figures` are the results of the new file's checks, where it came to
    these; `kind` says what raised it (`fenced` and `storage` may pass by themselves).
    """

    shard: int
    kind: Literal["check_failed", "damaged", "fenced", "storage", "failed"]
    message: str
    figures: tuple[Figure, ...] = ()
    errno: int | None = None
    path: Path | None = None

    @classmethod
    def of(cls, shard: int, error: HbError | OSError) -> ShardFailure:
        """The failure of a shard by this error."""
        if isinstance(error, CheckFailedError):
            return cls(shard, "check_failed", str(error), error.figures)
        if isinstance(error, DamagedFileError):
            return cls(shard, "damaged", str(error), path=error.path)
        if isinstance(error, FencedError):
            return cls(shard, "fenced", str(error))
        if isinstance(error, HbError):
            return cls(shard, "failed", str(error))
        path = None if error.filename is None else Path(os.fsdecode(error.filename))
        return cls(
            shard, "storage", error.strerror or type(error).__name__, errno=error.errno, path=path
        )

    def error(self) -> HbError | OSError:
        """The failure as an error again."""
        if self.kind == "check_failed":
            return CheckFailedError(self.message, figures=self.figures)
        if self.kind == "damaged":
            return DamagedFileError(self.message, path=self.path)
        if self.kind == "storage":
            return OSError(self.errno, self.message, None if self.path is None else str(self.path))
        return (FencedError if self.kind == "fenced" else HbError)(self.message)


class Consolidated(Counts, kw_only=True):
    """The result of consolidating a day, and the day's counts but for shards that failed.

    `written` counts rows that this run wrote, in `shards_written` files; `pending` fragments were
    taken in; `figures` are the checks' results, summed over the shards, those that failed included;
    `set_aside` says, in one line each, which files were found damaged and moved away; `failed` has
    what went wrong, by shard.
    """

    day: dt.date
    written: int = 0
    shards_written: int = 0
    pending: int = 0
    bytes: int = 0
    figures: list[Figure] = msgspec.field(default_factory=list)
    set_aside: list[str] = msgspec.field(default_factory=list)
    failed: list[ShardFailure] = msgspec.field(default_factory=list)

    def require(self) -> Consolidated:
        """Raise the error of the first failed shard, for callers that need every shard.

        Raises:
            CheckFailedError: a new file failed its checks; the published one is still in place.
            DamagedFileError: a file can't be read, or a rebuild lacks fragments that were pruned.
            FencedError: a pruner fenced us off; start again.
            HbError: anything else that a user can mend.
            OSError: a disk can't be read or written.
        """
        if self.failed:
            raise self.failed[0].error()
        return self


Progress: TypeAlias = Callable[[int, int], None]
"""Called with (shards done, shards in all)."""
Watermarks: TypeAlias = Mapping[int, tuple[int, int]]
"""Per source shard the entry id up to which every entry is acknowledged, and so in raw."""
Lock: TypeAlias = Callable[[dt.date, int], AbstractContextManager[object]]
"""Held around the work on a (day, shard). It saves work only: nothing is lost without it."""


def no_lock(_day: dt.date, _shard: int) -> AbstractContextManager[object]:
    """A lock that locks nothing."""
    return nullcontext()


def consolidate(
    lake: Lake,
    day: dt.date,
    settings: Settings,
    *,
    rebuild: bool = False,
    rewrite: bool = False,
    shards: Sequence[int] | None = None,
    watermarks: Watermarks | None = None,
    lock: Lock = no_lock,
    progress: Progress | None = None,
) -> Consolidated:
    """Consolidate a day, shard by shard; shards with nothing pending are only checked.

    A shard that fails doesn't stop the others: see `Consolidated.failed` and `require`. Its failure
    stands (`known_faults`) until one of its consolidations succeeds. A damaged fragment is set
    aside, and so is a damaged published file as long as raw still has all of it: it is then made
    anew.

    Args:
        lake: which lake.
        day: which day.
        settings: for memory and threads.
        rebuild: start from raw fragments alone instead of the published file.
        rewrite: write the file anew where nothing is pending, too (to apply a tombstone).
        shards: only these.
        watermarks: read from the buffer before this call; they let raw be pruned later on.
        lock: held around each shard.
        progress: called after each shard.
    """
    chosen = range(lake.shards) if shards is None else shards
    bounds = _Bounds.of(settings)
    set_aside: list[str] = []

    def work(shard: int) -> _ShardResult | ShardFailure | None:
        task = _Task(lake, day, shard, bounds, watermarks or {}, rebuild, rewrite)
        try:
            with lock(day, shard):
                return _noticed(task, set_aside)
        except (HbError, OSError) as error:
            return ShardFailure.of(shard, error)
        finally:
            pa.default_memory_pool().release_unused()  # each thread's pool would keep its most

    with ThreadPoolExecutor(_threads(settings)) as pool:
        working = [pool.submit(work, shard) for shard in chosen]
        try:
            for done, _ in enumerate(as_completed(working), start=1):
                if progress:
                    progress(done, len(chosen))
        except BaseException:
            bounds.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    results = [one.result() for one in working]
    return _summary(day, [one for one in results if one is not None], sorted(set_aside))


def _noticed(task: _Task, set_aside: list[str]) -> _ShardResult | None:
    """Consolidate, recording in the lake what fails, and that it no longer does."""
    try:
        result = _without_damage(task, set_aside)
    except (HbError, OSError) as error:
        known_faults.notice(task.lake, error, day=task.day, shard=task.shard)
        raise
    known_faults.resolved(task.lake, task.day, task.shard)
    return result


def _threads(settings: Settings) -> int:
    return settings.duckdb_threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Bounds of the work on a shard: memory and threads of its engine, and when it has to end.

    `turns` lets so many merges go on at once.
    """

    settings: Settings
    turns: threading.Semaphore
    stop: threading.Event

    @classmethod
    def of(cls, settings: Settings) -> _Bounds:
        """Merges side by side share memory and threads: a merge alone leaves cores idle."""
        threads, memory = _threads(settings), settings.duckdb_memory
        merges = max(1, min(threads, memory // _LEAST_MEMORY))
        share = {"duckdb_threads": threads // merges, "duckdb_memory": memory // merges}
        return cls(
            settings.model_copy(update=share), threading.Semaphore(merges), threading.Event()
        )


_LEAST_MEMORY = 2**28
"""Of a merge that goes on beside others: room for a few million rows."""


@dataclass(frozen=True, slots=True)
class _Task:
    lake: Lake
    day: dt.date
    shard: int
    bounds: _Bounds
    watermarks: Watermarks
    rebuild: bool
    rewrite: bool

    @property
    def where(self) -> str:
        return f"day {self.day.isoformat()}, shard {self.shard:02d}"

    @property
    def final(self) -> Path:
        return layout.consolidated_file(self.lake.root, self.day, self.shard)

    def raw(self) -> list[Fragment]:
        return fragments.listed(self.lake, self.day, self.shard)

    def listing(self) -> tuple[list[Fragment], Gaps]:
        """Fragments in raw, and those moved away: one that is moved meanwhile is in either."""
        raw = self.raw()
        while True:
            gaps, again = Gaps.of(self.lake, self.day, self.shard), self.raw()
            if again == raw:
                return raw, gaps
            raw = again

    def published(self) -> Current | None:
        return current(self.lake, self.day, self.shard)

    def is_published(self, seen: Current | None) -> bool:
        return is_published(self.lake, seen, self.day, self.shard)


@dataclass(frozen=True, slots=True)
class _ShardResult:
    metadata: ConsolidatedMetadata
    written: int
    pending: int
    bytes: int
    figures: list[Figure]


_PENDING = _ShardResult(ConsolidatedMetadata.nothing(), 0, 0, 0, [])
"""Marks a shard that isn't done yet."""


def _summary(
    day: dt.date, results: Sequence[_ShardResult | ShardFailure], set_aside: list[str]
) -> Consolidated:
    failed = [one for one in results if isinstance(one, ShardFailure)]
    shards = [one for one in results if isinstance(one, _ShardResult)]
    return Consolidated.of(
        sum((shard.metadata for shard in shards), Counts()),
        day=day,
        written=sum(shard.written for shard in shards),
        shards_written=sum(shard.written > 0 for shard in shards),
        pending=sum(shard.pending for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        figures=checks.summed([figure for one in results for figure in one.figures]),
        set_aside=set_aside,
        failed=failed,
    )


def _without_damage(task: _Task, set_aside: list[str]) -> _ShardResult | None:
    """Consolidate, and again without each damaged file that may be moved away."""
    while True:
        failure: HbError
        damaged: DamagedFileError | None
        try:
            return _consolidate_shard(task)
        except DamagedFileError as error:
            failure = damaged = error
        except ReplacedError:
            continue  # by another consolidator
        except FileNotFoundError as error:
            # What lies below the published file goes while we count it, whatever we have of it.
            raise FencedError(
                f"{task.where}: {error.filename or error} is gone, a pruner was here; start again"
            ) from None
        except CheckFailedError as error:
            # Each file has the bytes that it was written with: was it one of us who wrote it?
            failure, damaged = error, _culprit(task)
        except parquet.engine_errors() as error:
            paths = [task.final, *(fragment.path for fragment in task.raw())]
            failure = parquet.explained(error, paths)
            damaged = failure if isinstance(failure, DamagedFileError) else _culprit(task)
        moved = None
        if damaged is not None:
            moved = damage.set_aside(task.lake, damaged, task.bounds.settings)
        if moved is None:
            raise failure
        set_aside.append(moved)


def _culprit(task: _Task) -> DamagedFileError | None:
    """The first damaged file of a (day, shard)."""
    for path in [*(one.path for one in task.raw()), task.final]:
        try:
            damage.examine(task.lake, path, task.bounds.settings)
        except DamagedFileError as error:
            return error
        except FileNotFoundError:
            continue
    return None


def _consolidate_shard(task: _Task) -> _ShardResult | None:
    if not (task.rebuild or task.rewrite):
        # A look without a temp file: most shards of most runs have nothing to do.
        result = _if_nothing_is_pending(task)
        if result is not _PENDING:
            return result
    with TempFile(task.lake.root, task.final.parent) as temp:
        # The order of these three is invariant 4: a pruner that deletes what the file of another
        # consolidator lists has unlinked this temp file first.
        published = task.published()
        raw, gaps = task.listing()
        base = None if task.rebuild else published
        if task.rebuild:
            _require_all(task, published, raw)
        new = pending(base, raw)
        restored = [one for one in new if base and str(one.name) in base.metadata.excepted]
        left = len(new) - 1 if restored else 0
        # Below the watermark and new all the same: each by itself, no other is taken for new.
        new = restored[:1] or new
        if not new and base is None:
            return None if task.is_published(published) else _consolidate_shard(task)
        marks = {} if left else task.watermarks  # they would pass those that are left
        metadata = _merge(
            replace(task, watermarks=marks), temp.path, base, new, raw, published, gaps
        )
        if not task.is_published(published):
            # Overtaken: the rows that were read needn't be those of the footer that was read.
            return _consolidate_shard(task)
        figures = _figures(task, temp.path, metadata, raw, new if base else None)
        checks.require(figures, task.where)
        size = temp.path.stat().st_size
        temp.publish_replacing(task.final)
    if left and (rest := _consolidate_shard(task)) is not None:
        return replace(
            rest, written=rest.written + metadata.unique, pending=rest.pending + len(new)
        )
    return _ShardResult(metadata, metadata.unique, len(new), size, figures)


def _if_nothing_is_pending(task: _Task) -> _ShardResult | None:
    """The shard's result where nothing is pending; _PENDING where there is something to do."""
    raw = task.raw()
    published = task.published()
    if pending(published, raw):
        return _PENDING
    try:
        result = _unchanged(task, published, raw)
    except parquet.engine_errors():
        # A file that is replaced between two reads fits no engine's idea of one file.
        if task.is_published(published):
            raise
        return _PENDING
    return result if task.is_published(published) else _PENDING


def _require_all(task: _Task, published: Current | None, raw: Sequence[Fragment]) -> None:
    """Verify that raw has every fragment that was ever included, as a rebuild needs it."""
    if published is None:
        return
    gone = len(published.names - {str(one.name) for one in raw}) + published.metadata.pruned
    if gone:
        raise DamagedFileError(
            f"{task.where} can't be rebuilt: {gone} of its raw fragments were pruned; "
            "consolidate it without --rebuild"
        )


def _unchanged(
    task: _Task, published: Current | None, raw: Sequence[Fragment]
) -> _ShardResult | None:
    """The result of a published file that stays: it was checked before it was published."""
    if published is None:
        return None
    parquet.verify(published.path)
    figures = [*checks.passed(published.metadata.unique), _ledger(task, published, raw)]
    return _ShardResult(published.metadata, 0, 0, published.path.stat().st_size, figures)


def _figures(
    task: _Task,
    path: Path,
    metadata: ConsolidatedMetadata,
    raw: Sequence[Fragment],
    new: Sequence[Fragment] | None,
) -> list[Figure]:
    """Check the new file; where it extends a checked one, only the values of `new`."""
    files = None if new is None else [fragment.path for fragment in new]
    shard = task.shard, task.lake.shards
    found = checks.heartbeats(path, task.day, task.bounds.settings, files, shard)
    return [*found, _ledger(task, Current(path, metadata), raw)]


def _ledger(task: _Task, file: Current, raw: Sequence[Fragment]) -> Figure:
    metadata = file.metadata
    listed = [fragment for fragment in raw if str(fragment.name) in file.names]
    whole = len(listed) == len(file.names) and not metadata.pruned
    rows_in = metadata.rows
    if whole:
        rows_in = fragments.distinct_rows(listed, task.bounds.settings) - metadata.uncounted
    return checks.counts_add_up(
        rows_in=rows_in,
        unique=metadata.unique,
        superseded=metadata.superseded,
        erased=metadata.erased,
        rows_in_file=parquet.footer(file.path).num_rows,
    )


def _merge(
    task: _Task,
    path: Path,
    base: Current | None,
    new: Sequence[Fragment],
    raw: Sequence[Fragment],
    published: Current | None,
    gaps: Gaps,
) -> ConsolidatedMetadata:
    """Write the merged file to `path`; return its footer metadata."""
    before = base.metadata if base else _NOTHING
    inputs = _inputs(task, base, new, raw)
    tally = Tally()
    arrived = sum(fragment.rows for fragment in new)
    bounds = task.bounds
    with bounds.turns, parquet.writer(path, ENCODED, ORDER) as out:
        for rows in merged(inputs, tally, bounds.settings):
            if bounds.stop.is_set():
                raise _Stopped
            out.write(rows)
        replayed = arrived + before.unique - tally.survivors - tally.superseded - tally.erased
        stood = published.metadata if published else _NOTHING
        included = frozenset(before.fragments).union(str(one.name) for one in new)
        lost = {name for name in gaps.lacking(stood) if str(name) not in included}
        watermark = _later(stood.watermark, _sound(task, lost - gaps.accepted))
        names, pruned = _still_listed(before, new, raw, watermark)
        excepted = {str(name): stood.mark(name.source) for name in lost & gaps.accepted}
        excepted |= {name: at for name, at in stood.excepted.items() if name not in included}
        here = Counts(
            rows=arrived - replayed,
            superseded=tally.superseded,
            repeats=tally.repeats,
            corrections=tally.corrections,
            erased=tally.erased,
            uncounted=tally.uncounted,
            replayed=replayed,
        )
        written = {"unique": tally.survivors, "rows_written": stood.rows_written + tally.survivors}
        metadata = ConsolidatedMetadata.of(
            msgspec.structs.replace(before + here, **written),
            format=FORMAT,
            day=task.day.isoformat(),
            shard=task.shard,
            version=secrets.token_hex(8),
            fragments=names,
            pruned=before.pruned + pruned,
            watermark=watermark,
            excepted=excepted,
            losses=tuple(accepted_losses.stems(task.lake, HEARTBEATS, task.day, task.shard)),
        )
        out.close_with(metadata)
    pa.default_memory_pool().release_unused()  # before the checks take theirs
    return metadata


class _Stopped(Exception):  # noqa: N818  # nothing went wrong: nobody waits for it any more
    """Raised where the work on other shards was stopped early."""


_NOTHING = ConsolidatedMetadata.nothing()


def _inputs(
    task: _Task, base: Current | None, new: Sequence[Fragment], raw: Sequence[Fragment]
) -> Inputs:
    """The inputs of the merge; each file is verified when its rows are read."""
    for fragment in new:
        fragments.verify_place(fragment, task.day, task.shard)
    found = Inputs.of(task.lake, base, new, raw)
    paths = [*([found.base] if found.base else []), *found.new]
    erased = tombstones.of_files(task.lake, task.shard, paths, task.bounds.settings)
    return replace(found, erased=erased)


def _sound(task: _Task, missed: Collection[FragmentName]) -> Watermarks:
    """Watermarks without sources of which a fragment is missing: its rows aren't included."""
    sources = {name.source for name in missed}
    return {source: mark for source, mark in task.watermarks.items() if source not in sources}


def _later(before: Watermarks, now: Watermarks) -> dict[int, tuple[int, int]]:
    """By source shard the later one of both."""
    both = {**before, **now}
    return {source: max(mark, before.get(source, mark)) for source, mark in sorted(both.items())}


def _still_listed(
    before: ConsolidatedMetadata,
    new: Sequence[Fragment],
    raw: Sequence[Fragment],
    watermark: Watermarks,
) -> tuple[tuple[str, ...], int]:
    """Names to list, and how many listed before were pruned, which needn't be named.

    A name is left out only where the watermark would know its rows if they came again.
    """
    there = {str(one.name) for one in raw}
    gone = {
        name
        for name in before.fragments
        if name not in there
        and (parsed := FragmentName.parse(name)) is not None
        and parsed.last <= watermark.get(parsed.source, (0, 0))
    }
    names = {*before.fragments, *(str(one.name) for one in new)} - gone
    return tuple(sorted(names)), len(gone)
