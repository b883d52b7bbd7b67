"""Raw fragments: immutable Parquet files of one (day, shard), each row with its identity.

They are written, listed and counted here. Which fragments a consolidated file includes is in
`consolidated`, and when one may be deleted in `compaction.pruning`.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hb_assets.core import days
from hb_assets.core.days import MS_PER_DAY, day_of
from hb_assets.core.record import BPM_RANGE
from hb_assets.core.schema import ARRIVAL, HEARTBEATS, KEY, ORDER
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import layout, parquet, verified
from hb_assets.lake.storage.catalog import remembered
from hb_assets.lake.storage.durable_files import Fingerprint, TempFile, fingerprint
from hb_assets.lake.storage.engine import engine, figures
from hb_assets.lake.storage.layout import RAW, FragmentName
from hb_assets.lake.storage.store import FORMAT, Lake

_WRITERS = 4
"""Files written at once: their fsyncs overlap, even on one core."""


class FragmentMetadata(msgspec.Struct, frozen=True):
    """Footer metadata of a fragment."""

    format: int
    day: str
    shard: int
    source: int


@dataclass(frozen=True, slots=True, order=True)
class Fragment:
    """A published fragment. Sorts by arrival."""

    name: FragmentName
    path: Path

    @property
    def rows(self) -> int:
        """Rows in it, by its footer."""
        return _claims(self.path, fingerprint(self.path)).rows

    @property
    def unpacked(self) -> int:
        """Bytes of its rows without compression, by its footer."""
        return _claims(self.path, fingerprint(self.path)).unpacked

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size


class _Claims(NamedTuple):
    """Bounds that a fragment's footer states; its entries have ids from `first_ms` to `last_ms`."""

    rows: int
    unpacked: int
    metadata: FragmentMetadata
    first_ms: int
    last_ms: int


@remembered(200_000)
def _claims(path: Path, _seen: Fingerprint) -> _Claims:
    found = parquet.footer(path)
    groups = [found.row_group(number) for number in range(found.num_row_groups)]
    if sum(group.num_rows for group in groups) != found.num_rows:
        raise parquet.damaged(path, "its footer contradicts itself")
    judge_footer(found, path)
    bounds = [group.column(_ARRIVAL_MS).statistics for group in groups]
    return _Claims(
        found.num_rows,
        sum(group.total_byte_size for group in groups),
        parquet.metadata_in(found, path, FragmentMetadata),
        min((one.min for one in bounds if one is not None and one.has_min_max), default=0),
        max((one.max for one in bounds if one is not None and one.has_min_max), default=0),
    )


_ARRIVAL_MS = HEARTBEATS.get_field_index("arrival_ms")


def publish(lake: Lake, rows: pa.Table) -> list[Fragment]:
    """Write decoded rows durably: one fragment per source shard, day and user shard.

    Args:
        lake: where to.
        rows: as `decode.Decoded.rows`.

    Returns:
        The fragments; each is fsynced, renamed, and its folder fsynced.

    Raises:
        OSError: a write failed; what was published already stays (a replay is harmless).
    """
    if rows.num_rows == 0:
        return []
    rows = rows.combine_chunks()
    where = np.stack([rows[name].to_numpy() for name in ("arrival_shard", "day", "shard")], axis=1)
    starts = np.concatenate([[0], np.flatnonzero((where[1:] != where[:-1]).any(axis=1)) + 1])
    ends = np.append(starts[1:], rows.num_rows)
    pieces = [(where[a], rows.slice(a, b - a)) for a, b in zip(starts, ends, strict=True)]
    with ThreadPoolExecutor(_WRITERS) as pool:
        return list(pool.map(lambda piece: _publish_one(lake, *piece), pieces))


def _publish_one(lake: Lake, where: np.ndarray, rows: pa.Table) -> Fragment:
    source, day_number, shard = (int(part) for part in where)
    day = day_of(day_number * MS_PER_DAY)
    rows = rows.select(HEARTBEATS.names)
    name = FragmentName.covering(rows)
    folder = layout.shard_folder(lake.root, RAW, day, shard)
    with TempFile(lake.root, folder) as temp:
        metadata = FragmentMetadata(FORMAT, day.isoformat(), shard, source)
        parquet.write(temp.path, rows, metadata, ORDER)
        name = name.sealed(temp.path)
        temp.publish_new(folder / str(name))
    return Fragment(name, folder / str(name))


