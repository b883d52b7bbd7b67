"""Decoding: whatever comes, every line ends in exactly one place, and as `record.parse` says."""

from __future__ import annotations

import codecs
import dataclasses
import datetime as dt
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core import days, record
from hb_assets.core.record import Heartbeat, Refusal, shard_of
from hb_assets.core.schema import ARRIVAL, HEARTBEATS, QUARANTINE
from hb_assets.core.settings import Settings
from hb_assets.lake.files import fragments, quarantine
from hb_assets.lake.ingest import decode as decode_module
from hb_assets.lake.ingest.decode import Decoded, decode, pieces, refused
from hb_assets.lake.storage import layout, order
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.lake.deliveries import (
    DAY,
    NOON,
    Delivered,
    Row,
    deliver,
    entry,
    line,
    row,
    rows_of,
)

NOW = days.end_ms(DAY)
SETTINGS = Settings(home=Path("/dev/null/nowhere"), shards=4, duckdb_threads=1)

INSTANTS = (
    "2025-01-15T10:00:00Z",
    "2025-01-15T10:00:00",
    "2025-01-15 10:00:00.5",
    "2025-01-15t10:00:00.123456z",
    "2025-01-15T10:00:00+02:00",
    "2025-01-15T10:00:00.9999-11:30",
    "2025-01-15T00:30:00+14:00",
    "2025-01-15T10:00:00.1234567Z",
    "2025-01-15T10:00:00,5Z",
    "20250115T100000Z",
    "2025-01-15T10:00Z",
    "2025-01-15 10.30",
    "2025-01-15T10:30.5Z",
    "20250115103045123",
    "2025-01-15-05:00",
    "2025-01-15T10:00:00+05.5",
    "2025-01-15T10:00:00.9999999Z",
    "2025-01-15T10:00:00+1430",
    "2025-01-15T10:00:00-00:00",
    "2025-01-15T10:00:00+24:00",
    "2025-01-15T10Z",
    "2025-W03-3T10:00:00Z",
    "2025-01-15T24:00:00Z",
    "2025-01-15T10:00:60Z",
    "2025-02-30T10:00:00Z",
    "2025-01-15",
    " 2025-01-15T10:00:00Z",
    "2025-01-15T10:00:00Z\x00",
    "\u0662\u066025-01-15T10:00:00Z",
    "2019-12-31T23:59:59.999999Z",
    "2020-01-01T00:00:00Z",
    "2020-01-01T00:30:00+01:00",
    "2025-01-17T00:00:00Z",
    "2025-01-17T00:00:00.001Z",
    "9999-12-31T23:59:59.999Z",
    "0001-01-01T00:00:00+01:00",
    "infinity",
    "epoch",
    "now",
    "",
)
ids = st.one_of(
    st.sampled_from(
        ["u1", "a" * 128, "a" * 129, "😀" * 128, "😀" * 129, "", "null", "e\u0301" * 64]
    ),
    st.text(min_size=1, max_size=8),
    st.sampled_from(
        ["\x00", "a\x00b", "\\", '"', "\u2028", "\ufeff", "\x7f", " ", "'; DROP", "../x"]
    ),
)
junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**30, -(10**400), 2**63, 2**63 - 1, -(2**63), 0, -1]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
)
fields = st.fixed_dictionaries(
    {},
    optional={
        "user_id": ids | junk,
        "device_id": ids | junk,
        "timestamp": st.sampled_from(INSTANTS) | junk,
        "timestamp_ms": st.sampled_from([NOON, NOON + 0.0, NOON + 0.5, str(NOON), NOW, 10**15])
        | st.integers(days.start_ms(dt.date(2019, 12, 31)), NOW + 2 * days.MS_PER_DAY)
        | junk,
        "heart_rate": st.integers(28, 222) | st.sampled_from([75.0, 75.5, "75", 1e2, 1e300]) | junk,
        "extra": junk,
    },
)
likely = st.fixed_dictionaries(
    {"user_id": ids, "device_id": ids, "heart_rate": st.integers(30, 220)},
    optional={"extra": junk},
).flatmap(
    lambda found: st.one_of(
        st.sampled_from(INSTANTS).map(lambda text: {**found, "timestamp": text}),
        st.integers(NOON, NOW).map(lambda ms: {**found, "timestamp_ms": ms}),
    )
)

