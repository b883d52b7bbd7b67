"""The heartbeat: which fields a record has, and when it is valid.

The only definition of both. It holds the fields with their bounds, the reason codes, the parser of
one JSON text, and the canonical JSON form that we write ourselves. Storage types are derived from
these classes in `schema`; many records at once are decoded in `lake.ingest.decode`.
"""

from __future__ import annotations

import codecs
import datetime as dt
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from hb_assets.core.days import EPOCH, LAST_MS, MS_PER_DAY, ms_of, start_ms

ID_LENGTH = (1, 128)
BPM_RANGE = (30, 220)

UserId = Annotated[
    str, Meta(min_length=ID_LENGTH[0], max_length=ID_LENGTH[1], description="who wore the device")
]
DeviceId = Annotated[
    str, Meta(min_length=ID_LENGTH[0], max_length=ID_LENGTH[1], description="which device measured")
]
Bpm = Annotated[
    int, Meta(ge=BPM_RANGE[0], le=BPM_RANGE[1], description="heart rate in beats per minute")
]
EpochMs = Annotated[int, Meta(description="instant of the reading: UTC, kept to the millisecond")]


class Heartbeat(msgspec.Struct, frozen=True, gc=False):
    """One valid reading. Encoded as JSON, it is the canonical form that our own appends write."""

    user_id: UserId
    device_id: DeviceId
    timestamp_ms: EpochMs
    heart_rate: Bpm


class Arrival(msgspec.Struct, frozen=True, order=True, gc=False):
    """Identity of a delivered row: where in which entry of which source shard it came.

    Field order is the arrival order: entry id first (two unsigned integers), since arrival is
    arrival in Redis; the source shard decides only between equal ids of different streams.
    """

    arrival_ms: Annotated[int, Meta(ge=0, description="entry id, first part", extra={"bits": 64})]
    arrival_seq: Annotated[int, Meta(ge=0, description="entry id, second part", extra={"bits": 64})]
    arrival_shard: Annotated[int, Meta(ge=0, le=99, description="shard of the stream it came by")]
    arrival_pos: Annotated[
        int, Meta(ge=0, le=2**31 - 1, description="line number in its entry, from 0")
    ]


Field = Literal["record", "user_id", "device_id", "timestamp", "heart_rate"]
Code = Literal[
    "not_json",
    "not_an_object",
    "duplicate_field",
    "missing",
    "wrong_type",
    "wrong_length",
    "not_a_time",
    "too_old",
    "in_the_future",
    "out_of_range",
    # of a whole entry, in the drain only:
    "no_data",
    "poison",
]


class Refusal(msgspec.Struct, frozen=True, gc=False):
    """Why a record can't be used. The message names field, rule and remedy, never the value."""

    field: Field
    code: Code
    message: str

    @property
    def reason(self) -> str:
        """Reason code for counters and quarantine, e.g. `heart_rate_out_of_range`."""
        return f"{self.field}_{self.code}"


@dataclass(frozen=True, slots=True)
class TimeBounds:
    """Accepted timestamps: [start_ms, now + future_ms], epoch milliseconds."""

    start_ms: int
    future_ms: int

    @classmethod
    def of(cls, start: dt.date, max_future: dt.timedelta) -> TimeBounds:
        """Bounds out of the settings START_DATE and MAX_FUTURE."""
        return cls(start_ms(start), max_future // dt.timedelta(milliseconds=1))


class Wire(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    """The common shape of a record on the wire; `judge` makes a heartbeat of it."""

    user_id: UserId
    device_id: DeviceId
    heart_rate: Bpm
    timestamp: dt.datetime | UnsetType = UNSET
    timestamp_ms: int | UnsetType = UNSET


class _Timed(Wire, frozen=True, gc=False, kw_only=True):
    timestamp: dt.datetime


class _Stamped(Wire, frozen=True, gc=False, kw_only=True):
    timestamp_ms: int


class _Both(_Timed, frozen=True, gc=False, kw_only=True):
    timestamp_ms: int


WIRE_FIELDS = tuple(field.name for field in msgspec.structs.fields(Wire))
_wire_decoder = msgspec.json.Decoder(Wire)
_loose_decoder = msgspec.json.Decoder()
_TIMED, _STAMPED, _BOTH = 14, 12, 16
"""Quotes around the names and texts of such an object."""
_array_decoders = (
    (msgspec.json.Decoder(list[_Timed]), _TIMED),
    (msgspec.json.Decoder(list[_Stamped]), _STAMPED),
    (msgspec.json.Decoder(list[_Both]), _BOTH),
)
"""Each asks for all names that it counts, so that no object makes up for what another has twice."""
_encoder = msgspec.json.Encoder()
_REMEMBERED = 2**16
"""Users whose shards are remembered."""

_LOCAL_EPOCH = EPOCH.replace(tzinfo=None)
_ISO_8601 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ]"
    r"(?:[01][0-9]|2[0-3]):[0-5][0-9](?::[0-5][0-9](?:[.,][0-9]+)?)?"
    r"(?:[Zz]|[+-](?:[01][0-9]|2[0-3])(?::?[0-5][0-9])?)?"
)
"""An instant, as docs/wire-format.md describes it; whether the day exists is for the calendar."""
_FINE, _ESCAPED = re.compile(rb"\.[0-9]{7}"), re.compile(rb"\\u00[23]")
"""More than six digits behind a second's point, which msgspec rounds; a point or digit that is
escaped. One pattern with both takes ten times as long."""
_POINT, _BACKSLASH = b".\\"
"""As numbers, which `in` finds in bytes several times as fast."""


