"""Resolving damage: a whole copy is put back, or what a file held is accepted as lost.

Each step may be the last before a crash, and doing it all again is harmless. A fragment that is put
back is pending like any other. A consolidated file that is put back replaces the published one only
where all that the published one includes is in it or in raw: what it doesn't list is pending then,
and consolidated anew (invariant 4).
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hb_assets.core.errors import DamagedFileError, HbError
from hb_assets.core.schema import ENCODED, ORDER
from hb_assets.core.schema import HEARTBEATS as SCHEMA
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import Lock, consolidate, no_lock
from hb_assets.lake.compaction.inputs import Inputs
from hb_assets.lake.compaction.merge import Tally, merged
from hb_assets.lake.files import accepted_losses, fragments, tombstones
from hb_assets.lake.files.accepted_losses import Acceptance
from hb_assets.lake.files.consolidated import (
    ConsolidatedMetadata,
    current,
    incomplete_since,
    mark_complete,
)
from hb_assets.lake.files.fragments import FragmentMetadata
from hb_assets.lake.integrity import checks, damage, known_faults
from hb_assets.lake.integrity.damage import Place
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.durable_files import TempFile, make_folder, sync_folder
from hb_assets.lake.storage.layout import DAMAGED, HEARTBEATS, RAW, FragmentName
from hb_assets.lake.storage.store import Lake

Shortfall = Callable[[], int]
"""Returns how many heartbeats the ledger misses at most, known losses left out; it may be slow."""


@dataclass(frozen=True, slots=True)
class Restored:
    """A file that was put back: its rows, and whether its loss had been accepted."""

    path: Path
    rows: int
    was_accepted: bool


@dataclass(frozen=True, slots=True)
class GivenUp:
    """An accepted loss (None: nothing is lost, the damaged file was only to be deleted).

    `kept` rows of a consolidated file were sound.
    """

    acceptance: Acceptance | None
    kept: int | None = None


# -- putting a copy back


def restore(lake: Lake, copy: Path, settings: Settings, *, lock: Lock = no_lock) -> Restored:
    """Put a whole copy of a fragment or consolidated file back into its place, which it names.

    Raises:
        HbError: the copy isn't whole, doesn't fit its place, or would replace what it lacks.
        OSError: a disk can't be read or written.
    """
    name = FragmentName.parse(copy.name)
    try:
        parquet.verify(copy)
        place = _place_of(lake, copy, name)
        damage.examine_at(lake, copy, place, settings)
    except FileNotFoundError:
        raise HbError(
            f"there is no file {copy}: name a copy, or a file of `hb damaged list`"
        ) from None
    except DamagedFileError as error:
        why = str(error).rsplit("; ", 1)[0]
        raise HbError(f"nothing was put back: {why}; name a copy that is whole") from None
    with lock(place.day, place.shard):
        if name is not None:
            return _restore_fragment(lake, copy, name, place, settings)
        return _restore_consolidated(lake, copy, place, settings)


def _place_of(lake: Lake, copy: Path, name: FragmentName | None) -> Place:
    metadata: ConsolidatedMetadata | FragmentMetadata
    if name is None:
        metadata = parquet.metadata(copy, ConsolidatedMetadata)
    else:
        metadata = parquet.metadata(copy, FragmentMetadata)
    day = layout.day_of_folder(f"day={metadata.day}")
    if day is None or not 0 <= metadata.shard < lake.shards:
        raise parquet.damaged(copy, f"it belongs to day {metadata.day}, shard {metadata.shard}")
    return Place(HEARTBEATS if name is None else RAW, day, metadata.shard)


def _restore_fragment(
    lake: Lake, copy: Path, name: FragmentName, place: Place, settings: Settings
) -> Restored:
    final = layout.shard_folder(lake.root, RAW, place.day, place.shard) / str(name)
    with TempFile(lake.root, final.parent) as temp:
        _copy(copy, temp.path)
        if not _seals(name, temp.path):
            raise HbError(f"{copy} changed while it was copied: nothing was put back")
        rows = parquet.footer(temp.path).num_rows
        if final.exists() and not _seals(name, final):
            damage.set_aside(lake, parquet.damaged(final, "a whole copy replaces it"), settings)
        try:
            temp.publish_new(final)
        except FileExistsError:
            sync_folder(final.parent)  # it is back already
    given_up = accepted_losses.file_of(lake, RAW, place.day, place.shard, final.stem)
    was_accepted = given_up.exists()
    accepted_losses.remove(given_up)
    _remove_aside(lake, final, name)
    return Restored(final, rows, was_accepted)


def _remove_aside(lake: Lake, final: Path, name: FragmentName) -> None:
    """Remove the damaged file that a whole copy has replaced.

    A consolidator that had found the damaged one may have set the whole one aside instead.
    """
    aside = lake.root / DAMAGED / final.relative_to(lake.root)
    if not aside.exists():
        return
    with TempFile(lake.root, final.parent) as taken, suppress(FileNotFoundError, FileExistsError):
        aside.rename(taken.path)
        sync_folder(aside.parent)
        if not final.exists() and _seals(name, taken.path):
            taken.publish_new(final)


def _restore_consolidated(lake: Lake, copy: Path, place: Place, settings: Settings) -> Restored:
    day, shard = place.day, place.shard
    final = layout.consolidated_file(lake.root, day, shard)
    metadata = parquet.metadata(copy, ConsolidatedMetadata)
    stems = [
        one
        for one in accepted_losses.stems(lake, HEARTBEATS, day, shard)
        if one not in metadata.losses
    ]
    with TempFile(lake.root, final.parent) as temp:
        _copy(copy, temp.path)
        damage.examine_at(lake, temp.path, place, settings)
        lacking = _lacking(lake, place, metadata)
        if lacking:
            raise HbError(
                f"{copy} lacks what the published file of day {day}, shard {shard:02d} includes and "
                f"raw no longer has ({lacking:,} fragments): nothing was put back"
            )
        if not stems and damage.is_sound_at(lake, final, place, settings):
            raise HbError(f"{final} is sound and lacks nothing: nothing was put back")
        temp.publish_replacing(final)
    for stem in stems:
        accepted_losses.remove(accepted_losses.file_of(lake, HEARTBEATS, day, shard, stem))
    if any(tombstone.shard == shard for tombstone in tombstones.listed(lake)):
        # It may hold somebody who was forgotten since.
        consolidate(lake, day, settings, rewrite=True, shards=[shard]).require()
    known_faults.resolved(lake, day, shard)
    return Restored(final, metadata.unique, bool(stems))


def _lacking(lake: Lake, place: Place, metadata: ConsolidatedMetadata) -> int:
    """Fragments in the published file that neither raw nor a file with `metadata` includes."""
    try:
        published = current(lake, place.day, place.shard)
    except DamagedFileError:
        return 0  # nobody can tell what it includes
    if published is None:
        return 0
    there = {str(one.name) for one in fragments.listed(lake, place.day, place.shard)}
    gone = [
        name
        for text in published.names - there - set(metadata.fragments)
        if (name := FragmentName.parse(text)) is None or not metadata.includes(name)
    ]
    # Those that were pruned aren't named any more: of these the copy has as many as it names still.
    dropped = len(set(metadata.fragments) - published.names)
    return len(gone) + max(0, published.metadata.pruned - metadata.pruned - dropped)


def _seals(name: FragmentName, path: Path) -> bool:
    with path.open("rb") as file:
        return name.seals(file)


def _copy(source: Path, target: Path) -> None:
    with source.open("rb") as read, target.open("r+b") as written:
        shutil.copyfileobj(read, written)


# -- accepting a loss


def accept(
    lake: Lake,
    path: Path,
    settings: Settings,
    *,
    reason: str,
    shortfall: Shortfall,
    lock: Lock = no_lock,
    delete: bool = False,
) -> GivenUp:
    """Accept the loss of what a damaged file held and no other file holds.

    Args:
        lake: which lake.
        path: the file, in its place or under `damaged/`.
        settings: memory and threads.
        reason: a person's words, kept with the acceptance.
        shortfall: asked where nobody can tell how many rows the file held.
        lock: held around the work.
        delete: delete the damaged file as well.

    Raises:
        HbError: nothing is lost with this file.
        OSError: a disk can't be read or written.
    """
    where = path.relative_to(lake.root)
    where = where.relative_to(DAMAGED) if where.parts[0] == DAMAGED else where
    place = Place.of(lake, lake.root / where)
    if place is None:
        raise HbError(f"{path} is neither a fragment nor a consolidated file of {lake.root}")
    name = FragmentName.parse(where.name)
    with lock(place.day, place.shard):
        if name is not None:
            return _accept_fragment(
                lake, lake.root / where, name, place, settings, reason, shortfall, delete=delete
            )
        if lake.root / where != path:
            if not delete:
                raise HbError(
                    f"{path} was made anew, or accepted as lost, when it was moved there: "
                    "nothing more is lost with it; --delete deletes it"
                )
            _delete(path, delete=True)
            return GivenUp(None)
        return _accept_consolidated(lake, place, settings, reason, shortfall)


def _accept_fragment(
    lake: Lake,
    path: Path,
    name: FragmentName,
    place: Place,
    settings: Settings,
    reason: str,
    shortfall: Shortfall,
    *,
    delete: bool,
) -> GivenUp:
    aside = lake.root / DAMAGED / path.relative_to(lake.root)
    given_up = parquet.damaged(path, "accepted as lost")
    if path.exists() and damage.set_aside(lake, given_up, settings) is None:
        raise HbError(f"{path} is sound: nothing is lost with it")
    try:
        published = current(lake, place.day, place.shard)
    except DamagedFileError:
        published = None
    metadata = published.metadata if published else None
    if metadata is not None and metadata.includes(name):
        if not delete:
            raise HbError(
                f"the rows of {name} are in the consolidated file: nothing is lost with it; --delete "
                "deletes it"
            )
        _delete(aside, delete=True)
        return GivenUp(None)
    target = accepted_losses.file_of(lake, RAW, place.day, place.shard, path.stem)
    before = next(
        (one for at, one in accepted_losses.standing(lake, _ignore) if at == target), None
    )
    if before is None and not aside.exists() and not _is_noticed(lake, path, place):
        raise HbError(f"there is no file {name} among the damaged ones: see `hb damaged list`")
    found = before or _acceptance(
        lake,
        path,
        place,
        reason,
        *_rows_of_fragment(lake, aside, name, place, metadata, shortfall),
        name=name,
    )
    if before is None:
        accepted_losses.put(lake, target, found)
    _delete(aside, delete=delete)
    return GivenUp(found)


def _ignore(_: DamagedFileError) -> None:
    """Ignore damage of other acceptances, which don't concern this one."""


