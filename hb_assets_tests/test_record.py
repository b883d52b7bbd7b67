"""The record: no input raises, refusals are known and silent about values, hashes are DuckDB's."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterator
from typing import Any, get_args

import duckdb
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hb_assets import record
from hb_assets.days import LAST_MS
from hb_assets.record import Arrival, Code, Field, Heartbeat, Refusal, TimeBounds

NOW = 1_736_935_200_000  # 2025-01-15T10:00:00Z
BOUNDS = TimeBounds.of(dt.date(2020, 1, 1), dt.timedelta(hours=24))
GOOD: dict[str, Any] = {
    "user_id": "u1",
    "device_id": "device_a",
    "timestamp": "2025-01-15T10:00:00Z",
    "heart_rate": 75,
}

ids = st.text(min_size=1, max_size=128)
heartbeats = st.builds(
    Heartbeat,
    user_id=ids,
    device_id=ids,
    timestamp_ms=st.integers(BOUNDS.start_ms, NOW + BOUNDS.future_ms),
    heart_rate=st.integers(*record.BPM_RANGE),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.fixed_dictionaries(
    {}, optional=dict.fromkeys((*record.WIRE_FIELDS, "battery"), json_values)
)


def read(line: bytes) -> Heartbeat | Refusal:
    return record.parse(line, NOW, BOUNDS)[0]


def parse(**changes: Any) -> Heartbeat | Refusal:
    fields = {name: value for name, value in (GOOD | changes).items() if value is not ...}
    return read(json.dumps(fields).encode())


def assert_known(outcome: Heartbeat | Refusal) -> None:
    if isinstance(outcome, Refusal):
        assert outcome.field in get_args(Field)
        assert outcome.code in get_args(Code)
        assert outcome.reason == f"{outcome.field}_{outcome.code}"
        assert outcome.message
        assert "\n" not in outcome.message
    else:
        assert read(record.encode(outcome)) == outcome


@given(st.binary())
def test_any_bytes_are_read_or_refused(line: bytes) -> None:
    assert_known(read(line))


@given(records | json_values)
def test_any_json_is_read_or_refused(value: object) -> None:
    assert_known(read(json.dumps(value).encode()))


@given(heartbeats, st.data())
def test_damaged_records_are_read_or_refused(heartbeat: Heartbeat, data: st.DataObject) -> None:
    line = bytearray(record.encode(heartbeat))
    line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    assert_known(read(bytes(line)))


@pytest.mark.parametrize("line", [b"[" * 100_000, b'{"a":' * 100_000, b"", b"\xff", b"null", b"1"])
def test_hostile_lines_are_refused(line: bytes) -> None:
    refused = read(line)
    assert isinstance(refused, Refusal)
    assert refused.field == "record"


def test_half_a_character_is_no_text() -> None:
    line = json.dumps(GOOD | {"user_id": "\ud800"}).encode()
    assert isinstance(read(line), Refusal)


@given(heartbeats)
def test_the_canonical_form_comes_back_as_it_was(heartbeat: Heartbeat) -> None:
    line = record.encode(heartbeat)
    assert b"\n" not in line
    assert record.parse(line, NOW, BOUNDS) == (heartbeat, 0)
    assert record.parse_object(json.loads(line), NOW, BOUNDS) == (heartbeat, 0)


@given(records)
def test_bytes_and_objects_are_judged_alike(fields: dict[str, Any]) -> None:
    line = json.dumps(fields).encode()
    try:
        fields = msgspec.json.decode(line)
    except msgspec.DecodeError:  # NaN and Infinity, which JSON doesn't have
        assert read(line) == Refusal("record", "not_json", read(line).message)  # type: ignore[union-attr]  # refused, so it has one
    else:
        assert record.parse(line, NOW, BOUNDS) == record.parse_object(fields, NOW, BOUNDS)


@given(
    st.sampled_from([*record.WIRE_FIELDS, "battery"]),
    st.text("ξψωЖ", min_size=1, max_size=200),
    st.integers(min_value=10**6),
)
def test_messages_hold_no_values(name: str, text: str, number: int) -> None:
    for value in (text, number, [text], {text: number}):
        outcome = parse(**{name: value})
        if isinstance(outcome, Refusal):
            assert text not in outcome.message
            assert str(number) not in outcome.message
            assert str(GOOD["heart_rate"]) not in outcome.message
            assert GOOD["user_id"] not in outcome.message


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user_id": ...}, "user_id_missing"),
        ({"user_id": None}, "user_id_missing"),
        ({"user_id": 7}, "user_id_wrong_type"),
        ({"user_id": ""}, "user_id_wrong_length"),
        ({"user_id": "é" * 129}, "user_id_wrong_length"),
        ({"device_id": ...}, "device_id_missing"),
        ({"device_id": ["a"]}, "device_id_wrong_type"),
        ({"device_id": "d" * 129}, "device_id_wrong_length"),
        ({"timestamp": ...}, "timestamp_missing"),
        ({"timestamp": None, "timestamp_ms": None}, "timestamp_missing"),
        ({"timestamp": 1736935200}, "timestamp_wrong_type"),
        ({"timestamp": "yesterday"}, "timestamp_not_a_time"),
        ({"timestamp": "2025-01-15"}, "timestamp_not_a_time"),
        ({"timestamp": "2025-02-30T10:00:00Z"}, "timestamp_not_a_time"),
        ({"timestamp": "2019-12-31T23:59:59.999Z"}, "timestamp_too_old"),
        ({"timestamp": "2025-01-16T10:00:00.001Z"}, "timestamp_in_the_future"),
        ({"timestamp_ms": NOW + 86_400_001}, "timestamp_in_the_future"),
        ({"timestamp_ms": 10**30}, "timestamp_in_the_future"),
        ({"timestamp_ms": "1736935200000"}, "timestamp_wrong_type"),
        ({"timestamp_ms": True}, "timestamp_wrong_type"),
        ({"timestamp_ms": 0.5}, "timestamp_wrong_type"),
        ({"heart_rate": ...}, "heart_rate_missing"),
        ({"heart_rate": "75"}, "heart_rate_wrong_type"),
        ({"heart_rate": 75.5}, "heart_rate_wrong_type"),
        ({"heart_rate": True}, "heart_rate_wrong_type"),
        ({"heart_rate": 29}, "heart_rate_out_of_range"),
        ({"heart_rate": 221}, "heart_rate_out_of_range"),
        ({"heart_rate": 0}, "heart_rate_out_of_range"),
    ],
)
def test_reasons(changes: dict[str, Any], reason: str) -> None:
    refused = parse(**changes)
    assert isinstance(refused, Refusal)
    assert refused.reason == reason


@pytest.mark.parametrize(
    "changes",
    [
        {"user_id": "é" * 128},
        {"device_id": "d"},
        {"heart_rate": 30},
        {"heart_rate": 220},
        {"heart_rate": 75.0},
        {"timestamp": "2020-01-01T00:00:00Z"},
        {"timestamp": "2025-01-16T10:00:00Z"},
    ],
)
def test_the_bounds_themselves_are_accepted(changes: dict[str, Any]) -> None:
    assert isinstance(parse(**changes), Heartbeat)


def test_the_first_fault_in_the_order_of_fields_is_told() -> None:
    refused = read(b'{"heart_rate": 0}')
    assert isinstance(refused, Refusal)
    assert refused.reason == "user_id_missing"


@pytest.mark.parametrize(
    "text",
    [
        "2025-01-15T10:00:00Z",
        "2025-01-15t10:00:00z",
        "2025-01-15 10:00:00",
        "2025-01-15T10:00",
        "20250115T100000Z",
        "2025-01-15T12:30:00+02:30",
        "2025-01-15T10:00:00.000999Z",
        "2025-01-15T10:00:00.000999999Z",
    ],
)
def test_one_instant_in_many_spellings(text: str) -> None:
    assert record.parse_instant(text) == NOW


@given(
    st.datetimes(
        timezones=st.timezones() | st.none(),  # type: ignore[arg-type]  # its stub knows one of them
        min_value=dt.datetime(1, 1, 2),
        max_value=dt.datetime(9999, 12, 30),
    )
)
def test_instants_are_floored_to_the_millisecond(moment: dt.datetime) -> None:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC)
    exact = (aware - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) // dt.timedelta(milliseconds=1)
    assert record.parse_instant(moment.isoformat()) == exact


def test_timestamp_ms_wins_over_timestamp() -> None:
    outcome = parse(timestamp_ms=NOW - 1)
    assert isinstance(outcome, Heartbeat)
    assert outcome.timestamp_ms == NOW - 1


def test_no_time_reaches_beyond_the_calendar() -> None:
    line = json.dumps(GOOD | {"timestamp_ms": LAST_MS + 1}).encode()
    refused, _ = record.parse(line, LAST_MS, BOUNDS)
    assert isinstance(refused, Refusal)
    assert refused.reason == "timestamp_in_the_future"


def test_unknown_fields_are_ignored_and_counted() -> None:
    line = json.dumps(GOOD | {"battery": 3, "firmware": None}).encode()
    outcome, unknown = record.parse(line, NOW, BOUNDS)
    assert isinstance(outcome, Heartbeat)
    assert unknown == 2


def test_arrivals_sort_by_number_and_never_by_text() -> None:
    first = Arrival(9, 0, 99, 0)
    assert first < Arrival(10, 0, 0, 0) < Arrival(10, 2, 0, 0) < Arrival(10, 11, 0, 0)
    assert Arrival(1, 1, 1, 1) < Arrival(1, 1, 1, 2) < Arrival(1, 1, 2, 0)


HASHES = {  # as DuckDB's md5_number_lower gives them
    "": 9098107892288553193,
    "a": 7000413967451013937,
    "u1": 13001253585282616897,
    "é": 8054489590243458038,
    "user-00042": 13547773785817896752,
    "心拍": 9827173201038411994,
}


@pytest.mark.parametrize(("user_id", "number"), HASHES.items())
def test_shard_vectors(user_id: str, number: int) -> None:
    assert record.shard_of(user_id, 2**64) == number
    assert record.shard_of(user_id, 16) == number % 16
    assert record.shard_of(user_id, 1) == 0


@pytest.fixture(scope="module")
def engine() -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        yield connection


@given(st.lists(ids, min_size=1, max_size=50))
def test_shards_agree_with_duckdb(engine: duckdb.DuckDBPyConnection, user_ids: list[str]) -> None:
    numbers = engine.execute(
        "SELECT md5_number_lower(id) FROM (SELECT unnest(?) AS id)", [user_ids]
    ).fetchall()
    assert [number for (number,) in numbers] == [record.shard_of(id_, 2**64) for id_ in user_ids]