def verify_place(fragment: Fragment, day: dt.date, shard: int) -> None:
    """Verify that the fragment's own metadata says that it belongs here, under this name.

    Raises: as `parquet.verify`.
    """
    path, name = fragment.path, fragment.name
    claims = _claims(path, fingerprint(path))
    metadata = claims.metadata
    if (metadata.day, metadata.shard, metadata.source) != (day.isoformat(), shard, name.source):
        raise parquet.damaged(path, f"it belongs to day {metadata.day}, shard {metadata.shard:02d}")
    if claims.last_ms and not name.first[0] <= claims.first_ms <= claims.last_ms <= name.last[0]:
        raise parquet.damaged(path, "it holds other entries than its name says")


def judge_footer(footer: pq.FileMetaData, path: Path) -> None:
    """Check a fragment's footer against the bounds of record and place.

    Raises:
        DamagedFileError: no drain can have written it, although its checksums fit.
    """
    if footer.schema.names != HEARTBEATS.names:
        raise parquet.damaged(path, "its columns are none of a fragment's")
    place = layout.place_of(path)
    first, end = (days.start_ms(place[0]), days.end_ms(place[0])) if place else (0, days.LAST_MS)
    for group in map(footer.row_group, range(footer.num_row_groups)):
        times, rates = (group.column(at).statistics for at in (_TIMESTAMP, _HEART_RATE))
        # as they are stored: milliseconds since the epoch
        if (
            times is not None
            and times.has_min_max
            and not first <= times.min_raw <= times.max_raw < end
        ):
            raise parquet.damaged(path, "timestamp is out of bounds: no drain wrote it")
        if rates is not None and rates.has_min_max:
            require_bpm(rates.min_raw, rates.max_raw, path)


def require_bpm(least: int, most: int, path: Path) -> None:
    """Check a file's least and greatest heart rate against the record's. Raises as the above."""
    if not BPM_RANGE[0] <= least <= most <= BPM_RANGE[1]:
        raise parquet.damaged(path, "heart_rate is out of bounds: no drain wrote it")


def listed(lake: Lake, day: dt.date, shard: int) -> list[Fragment]:
    """Fragments of one (day, shard) that are there now, by arrival."""
    folder = layout.shard_folder(lake.root, RAW, day, shard)
    try:
        with os.scandir(folder) as found:
            named = [(FragmentName.parse(entry.name), entry.path) for entry in found]
    except FileNotFoundError:
        return []
    return sorted(Fragment(name, Path(path)) for name, path in named if name is not None)


def all_listed(lake: Lake, day: dt.date) -> list[Fragment]:
    """Fragments of one day, over all shards."""
    return [fragment for shard in range(lake.shards) for fragment in listed(lake, day, shard)]


def digest(fragments: Iterable[Fragment]) -> str:
    """A short digest of a set of fragments: it changes when, and only when, the set does."""
    names = sorted(str(fragment.name) for fragment in fragments)
    return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest()


def overlapping(fragments: Sequence[Fragment]) -> list[list[Fragment]]:
    """Groups of fragments that may hold the same rows (chains of overlapping id ranges)."""
    groups: list[list[Fragment]] = []
    end: tuple[int, int] = (0, 0)
    for fragment in sorted(fragments, key=lambda one: (one.name.source, one.name.first)):
        same = groups and groups[-1][0].name.source == fragment.name.source
        if same and fragment.name.first <= end:
            groups[-1].append(fragment)
            end = max(end, fragment.name.last)
        else:
            groups.append([fragment])
            end = fragment.name.last
    return groups


def distinct_rows(fragments: Sequence[Fragment], settings: Settings) -> int:
    """Distinct rows (key and identity) of the fragments: one delivered twice counts once.

    Only fragments with overlapping id ranges are read; of the others the footer says enough.
    """
    groups = overlapping(fragments)
    total = sum(group[0].rows for group in groups if len(group) == 1)
    doubtful = [[one.path for one in group] for group in groups if len(group) > 1]
    if doubtful:
        with engine(settings) as connection:
            for paths in doubtful:
                with verified.relations(connection, {"raw": paths}):
                    total += figures(connection, _DISTINCT)[0]
    return total


_TIMESTAMP, _HEART_RATE = map(HEARTBEATS.get_field_index, ("timestamp", "heart_rate"))
_ROW = ", ".join((*KEY, *ARRIVAL))
_DISTINCT = f"SELECT count(*) FROM (SELECT DISTINCT {_ROW} FROM raw)"
