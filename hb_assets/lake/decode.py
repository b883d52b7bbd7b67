"""Entries into columns: NDJSON text to a table of heartbeats, and what can't be used.

Belongs here: the columnar reading of many records at once. DuckDB takes every line that is
plainly valid; any other line goes to `record.parse`, whose word is final, so that validity is
defined once and one bad row never stops its entry. Doesn't belong here: where rows are written, and
decoding what may kill the process (`isolation`).
The columnar path forgives a few slips of syntax that `record.parse` doesn't: a trailing comma, and
`NaN`, `1e999` or deep nesting in fields that are ignored.
"""

from __future__ import annotations

import errno
import io
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import duckdb
import numpy as np
import pyarrow as pa

from hb_assets import record
from hb_assets.days import LAST_MS, MS_PER_DAY
from hb_assets.lake.engine import engine
from hb_assets.record import BPM_RANGE, ID_LENGTH, Heartbeat, Refusal
from hb_assets.schema import HEARTBEATS, ORDER, QUARANTINE
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

_CHUNK = 50_000
"""Lines that are handled in Python at a time."""
_SCAN = 64
"""Entries that one thread reads in one go."""
_ENTRIES = pa.schema(
    [
        ("entry", pa.int32()),
        ("latest", pa.int64()),
        ("foreign", pa.bool_()),
        ("data", pa.string()),
    ]
)

