"""Entries into columns: NDJSON text to a table of heartbeats, and what can't be used.

Belongs here: the columnar reading of many records at once. Entries of our own appends are read as
`canonical` lines. Of other entries, and of those where that fails, DuckDB takes every line that is
plainly valid; any other line goes to `record.parse`, whose word is final, so that validity is
defined once and one bad row never stops its entry. Doesn't belong here: where rows are written, and
decoding what may kill the process (`isolation`).
"""

from __future__ import annotations

import codecs
import io
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hb_assets import record
from hb_assets.days import LAST_MS, MS_PER_DAY
from hb_assets.lake import canonical
from hb_assets.lake.columns import order_of
from hb_assets.lake.engine import engine
from hb_assets.record import BPM_RANGE, ID_LENGTH, Heartbeat, Refusal
from hb_assets.schema import HEARTBEATS, QUARANTINE
from hb_assets.settings import Settings


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
        """Heartbeats that our own append counted; None for an entry of somebody else's."""

    @property
    def deliveries(self) -> int:
        """How often it was handed out."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """What a batch of entries held.

    Attributes:
        rows: HEARTBEATS columns, then `shard` (the user's) and `day` (days since 1970); sorted by
            arrival_shard, day, shard and then as consolidated files are.
        rejected: QUARANTINE columns.
        counts: records per entry, in the order of the entries; each is in `rows` or `rejected`.
        unknown_fields: fields of foreign entries that were ignored (our own appends write none).
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
"""Lines that are handled in Python at a time."""
_SCAN = 64
"""Entries that one thread reads in one go."""
_ENTRIES = pa.schema(
    [
        ("entry", pa.int32()),
        ("latest", pa.int64()),
        ("data", pa.string()),
    ]
)

_NAME = pa.dictionary(pa.int32(), pa.string())
_FOUND: pa.Schema = pa.schema(
    [
        ("entry", pa.int32()),
        ("pos", pa.int32()),
        ("user_id", _NAME),
        ("device_id", _NAME),
        ("instant", pa.int64()),
        ("bpm", pa.int16()),
    ]
)

# Only a line that is sound beyond doubt is taken here; what is false or null is read again, by
# record.parse. Ids with a backslash are left to it as well: escapes are rare and easy to get wrong.
# So is a line that names an unknown field, or one twice (DuckDB takes the first value, msgspec the
# last), or ends with a comma, which DuckDB forgives: all of these have more than three commas. Ids
# may have them too: then the number of quotes says that there are no other names.
_DECODE = r"""
WITH lines AS (
    SELECT entry, latest,
        CAST($first + unnest(range(len(parts))) AS INTEGER) AS pos, unnest(parts) AS line
    FROM (SELECT entry, latest, string_split(data, chr(10)) AS parts FROM entries)
), read AS (
    SELECT entry, latest, pos, line,
        CASE WHEN json_valid(line) THEN from_json(line, $shape) END AS r,
        CASE WHEN line LIKE '%,%,%,%,%' AND NOT regexp_matches(line, ',\s*\}\s*$')
        THEN length(line) - length(replace(line, '"', '')) END AS quotes,
        line NOT LIKE '%,%,%,%,%' AS plain
    FROM lines
), texts AS (
    SELECT entry, latest, pos, line, quotes, plain,
        CAST(r.user_id AS VARCHAR) AS user_text, CAST(r.device_id AS VARCHAR) AS device_text,
        CAST(r.timestamp AS VARCHAR) AS time_text, CAST(r.timestamp_ms AS VARCHAR) AS ms_text,
        CAST(r.heart_rate AS VARCHAR) AS bpm_text
    FROM read
), typed AS (
    SELECT *, TRY_CAST(bpm_text AS SMALLINT) AS bpm,
        CASE
            WHEN ms_text IS NOT NULL THEN TRY_CAST(ms_text AS BIGINT)
            WHEN regexp_full_match(time_text, $instant)
            THEN epoch_us(TRY_CAST(trim(time_text, '"') AS TIMESTAMPTZ)) // 1000
        END AS instant
    FROM texts
), judged AS (
    SELECT *, coalesce(
            starts_with(user_text, '"') AND starts_with(device_text, '"')
            AND NOT contains(user_text, chr(92)) AND NOT contains(device_text, chr(92))
            AND length(user_text) - 2 BETWEEN $shortest AND $longest
            AND length(device_text) - 2 BETWEEN $shortest AND $longest
            AND bpm BETWEEN $lowest AND $highest AND CAST(bpm AS VARCHAR) = bpm_text
            AND (ms_text IS NULL OR CAST(instant AS VARCHAR) = ms_text)
            AND instant BETWEEN $start AND latest
            AND (plain OR quotes = CASE WHEN ms_text IS NULL THEN 14 ELSE 12 END),
        false) AS sound
    FROM typed
)
SELECT sound, entry, pos,
    CASE WHEN sound THEN user_text[2:-2] END AS user_id,
    CASE WHEN sound THEN device_text[2:-2] END AS device_id,
    instant, bpm,
    CASE WHEN NOT sound THEN line END AS line
FROM judged
"""
_SHAPE = '{"user_id":"JSON","device_id":"JSON","timestamp":"JSON","timestamp_ms":"JSON","heart_rate":"JSON"}'
_INSTANT = (
    r'"\d{4}-\d{2}-\d{2}[T ]([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?'
    r'(Z|[+-](0\d|1[0-4]):[0-5]\d)?"'
)

_SHARDS = "SELECT CAST(md5_number_lower(name) % $shards AS SMALLINT) AS shard FROM names"
_FEW_USERS = 4096
"""As many are hashed faster than an engine is asked."""


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
    """An entry that goes to the quarantine as a whole, in pieces.

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
    rejects = _Rejects(batch)
    whole = []
    for index, entry in enumerate(batch.entries):
        if _is_empty(entry):
            rejects.add(index, 0, batch.texts[index], _NO_DATA)
        else:
            whole.append(index)
    parts: list[pa.Table] = []
    doubtful: Iterable[tuple[int, int, bytes]]
    if careful:
        doubtful = _lines(batch, whole)
    else:
        parts, doubtful = _read(batch, whole)
    unknown_fields = 0
    found: list[tuple[int, int, Heartbeat]] = []
    for index, pos, line in doubtful:
        if _is_blank(line):
            continue
        now_ms = min(batch.entries[index].ms, LAST_MS)
        result, unknown = record.parse(line, now_ms, settings.time_bounds)
        if isinstance(result, Refusal):
            rejects.add(index, pos, line, result)
        else:
            found.append((index, pos, result))
            unknown_fields += len(unknown)
    sound = _together([*parts, _parsed(found)])
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
        """Of each entry the latest timestamp that is accepted."""
        now_ms = np.minimum(self.ms, np.uint64(LAST_MS)).astype(np.int64)
        return np.minimum(now_ms + self.settings.time_bounds.future_ms, LAST_MS)


_NO_DATA = Refusal(
    "record", "no_data", "the entry has no field `data` with NDJSON in it; see docs/wire-format.md"
)


def _is_empty(entry: Delivery) -> bool:
    return not entry.data or _is_blank(entry.data)


def _is_blank(text: bytes) -> bool:
    """Whether there is nothing in it, a byte order mark aside."""
    text = text.removeprefix(codecs.BOM_UTF8)
    return not text or text.isspace()


def _read(
    batch: _Batch, indexes: Sequence[int]
) -> tuple[list[pa.Table], Iterator[tuple[int, int, bytes]]]:
    """Sound lines of these entries, and those that nothing vouches for."""
    found, left = _canonical(batch, indexes)
    if not left:
        return found, iter(())
    with engine(batch.settings) as connection:
        read, unread = _read_all(connection, batch, left)
    sound = read.filter(read["sound"]).select(_FOUND.names)
    return [*found, _encoded(sound)], _doubtful(read, batch, unread)


def _canonical(batch: _Batch, indexes: Sequence[int]) -> tuple[list[pa.Table], list[int]]:
    """Entries that are canonical throughout, and the entries that aren't.

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
            pa.array(lines.bpm),
        ],
        schema=_FOUND,
    )
    if np.count_nonzero(sound) == counts.sum():
        return [found], [index for index in indexes if batch.entries[index].own is None]
    whole = np.bincount(at[sound], minlength=len(own)) == counts
    return [found.filter(pa.array(whole[at]))], sorted({*indexes} - {*own[whole].tolist()})


