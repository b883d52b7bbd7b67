"""CSV: one meaning or a refusal, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest

from hb_assets.pipeline.importing.sources import MOST
from hb_assets_tests.lake.deliveries import NOON
from hb_assets_tests.pipeline.importing.reading import AT, HEADER, of

ROW = f"u1,d,{AT},75\n".encode()


def test_rows(tmp_path: Path) -> None:
    found = of(
        tmp_path / "a.csv",
        b"\xef\xbb\xbf" + HEADER.replace(b"\n", b",note\n") + b"u1,d,2025-01-15T12:00:00Z,75,x\n"
        b'"u\n2",d,2025-01-15 12:00:00,76,\n'
        b"\n"
        b"u3,d,2025-01-15T12:00:00Z,high,\n"
        b",d,2025-01-15T12:00:00Z,75,\n"
        b"u4,d\r\n"
        b"u5,d,2025-01-15T12:00:00Z,77,x,,\n",
    )
    assert [(one.user_id, one.heart_rate) for one in found.heartbeats] == [
        ("u1", 75),
        ("u\n2", 76),
        ("u5", 77),
    ]
    assert found.reasons == [
        (6, "heart_rate_wrong_type"),
        (7, "user_id_missing"),
        (8, "timestamp_missing"),
    ]
    assert found.done.ignored.total() == 2


@pytest.mark.parametrize(
    "text",
    [
        *("2025-01-15 10.30", "2025-01-15T10.5Z", "2025-01-15T10:30.5Z", "2025-01-15 07.45"),
        *("20250115103045123", "2025011510304", "2025-01-15-05:00", "2025-01-15+05:30"),
        "2025-01-15T10:00:00+05.5",
    ],
)
def test_what_may_be_another_time_is_refused(tmp_path: Path, text: str) -> None:
    found = of(tmp_path / "a.csv", HEADER + f"u1,d,{text},75\nu1,d,{AT},76\n".encode())
    assert (found.bpm, found.reasons) == ([76], [(2, "timestamp_not_a_time")])


def test_more_cells_than_columns(tmp_path: Path) -> None:
    """A decimal comma at the end would be cut off, and what follows a comma in a name."""
    found = of(tmp_path / "a.csv", HEADER + f"u1,d,{AT},75,5\nu1,d,{AT},76\n".encode())
    assert (found.bpm, found.reasons) == ([76], [(2, "record_too_many_cells")])
    header = "user_id,timestamp,heart_rate,device_id\n"
    rows = f"u1,{AT},70,Band, left\nu1,{AT},99,Band, right\n"
    found = of(tmp_path / "b.csv", header + rows)
    assert (found.bpm, len(found.refused)) == ([], 2)


def test_more_cells_that_are_empty(tmp_path: Path) -> None:
    assert of(tmp_path / "a.csv", HEADER + f"u1,d,{AT},70,, \n".encode()).bpm == [70]


@pytest.mark.parametrize(
    ("header", "twice"),
    [
        ("user_id,device_id,timestamp,heart_rate,heart_rate", "heart_rate"),
        ("user_id,User_ID,device_id,timestamp,heart_rate", "user_id"),
        ("user_id,device_id,timestamp,heart_rate,note,note", "note"),
    ],
)
def test_a_column_twice(tmp_path: Path, header: str, twice: str) -> None:
    found = of(tmp_path / "a.csv", f"{header}\nu1,u1,d,{AT},71,171\n")
    assert f"the column {twice} more than once" in found.fault
    assert found.bpm == []


def test_epoch_milliseconds(tmp_path: Path) -> None:
    found = of(
        tmp_path / "a.csv",
        f"heart_rate,timestamp_ms,device_id,user_id\n75,{NOON},d,u1\n75,x,d,u1\n75,,d,u1\n",
    )
    assert found.late == [0]
    assert found.reasons == [(3, "timestamp_wrong_type"), (4, "timestamp_missing")]


def test_epoch_milliseconds_count_before_a_timestamp(tmp_path: Path) -> None:
    header = "user_id,device_id,timestamp,heart_rate,timestamp_ms\n"
    rows = f"u1,d,2025-01-15T10:00:00Z,75,{NOON + 5}\nu1,d,{AT},75,\n"
    assert of(tmp_path / "a.csv", header + rows).late == [5, 0]


@pytest.mark.parametrize(
    ("text", "accepted"),
    [("75", 1), ("75.0", 1), ("75.5", 0), ("7_5", 0), ("+75", 0), ("7e1", 0), ("nan", 0)],
)
def test_numbers_are_what_json_takes(tmp_path: Path, text: str, accepted: int) -> None:
    found = of(tmp_path / "a.csv", HEADER + f"u1,d,{AT},{text}\n".encode())
    assert (len(found.heartbeats), len(found.refused)) == (accepted, 1 - accepted)


@pytest.mark.parametrize(
    "content",
    [
        f"user_id;device_id;timestamp;heart_rate\nu1;d;{AT};75\n",
        f"user_id\tdevice_id\ttimestamp\theart_rate\nu1\td\t{AT}\t75\n",
        f"user_id|device_id|timestamp|heart_rate\nu1|d|{AT}|75\n",
        f"sep=;\r\nuser_id;device_id;timestamp;heart_rate\r\nu1;d;{AT};75\r\n",
        f"SEP=:\nuser_id:device_id:timestamp_ms:heart_rate\nu1:d:{NOON}:75\n",
        f"\n\nuser_id,device_id,timestamp,heart_rate\nu1,d,{AT},75",
        f"user_id, device_id, timestamp, heart_rate\nu1, d, {AT}, 75\n",
        f'user_id, "device_id", timestamp, heart_rate\nu1, "d", {AT}, 75\n',
        f"User_Id,DEVICE_ID,Timestamp,heart_Rate\nu1,d,{AT},75\n",
        f'"user_id","device_id","timestamp","heart_rate"\r"u1","d","{AT}","75"\r',
        f",user_id,device_id,timestamp,heart_rate,,\n0,u1,d,{AT},75,,\n",
    ],
)
def test_whoever_wrote_it(tmp_path: Path, content: str) -> None:
    found = of(tmp_path / "a.csv", content)
    assert found.done.fault is None
    (one,) = found.heartbeats
    assert (one.user_id, one.device_id, one.timestamp_ms, one.heart_rate) == ("u1", "d", NOON, 75)


def test_spaces_of_a_value_are_kept(tmp_path: Path) -> None:
    """Where the header has none, they are the value's, as CSV is defined."""
    found = of(tmp_path / "a.csv", HEADER + f" u1,d ,{AT},75\n".encode())
    assert [(one.user_id, one.device_id) for one in found.heartbeats] == [(" u1", "d ")]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "lacks the columns"),
        (f"secret,d,{AT},177\n".encode(), "lacks the columns"),
        (b"user_id,heart_rate\nsecret,177\n", "lacks the columns device_id, timestamp (or"),
        (b"user_id:device_id:timestamp:heart_rate\n", "commas, semicolons, tabs or bars"),
        (b"user_id ,device_id,timestamp,heart_rate\n", "spaces stand around the name user_id"),
        (b"user_id,device_id,timestamp,heart_rate,secret\xe9\n", "isn't UTF-8"),
        (HEADER.decode().encode("utf-16"), "UTF-16"),
    ],
)
def test_no_header(tmp_path: Path, content: bytes, why: str) -> None:
    assert why in of(tmp_path / "a.csv", content).fault