heartbeats = st.builds(
    Heartbeat,
    ids.filter(lambda name: 1 <= len(name) <= 128),
    st.sampled_from(["d", "d,d"]),
    st.integers(NOON, NOW),
    st.integers(30, 220),
)


@st.composite
def lines(draw: st.DrawFn) -> bytes:
    """One line: JSON in some spelling, perhaps spoilt."""
    text = json.dumps(
        draw(likely | fields),
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([(",", ":"), (" , ", "\t: ")])),
    )
    found = text.encode(errors="surrogatepass")
    if draw(st.booleans()):
        found = record.encode(draw(heartbeats))
    spoil = draw(st.sampled_from(["no"] * 6 + ["cut", "insert", "around", "twice", "comma"]))
    place = draw(st.integers(0, len(found)))
    odd = [
        b"\x00",
        b"\xff",
        b"\x01",
        b"\\",
        b'"',
        b"\\ud800",
        b"\\u0041",
        b"\r",
        b" ",
        b"{",
        b"0",
        b"\xc3",
    ]
    if spoil == "cut":
        found = found[:place]
    elif spoil == "insert":
        found = found[:place] + draw(st.sampled_from(odd)) + found[place:]
    elif spoil == "twice" and found.endswith(b"}"):
        name = draw(st.sampled_from([*record.WIRE_FIELDS, "extra", "heart\\u005frate"]))
        found = found[:-1] + f', "{name}": {draw(st.sampled_from(["75", "1", "{}"]))}}}'.encode()
    elif spoil == "comma":
        found = found.replace(b"}", b",}").replace(b"]", b",]")
    elif spoil == "around":
        found = draw(st.sampled_from([b"\xef\xbb\xbf", b" ", b"\t", b"[", b"//", b"\x0b"])) + found
        found += draw(st.sampled_from([b"", b"\r", b" ", b"]", b" x", b"\x00", b"{}"]))
    return found.replace(b"\n", b" ")


texts = lines() | st.sampled_from(
    [
        b"",
        b" ",
        b"\r",
        b"null",
        b"5",
        b"[]",
        b'"x"',
        b"{}",
        b"[" * 3000,
        b"NaN",
        b"-",
        b"\x00",
        b"\x0c",
        codecs.BOM_UTF8,
        codecs.BOM_UTF8 + b"\r",
    ]
)


def expected(text: bytes, now_ms: int) -> tuple[Any, ...] | str | None:
    if not text.removeprefix(codecs.BOM_UTF8).strip():
        return None
    result, _ = record.parse(text, now_ms, SETTINGS.time_bounds)
    if isinstance(result, Heartbeat):
        return (result.user_id, result.device_id, result.timestamp_ms, result.heart_rate)
    return result.reason


def where_lines_went(decoded: Decoded) -> dict[tuple[int, ...], tuple[Any, ...] | str]:
    found: dict[tuple[int, ...], tuple[Any, ...] | str] = {}
    for fields in decoded.rows.to_pylist():
        read = row(fields)
        assert read[4] not in found
        found[read[4]] = read[:4]
    for fields in decoded.rejected.to_pylist():
        identity = tuple(fields[name] for name in ARRIVAL)
        assert identity not in found
        found[identity] = fields["reason"]
    return found