def _read_all(
    connection: duckdb.DuckDBPyConnection, batch: _Batch, indexes: Sequence[int]
) -> tuple[pa.Table, list[int]]:
    """Lines of these entries in columns, and the entries that can't be read so.

    What fails in company (one entry that isn't UTF-8, or takes more memory than there is) is tried
    in halves, down to the entry that fails alone: `record.parse` reads that one line by line.
    """
    try:
        return _read_some(connection, batch, indexes), []
    except (UnicodeDecodeError, MemoryError, duckdb.Error, pa.ArrowException):
        half = len(indexes) // 2
        if half == 0:
            return _read_some(connection, batch, []), list(indexes)
    first, unread = _read_all(connection, batch, indexes[:half])
    second, more = _read_all(connection, batch, indexes[half:])
    return pa.concat_tables([first, second]), unread + more


def _read_some(
    connection: duckdb.DuckDBPyConnection, batch: _Batch, indexes: Sequence[int]
) -> pa.Table:
    texts, settings = batch.texts, batch.settings
    table = pa.Table.from_arrays(
        [
            pa.array(indexes, pa.int32()),
            pa.array(batch.latest[indexes], pa.int64()),
            pa.array([texts[index].decode() for index in indexes], pa.string()),
        ],
        schema=_ENTRIES,
    )
    # DuckDB scans an Arrow table by its chunks, each in one thread.
    chunks = pa.Table.from_batches(table.to_batches(_SCAN), table.schema)
    connection.register("entries", chunks)
    parameters = {
        "first": batch.first,
        "shape": _SHAPE,
        "instant": _INSTANT,
        "shortest": ID_LENGTH[0],
        "longest": ID_LENGTH[1],
        "lowest": BPM_RANGE[0],
        "highest": BPM_RANGE[1],
        # before 1970 DuckDB cuts a fraction off towards 1970, record.parse always downwards
        "start": max(settings.time_bounds.start_ms, 1),
    }
    return connection.sql(_DECODE, params=parameters).to_arrow_table()