def _is_noticed(lake: Lake, path: Path, place: Place) -> bool:
    return any(fault.path == path for fault in known_faults.faults(lake, [place.day]))


def _delete(aside: Path, *, delete: bool) -> None:
    if delete and aside.exists():
        aside.unlink(missing_ok=True)
        sync_folder(aside.parent)


def _rows_of_fragment(
    lake: Lake,
    aside: Path,
    name: FragmentName,
    place: Place,
    metadata: ConsolidatedMetadata | None,
    shortfall: Shortfall,
) -> tuple[int | None, int | None]:
    """The number of rows that are lost with a fragment, or an upper bound.

    Its footer tells how many it had. Where another fragment may hold the same rows, after a drain
    that died before it could acknowledge, that is only a bound.
    """
    try:
        rows = parquet.footer(aside).num_rows
    except (DamagedFileError, FileNotFoundError):
        return None, shortfall()
    others = [one.name for one in fragments.listed(lake, place.day, place.shard)]
    if metadata is not None:
        parsed = map(FragmentName.parse, metadata.fragments)
        others += [one for one in parsed if one is not None]
        if metadata.reaches(name):
            return None, rows
    return (None, rows) if any(name.overlaps(one) for one in others) else (rows, None)


def _acceptance(
    lake: Lake,
    path: Path,
    place: Place,
    reason: str,
    rows: int | None,
    at_most: int | None,
    *,
    name: FragmentName | None = None,
    pruned_ms: int | None = None,
) -> Acceptance:
    return Acceptance(
        file=str(path.relative_to(lake.root)),
        day=place.day.isoformat(),
        shard=place.shard,
        reason=reason,
        rows=rows,
        at_most=at_most,
        accepted_ms=int(time.time() * 1000),
        source=name.source if name else None,
        first=name.first if name else None,
        last=name.last if name else None,
        pruned_ms=pruned_ms,
    )