@given(
    st.lists(
        st.tuples(st.lists(texts, min_size=1, max_size=6), st.booleans()), min_size=1, max_size=4
    )
)
@example_settings(max_examples=80)
def test_every_line_ends_where_the_record_says(contents: list[tuple[list[bytes], bool]]) -> None:
    entries = [
        dataclasses.replace(entry(content, seq, shard=seq % 4), own=len(content) if own else None)
        for seq, (content, own) in enumerate(contents)
    ]
    decoded = decode(entries, SETTINGS)
    found = where_lines_went(decoded)
    counts = [0] * len(entries)
    for index, one in enumerate(entries):
        assert one.data is not None
        if not one.data.removeprefix(codecs.BOM_UTF8).strip():
            assert found.pop((one.ms, one.seq, one.shard, 0)) == "record_no_data"
            counts[index] = 1
            continue
        for pos, text in enumerate(one.data.split(b"\n")):
            want = expected(text, one.ms)
            if want is None:
                continue
            counts[index] += 1
            got = found.pop((one.ms, one.seq, one.shard, pos))
            assert got == want, text
    assert found == {}
    assert decoded.counts == counts


@given(st.lists(ids.filter(lambda name: 1 <= len(name) <= 128), min_size=1, max_size=20))
@example_settings(max_examples=20)
def test_shard_and_day_of_a_row(users: list[str]) -> None:
    decoded = decode([entry([line(user) for user in users])], SETTINGS)
    assert decoded.rows.num_rows == len(users)
    for fields in decoded.rows.to_pylist():
        assert fields["shard"] == shard_of(fields["user_id"], SETTINGS.shards)
        assert fields["day"] == (DAY - dt.date(1970, 1, 1)).days


@given(st.text(max_size=140))
def test_python_and_duckdb_agree_on_the_hash(user: str) -> None:
    [[found]] = duckdb.execute("SELECT md5_number_lower($1) % 97", [user]).fetchall()
    assert found == shard_of(user, 97)


def test_raw_bytes_are_kept_as_they_came() -> None:
    bad = [b"\xff\xfe", b'{"user_id": "\\u0000"}\r', b"not json", line(bpm=5)]
    decoded = decode([entry([line(), *bad])], SETTINGS)
    assert decoded.rejected.schema.equals(QUARANTINE)
    assert decoded.rejected["raw"].to_pylist() == bad
    assert decoded.rejected["arrival_pos"].to_pylist() == [1, 2, 3, 4]
    assert decoded.rows["arrival_pos"].to_pylist() == [0]


def test_messages_hold_no_value() -> None:
    decoded = decode([entry([line("secret-user", bpm=999), line("s" * 200), b"{secret"])], SETTINGS)
    for message in decoded.rejected["message"].to_pylist():
        assert "secret" not in message
        assert "999" not in message


@pytest.mark.parametrize("own", [None, 3])
def test_a_byte_order_mark_is_skipped(own: int | None) -> None:
    """At the beginning of an entry as of a line: files that were put together have it there too."""
    mark = codecs.BOM_UTF8
    spelt = line(at="2025-01-15T10:00:00Z")
    one = entry([mark + line(), mark + spelt, mark + line(bpm=5), mark, line()])
    decoded = decode([dataclasses.replace(one, own=own)], SETTINGS)
    assert (decoded.rows.num_rows, decoded.counts) == (3, [4])
    assert decoded.rejected["reason"].to_pylist() == ["heart_rate_out_of_range"]
    assert decoded.rejected["raw"].to_pylist() == [mark + line(bpm=5)]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (line()[:-1] + b', "heart_rate": 171}', "record_duplicate_field"),
        (line()[:-1] + b', "heart\\u005frate": 171}', "record_duplicate_field"),
        (b'{"user_id": "u2", ' + line()[1:], "record_duplicate_field"),
        (line(at=None)[:-1] + b', "heart_rate": 75}', "record_duplicate_field"),
        (line()[:-1] + b",}", "record_not_json"),
        (line("u,1")[:-1] + b", } ", "record_not_json"),
        (line("u,1")[:-1] + b', "heart_rate": 171}', "record_duplicate_field"),
        (line()[:-1] + b', "x": NaN}', "record_not_json"),
        (line()[:-1] + b', "x": 1e999}', "record_not_json"),
        (line() + line(), "record_not_json"),
        (line() + b", " + line(), "record_not_json"),
        (line(at="2025-01-15 10.30"), "timestamp_not_a_time"),
    ],
)
@pytest.mark.parametrize("careful", [False, True])
def test_what_readers_of_json_differ_about_is_refused(
    text: bytes, reason: str, careful: bool
) -> None:
    for own in (None, 2):
        one = dataclasses.replace(entry([text, line()]), own=own)
        [decoded] = pieces([one], SETTINGS, careful=careful)
        assert decoded.rejected["reason"].to_pylist()[0] == reason
        assert decoded.rows.num_rows == 1


