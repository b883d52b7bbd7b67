"""Reads the rows of one user, from the files that may hold them, and no more of each than needed.

It picks the files of a (day, shard) (invariant 5) and the row groups of each, and caches footers,
so that the cost depends on what is asked and not on what is stored.

A file is verified whole when it is first read, and when it looks changed; its footer is cached
until then. Once it is open for its rows, it is looked at again: still the one that was verified, or
else footer and rows could be of two versions. Each page that is read is held to its checksum every
time. Rows are held to the record's bounds before they are answered: a fragment with a row that no
drain can have written is damaged, however well its checksums fit.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from hb_assets.core import days
from hb_assets.core.record import ID_LENGTH
from hb_assets.core.schema import ARRIVAL, HEARTBEATS
from hb_assets.lake.files import consolidated, fragments, tombstones
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.files.tombstones import Cutoffs
from hb_assets.lake.query.aggregate import Integers, Readings
from hb_assets.lake.storage import catalog, layout, parquet, verified
from hb_assets.lake.storage.catalog import remembered
from hb_assets.lake.storage.durable_files import Fingerprint, fingerprint
from hb_assets.lake.storage.layout import FragmentName
from hb_assets.lake.storage.store import Lake
from hb_assets.lake.storage.verified import ReplacedError

_PLAIN = ("user_id", "device_id", "timestamp", "heart_rate")
_FEW_DEVICES = 16
_USER, _TIMESTAMP = HEARTBEATS.get_field_index("user_id"), HEARTBEATS.get_field_index("timestamp")


@dataclass(frozen=True, slots=True)
class Wanted:
    """A selection of rows: one user's, of the half-open range, of one device or of all.

    `cutoffs` are those of a user who was forgotten: what arrived up to them is left out.
    """

    user_id: str
    start_ms: int
    end_ms: int
    device_id: str | None = None
    cutoffs: Cutoffs | None = None


@dataclass(frozen=True, slots=True)
class _Group:
    """Bounds of a row group: least and greatest user and timestamp (None: not in the footer)."""

    users: tuple[str, str] | None
    times: tuple[int, int] | None

    def may_hold(self, wanted: Wanted) -> bool:
        if self.users and not self.users[0] <= wanted.user_id <= self.users[1]:
            return False
        return not self.times or (
            self.times[0] < wanted.end_ms and self.times[1] >= wanted.start_ms
        )


@dataclass(frozen=True, slots=True)
class _Published:
    """The cached footer of a consolidated file."""

    footer: pq.FileMetaData
    included: frozenset[str]
    groups: tuple[_Group, ...]


def of_user(
    lake: Lake,
    day: dt.date,
    shard: int,
    wanted: Wanted,
    *,
    identified: bool = False,
    raw_alone: bool = False,
) -> list[Readings]:
    """Read every durable row that is wanted, in parts; a key as often as it was delivered.

    Args:
        lake: which lake.
        day: which day.
        shard: the user's.
        wanted: which rows.
        identified: with arrivals, even where the lake alone needs none to tell what is latest.
        raw_alone: out of raw fragments, as if there were no consolidated file.

    Raises:
        FileNotFoundError: a file was pruned or replaced meanwhile: ask again.
        DamagedFileError: a file isn't what was written, or holds what no drain can have written.
        OSError: the disk can't be read.
    """
    folder = layout.shard_folder(lake.root, layout.RAW, day, shard)
    raw = catalog.names(folder)
    path = layout.consolidated_file(lake.root, day, shard)
    seen, published = (None, None) if raw_alone else _published_at(path)
    if published is None and not raw_alone and consolidated.current(lake, day, shard) is not None:
        raise ReplacedError(f"day {day.isoformat()} was consolidated meanwhile")
    pending = [
        (one, *_of_fragment(one, fingerprint(one)))
        for one in _pending(folder, raw, published.included if published else frozenset())
    ]
    chosen = [(one, seen_so, _chosen(groups, wanted)) for one, seen_so, groups in pending]
    # A consolidated file has each key once: alone it needs no arrivals.
    identified |= wanted.cutoffs is not None or any(groups for *_, groups in chosen)
    found: list[Readings] = []
    if published is not None and seen is not None:
        groups = _chosen(published.groups, wanted)
        found += _read(path, seen, groups, wanted, identified=identified, footer=published.footer)
    for fragment, seen_so, groups in chosen:
        found += _read(fragment, seen_so, groups, wanted, identified=True)
    return found


def in_table(rows: pa.Table, wanted: Wanted) -> list[Readings]:
    """The wanted ones of rows in memory (HEARTBEATS columns, maybe more)."""
    rows = rows.select(HEARTBEATS.names)
    for at in (_USER, HEARTBEATS.get_field_index("device_id")):
        rows = rows.set_column(at, rows.schema.names[at], rows.column(at).dictionary_encode())
    return list(_matching(rows, wanted))


def _published_at(path: Path) -> tuple[Fingerprint | None, _Published | None]:
    try:
        return _of_published(path, fingerprint(path))
    except FileNotFoundError:
        return None, None


@remembered(512)
def _of_published(path: Path, _seen: Fingerprint) -> tuple[Fingerprint, _Published]:
    seen, footer = verified.whole(path)
    metadata = parquet.metadata_in(footer, path, ConsolidatedMetadata)
    return seen, _Published(footer, frozenset(metadata.fragments), _groups(footer))


@remembered(50_000)
def _of_fragment(path: Path, _seen: Fingerprint) -> tuple[Fingerprint, tuple[_Group, ...]]:
    seen, footer = verified.whole(path)
    fragments.judge_footer(footer, path)
    return seen, _groups(footer)


@lru_cache(maxsize=64)
def _pending(folder: Path, raw: frozenset[str], included: frozenset[str]) -> tuple[Path, ...]:
    """Fragments that the consolidated file doesn't include."""
    return tuple(folder / name for name in sorted(raw - included) if FragmentName.parse(name))