# Only a line that is sound beyond doubt is taken here; what is false or null is read again, by
# record.parse. Ids with a backslash are left to it as well: escapes are rare and easy to get wrong;
# and foreign lines with more than four fields, so that unknown ones are counted.
_DECODE = r"""
WITH lines AS (
    SELECT entry, latest, "foreign",
        CAST($first + unnest(range(len(parts))) AS INTEGER) AS pos, unnest(parts) AS line
    FROM (SELECT entry, latest, "foreign", string_split(data, chr(10)) AS parts FROM entries)
), read AS (
    SELECT entry, latest, "foreign", pos, line, CASE WHEN json_valid(line) THEN from_json(line, $shape) END AS r
    FROM lines
), texts AS (
    SELECT entry, latest, pos, line,
        CAST(r.user_id AS VARCHAR) AS user_text, CAST(r.device_id AS VARCHAR) AS device_text,
        CAST(r.timestamp AS VARCHAR) AS time_text, CAST(r.timestamp_ms AS VARCHAR) AS ms_text,
        CAST(r.heart_rate AS VARCHAR) AS bpm_text,
        CASE WHEN "foreign" AND r IS NOT NULL THEN len(json_keys(line)) ELSE 4 END AS fields
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
            AND fields = 4,
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

# Each user is hashed once, not each row: that halves the time of this query.
_SORT = f"""
SELECT {", ".join(HEARTBEATS.names)}, users.shard,
    CAST(epoch_ms(timestamp) // {MS_PER_DAY} AS INTEGER) AS day
FROM found JOIN (
    SELECT user_id, CAST(md5_number_lower(user_id) % $shards AS SMALLINT) AS shard
    FROM (SELECT DISTINCT user_id FROM found)
) AS users USING (user_id)
ORDER BY arrival_shard, day, shard, {", ".join(ORDER)}, arrival_ms, arrival_seq, arrival_pos
"""


def decode(entries: Sequence[Delivery], settings: Settings) -> Decoded:
    """Read a batch of entries. A timestamp's "too far ahead" is measured from the entry's id.

    Raises:
        OSError: DuckDB can't spill; the entries are as good as before.
    """
    return _decode(entries, [entry.data or b"" for entry in entries], 0, settings)


def pieces(
    entries: Sequence[Delivery], settings: Settings, *, careful: bool = False
) -> Iterator[Decoded]:
    """As `decode`, in as many pieces as memory asks for; their `counts` are to be added up.

    Args:
        entries: together within DRAIN_MAX_ROWS and DRAIN_MAX_BYTES, as a claim's are; a single one
            of any size is cut up.
        settings: those bounds, and what is valid.
        careful: leave nothing to the columnar reading: slower, and proof against its faults.

    Raises:
        OSError: as `decode`.
    """
    if len(entries) != 1 or _is_empty(entries[0]):
        texts = [entry.data or b"" for entry in entries]
        yield _decode(entries, texts, 0, settings, careful=careful)
        return
    for first, text in _cut(entries[0], settings):
        yield _decode(entries, [text], first, settings, careful=careful)


def refused(entry: Delivery, refusal: Refusal, settings: Settings) -> Iterator[Decoded]:
    """An entry that goes to the quarantine as a whole, in pieces.

    It is taken apart by nothing but its line ends: each line that isn't blank is one record at the
    position that it would have had, so that the ledger counts it as if it had been decoded.
    """
    if _is_empty(entry):
        yield _refused(entry, [(0, entry.data or b"")], _NO_DATA)
        return
    for first, text in _cut(entry, settings):
        lines = enumerate(text.split(b"\n"), first)
        yield _refused(entry, ((pos, line) for pos, line in lines if line.strip()), refusal)


def _refused(entry: Delivery, lines: Iterable[tuple[int, bytes]], refusal: Refusal) -> Decoded:
    rejects = _Rejects([entry])
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


def _decode(
    entries: Sequence[Delivery],
    texts: Sequence[bytes],
    first: int,
    settings: Settings,
    *,
    careful: bool = False,
) -> Decoded:
    """Read these texts of the entries; their first lines are at position `first`."""
    bounds = settings.time_bounds
    rejects = _Rejects(entries)
    found: list[tuple[int, int, Heartbeat]] = []
    unknown_fields = 0
    with engine(settings) as connection:
        batch = _Batch(connection, entries, texts, first, settings)
        whole = [index for index, entry in enumerate(entries) if not _is_empty(entry)]
        read, unread = _read_all(batch, [] if careful else whole)
        sound = read.filter(read["sound"])
        for index in set(range(len(entries))) - set(whole):
            rejects.add(index, 0, texts[index], _NO_DATA)
        for index, pos, line in _doubtful(read, batch, whole if careful else unread):
            if not line.strip():
                continue
            result, unknown = record.parse(line, min(entries[index].ms, LAST_MS), bounds)
            if isinstance(result, Refusal):
                rejects.add(index, pos, line, result)
            else:
                found.append((index, pos, result))
                unknown_fields += unknown
        counts = np.bincount(
            np.concatenate(
                [
                    sound["entry"].to_numpy(),
                    np.array([index for index, _, _ in found], np.int32),
                    np.array(rejects.indexes, np.int32),
                ]
            ),
            minlength=len(entries),
        )
        rows = pa.concat_tables([_sound_rows(sound, entries), _found_rows(found, entries)])
        connection.register("found", rows)
        try:
            sorted_rows = connection.sql(_SORT, params={"shards": settings.shards}).to_arrow_table()
        except duckdb.OutOfMemoryException:
            sorted_rows = _sorted(rows, settings.shards)
        except duckdb.IOException:
            where = str(settings.run_dir)
            raise OSError(errno.EIO, "DuckDB can't spill to disk", where) from None
    return Decoded(sorted_rows.cast(ROWS), rejects.table(), counts.tolist(), unknown_fields)


@dataclass(frozen=True, slots=True)
class _Batch:
    connection: duckdb.DuckDBPyConnection
    entries: Sequence[Delivery]
    texts: Sequence[bytes]
    first: int
    settings: Settings


_NO_DATA = Refusal(
    "record", "no_data", "the entry has no field `data` with NDJSON in it; see docs/wire-format.md"
)


def _latest(entry_ms: int, settings: Settings) -> int:
    return min(min(entry_ms, LAST_MS) + settings.time_bounds.future_ms, LAST_MS)


def _is_empty(entry: Delivery) -> bool:
    return not entry.data or entry.data.isspace()


def _sorted(rows: pa.Table, shards: int) -> pa.Table:
    """As `_SORT` where DuckDB lacks memory and can't spill: slower, and it takes no more of it."""
    users = rows["user_id"].combine_chunks().dictionary_encode()
    shard_of = [record.shard_of(user, shards) for user in users.dictionary.to_pylist()]
    shard = pa.array(shard_of, pa.int16()).take(users.indices)
    day = pa.array(rows["timestamp"].cast(pa.int64()).to_numpy() // MS_PER_DAY, pa.int32())
    table = rows.append_column("shard", shard).append_column("day", day)
    keys = ["arrival_shard", "day", "shard", *ORDER, "arrival_ms", "arrival_seq", "arrival_pos"]
    return table.sort_by([(key, "ascending") for key in keys])


def _read_all(batch: _Batch, indexes: Sequence[int]) -> tuple[pa.Table, list[int]]:
    """Lines of these entries in columns, and the entries that can't be read so.

    What fails in company (one entry that isn't UTF-8, or takes more memory than there is) is tried
    in halves, down to the entry that fails alone: `record.parse` reads that one line by line.
    """
    try:
        return _read(batch, indexes), []
    except (UnicodeDecodeError, MemoryError, duckdb.Error, pa.ArrowException):
        half = len(indexes) // 2
        if half == 0:
            return _read(batch, []), list(indexes)
    first, unread = _read_all(batch, indexes[:half])
    second, more = _read_all(batch, indexes[half:])
    return pa.concat_tables([first, second]), unread + more


def _doubtful(
    read: pa.Table, batch: _Batch, unread: Sequence[int]
) -> Iterator[tuple[int, int, bytes]]:
    """Entry, position and text of each line that DuckDB doesn't vouch for, a chunk at a time."""
    lines = read.filter(pa.compute.invert(read["sound"])).select(["entry", "pos", "line"])
    for chunk in lines.to_batches(_CHUNK):
        for index, pos, line in zip(*(column.to_pylist() for column in chunk.columns), strict=True):
            yield index, pos, line.encode()
    for index in unread:
        for pos, raw in enumerate(io.BytesIO(batch.texts[index]), batch.first):
            yield index, pos, raw.removesuffix(b"\n")


def _read(batch: _Batch, indexes: Sequence[int]) -> pa.Table:
    entries, texts, settings = batch.entries, batch.texts, batch.settings
    table = pa.Table.from_arrays(
        [
            pa.array(indexes, pa.int32()),
            pa.array([_latest(entries[index].ms, settings) for index in indexes], pa.int64()),
            pa.array([entries[index].own is None for index in indexes], pa.bool_()),
            pa.array([texts[index].decode() for index in indexes], pa.string()),
        ],
        schema=_ENTRIES,
    )
    # DuckDB scans an Arrow table by its chunks, each in one thread.
    chunks = pa.Table.from_batches(table.to_batches(_SCAN), table.schema)
    batch.connection.register("entries", chunks)
    parameters = {
        "first": batch.first,
        "shape": _SHAPE,
        "instant": _INSTANT,
        "shortest": ID_LENGTH[0],
        "longest": ID_LENGTH[1],
        "lowest": BPM_RANGE[0],
        "highest": BPM_RANGE[1],
        "start": settings.time_bounds.start_ms,
    }
    return batch.connection.sql(_DECODE, params=parameters).to_arrow_table()


def _arrivals(indexes: Any, positions: Any, entries: Sequence[Delivery]) -> list[pa.Array]:
    def column(values: list[int], kind: Any, arrow: pa.DataType) -> pa.Array:
        return pa.array(np.array(values, kind)[indexes], arrow)

    return [
        column([entry.ms for entry in entries], np.uint64, pa.uint64()),
        column([entry.seq for entry in entries], np.uint64, pa.uint64()),
        column([entry.shard for entry in entries], np.int16, pa.int16()),
        pa.array(positions, pa.int32()),
    ]


def _sound_rows(sound: pa.Table, entries: Sequence[Delivery]) -> pa.Table:
    timestamp = HEARTBEATS.field("timestamp").type
    columns = [
        sound["user_id"],
        sound["device_id"],
        sound["instant"].cast(timestamp),
        sound["bpm"],
        *_arrivals(sound["entry"].to_numpy(), sound["pos"].to_numpy(), entries),
    ]
    return pa.Table.from_arrays(columns, schema=HEARTBEATS)


def _found_rows(found: list[tuple[int, int, Heartbeat]], entries: Sequence[Delivery]) -> pa.Table:
    indexes = np.array([index for index, _, _ in found], np.int64)
    columns = [
        pa.array([beat.user_id for _, _, beat in found], pa.string()),
        pa.array([beat.device_id for _, _, beat in found], pa.string()),
        pa.array([beat.timestamp_ms for _, _, beat in found], pa.int64()).cast(
            HEARTBEATS.field("timestamp").type
        ),
        pa.array([beat.heart_rate for _, _, beat in found], pa.int16()),
        *_arrivals(indexes, [pos for _, pos, _ in found], entries),
    ]
    return pa.Table.from_arrays(columns, schema=HEARTBEATS)


class _Rejects:
    """Records that can't be used, gathered in columns: there may be millions of tiny ones."""

    def __init__(self, entries: Sequence[Delivery]) -> None:
        self._entries = entries
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
        attempts = np.array([entry.deliveries for entry in self._entries], np.int32)[indexes]
        columns = [
            pa.array(self._raws, pa.binary()),
            pa.array([refusal.reason for refusal in self._refusals], pa.string()),
            pa.array([refusal.message for refusal in self._refusals], pa.string()),
            *_arrivals(indexes, self._positions[self._done :], self._entries),
            pa.array(attempts, pa.int32()),
            pa.array([self._now_ms] * len(indexes), pa.int64()).cast(
                QUARANTINE.field("quarantined_at").type
            ),
        ]
        self._chunks.append(pa.Table.from_arrays(columns, schema=QUARANTINE))
        self._done = len(self.indexes)
        self._raws, self._refusals = [], []