# -- a consolidated file: what is sound of it is kept


def _accept_consolidated(
    lake: Lake, place: Place, settings: Settings, reason: str, shortfall: Shortfall
) -> GivenUp:
    day, shard = place.day, place.shard
    path = layout.consolidated_file(lake.root, day, shard)
    if damage.is_sound_at(lake, path, place, settings):
        raise HbError(f"{path} is sound: nothing is lost with it")
    if damage.raw_has_all(lake, path, place):
        raise HbError(
            f"raw has all of day {day}, shard {shard:02d}: hb consolidate {day} makes it anew"
        )
    try:
        footer = parquet.footer(path)
        metadata = parquet.metadata_in(footer, path, ConsolidatedMetadata)
    except (DamagedFileError, FileNotFoundError):
        return _give_up_whole(lake, path, place, settings, reason, shortfall)
    if (metadata.day, metadata.shard) != (day.isoformat(), shard):
        return _give_up_whole(lake, path, place, settings, reason, shortfall)
    return _salvage(lake, path, footer, metadata, place, settings, reason, shortfall)


def _give_up_whole(
    lake: Lake, path: Path, place: Place, settings: Settings, reason: str, shortfall: Shortfall
) -> GivenUp:
    """Give up a file whose footer can't be read: only what raw has remains."""
    day, shard = place.day, place.shard
    since = incomplete_since(lake, day, shard)
    found = next(
        (
            one
            for _, one in accepted_losses.standing(lake, _ignore)
            if (one.day, one.shard, one.pruned_ms) == (day.isoformat(), shard, since)
            and one.pruned_ms is not None
        ),
        None,
    )
    if found is None:
        found = _acceptance(lake, path, place, reason, None, shortfall(), pruned_ms=since)
        stem = f"{path.stem}-{found.accepted_ms}"
        accepted_losses.put(
            lake, accepted_losses.file_of(lake, HEARTBEATS, day, shard, stem), found
        )
    if path.exists():
        damage.move_aside(lake, path)
    mark_complete(lake, day, shard)
    done = consolidate(lake, day, settings, shards=[shard]).require()
    return GivenUp(found, kept=done.unique)


