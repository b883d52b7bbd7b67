"""Entries into columns: NDJSON text to a table of heartbeats, and what can't be used.

Belongs here: the columnar reading of many records at once. DuckDB takes every line that is
plainly valid; any other line goes to `record.parse`, whose word is final, so that validity is
defined once and one bad row never stops its entry. Doesn't belong here: where rows are written.
The columnar path forgives a few slips of syntax that `record.parse` doesn't: a trailing comma, and
`NaN`, `1e999` or deep nesting in fields that are ignored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
        CAST(unnest(range(len(parts))) AS INTEGER) AS pos, unnest(parts) AS line
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
    """Read a batch of entries. A timestamp's "too far ahead" is measured from the entry's id."""
    bounds = settings.time_bounds
    rejects = _Rejects(entries)
    texts: list[tuple[int, str]] = []
    lines: list[tuple[int, int, bytes]] = []  # entry, position, text: for record.parse
    for index, entry in enumerate(entries):
        if entry.data is None or not entry.data.strip():
            rejects.add(index, 0, entry.data or b"", _NO_DATA)
            continue
        try:
            texts.append((index, entry.data.decode()))
        except UnicodeDecodeError:
            lines += ((index, pos, line) for pos, line in enumerate(entry.data.split(b"\n")))
    table = pa.Table.from_arrays(
        [
            pa.array([index for index, _ in texts], pa.int32()),
            pa.array([_latest(entries[index].ms, settings) for index, _ in texts], pa.int64()),
            pa.array([entries[index].own is None for index, _ in texts], pa.bool_()),
            pa.array([text for _, text in texts], pa.string()),
        ],
        schema=_ENTRIES,
    )
    with engine(settings) as connection:
        read = _read(connection, table, settings)
        sound = read.filter(read["sound"])
        doubtful = read.filter(pa.compute.invert(read["sound"])).select(["entry", "pos", "line"])
        for row in doubtful.to_pylist():
            lines.append((row["entry"], row["pos"], row["line"].encode()))
        found: list[tuple[int, int, Heartbeat]] = []
        unknown_fields = 0
        for index, pos, line in lines:
            if not line.strip():
                continue
            now_ms = min(entries[index].ms, LAST_MS)
            result, unknown = record.parse(line, now_ms, bounds)
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
        sorted_rows = connection.sql(_SORT, params={"shards": settings.shards}).to_arrow_table()
    return Decoded(sorted_rows.cast(ROWS), rejects.table(), counts.tolist(), unknown_fields)


_NO_DATA = Refusal(
    "record", "no_data", "the entry has no field `data` with NDJSON in it; see docs/wire-format.md"
)


def _latest(entry_ms: int, settings: Settings) -> int:
    return min(min(entry_ms, LAST_MS) + settings.time_bounds.future_ms, LAST_MS)


def _read(connection: duckdb.DuckDBPyConnection, table: pa.Table, settings: Settings) -> pa.Table:
    # DuckDB scans an Arrow table by its chunks, each in one thread.
    connection.register("entries", pa.Table.from_batches(table.to_batches(_SCAN), table.schema))
    parameters = {
        "shape": _SHAPE,
        "instant": _INSTANT,
        "shortest": ID_LENGTH[0],
        "longest": ID_LENGTH[1],
        "lowest": BPM_RANGE[0],
        "highest": BPM_RANGE[1],
        "start": settings.time_bounds.start_ms,
    }
    return connection.sql(_DECODE, params=parameters).to_arrow_table()


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
    """Records that can't be used, gathered in their envelope."""

    def __init__(self, entries: Sequence[Delivery]) -> None:
        self._entries = entries
        self._rows: list[dict[str, Any]] = []
        self.indexes: list[int] = []
        self._now_ms = time.time_ns() // 1_000_000

    def add(self, index: int, pos: int, raw: bytes, refusal: Refusal) -> None:
        entry = self._entries[index]
        self.indexes.append(index)
        self._rows.append(
            {
                "raw": raw,
                "reason": refusal.reason,
                "message": refusal.message,
                "arrival_ms": entry.ms,
                "arrival_seq": entry.seq,
                "arrival_shard": entry.shard,
                "arrival_pos": pos,
                "attempts": entry.deliveries,
                "quarantined_at": self._now_ms,
            }
        )

    def table(self) -> pa.Table:
        return pa.Table.from_pylist(self._rows, schema=QUARANTINE)