WRITTEN_BEFORE = [
    (b'{"user_id":"u1","device_id":"device_a","timestamp_ms":1736935200000,"heart_rate":75}', "u1"),
    (b'{"user_id":"a,b","device_id":"d","timestamp_ms":1736935200000,"heart_rate":30}', "a,b"),
    (b'{"user_id":",,,,","device_id":",","timestamp_ms":1736935200001,"heart_rate":220}', ",,,,"),
    (b'{"user_id":"\\"heart_rate\\"","device_id":"d","timestamp_ms":1736935200000,"heart_rate":99}',
     '"heart_rate"'),
    (b'{"user_id":"\\\\","device_id":"\\u0000","timestamp_ms":1736935200000,"heart_rate":75}', "\\"),
    ('{"user_id":"é.1234567","device_id":"\ufeff","timestamp_ms":1577836800000,"heart_rate":75}'.encode(),
     "é.1234567"),
]  # fmt: skip


@pytest.mark.parametrize("careful", [False, True])
def test_lines_of_older_releases_drain_as_before(careful: bool) -> None:
    """As the append-only file and the spool may still hold them, in the bytes of their time."""
    texts = [text for text, _ in WRITTEN_BEFORE]
    for content in ([texts], [[text] for text in texts]):
        entries = [
            dataclasses.replace(entry(part, seq), own=len(part)) for seq, part in enumerate(content)
        ]
        [decoded] = pieces(entries, SETTINGS, careful=careful)
        assert decoded.rejected.num_rows == decoded.unknown_fields == 0
        assert set(decoded.rows["user_id"].to_pylist()) == {user for _, user in WRITTEN_BEFORE}
    for text in texts:
        found, _ = record.parse(text, NOW, SETTINGS.time_bounds)
        assert isinstance(found, Heartbeat)
        assert record.encode(found) == text


HALF, OTHER_HALF = line().split(b", ", 1)


@pytest.mark.parametrize(
    "texts",
    [
        [line() + b"," + HALF, OTHER_HALF],
        [line() + b", " + line(), HALF + b",", OTHER_HALF],
        [line() + b", " + line(), line("a}"), line("{b")],
        [line() + b", " + line(), line("a}")[:-60], b"{" + line()[16:]],
    ],
)
def test_an_object_is_one_line(texts: list[bytes]) -> None:
    """Where there are as many objects as lines, but not one on each, too."""
    decoded = decode([entry([line(), *texts])], SETTINGS)
    want = [expected(text, NOW) for text in texts]
    assert decoded.rows.num_rows == 1 + sum(isinstance(one, tuple) for one in want)
    assert decoded.rejected["raw"].to_pylist() == [
        text for text, one in zip(texts, want, strict=True) if isinstance(one, str)
    ]