def _salvage(
    lake: Lake,
    path: Path,
    footer: pq.FileMetaData,
    metadata: ConsolidatedMetadata,
    place: Place,
    settings: Settings,
    reason: str,
    shortfall: Shortfall,
) -> GivenUp:
    """Publish in a file's place what is sound of it, with what raw still has of it."""
    day, shard = place.day, place.shard
    with TempFile(lake.root, path.parent) as temp, TempFile(lake.root, path.parent) as sound:
        kept = 0
        with parquet.writer(sound.path, SCHEMA, ORDER) as out:
            for rows in _sound_groups(path, footer, place, lake.shards):
                kept += rows.num_rows
                out.write(rows)
            out.close_with(metadata)
        listed = set(metadata.fragments)
        new = [
            one
            for one in fragments.listed(lake, day, shard)
            if str(one.name) in listed and damage.is_sound_at(lake, one.path, place, settings)
        ]
        tally = Tally()
        inputs = Inputs(sound.path if kept else None, [one.path for one in new])
        stem = f"{path.stem}-{_crc32(path)}"
        with parquet.writer(temp.path, ENCODED, ORDER) as out:
            if kept or new:
                for rows in merged(inputs, tally, settings):
                    out.write(rows)
            superseded = metadata.repeats + metadata.corrections
            stems = {*accepted_losses.stems(lake, HEARTBEATS, day, shard), stem}
            made = msgspec.structs.replace(
                metadata,
                version=os.urandom(8).hex(),
                unique=tally.survivors,
                superseded=superseded,
                rows=tally.survivors + superseded + metadata.erased,
                rows_written=metadata.rows_written + tally.survivors,
                losses=tuple(sorted(stems)),
            )
            out.close_with(made)
        checks.require(checks.heartbeats(temp.path, day, settings), f"day {day}, shard {shard:02d}")
        wrong = metadata.contradictions(day, shard, footer.num_rows)
        lost = (None, shortfall()) if wrong else (metadata.rows - made.rows, None)
        found = _acceptance(lake, path, place, reason, *lost)
        accepted_losses.put(
            lake, accepted_losses.file_of(lake, HEARTBEATS, day, shard, stem), found
        )
        aside = lake.root / DAMAGED / path.relative_to(lake.root).with_name(f"{stem}.parquet")
        make_folder(aside.parent, lake.root)
        if not aside.exists():
            os.link(path, aside)
        sync_folder(aside.parent)
        temp.publish_replacing(path)
    known_faults.resolved(lake, day, shard)
    return GivenUp(found, kept=made.unique)


