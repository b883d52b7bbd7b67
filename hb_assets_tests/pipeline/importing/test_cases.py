"""Small files that stand for kinds of mistakes: each was once read as something else.

What a case is about in full is shown where its format is; here stands what a person would try.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hb_assets_tests.lake.deliveries import NOON
from hb_assets_tests.pipeline.importing.reading import Read, of, read
from hb_assets_tests.pipeline.importing.test_parquet_file import instants, written

NO_TIME = "timestamp_not_a_time"
OBJECTS = [
    '{"user_id":"k","device_id":"d","timestamp":"2025-01-15T12:00:01Z","heart_rate":75}',
    '{"user_id":"k","device_id":"d","timestamp":"2025-01-15T12:00:02Z","heart_rate":76}',
]
HEADER = "user_id,device_id,timestamp,heart_rate"
TEXTS: dict[str, tuple[list[str], Sequence[tuple[int, int]], Sequence[tuple[int, str]]]] = {
    # lines, (ms after NOON, bpm) of what is accepted, (line, reason) of what is refused
    "fraction_of_an_hour_or_minute.csv": (
        [
            HEADER,
            "k,a,2025-01-15 12.30,71",
            "k,b,2025-01-15T12.5Z,72",
            "k,c,2025-01-15T12:30.5Z,73",
            "k,e,2025-01-15 07.45,74",
        ],
        [],
        [(2, NO_TIME), (3, NO_TIME), (4, NO_TIME), (5, NO_TIME)],
    ),
    "digit_as_separator.csv": (
        [HEADER, "k,a,20250115103045123,71", "k,b,2025011510304,72"],
        [],
        [(2, NO_TIME), (3, NO_TIME)],
    ),
    "date_with_offset.csv": (
        [HEADER, "k,a,2025-01-15-05:00,71", "k,b,2025-01-15+05:30,72"],
        [],
        [(2, NO_TIME), (3, NO_TIME)],
    ),
    "fraction_in_offset.csv": (
        [HEADER, "k,a,2025-01-15T12:00:00+05.5,71"],
        [],
        [(2, NO_TIME)],
    ),
    "decimal_comma_last.csv": (
        [HEADER, "k,d,2025-01-15T12:00:01Z,75,5", "k,d,2025-01-15T12:00:02Z,76"],
        [(2000, 76)],
        [(2, "record_too_many_cells")],
    ),
    "comma_in_device_last.csv": (
        [
            "user_id,timestamp,heart_rate,device_id",
            "k,2025-01-15T12:00:01Z,70,Band, left",
            "k,2025-01-15T12:00:01Z,99,Band, right",
        ],
        [],
        [(2, "record_too_many_cells"), (3, "record_too_many_cells")],
    ),
    "trailing_empty.csv": ([HEADER, "k,d,2025-01-15T12:00:01Z,70,,"], [(1000, 70)], []),
    "all_refused.csv": (
        [HEADER, "k,d,1736942400,71", "k,d,1736942401,72"],
        [],
        [(2, NO_TIME), (3, NO_TIME)],
    ),
    "byte_order_mark.ndjson": (
        ["\ufeff" + OBJECTS[0], OBJECTS[1]],
        [(1000, 75), (2000, 76)],
        [],
    ),
    "array.json": (["[" + ", ".join(OBJECTS) + "]"], [(1000, 75), (2000, 76)], []),
    "semicolon.csv": (
        [HEADER.replace(",", ";"), "k;d;2025-01-15T12:00:01Z;75"],
        [(1000, 75)],
        [],
    ),
    "spaces_after_comma.csv": (
        [HEADER.replace(",", ", "), "k, d, 2025-01-15T12:00:01Z, 75"],
        [(1000, 75)],
        [],
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_text(tmp_path: Path, name: str) -> None:
    lines, accepted, refused = TEXTS[name]
    found = of(tmp_path / name, "\n".join(lines))
    assert list(zip(found.late, found.bpm, strict=True)) == list(accepted)
    assert found.reasons == list(refused)
    assert found.done.fault is None


def test_two_heart_rates(tmp_path: Path) -> None:
    row = "k,d,2025-01-15T12:00:01Z,71,171"
    found = of(tmp_path / "a.csv", f"{HEADER},heart_rate\n{row}\n")
    assert (found.heartbeats, found.refused) == ([], [])
    assert "has the column heart_rate more than once" in found.fault


def test_one_bad_byte(tmp_path: Path) -> None:
    rows = [
        b"k,%b,2025-01-15T12:00:0%dZ,7%d" % (d, n, n) for n, d in enumerate([b"d", b"\xe9", b"d"])
    ]
    content = b"\n".join([HEADER.encode(), *rows])
    found = of(tmp_path / "a.csv", content)
    assert (found.bpm, found.reasons) == ([70, 72], [(3, "record_not_utf8")])


def test_unclosed_quote(tmp_path: Path) -> None:
    rows = [f"k,d,2025-01-15T12:00:{n:02d}Z,80" for n in range(20)]
    rows[1] = rows[1].replace("d", '"d')
    found = of(tmp_path / "a.csv", "\n".join([HEADER, *rows]))
    assert (found.bpm, found.refused) == ([80], [])
    assert "line 3: a quote that is opened there isn't closed" in found.fault


def both_times(path: Path) -> Path:
    first = pa.array([NOON + 3_600_000, NOON + 3_601_000, None], pa.int64())
    return written(path, timestamp_ms=first)


def one_bad_clock(path: Path) -> Path:
    numbers = [NOON * 1000, 2**62, NOON * 1000 + 2_000_000]
    return written(path, timestamp=pa.array(numbers).cast(pa.timestamp("us", "UTC")))


def uuids(path: Path) -> Path:
    ids = [uuid.UUID(int=n).bytes for n in (1, 2, 3)]
    return written(path, user_id=pa.array(ids, pa.uuid()))


def decimals(path: Path) -> Path:
    values = pa.array([Decimal(n) for n in (71, 72, 73)], pa.decimal128(5, 0))
    return written(path, heart_rate=values)


WHOLE = [(0, 71), (1000, 72), (2000, 73)]
TABLES: dict[str, tuple[Callable[[Path], Path], list[tuple[int, int]], list[Any]]] = {
    "both_times": (both_times, [(3_600_000, 71), (3_601_000, 72), (2000, 73)], []),
    "unknown_zone": (lambda path: written(path, timestamp=instants("ns", "tzutc()")), WHOLE, []),
    "one_bad_clock": (one_bad_clock, [WHOLE[0], WHOLE[2]], [(2, "timestamp_in_the_future")]),
    "decimal_heart_rate": (decimals, WHOLE, []),
    "uuid_user": (uuids, WHOLE, []),
    "nanoseconds": (lambda path: written(path, timestamp=instants("ns", finer=9)), WHOLE, []),
}


@pytest.mark.parametrize("name", TABLES)
def test_table(tmp_path: Path, name: str) -> None:
    write, accepted, refused = TABLES[name]
    found: Read = read(write(tmp_path / f"{name}.parquet"))
    assert list(zip(found.late, found.bpm, strict=True)) == accepted
    assert found.reasons == refused
    assert found.done.fault is None
    if name == "uuid_user":
        assert found.heartbeats[1].user_id == "00000000-0000-0000-0000-000000000002"
