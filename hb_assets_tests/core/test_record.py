"""The record: no input raises, refusals are known and silent about values, hashes are DuckDB's."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import duckdb
import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core import record
from hb_assets.core.days import LAST_MS
from hb_assets.core.record import Arrival, Code, Field, Heartbeat, Refusal, TimeBounds

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
    assert record.parse(line, NOW, BOUNDS) == (heartbeat, ())
    assert record.parse_object(json.loads(line), NOW, BOUNDS) == (heartbeat, ())


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


# -- instants


def said(text: str) -> int | None:
    """Epoch milliseconds by the parser; None: refused."""
    try:
        return record.parse_instant(text)
    except ValueError:
        return None


def said_in_json(text: str, *, escaped: bool) -> list[int | None]:
    """The same by each reader of JSON."""
    line = json.dumps(GOOD | {"timestamp": text}).encode()
    if escaped:
        spelt = "".join(f"\\u{ord(char):04x}" for char in text if ord(char) < 0x10000)
        line = line.replace(json.dumps(text).encode(), f'"{spelt}"'.encode())
    anything = TimeBounds(-(2**60), 2**60)
    found = [
        record.parse(line, 0, anything)[0],
        record.parse_object(GOOD | {"timestamp": text}, 0, anything)[0],
        *record.parse_plain([line], 0, anything)[0],
    ]
    for wires in (record.read_lines(line, 1), record.read_array(b"[" + line + b"]")):
        if wires is not None:
            found += record.judge(wires, 0, anything)[0]
    for one in found:
        if isinstance(one, Refusal):
            assert one.reason in ("timestamp_not_a_time", "timestamp_in_the_future")
    return [one.timestamp_ms if isinstance(one, Heartbeat) else None for one in found]


def by_hand(text: str) -> int | None:
    """Another reading of docs/wire-format.md: digit by digit, with a calendar of its own."""
    left = list(text)

    def take(chars: str) -> str:
        return left.pop(0) if left and left[0] in chars else ""

    def number(digits: int) -> int:
        found = [take("0123456789") for _ in range(digits)]
        return int("".join(found)) if all(found) else 10**9

    year, _ = number(4), take("-") or left.insert(0, "?")
    month, _ = number(2), take("-") or left.insert(0, "?")
    day, _ = number(2), take("Tt ") or left.insert(0, "?")
    hour, _ = number(2), take(":") or left.insert(0, "?")
    minute = number(2)
    second = milli = 0
    if take(":"):
        second = number(2)
        if take(".,"):
            digits = ""
            while digit := take("0123456789"):
                digits += digit
            milli = int((digits + "00")[:3]) if digits else 10**9
    east = 0
    if left and not take("Zz"):
        sign = take("+-")
        hours = number(2)
        minutes = number(2) if (take(":") or left) else 0
        east = (hours * 60 + minutes) * (-1 if sign == "-" else 1)
        if not sign or hours > 23 or minutes > 59:
            return None
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    lengths = [31, 29 if leap else 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31]
    if not (1 <= year <= 9999 and 1 <= month <= 12 and 1 <= day <= lengths[month - 1]):
        return None
    if left or hour > 23 or minute > 59 or second > 59 or milli > 999:
        return None
    before = year - 1
    days = before * 365 + before // 4 - before // 100 + before // 400
    days += sum(lengths[: month - 1]) + day - 1
    minutes = ((days - 719_162) * 24 + hour) * 60 + minute - east
    return (minutes * 60 + second) * 1000 + milli


like_instants = st.from_regex(
    r"(000[01]|1900|19[67][0-9]|20[0-9]{2}|9999)-?(0[0-9]|1[0-3]|02)-?([0-3][0-9]|29|31)[-+T t_]"
    r"([01][0-9]|2[0-4]|[0-9]):?([0-5][0-9]|60)?(:([0-5][0-9]|60))?([.,][0-9]{0,12})?"
    r"([Zz]|[-+ ]([01][0-9]|2[0-4])(:?([0-5][0-9]|60)?(:[0-9]{2})?([.][0-9])?)?)?",
    fullmatch=True,
)
exact_instants = st.from_regex(
    r"(0001|1969|1970|2000|2024|2025|9999)-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[T t]"
    r"([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.,](9{1,12}|[0-9]{1,10}))?)?"
    r"([Zz]|[-+]([01][0-9]|2[0-3])(:?[0-5][0-9])?)?",
    fullmatch=True,
)


@st.composite
def spoilt_instants(draw: st.DrawFn) -> str:
    """An instant with a few characters that are cut out, put in or exchanged."""
    text = draw(exact_instants)
    for _ in range(draw(st.integers(1, 2))):
        place = draw(st.integers(0, len(text)))
        odd = draw(
            st.sampled_from(
                [*"0123456789:-+.,TZ tz_W/", "\n", "\x00", "\u0662", "\uff10", "\u2212"]
            )
        )
        text = (
            text[:place]
            + draw(st.sampled_from(["", odd]))
            + text[place + draw(st.integers(0, 1)) :]
        )
    return text


@given(like_instants | exact_instants | spoilt_instants() | st.text(max_size=30), st.booleans())
@example_settings(max_examples=500)
def test_a_time_means_what_another_reading_says(text: str, escaped: bool) -> None:
    want = by_hand(text)
    assert said(text) == want
    if want is not None and want > LAST_MS:  # by its offset
        want = None
    assert set(said_in_json(text, escaped=escaped)) == {want}


FORMS = [
    (json.loads(row["form"]), row["ms"])
    for row in map(
        re.compile(r"\| `(?P<form>\".*\")` \| (?P<ms>-?[0-9]+|refused) \|.*").fullmatch,
        (Path(__file__).parents[2] / "docs" / "wire-format.md").read_text().splitlines(),
    )
    if row
]


def test_the_documented_forms_of_a_time() -> None:
    assert len(FORMS) >= 60
    for form, ms in FORMS:
        want = None if ms == "refused" else int(ms)
        assert (said(form), by_hand(form)) == (want, want), form
        for escaped in (False, True):
            assert set(said_in_json(form, escaped=escaped)) == {want}, form


@given(
    st.datetimes(
        timezones=st.timezones() | st.none(),  # type: ignore[arg-type]  # its stub knows one of them
        min_value=dt.datetime(1980, 1, 1),  # local mean times had offsets with seconds
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
    assert unknown == ("battery", "firmware")


LINE = json.dumps(GOOD).encode()


@pytest.mark.parametrize("name", record.WIRE_FIELDS)
@pytest.mark.parametrize("spelling", [str, lambda name: name.replace("_", "\\u005f")])
@pytest.mark.parametrize("more", ["", ', "battery": [1, {"user_id": 2}]'])
def test_a_field_that_is_named_twice_is_refused(
    name: str, spelling: Callable[[str], str], more: str
) -> None:
    value = json.dumps((GOOD | {"timestamp_ms": NOW})[name])
    again = f', "{spelling(name)}": {value}'
    line = (
        LINE[:-1] + b', "timestamp_ms": 1' * (name == "timestamp_ms") + f"{again}{more}}}".encode()
    )
    refused = read(line)
    assert isinstance(refused, Refusal)
    assert refused.reason == "record_duplicate_field"
    # in company, too, where another one has a name less
    lacking = json.dumps({key: value for key, value in GOOD.items() if key != "timestamp"}).encode()
    for other in (LINE, lacking):
        assert record.read_lines(line + b"\n" + other, 2) is None
        assert 0 in record.parse_plain([line, other], NOW, BOUNDS)[1]
        assert record.read_array(b"[" + other + b"," + line + b"]") is None


@pytest.mark.parametrize(
    "line",
    [
        LINE.replace(b"u1", b"u,1,2"),
        LINE.replace(b"u1", b'heart_rate\\": 1, \\"heart_rate'),
        LINE[:-1] + b', "x": 1, "x": 2}',
        LINE[:-1] + b', "x": {"heart_rate": 1, "heart_rate": 2}}',
        LINE[:-1] + b', "timestamp_ms": null}',
        LINE[:-1] + b', "timestamp_ms": 1736935200000}',
        b"\xef\xbb\xbf" + LINE,
        b"\xef\xbb\xbf" + LINE[:-1] + b', "x": 1}',
    ],
)
def test_what_looks_like_two_fields_and_is_one(line: bytes) -> None:
    assert isinstance(read(line), Heartbeat)


@pytest.mark.parametrize(
    "time",
    [
        {"timestamp": "2025-01-15T10:00:00Z"},
        {"timestamp": "2025-01-15 10:00:00.123"},
        {"timestamp": "2025-01-15T10:00:00.123456+00:00"},
        {"timestamp_ms": NOW},
        {"timestamp_ms": NOW, "timestamp": "2025-01-15T10:00:00Z"},
    ],
)
def test_the_usual_lines_are_read_in_company(time: dict[str, Any]) -> None:
    """Else every batch would take several times as long."""
    line = json.dumps({"user_id": "u.1, u", "device_id": "é", **time, "heart_rate": 75}).encode()
    for end in (b"\n", b"\r\n"):
        assert len(record.read_lines(end.join([line] * 3), 3) or ()) == 3
    assert len(record.read_array(b"[%b , %b]" % (line, line)) or ()) == 2


@pytest.mark.parametrize(
    "text",
    [
        LINE.replace(b", ", b",\n", 1) + LINE,
        LINE.replace(b", ", b"\n", 1),
        LINE + LINE + b"\n",
        LINE + b" " + LINE + b"\n\n",
        LINE + b"\n\n" + LINE,
        LINE + b",\n" + LINE,
        LINE.replace(b"u1", b"u\n1"),
        LINE + b"," + LINE.replace(b", ", b"\n", 1),
        LINE + b"," + LINE + b"\n" + LINE.replace(b"u1", b"u}\n{1"),
    ],
)
def test_lines_that_are_not_one_object_each(text: bytes) -> None:
    assert record.read_lines(text, text.count(b"\n") + 1) is None


@given(st.lists(st.text(max_size=40), max_size=60))
def test_ignored_fields_are_named_within_bounds(names: list[str]) -> None:
    ignored = record.Ignored()
    ignored.add(names)
    assert ignored.total() == len(names)
    assert len(ignored) <= record.Ignored.MOST + 1
    assert all(len(name) <= record.Ignored.LENGTH for name in ignored)
    first = list(dict.fromkeys(name[: record.Ignored.LENGTH] for name in names))
    assert list(ignored)[: record.Ignored.MOST] == first[: record.Ignored.MOST]
    assert len(first) <= record.Ignored.MOST or record.Ignored.OTHERS in ignored


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