def _crc32(path: Path) -> str:
    return f"{zlib.crc32(path.read_bytes()):08x}"


def _sound_groups(
    path: Path, footer: pq.FileMetaData, place: Place, shards: int
) -> Iterator[pa.Table]:
    """Row groups whose pages have the checksums that they were written with.

    An older release wrote none: which of the row groups of its files are sound can't be told.
    """
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        with path.open("rb") as source:
            if not all(
                _has_checksum(source, group.column(index)) for index in range(group.num_columns)
            ):
                continue
        try:
            with path.open("rb") as source, parquet.opened(source, path, metadata=footer) as file:
                rows = file.read_row_group(number, use_threads=False)
        except DamagedFileError:
            continue
        if (
            rows.num_rows == group.num_rows
            and rows.schema.equals(SCHEMA)
            and damage.unfit(rows, place, shards, None) is None
            and all(_fits(rows[name], group.column(n)) for n, name in enumerate(SCHEMA.names))
        ):
            yield rows


def _fits(values: pa.ChunkedArray, column: pq.ColumnChunkMetaData) -> bool:
    said = column.statistics
    if said is None or not said.has_min_max:
        return True
    found = pc.min_max(values).as_py()
    return bool((said.min, said.max) == (found["min"], found["max"]))


_CRC_FIELD = 4


def _has_checksum(source: BinaryIO, column: pq.ColumnChunkMetaData) -> bool:
    """Whether the header of a column's first page has a CRC.

    It is Parquet's PageHeader in Thrift's compact protocol: fields 1 to 3 are integers, field 4 is
    the CRC, which is optional.
    """
    offsets = (column.dictionary_page_offset, column.data_page_offset)
    source.seek(min(one for one in offsets if one is not None))
    header = source.read(64)
    at, field = 0, 0
    while at < len(header):
        field += header[at] >> 4
        if field >= _CRC_FIELD:
            break
        at += 1
        while at < len(header) and header[at] & 0x80:
            at += 1
        at += 1
    return field == _CRC_FIELD