def test_a_bad_byte_refuses_its_row(tmp_path: Path) -> None:
    found = of(tmp_path / "a.csv", HEADER + ROW + f"u1,Ren\xe9,{AT},72\n".encode("latin-1") + ROW)
    assert (found.bpm, found.reasons) == ([75, 75], [(3, "record_not_utf8")])


def test_a_quote_that_is_not_closed(tmp_path: Path) -> None:
    """It is named with its line; what is before it is taken, and nothing is guessed behind it."""
    rows = b"".join(f"u1,d,2025-01-15T12:01:{n:02d}Z,80\n".encode() for n in range(20))
    found = of(tmp_path / "a.csv", HEADER + ROW + f'secret,"d,{AT},76\n'.encode() + rows)
    assert (found.bpm, found.refused) == ([75], [])
    assert "line 3: a quote" in found.fault


def test_a_quote_that_is_not_closed_in_the_last_line(tmp_path: Path) -> None:
    found = of(tmp_path / "a.csv", HEADER + ROW + b'"secret,d')
    assert (found.bpm, found.refused) == ([75], [])
    assert "line 3: a quote" in found.fault


def test_a_quote_that_another_one_closes(tmp_path: Path) -> None:
    found = of(tmp_path / "a.csv", HEADER + ROW + f'secret,"d,{AT},76\n'.encode() + ROW + b'"u2",d')
    assert (found.bpm, found.refused) == ([75], [])
    assert "line 3: a quote" in found.fault


def test_a_quote_that_is_not_closed_in_a_large_file(tmp_path: Path) -> None:
    """Memory stays bounded."""
    found = of(tmp_path / "a.csv", HEADER + b'"secret' + ROW * (3 * MOST // len(ROW)))
    assert "line 2: a quote" in found.fault


def test_quotes_that_are_closed_late(tmp_path: Path) -> None:
    found = of(tmp_path / "a.csv", HEADER + ROW + b'"secret\n",' * 4 * (MOST // 10) + ROW)
    assert found.bpm == [75]
    assert "line 3: a quote" in found.fault


def test_text_behind_a_closing_quote(tmp_path: Path) -> None:
    found = of(tmp_path / "a.csv", HEADER + f'u1,"d"x,{AT},76\n'.encode() + ROW)
    assert (found.bpm, found.reasons) == ([75], [(2, "record_bad_quotes")])


def test_a_long_field_ends_no_file(tmp_path: Path) -> None:
    content = HEADER + b"".join(b"x" * length + b",d,1,75\n" for length in (300_000, 3 * MOST))
    found = of(tmp_path / "a.csv", content + ROW)
    assert found.reasons == [(2, "user_id_wrong_length"), (3, "record_too_long")]
    assert found.bpm == [75]