def parse(
    line: bytes, now_ms: int, bounds: TimeBounds
) -> tuple[Heartbeat | Refusal, Sequence[str]]:
    """Read one JSON text.

    Args:
        line: one JSON object, UTF-8, with or without a byte order mark.
        now_ms: the instant that "too far in the future" is measured from, epoch milliseconds.
        bounds: accepted timestamps.

    Returns:
        The heartbeat or the first refusal (fields in the order of `Field`), and the names of
        unknown fields, which were ignored.
    """
    try:
        wire = _wire_decoder.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _read_loosely(line, now_ms, bounds)
    quotes = _BOTH if wire.timestamp_ms is not UNSET else _TIMED
    if not _is_plain(line, _STAMPED if wire.timestamp is UNSET else quotes):
        return _read_loosely(line, now_ms, bounds)
    found, refused = judge((wire,), now_ms, bounds)
    return (found[0] if found else refused[0][1]), ()


def parse_plain(
    lines: Sequence[bytes], now_ms: int, bounds: TimeBounds
) -> tuple[list[Heartbeat], list[int]]:
    """The heartbeats of JSON texts that are plainly valid, and the numbers of the other texts.

    Three times as fast as `parse` for each, which tells what the others are. A line end may follow
    a text.
    """
    odd = _is_odd(b"".join(lines))
    wires: list[Wire] = []
    others: list[int] = []
    decode, unset = _wire_decoder.decode, UNSET
    for number, line in enumerate(lines):
        try:
            wire = decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            others.append(number)
            continue
        quotes = _TIMED if wire.timestamp_ms is unset else _STAMPED
        if line.count(b'"') == quotes and not (odd and _is_odd(line)):
            wires.append(wire)
        else:
            others.append(number)
    found, refused = judge(wires, now_ms, bounds)
    if refused:
        plain = sorted({*range(len(lines))}.difference(others))
        others = sorted([*others, *(plain[number] for number, _ in refused)])
    return found, others


def read_array(text: bytes) -> list[Wire] | None:
    """The elements of a JSON array, for `judge`; ten times as fast as one `parse` for each.

    None unless all have one common shape of a heartbeat: `parse` tells what each of them is.
    """
    for decoder, quotes in _array_decoders:
        try:
            wires: list[Wire] = decoder.decode(text)  # type: ignore[assignment]  # of one of its shapes
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if _is_plain(text, quotes * len(wires)):
            return wires
    return None


def read_lines(text: bytes, lines: int) -> list[Wire] | None:
    """As `read_array`, for NDJSON of so many lines with one object on each.

    As an array, since `decode_lines` lets an object reach over several lines, and several stand in
    one. No text holds a line end, and no object of these shapes another one: what stands between a
    closing and an opening brace is between two objects, and then as many objects as lines are one
    on each.
    """
    ends = text.count(b"}\n{") or text.count(b"}\r\n{")
    if ends != lines - 1:
        return None
    wires = read_array(b"[%b]" % text.replace(b"\n", b",\n"))
    return wires if wires is not None and len(wires) == lines else None