@pytest.mark.parametrize("end", [b"", b"Z", b"+02:00"])
def test_usual_lines_of_other_producers_are_plain(
    end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a drain of them would take several times as long."""
    monkeypatch.setattr(record, "parse", None)
    spelt = line(at="2025-01-15T10:00:00.123" + end.decode())
    for text in (spelt, line()):
        for data in (b"\n".join([text] * 2000), b"\r\n".join([text] * 3) + b"\r\n"):
            decoded = decode([Delivered(data=data)], SETTINGS)
            assert decoded.rows.num_rows == data.count(b"user_id")


def test_times_with_and_without_an_offset_side_by_side() -> None:
    spelt = [line(at="2025-01-15T10:00:00" + end) for end in ("Z", "", "+02:00")]
    decoded = decode([entry(spelt)], SETTINGS)
    at = decoded.rows.sort_by("arrival_pos")["timestamp"].cast("int64").to_pylist()
    assert at == [NOON - 7_200_000, NOON - 7_200_000, NOON - 14_400_000]


def test_before_1970_too_a_fraction_is_cut_off_downwards() -> None:
    long_ago = SETTINGS.model_copy(update={"start_date": dt.date(1960, 1, 1)})
    spelt = [line(at=f"1969-12-31T23:59:59.{digits}Z") for digits in ("9999", "9991", "123456")]
    decoded = decode([entry(spelt)], long_ago)
    assert decoded.rows["timestamp"].cast("int64").to_pylist() == [-877, -1, -1]


@pytest.mark.parametrize("data", [None, b"", b" \r\n\n", b"\n", b"\xef\xbb\xbf", b"\xef\xbb\xbf\n"])
def test_entry_without_data(data: bytes | None) -> None:
    decoded = decode([Delivered(2, NOW, 7, data, deliveries=3), entry([line()])], SETTINGS)
    assert decoded.counts == [1, 1]
    [fields] = decoded.rejected.to_pylist()
    assert fields["reason"] == "record_no_data"
    assert fields["raw"] == (data or b"")
    assert fields["attempts"] == 3
    assert [fields[name] for name in ARRIVAL] == [NOW, 7, 2, 0]


def test_blank_lines_count_as_positions_only() -> None:
    decoded = decode([Delivered(data=b"\r\n" + line() + b"\r\n\n" + line() + b"\n")], SETTINGS)
    assert decoded.counts == [2]
    assert decoded.rows["arrival_pos"].to_pylist() == [1, 3]


def test_nothing_to_decode() -> None:
    decoded = decode([], SETTINGS)
    assert (decoded.rows.num_rows, decoded.rejected.num_rows, decoded.counts) == (0, 0, [])


@pytest.mark.parametrize("ms", [0, 1, NOW, days.LAST_MS, days.LAST_MS + 1, 2**63, 2**64 - 1])
def test_entry_ids_of_64_bits(ms: int, lake: Lake, settings: Settings) -> None:
    """Through files, too. "Now" is the entry's id, so that 1970's entries are all in the future."""
    one = Delivered(3, ms, 2**64 - 1, line(at=1) + b"\n" + line(at=NOON) + b"\nx")
    decoded = decode([one], settings)
    assert decoded.counts == [3]
    identity = (ms, 2**64 - 1, 3)
    if ms < NOON - days.MS_PER_DAY:
        assert decoded.rows.num_rows == 0
        assert "timestamp_in_the_future" in decoded.rejected["reason"].to_pylist()
    else:
        [fragment] = fragments.publish(lake, decoded.rows)
        assert [found[4] for found in rows_of(fragment.path)] == [(*identity, 1)]
        assert fragment.name.first == fragment.name.last == identity[:2]
    quarantine.publish(lake, decoded.rejected)
    found = {record.arrival for record in quarantine.records(lake, settings)}
    assert {tuple(getattr(one, name) for name in ARRIVAL)[:3] for one in found} == {identity}


@pytest.mark.parametrize(
    ("ahead_ms", "taken"), [(0, True), (days.MS_PER_DAY, True), (days.MS_PER_DAY + 1, False)]
)
def test_now_is_the_entry_id(ahead_ms: int, taken: bool) -> None:
    long_ago = days.start_ms(dt.date(2021, 5, 5))
    for text in (line(at=long_ago + ahead_ms), line(at=float(long_ago + ahead_ms))):
        decoded = decode([entry([text], ms=long_ago)], SETTINGS)
        assert decoded.rows.num_rows == taken


@given(
    st.integers(days.start_ms(dt.date(2020, 1, 1)) // 86_400_000, NOW // 86_400_000),
    st.sampled_from([-1, 0, 1]),
)
@example_settings(max_examples=20)
def test_day_borders(day_number: int, off_ms: int) -> None:
    at = day_number * 86_400_000 + off_ms
    if not SETTINGS.time_bounds.start_ms <= at:
        return
    text = days.EPOCH + dt.timedelta(milliseconds=at)
    spelt = json.dumps(
        {"user_id": "u", "device_id": "d", "timestamp": text.isoformat(), "heart_rate": 75}
    ).encode()
    decoded = decode([entry([line(at=at), spelt])], SETTINGS)
    assert decoded.rows["day"].to_pylist() == [at // 86_400_000] * 2


def test_fragments_of_a_batch(lake: Lake, settings: Settings) -> None:
    """One per source shard, day and user shard; sorted; the names say which ids are in it."""
    users = [f"u{n}" for n in range(8)]
    midnight = days.start_ms(DAY)
    entries = [
        entry(
            [line(user, at=at) for user in users for at in (midnight, midnight - 1)],
            seq,
            shard=source,
        )
        for seq, source in ((5, 0), (3, 0), (9, 1))
    ]
    published = deliver(lake, settings, *entries)
    places = set()
    rows: list[Row] = []
    for fragment in published:
        day = layout.day_of_folder(fragment.path.parent.parent.name)
        shard = int(fragment.path.parent.name.removeprefix("shard="))
        places.add((fragment.name.source, day, shard))
        found = rows_of(fragment.path)
        assert fragment.rows == len(found)
        assert found == sorted(found, key=lambda one: (one[0], one[2], one[1], one[4]))
        assert {days.day_of(one[2]) for one in found} == {day}
        assert {shard_of(one[0], 4) for one in found} == {shard}
        assert {one[4][2] for one in found} == {fragment.name.source}
        assert fragment.name.first == min(one[4][:2] for one in found)
        assert fragment.name.last == max(one[4][:2] for one in found)
        rows += found
    assert len(places) == len(published)
    assert len(rows) == len({one[4] for one in rows}) == 3 * 16
    assert HEARTBEATS.names == [*HEARTBEATS.names[:4], *ARRIVAL]


def test_unknown_fields_of_foreign_entries_are_counted() -> None:
    more = line()[:-1] + b', "steps": 7, "posture": {"timestamp": 1}}'
    external = entry([more, line(), more, line(bpm=5)])
    decoded = decode([external], SETTINGS)
    assert (decoded.rows.num_rows, decoded.unknown_fields) == (3, 4)
    own = dataclasses.replace(external, own=4)
    assert decode([own], SETTINGS).rows.equals(decoded.rows)


def test_a_line_of_any_size_is_read_and_its_neighbours_too() -> None:
    huge = line("huge")[:-1] + b', "x": "' + b"y" * 40_000_000 + b'"}'
    entries = [entry([line("u1")], 0), entry([huge, b"bad"], 1), entry([line("u2")], 2)]
    decoded = decode(entries, SETTINGS)
    assert sorted(decoded.rows["user_id"].to_pylist()) == ["huge", "u1", "u2"]
    assert decoded.rejected["raw"].to_pylist() == [b"bad"]
    assert decoded.counts == [1, 2, 1]


def test_more_rejects_than_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "_CHUNK", 7)
    bad = [b"bad %d" % number for number in range(20)]
    decoded = decode([entry(bad[:9], 0), entry([b"\xff", *bad[9:]], 1)], SETTINGS)
    found = zip(
        decoded.rejected["arrival_seq"].to_pylist(),
        decoded.rejected["arrival_pos"].to_pylist(),
        decoded.rejected["raw"].to_pylist(),
        strict=True,
    )
    expected = [(0, pos, raw) for pos, raw in enumerate(bad[:9])]
    expected += [(1, pos, raw) for pos, raw in enumerate([b"\xff", *bad[9:]])]
    assert sorted(found) == expected
    assert decoded.counts == [9, 12]


@given(
    st.lists(texts, min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(1024, 2048),
    st.booleans(),
)
@example_settings(max_examples=40)
def test_a_large_entry_is_cut_at_line_ends(
    content: list[bytes], most_rows: int, most_bytes: int, careful: bool
) -> None:
    """Pieces together hold what the whole holds, at the same positions, and keep the bounds."""
    tight = SETTINGS.model_copy(update={"drain_max_rows": most_rows, "drain_max_bytes": most_bytes})
    one = entry(content)
    whole = decode([one], SETTINGS)
    parts = list(pieces([one], tight, careful=careful))
    assert sum(part.counts[0] for part in parts) == whole.counts[0]
    assert all(part.counts[0] <= most_rows for part in parts)
    found: dict[tuple[int, ...], tuple[Any, ...] | str] = {}
    for part in parts:
        found |= where_lines_went(part)
    assert found == where_lines_went(whole)
    as_a_whole = list(refused(one, Refusal("record", "poison", "x"), tight))
    assert sum(part.counts[0] for part in as_a_whole) == whole.counts[0]
    positions = [pos for part in as_a_whole for pos in part.rejected["arrival_pos"].to_pylist()]
    assert positions == sorted(identity[3] for identity in found)


def test_memory_of_millions_of_tiny_rows_is_bounded(tmp_path: Path) -> None:
    program = (
        "import resource\n"
        "from pathlib import Path\n"
        "from hb_assets.lake.ingest.decode import pieces\n"
        "from hb_assets.core.settings import Settings\n"
        "from hb_assets_tests.lake.deliveries import Delivered\n"
        f"settings = Settings(home=Path({str(tmp_path)!r}), drain_max_rows=50_000)\n"
        "peaks = []\n"
        "for part in pieces([Delivered(data=b'1\\n' * 1_000_000)], settings):\n"
        "    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
        "print(peaks[3], peaks[-1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    early, late = map(int, done.stdout.split())
    assert late - early < 100, "MB more after a million rows than after 200,000"


@pytest.mark.parametrize("own", [None, 1])
def test_rows_are_sorted(own: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way: by source, day and shard, then as consolidated files are, then by arrival."""
    users = ["u", "U", "é", "e\u0301", "\U0001f600", "\uffff", "a,b", "z"]
    beats = [
        Heartbeat(f"{user}{n % 2}", f"d{n % 3}", NOON - n % 9 * 40_000_001, 60 + n)
        for n in range(40)
        for user in users
    ]
    lines = [record.encode(beat) for beat in beats]
    entries = [
        dataclasses.replace(entry(part, seq, shard=shard), own=own)
        for part, seq, shard in ((lines[:90], 2, 1), (lines[90:], 10, 0), (lines[:150], 9, 0))
    ]
    decoded = decode(entries, SETTINGS)
    rows = decoded.rows.to_pylist()
    assert decoded.counts == [90, 230, 150]
    assert rows == sorted(
        rows,
        key=lambda one: (
            *(one["arrival_shard"], one["day"], one["shard"], one["user_id"].encode()),
            *(one["timestamp"], one["device_id"].encode()),
            *(one["arrival_ms"], one["arrival_seq"], one["arrival_pos"]),
        ),
    )
    monkeypatch.setattr(order, "_WORD", 0)
    assert decode(entries, SETTINGS).rows.equals(decoded.rows)