def _doubtful(
    read: pa.Table, batch: _Batch, unread: Sequence[int]
) -> Iterator[tuple[int, int, bytes]]:
    """Entry, position and text of each line that DuckDB doesn't vouch for, a chunk at a time."""
    lines = read.filter(pa.compute.invert(read["sound"])).select(["entry", "pos", "line"])
    for chunk in lines.to_batches(_CHUNK):
        for index, pos, line in zip(*(column.to_pylist() for column in chunk.columns), strict=True):
            yield index, pos, line.encode()
    yield from _lines(batch, unread)


def _lines(batch: _Batch, indexes: Sequence[int]) -> Iterator[tuple[int, int, bytes]]:
    """Entry, position and text of each line of these entries."""
    for index in indexes:
        for pos, raw in enumerate(io.BytesIO(batch.texts[index]), batch.first):
            yield index, pos, raw.removesuffix(b"\n")


def _parsed(found: list[tuple[int, int, Heartbeat]]) -> pa.Table:
    beats = [beat for _, _, beat in found]
    columns = [
        pa.array([index for index, _, _ in found], pa.int32()),
        pa.array([pos for _, pos, _ in found], pa.int32()),
        pa.array([beat.user_id for beat in beats], pa.string()).dictionary_encode(),
        pa.array([beat.device_id for beat in beats], pa.string()).dictionary_encode(),
        pa.array([beat.timestamp_ms for beat in beats], pa.int64()),
        pa.array([beat.heart_rate for beat in beats], pa.int16()),
    ]
    return pa.Table.from_arrays(columns, schema=_FOUND)


def _encoded(sound: pa.Table) -> pa.Table:
    """Sound lines with names in dictionaries."""
    for at in (_FOUND.get_field_index(name) for name in ("user_id", "device_id")):
        column = sound.column(at).dictionary_encode()
        sound = sound.set_column(at, _FOUND.field(at), column)
    return sound.cast(_FOUND)


def _together(parts: Sequence[pa.Table]) -> pa.Table:
    """All lines that were found, by entry and position; one dictionary for each column of names."""
    parts = [part for part in parts if part.num_rows] or [_FOUND.empty_table()]
    found = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
    entry, pos = found["entry"].to_numpy(), found["pos"].to_numpy()
    ahead = (entry[1:] > entry[:-1]) | ((entry[1:] == entry[:-1]) & (pos[1:] > pos[:-1]))
    return found if ahead.all() else found.take(pa.array(np.lexsort((pos, entry))))


def _sorted(found: pa.Table, batch: _Batch) -> pa.Table:
    """The rows that were found, with identity, shard and day, as `Decoded.rows` has them."""
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
            pa.array(found["bpm"].to_numpy()[order]),
            *_arrivals(batch, entry, pos[order]),
            pa.array(shards[user]),
            pa.array(day[order], pa.int32()),
        ],
        schema=ROWS,
    )


def _shards(users: pa.StringArray, settings: Settings) -> npt.NDArray[np.int16]:
    """The shard of each user, who is hashed once, not for each row."""
    if len(users) > _FEW_USERS:
        with suppress(duckdb.Error), engine(settings) as connection:
            connection.register("names", pa.table({"name": users}))
            found = connection.sql(_SHARDS, params={"shards": settings.shards}).to_arrow_table()
            shards: npt.NDArray[np.int16] = found["shard"].to_numpy()
            return shards
    of_each = [record.shard_of(user, settings.shards) for user in users.to_pylist()]
    return np.array(of_each, np.int16)


def _by_name(names: pa.DictionaryArray) -> npt.NDArray[np.uint64]:
    order: npt.NDArray[np.uint64] = pa.compute.array_sort_indices(names.dictionary).to_numpy()
    return order


def _ranks(order: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The place of each in an order of all."""
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


class _Rejects:
    """Records that can't be used, gathered in columns: there may be millions of tiny ones."""

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