def _is_plain(text: bytes, quotes: int) -> bool:
    """Whether what msgspec made of an object, or of an array of them, means one thing.

    Of a name that stands in an object twice it takes the last value: then there are more quotes
    than these, which the names and texts that it found need at least. And it rounds a time where
    finer digits are to be cut off.
    """
    return text.count(b'"') == quotes and not _is_odd(text)


def _is_odd(text: bytes) -> bool:
    """Whether there may be a time in it that msgspec rounds."""
    return bool(
        (_POINT in text and _FINE.search(text)) or (_BACKSLASH in text and _ESCAPED.search(text))
    )


def judge(
    wires: Iterable[Wire], now_ms: int, bounds: TimeBounds
) -> tuple[list[Heartbeat], list[tuple[int, Refusal]]]:
    """Validate records of the common shape: heartbeats, and refusals with their indexes.

    One loop that calls as little as it can: a gateway spends a quarter of its time here.
    """
    first, last = bounds.start_ms, min(now_ms + bounds.future_ms, LAST_MS)
    epoch, local, unset = EPOCH, _LOCAL_EPOCH, UNSET
    found: list[Heartbeat] = []
    refused: list[tuple[int, Refusal]] = []
    for wire in wires:
        instant = wire.timestamp_ms
        if instant is unset:
            moment = wire.timestamp
            if moment is unset:
                refused.append((len(found) + len(refused), _NO_TIME))
                continue
            gap = moment - (local if moment.tzinfo is None else epoch)
            instant = gap.days * MS_PER_DAY + gap.seconds * 1000 + gap.microseconds // 1000
        if first <= instant <= last:
            found.append(Heartbeat(wire.user_id, wire.device_id, instant, wire.heart_rate))
        else:
            refused.append((len(found) + len(refused), _outside(instant, bounds)))
    return found, refused


def parse_object(
    fields: Any, now_ms: int, bounds: TimeBounds
) -> tuple[Heartbeat | Refusal, Sequence[str]]:
    """As `parse`, for a value that is decoded already (a row of a table)."""
    if not isinstance(fields, dict):
        return Refusal("record", "not_an_object", "a heartbeat is a JSON object"), ()
    unknown = tuple(name for name in fields if name not in WIRE_FIELDS)
    return _check(fields, now_ms, bounds), unknown


class Ignored(Counter[str]):
    """How often unknown fields were ignored, by name.

    Bounded by `add`, since a sender may think of any names: `MOST` of them, each cut to `LENGTH`
    characters; the others are counted together as `OTHERS`.
    """

    MOST = 16
    LENGTH = 32
    OTHERS = "*"

    def add(self, names: Iterable[str], times: int = 1) -> None:
        """Count each of these names `times` times."""
        for name in names:
            known = name[: self.LENGTH]
            if known not in self and len(self) >= self.MOST:
                known = self.OTHERS
            self[known] += times


def encode(heartbeat: Heartbeat) -> bytes:
    """Canonical JSON of one heartbeat: one line, no line end."""
    return _encoder.encode(heartbeat)


def encode_lines(heartbeats: Sequence[Heartbeat]) -> bytes:
    """Canonical JSON of many heartbeats, a line each; no line end behind the last."""
    return _encoder.encode_lines(heartbeats)[:-1]


@lru_cache(maxsize=_REMEMBERED)
def shard_of(user_id: str, shards: int) -> int:
    """Shard of a user: `md5_number_lower(user_id) % shards`, as DuckDB computes it."""
    return shards_of((user_id,), shards)[0]


def shards_of(user_ids: Iterable[str], shards: int) -> list[int]:
    """Shards of many users, as `shard_of`; each user is hashed."""
    md5, number = hashlib.md5, int.from_bytes
    digests = (md5(user_id.encode(), usedforsecurity=False).digest() for user_id in user_ids)
    return [number(digest[8:], "little") % shards for digest in digests]


class Shards(dict[str, int]):
    """The shard of each user among `shards`, remembered: looked up faster than `shard_of`."""

    def __init__(self, shards: int) -> None:
        super().__init__()
        self._shards = shards

    def __missing__(self, user_id: str) -> int:
        if len(self) >= _REMEMBERED:
            self.clear()
        found = self[user_id] = shard_of(user_id, self._shards)
        return found