def _groups(footer: pq.FileMetaData) -> tuple[_Group, ...]:
    found = []
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        users = group.column(_USER).statistics
        times = group.column(_TIMESTAMP).statistics
        found.append(
            _Group(
                (users.min, users.max) if users is not None and users.has_min_max else None,
                (days.ms_of(times.min), days.ms_of(times.max))
                if times is not None and times.has_min_max
                else None,
            )
        )
    return tuple(found)


def _judge(found: Readings, path: Path) -> None:
    """Check rows against the record's bounds before they are answered."""
    fragments.require_bpm(found.heart_rate.min(), found.heart_rate.max(), path)
    shortest, longest = ID_LENGTH
    if not all(shortest <= len(device) <= longest for device in found.devices):
        raise parquet.damaged(path, "device_id is out of bounds: no drain wrote it")


def _chosen(groups: tuple[_Group, ...], wanted: Wanted) -> list[int]:
    return [number for number, group in enumerate(groups) if group.may_hold(wanted)]


def _read(
    path: Path,
    seen: Fingerprint,
    groups: list[int],
    wanted: Wanted,
    *,
    identified: bool,
    footer: pq.FileMetaData | None = None,
) -> Iterator[Readings]:
    """Wanted rows of these row groups; with arrivals where they are to be `identified`."""
    if not groups:
        return
    columns = [*_PLAIN, *ARRIVAL] if identified else [*_PLAIN]
    with verified.reopened(path, seen, ("user_id", "device_id"), footer) as file:
        for number in groups:
            rows = file.read_row_group(number, columns=columns, use_threads=False)
            for found in _matching(rows, wanted):
                _judge(found, path)
                yield found


def _matching(rows: pa.Table, wanted: Wanted) -> Iterator[Readings]:
    for batch in rows.to_batches():
        devices = batch["device_id"]
        mine = _positions(_are(batch["user_id"], wanted.user_id))
        at = batch["timestamp"].view(pa.int64()).to_numpy()[mine]
        chosen = (at >= wanted.start_ms) & (at < wanted.end_ms)
        if wanted.device_id is not None:
            chosen &= _are(devices, wanted.device_id)[mine]
        found = Readings(
            at,
            batch["heart_rate"].to_numpy()[mine],
            *_in_use(devices.indices.to_numpy()[mine], devices.dictionary),
            tuple(batch[name].to_numpy()[mine] for name in ARRIVAL if name in batch.schema.names),
        ).taken(_positions(chosen))
        if wanted.cutoffs is not None:
            found = found.taken(~tombstones.reached_by(found.arrival, wanted.cutoffs))
        if len(found):
            yield found


def _positions(flags: npt.NDArray[np.bool_]) -> Integers | slice:
    """Positions of true flags; in a sorted file that is one range, which is sliced, not copied."""
    found = np.flatnonzero(flags)
    if len(found) and found[-1] - found[0] + 1 == len(found):
        return slice(int(found[0]), int(found[-1]) + 1)
    return found


def _in_use(codes: Integers, names: pa.Array) -> tuple[Integers, list[str]]:
    """Codes and names of devices; of very many only those that occur."""
    if len(names) <= _FEW_DEVICES:
        return codes, names.to_pylist()
    used, codes = np.unique(codes, return_inverse=True)
    return codes, names.take(pa.array(used)).to_pylist()


def _are(values: pa.DictionaryArray, value: str) -> npt.NDArray[np.bool_]:
    same: npt.NDArray[np.bool_] = (
        values.indices.to_numpy() == pc.index(values.dictionary, value).as_py()
    )
    return same
