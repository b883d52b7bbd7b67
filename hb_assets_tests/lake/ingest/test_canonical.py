"""Canonical lines: what our own appends write is read; what isn't proved to be that is left out."""

from __future__ import annotations

import datetime as dt

import pytest
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core import record
from hb_assets.core.record import BPM_RANGE, Heartbeat, TimeBounds
from hb_assets.lake.ingest import canonical
from hb_assets_tests.lake.deliveries import NOON

BOUNDS = TimeBounds.of(dt.date(1970, 1, 1), dt.timedelta(0))
LAST = 10**13 - 1
names = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters=',"\\', min_codepoint=32),
    min_size=1,
    max_size=128,
) | st.sampled_from(["a" * 128, "\U0001f600" * 128, "\x7f", "\ufeff", "{", "null", "\u2028"])
beats = st.builds(Heartbeat, names, names, st.integers(10**12, LAST), st.integers(*BPM_RANGE))
PLAIN = record.encode(Heartbeat("user", "device", NOON, 75))


def taken(text: bytes) -> list[tuple[int, Heartbeat]] | None:
    """Number and content of each line that is read."""
    found = canonical.read(text, text.count(b"\n") + 1)
    if found is None:
        return None
    columns = (
        found.user_id.to_pylist(),
        found.device_id.to_pylist(),
        found.instant.tolist(),
        found.values[0].to_pylist(),
    )
    beats = [Heartbeat(*fields) for fields in zip(*columns, strict=True)]
    return list(zip(found.number.tolist(), beats, strict=True))


@given(st.lists(beats, min_size=1, max_size=20))
@example_settings(max_examples=30)
def test_what_our_appends_write_is_read(found: list[Heartbeat]) -> None:
    """Else every drain would take the long way."""
    assert taken(b"\n".join(map(record.encode, found))) == list(enumerate(found))


def test_lines_that_are_not_canonical_are_left_out_alone() -> None:
    comma = record.encode(Heartbeat("a,b", "d", NOON, 75))
    lines = [PLAIN, comma, PLAIN, b"", b"{}", PLAIN.replace(b"75", b"29"), PLAIN]
    found = taken(b"\n".join(lines))
    assert found is not None
    assert [number for number, _ in found] == [0, 2, 6]


@pytest.mark.parametrize(
    ("part", "other"),
    [
        (b'"user"', b'"us\\u0041"'),
        (b'"user"', b'"us\x01"'),
        (b'"user"', b'"us"er"'),
        (b'"user"', b'""'),
        (b'"user"', b'"' + b"u" * 129 + b'"'),
        (b'"user_id"', b'"uzer_id"'),
        (b'"device"', b'"device" '),
        (b'"device"', b'"\\\\"'),
        (b'_ms":1', b'_ms":0'),
        (b'_ms":1', b'_ms":-'),
        (b"timestamp_ms", b"tymestamp_ms"),
        (b":75", b":075"),
        (b":75", b":7.5"),
        (b":75", b":221"),
        (b"75}", b"75}}"),
    ],
)
def test_what_is_not_plain_is_left_out(part: bytes, other: bytes) -> None:
    assert part in PLAIN
    found = taken(PLAIN + b"\n" + PLAIN.replace(part, other))
    assert found is not None
    assert [number for number, _ in found] == [0]


@pytest.mark.parametrize(
    "text",
    [
        PLAIN + b"\r\n" + PLAIN,
        PLAIN.replace(b"user", b"us\rer", 2),
        b"\xef\xbb\xbf" + PLAIN,
        PLAIN + b"\n" + PLAIN.replace(b"device", b"\xff", 2),
        PLAIN + b"\n",
        b"\n".join([b"{}"] * 2000),
        PLAIN.replace(b"user", b"u" * 2**22),
    ],
)
def test_texts_that_cannot_be_told_apart(text: bytes) -> None:
    assert taken(text) is None


@given(st.data())
@example_settings(max_examples=100)
def test_whatever_is_read_is_what_the_record_says(data: st.DataObject) -> None:
    line = record.encode(data.draw(beats))
    place = data.draw(st.integers(0, len(line)))
    cut = data.draw(st.integers(0, 2))
    odd = st.sampled_from(
        [*'"\\,:{}+-0159 \tabc\x00\x1f\x7f', "\\u0041", ',"', '":"', "e1", ".0", "x"]
    )
    spoilt = (
        line[:place] + "".join(data.draw(st.lists(odd, max_size=3))).encode() + line[place + cut :]
    )
    found = taken(PLAIN + b"\n" + spoilt)
    if found is not None and len(found) == 2:
        result, unknown = record.parse(spoilt, LAST, BOUNDS)
        assert (found[1][1], ()) == (result, unknown)
