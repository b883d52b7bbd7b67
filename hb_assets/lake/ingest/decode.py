"""Decodes entries (NDJSON) into a table of heartbeats and one of rejected records.

Entries of our own appends are read as `canonical` lines. Other entries, and those where that fails,
are read line by line by `record`, which alone defines what is valid. Entries that may kill the
process are decoded by `isolation`.
"""

from __future__ import annotations

import codecs
import io
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hb_assets.core import record
from hb_assets.core.days import LAST_MS, MS_PER_DAY
from hb_assets.core.record import Heartbeat, Refusal, TimeBounds
from hb_assets.core.schema import HEARTBEATS, QUARANTINE, VALUES
from hb_assets.core.settings import Settings
from hb_assets.lake.ingest import canonical
from hb_assets.lake.storage.order import order_of


class Delivery(Protocol):
    """One entry as the buffer hands it out."""

    @property
    def shard(self) -> int:
        """Source shard: of the stream that it came by."""

    @property
    def ms(self) -> int:
        """First part of the entry id: arrival, epoch milliseconds."""

    @property
    def seq(self) -> int:
        """Second part of the entry id."""

    @property
    def data(self) -> bytes | None:
        """The field `data`; None where the entry has none."""

    @property
    def own(self) -> int | None:
        """Heartbeats that our own append counted; None for an external producer's entry."""

    @property
    def deliveries(self) -> int:
        """How often it was handed out."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """The contents of a batch of entries.

    Attributes:
        rows: HEARTBEATS columns, then `shard` (the user's) and `day` (days since 1970); sorted by
            arrival_shard, day, shard and then as consolidated files are.
        rejected: QUARANTINE columns.
        counts: records per entry, in the order of the entries; each is in `rows` or `rejected`.
        unknown_fields: fields of external entries that were ignored (our own appends write none).
    """

    rows: pa.Table
    rejected: pa.Table
    counts: list[int]
    unknown_fields: int


ROWS: pa.Schema = pa.schema(
    [*HEARTBEATS, pa.field("shard", pa.int16()), pa.field("day", pa.int32())]
)

_MOST_LOTS = 4
_LEAST_LOT = 2**20
"""Bytes of NDJSON that are worth a piece of their own."""
_CHUNK = 50_000
"""Records that Python holds as objects at a time."""

_NAME = pa.dictionary(pa.int32(), pa.string())
_FOUND: pa.Schema = pa.schema(
    [
        ("entry", pa.int32()),
        ("pos", pa.int32()),
        ("user_id", _NAME),
        ("device_id", _NAME),
        ("instant", pa.int64()),
        *VALUES,
    ]
)


def decode(entries: Sequence[Delivery], settings: Settings) -> Decoded:
    """Read a batch of entries. A timestamp's "too far ahead" is measured from the entry's id."""
    return _decode(entries, [entry.data or b"" for entry in entries], 0, settings)


def pieces(
    entries: Sequence[Delivery], settings: Settings, *, careful: bool = False
) -> Iterator[Decoded]:
    """As `decode`, in several pieces, so that one can be written while the next one is decoded.

    Their `counts` are to be added up. Entries of one source shard are in one piece, since each
    piece makes fragments of its own.

    Args:
        entries: together within DRAIN_MAX_ROWS and DRAIN_MAX_BYTES, as a claim's are; a single one
            of any size is cut up.
        settings: those bounds, and what is valid.
        careful: leave nothing to the columnar reading: slower, and proof against its faults.
    """
    if len(entries) != 1 or _is_empty(entries[0]):
        for lot in _lots(entries):
            members = [entries[index] for index in lot]
            texts = [entry.data or b"" for entry in members]
            decoded = _decode(members, texts, 0, settings, careful=careful)
            counts = np.zeros(len(entries), np.int64)
            counts[lot] = decoded.counts
            yield replace(decoded, counts=counts.tolist())
        return
    for first, text in _cut(entries[0], settings):
        yield _decode(entries, [text], first, settings, careful=careful)


def refused(entry: Delivery, refusal: Refusal, settings: Settings) -> Iterator[Decoded]:
    """Reject an entry as a whole, in pieces, for the quarantine.

    It is taken apart by nothing but its line ends: each line that isn't blank is one record at the
    position that it would have had, so that the ledger counts it as if it had been decoded.
    """
    if _is_empty(entry):
        yield _refused(entry, [(0, entry.data or b"")], _NO_DATA, settings)
        return
    for first, text in _cut(entry, settings):
        lines = enumerate(text.split(b"\n"), first)
        records = ((pos, line) for pos, line in lines if not _is_blank(line))
        yield _refused(entry, records, refusal, settings)


def _refused(
    entry: Delivery, lines: Iterable[tuple[int, bytes]], refusal: Refusal, settings: Settings
) -> Decoded:
    rejects = _Rejects(_Batch.by_arrival([entry], [b""], 0, settings)[1])
    for pos, line in lines:
        rejects.add(0, pos, line, refusal)
    return Decoded(ROWS.empty_table(), rejects.table(), [len(rejects.indexes)], 0)


def _cut(entry: Delivery, settings: Settings) -> Iterator[tuple[int, bytes]]:
    """An entry's text in pieces of whole lines, each with the position of its first line."""
    data = entry.data or b""
    first = start = 0
    size = settings.drain_max_bytes
    while start < len(data):
        size = min(2 * size, settings.drain_max_bytes)
        while size > 1 and data.count(b"\n", start, start + size) >= settings.drain_max_rows:
            size //= 2
        end = len(data)
        if start + size < end:
            last = data.rfind(b"\n", start, start + size)
            following = data.find(b"\n", start + size) if last < 0 else last
            end = following if following >= 0 else end
        yield first, data[start:end]
        first += data.count(b"\n", start, end) + 1
        start = end + 1


def _lots(entries: Sequence[Delivery]) -> list[npt.NDArray[np.intp]]:
    """Entries in lots of about the same size, by source shard; a small batch is one lot."""
    sizes = np.array([len(entry.data or b"") for entry in entries], np.int64)
    sources = np.array([entry.shard for entry in entries], np.int64)
    lots = min(_MOST_LOTS, int(sizes.sum()) // _LEAST_LOT)
    if lots < 2:
        return [np.arange(len(entries))]
    of_source = np.bincount(sources, sizes)
    lot_of_source = (np.cumsum(of_source) - of_source) * lots // of_source.sum()
    lot = lot_of_source[sources]
    return [np.flatnonzero(lot == number) for number in np.unique(lot)]


def _decode(
    entries: Sequence[Delivery],
    texts: Sequence[bytes],
    first: int,
    settings: Settings,
    *,
    careful: bool = False,
) -> Decoded:
    """Read these texts of the entries; their first lines are at position `first`."""
    order, batch = _Batch.by_arrival(entries, texts, first, settings)
    rows, rejects = _Rows(), _Rejects(batch)
    whole = []
    for index, entry in enumerate(batch.entries):
        if _is_empty(entry):
            rejects.add(index, 0, batch.texts[index], _NO_DATA)
        else:
            whole.append(index)
    found, left = ([], whole) if careful else _canonical(batch, whole)
    bounds = settings.time_bounds
    unknown_fields = sum(_read(batch, index, bounds, rows, rejects) for index in left)
    sound = _together([*found, *rows.tables()])
    read = np.concatenate([sound["entry"].to_numpy(), np.array(rejects.indexes, np.int32)])
    counts = np.empty(len(entries), np.int64)
    counts[order] = np.bincount(read, minlength=len(entries))
    return Decoded(_sorted(sound, batch), rejects.table(), counts.tolist(), unknown_fields)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Entries and their texts, those of each source shard in the order of arrival."""

    entries: Sequence[Delivery]
    texts: Sequence[bytes]
    first: int
    settings: Settings
    ms: npt.NDArray[np.uint64]
    seq: npt.NDArray[np.uint64]
    shard: npt.NDArray[np.int16]

    @classmethod
    def by_arrival(
        cls, entries: Sequence[Delivery], texts: Sequence[bytes], first: int, settings: Settings
    ) -> tuple[npt.NDArray[np.intp], Self]:
        """Where each of its entries stands in the entries that are given, and the batch."""
        ms = np.array([entry.ms for entry in entries], np.uint64)
        seq = np.array([entry.seq for entry in entries], np.uint64)
        shard = np.array([entry.shard for entry in entries], np.int16)
        order = np.lexsort((seq, ms, shard))
        return order, cls(
            [entries[index] for index in order],
            [texts[index] for index in order],
            first,
            settings,
            *(ms[order], seq[order], shard[order]),
        )

    @property
    def latest(self) -> npt.NDArray[np.int64]:
        """The latest accepted timestamp of each entry."""
        now_ms = np.minimum(self.ms, np.uint64(LAST_MS)).astype(np.int64)
        return np.minimum(now_ms + self.settings.time_bounds.future_ms, LAST_MS)


_NO_DATA = Refusal(
    "record", "no_data", "the entry has no field `data` with NDJSON in it; see docs/wire-format.md"
)


def _is_empty(entry: Delivery) -> bool:
    return not entry.data or _is_blank(entry.data)


def _is_blank(text: bytes) -> bool:
    """Whether a text is blank, a byte order mark aside."""
    text = text.removeprefix(codecs.BOM_UTF8)
    return not text or text.isspace()


def _canonical(batch: _Batch, indexes: Sequence[int]) -> tuple[list[pa.Table], list[int]]:
    """Split entries into those that are canonical throughout, and the others.

    Only our own appends are tried: an entry that turns out to be something else is read twice.
    """
    own = np.array([index for index in indexes if batch.entries[index].own is not None], np.int32)
    texts = [batch.texts[index] for index in own]
    counts = np.array([text.count(b"\n") + 1 for text in texts], np.int64)
    lines = canonical.read(b"\n".join(texts), int(counts.sum())) if texts else None
    if lines is None:
        return [], list(indexes)
    at = np.repeat(np.arange(len(own), dtype=np.int32), counts)
    pos = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts) + batch.first
    if len(lines.number) < len(at):
        at, pos = at[lines.number], pos[lines.number]
    entry = own[at]
    sound = (lines.instant >= batch.settings.time_bounds.start_ms) & (
        lines.instant <= batch.latest[entry]
    )
    found = pa.Table.from_arrays(
        [
            pa.array(entry),
            pa.array(pos, pa.int32()),
            lines.user_id,
            lines.device_id,
            pa.array(lines.instant),
            *lines.values,
        ],
        schema=_FOUND,
    )
    if np.count_nonzero(sound) == counts.sum():
        return [found], [index for index in indexes if batch.entries[index].own is None]
    whole = np.bincount(at[sound], minlength=len(own)) == counts
    return [found.filter(pa.array(whole[at]))], sorted({*indexes} - {*own[whole].tolist()})


def _read(batch: _Batch, index: int, bounds: TimeBounds, rows: _Rows, rejects: _Rejects) -> int:
    """Read an entry line by line; returns how many unknown fields it has."""
    now_ms = min(batch.entries[index].ms, LAST_MS)
    unknown_fields, first, text = 0, batch.first, io.BytesIO(batch.texts[index])
    while lines := list(islice(text, _CHUNK)):
        found, doubtful = record.parse_plain(lines, now_ms, bounds)
        positions: Iterable[int] = range(first, first + len(lines))
        if doubtful:
            positions = sorted({*positions}.difference(first + number for number in doubtful))
        rows.add(index, positions, found)
        for number in doubtful:
            line = lines[number].removesuffix(b"\n")
            if _is_blank(line):
                continue
            result, unknown = record.parse(line, now_ms, bounds)
            if isinstance(result, Refusal):
                rejects.add(index, first + number, line, result)
            else:
                rows.add(index, (first + number,), (result,))
                unknown_fields += len(unknown)
        first += len(lines)
    return unknown_fields


def _together(parts: Sequence[pa.Table]) -> pa.Table:
    """Join parts by entry and position, with one dictionary for each column of names."""
    parts = [part for part in parts if part.num_rows] or [_FOUND.empty_table()]
    found = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
    entry, pos = found["entry"].to_numpy(), found["pos"].to_numpy()
    ahead = (entry[1:] > entry[:-1]) | ((entry[1:] == entry[:-1]) & (pos[1:] > pos[:-1]))
    return found if ahead.all() else found.take(pa.array(np.lexsort((pos, entry))))


def _sorted(found: pa.Table, batch: _Batch) -> pa.Table:
    """The decoded rows with identity, shard and day, as in `Decoded.rows`."""
    if found.num_rows == 0:
        return ROWS.empty_table()
    entry, pos = found["entry"].to_numpy(), found["pos"].to_numpy()
    users, devices = found["user_id"].chunk(0), found["device_id"].chunk(0)
    user, device = users.indices.to_numpy(), devices.indices.to_numpy()
    shards = _shards(users.dictionary, batch.settings)
    instant, source = found["instant"].to_numpy(), batch.shard[entry]
    day, of_day = np.divmod(instant, MS_PER_DAY)
    user_rank = _ranks(np.lexsort((_ranks(_by_name(users)), shards)))
    device_rank = _ranks(_by_name(devices))
    # what is equal stays as it is: by arrival
    order = order_of([source, day, user_rank[user], of_day, device_rank[device]])
    user, entry = user[order], entry[order]
    return pa.Table.from_arrays(
        [
            users.dictionary.take(pa.array(user)),
            devices.dictionary.take(pa.array(device[order])),
            pa.array(instant[order]).cast(HEARTBEATS.field("timestamp").type),
            *(found[field.name].chunk(0).take(pa.array(order)) for field in VALUES),
            *_arrivals(batch, entry, pos[order]),
            pa.array(shards[user]),
            pa.array(day[order], pa.int32()),
        ],
        schema=ROWS,
    )


def _shards(users: pa.StringArray, settings: Settings) -> npt.NDArray[np.int16]:
    """The shard of each user, who is hashed once, not for each row."""
    return np.array(record.shards_of(users.to_pylist(), settings.shards), np.int16)


def _by_name(names: pa.DictionaryArray) -> npt.NDArray[np.uint64]:
    order: npt.NDArray[np.uint64] = pa.compute.array_sort_indices(names.dictionary).to_numpy()
    return order


def _ranks(order: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The rank of each place in an order of all."""
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


def _arrivals(batch: _Batch, entry: npt.NDArray[Any], pos: Any) -> list[pa.Array]:
    return [
        pa.array(batch.ms[entry]),
        pa.array(batch.seq[entry]),
        pa.array(batch.shard[entry]),
        pa.array(pos, pa.int32()),
    ]


class _Rows:
    """Decoded heartbeats, gathered in columns: as objects they take ten times the room."""

    def __init__(self) -> None:
        self._tables: list[pa.Table] = []
        self._clear()

    def _clear(self) -> None:
        self._indexes, self._positions = array("i"), array("i")
        self._heartbeats: list[Heartbeat] = []

    def add(self, index: int, positions: Iterable[int], heartbeats: Sequence[Heartbeat]) -> None:
        self._indexes.extend([index] * len(heartbeats))
        self._positions.extend(positions)
        self._heartbeats.extend(heartbeats)
        if len(self._heartbeats) >= _CHUNK:
            self._close_chunk()

    def tables(self) -> list[pa.Table]:
        self._close_chunk()
        return self._tables

    def _close_chunk(self) -> None:
        columns = [
            pa.array(self._indexes, pa.int32()),
            pa.array(self._positions, pa.int32()),
            pa.array(
                [heartbeat.user_id for heartbeat in self._heartbeats], pa.string()
            ).dictionary_encode(),
            pa.array(
                [heartbeat.device_id for heartbeat in self._heartbeats], pa.string()
            ).dictionary_encode(),
            pa.array([heartbeat.timestamp_ms for heartbeat in self._heartbeats], pa.int64()),
            *(
                pa.array(
                    [getattr(heartbeat, field.name) for heartbeat in self._heartbeats], field.type
                )
                for field in VALUES
            ),
        ]
        self._tables.append(pa.Table.from_arrays(columns, schema=_FOUND))
        self._clear()


class _Rejects:
    """Rejected records, gathered in columns: there may be millions of tiny ones."""

    def __init__(self, batch: _Batch) -> None:
        self._batch = batch
        self.indexes = array("i")
        self._positions = array("i")
        self._raws: list[bytes] = []
        self._refusals: list[Refusal] = []
        self._known: dict[Refusal, Refusal] = {}
        self._chunks: list[pa.Table] = []
        self._done = 0
        self._now_ms = time.time_ns() // 1_000_000

    def add(self, index: int, pos: int, raw: bytes, refusal: Refusal) -> None:
        self.indexes.append(index)
        self._positions.append(pos)
        self._raws.append(raw)
        self._refusals.append(self._known.setdefault(refusal, refusal))
        if len(self._raws) == _CHUNK:
            self._close_chunk()

    def table(self) -> pa.Table:
        self._close_chunk()
        return pa.concat_tables([QUARANTINE.empty_table(), *self._chunks])

    def _close_chunk(self) -> None:
        indexes = np.array(self.indexes[self._done :], np.int64)
        attempts = np.array([entry.deliveries for entry in self._batch.entries], np.int32)[indexes]
        columns = [
            pa.array(self._raws, pa.binary()),
            pa.array([refusal.reason for refusal in self._refusals], pa.string()),
            pa.array([refusal.message for refusal in self._refusals], pa.string()),
            *_arrivals(self._batch, indexes, self._positions[self._done :]),
            pa.array(attempts, pa.int32()),
            pa.array([self._now_ms] * len(indexes), pa.int64()).cast(
                QUARANTINE.field("quarantined_at").type
            ),
        ]
        self._chunks.append(pa.Table.from_arrays(columns, schema=QUARANTINE))
        self._done = len(self.indexes)
        self._raws, self._refusals = [], []