def parse_instant(text: str) -> int:
    """Epoch milliseconds of an ISO 8601 instant; no offset means UTC; finer digits are cut off.

    Raises:
        ValueError: not an instant as docs/wire-format.md describes it.
    """
    if not _ISO_8601.fullmatch(text):
        raise ValueError("not a date and a time of ISO 8601")
    return ms_of(dt.datetime.fromisoformat(text.upper()))


def _read_loosely(
    line: bytes, now_ms: int, bounds: TimeBounds
) -> tuple[Heartbeat | Refusal, Sequence[str]]:
    line = line.removeprefix(codecs.BOM_UTF8)
    try:
        fields = _loose_decoder.decode(line)
        # each pair but the first has a comma before it
        twice = _twice(line) if type(fields) is dict and line.count(b",") >= len(fields) else None
    except (msgspec.DecodeError, ValueError, RecursionError):
        return Refusal("record", "not_json", "the text is not one JSON object in UTF-8"), ()
    if twice is not None:
        message = f"{twice} stands in it more than once, and which one is meant can't be told"
        return Refusal("record", "duplicate_field", message), ()
    return parse_object(fields, now_ms, bounds)


def _twice(text: bytes) -> str | None:
    """The first of our fields that a JSON object names more than once; None: there is none."""
    names: list[str] = []

    def keep(pairs: list[tuple[str, object]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object ends last

    json.loads(text.decode(), object_pairs_hook=keep, parse_int=str, parse_float=str)
    return next((name for name in WIRE_FIELDS if names.count(name) > 1), None)


def _check(fields: dict[str, Any], now_ms: int, bounds: TimeBounds) -> Heartbeat | Refusal:
    ids: dict[Literal["user_id", "device_id"], str] = {}
    names: tuple[Literal["user_id", "device_id"], ...] = ("user_id", "device_id")
    for name in names:
        value = fields.get(name)
        if value is None:
            return Refusal(name, "missing", f"{name} is required")
        if not isinstance(value, str):
            return Refusal(name, "wrong_type", f"{name} must be a string")
        if not ID_LENGTH[0] <= len(value) <= ID_LENGTH[1]:
            return Refusal(name, "wrong_length", f"{name} must have 1 to {ID_LENGTH[1]} characters")
        ids[name] = value
    instant = _instant(fields.get("timestamp"), fields.get("timestamp_ms"))
    if isinstance(instant, Refusal):
        return instant
    if not bounds.start_ms <= instant <= min(now_ms + bounds.future_ms, LAST_MS):
        return _outside(instant, bounds)
    bpm = fields.get("heart_rate")
    if bpm is None:
        return Refusal("heart_rate", "missing", "heart_rate is required")
    whole = _whole_number(bpm)
    if whole is None:
        return Refusal("heart_rate", "wrong_type", "heart_rate must be an integer")
    if not BPM_RANGE[0] <= whole <= BPM_RANGE[1]:
        low, high = BPM_RANGE
        return Refusal("heart_rate", "out_of_range", f"heart_rate must be {low} to {high} bpm")
    return Heartbeat(ids["user_id"], ids["device_id"], instant, whole)


_NO_TIME = Refusal("timestamp", "missing", "timestamp (or timestamp_ms) is required")


def _instant(text: object, epoch_ms: object) -> int | Refusal:
    """Epoch milliseconds out of `timestamp_ms`, or else `timestamp`."""
    if epoch_ms is not UNSET and epoch_ms is not None:
        whole = _whole_number(epoch_ms)
        if whole is None:
            return Refusal("timestamp", "wrong_type", "timestamp_ms must be an integer (epoch ms)")
        return whole
    if text is UNSET or text is None:
        return _NO_TIME
    if not isinstance(text, str):
        return Refusal("timestamp", "wrong_type", "timestamp must be an ISO 8601 string")
    try:
        return parse_instant(text)
    except ValueError:
        return Refusal(
            "timestamp",
            "not_a_time",
            "timestamp must be ISO 8601 with date and time, like 2025-01-15T10:00:00Z",
        )


def _outside(instant: int, bounds: TimeBounds) -> Refusal:
    if instant < bounds.start_ms:
        return Refusal("timestamp", "too_old", "timestamp lies before HB_START_DATE")
    return Refusal("timestamp", "in_the_future", "timestamp lies further ahead than HB_MAX_FUTURE")


def _whole_number(value: object) -> int | None:
    """The integer that a JSON number denotes (75 and 75.0 alike), or None."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return None
