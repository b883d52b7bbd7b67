"""Parquet: any type that says what is meant, and rows that refuse themselves alone."""

from __future__ import annotations

import datetime as dt
import subprocess
import sys
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hb_assets_tests.lake.deliveries import NOON
from hb_assets_tests.pipeline.importing.reading import AT, Read, of, read

MOMENT = dt.datetime(2025, 1, 15, 12, tzinfo=dt.UTC)
ROWS = 3


def written(path: Path, options: dict[str, Any] | None = None, **columns: Any) -> Path:
    """A file with a row a second from NOON on, with these columns instead."""
    usual: dict[str, Any] = {
        "user_id": ["u1"] * ROWS,
        "device_id": ["d"] * ROWS,
        "timestamp": instants("us"),
        "heart_rate": [71, 72, 73],
    }
    table = pa.table({k: v for k, v in (usual | columns).items() if v is not None})
    pq.write_table(table, path, **(options or {}))
    return path


def instants(unit: str, zone: str | None = "UTC", *, finer: int = 0) -> pa.Array:
    by = {"s": 1, "ms": 1000, "us": 1_000_000, "ns": 1_000_000_000}[unit]
    numbers = [NOON // 1000 * by + n * by + finer for n in range(ROWS)]
    return pa.array(numbers, pa.int64()).cast(pa.timestamp(unit, zone))


def whole(found: Read) -> bool:
    """Whether all rows were taken, as they were meant."""
    bare = [(one.user_id, one.device_id) for one in found.heartbeats]
    return (bare, found.late, found.bpm) == (
        [("u1", "d")] * ROWS,
        [0, 1000, 2000],
        [71, 72, 73],
    ) and found.done.fault is None


@pytest.mark.parametrize("zone", ["UTC", None, "Europe/Berlin", "tzutc()"])
@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_any_unit_and_zone(tmp_path: Path, unit: str, zone: str | None) -> None:
    """Instants are stored in UTC: the zone is only for display, whatever its name."""
    assert whole(read(written(tmp_path / "a.parquet", timestamp=instants(unit, zone))))


def test_finer_digits_are_cut_off(tmp_path: Path) -> None:
    for unit, finer in (("us", 999), ("ns", 999_999)):
        times = instants(unit, finer=finer)
        assert whole(read(written(tmp_path / "a.parquet", timestamp=times)))


def test_timestamps_of_spark_and_impala(tmp_path: Path) -> None:
    int96 = {"use_deprecated_int96_timestamps": True}
    assert whole(read(written(tmp_path / "a.parquet", int96, timestamp=instants("ns"))))


def test_a_timestamp_of_spark_that_nanoseconds_cannot_hold(tmp_path: Path) -> None:
    far = pa.array([NOON * 1000 + 2**64 // 1000] * ROWS).cast(pa.timestamp("us", "UTC"))
    int96 = {"use_deprecated_int96_timestamps": True}
    found = read(written(tmp_path / "a.parquet", int96, timestamp=far))
    assert found.reasons == [(n + 1, "timestamp_in_the_future") for n in range(ROWS)]


def test_as_text(tmp_path: Path) -> None:
    found = read(written(tmp_path / "a.parquet", timestamp=[AT, None, "secret"]))
    assert found.late == [0]
    assert found.reasons == [(2, "timestamp_missing"), (3, "timestamp_not_a_time")]


def test_epoch_milliseconds_count_before_a_timestamp(tmp_path: Path) -> None:
    kinds = (pa.int64(), pa.float64(), pa.decimal128(20, 0), pa.timestamp("ms", "UTC"))
    for kind in kinds:
        numbers = pa.array([NOON + 5, NOON + 6, None], pa.int64()).cast(kind)
        found = read(written(tmp_path / "a.parquet", timestamp_ms=numbers))
        assert found.late == [5, 6, 2000], kind
    only = pa.array([NOON, NOON + 1000, NOON + 2000])
    assert whole(read(written(tmp_path / "a.parquet", timestamp=None, timestamp_ms=only)))


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("heart_rate", pa.array([71, 72, 73], pa.uint8())),
        ("heart_rate", pa.array([71, 72, 73], pa.float32())),
        ("heart_rate", pa.array([71, 72, 73], pa.int64()).cast(pa.float16())),
        ("heart_rate", pa.array([Decimal(n) for n in (71, 72, 73)], pa.decimal128(5, 0))),
        ("heart_rate", pa.array([Decimal(n) for n in (71, 72, 73)], pa.decimal256(40, 2))),
        ("heart_rate", pa.array([71, 72, 73]).dictionary_encode()),
        ("user_id", pa.array(["u1"] * ROWS).dictionary_encode()),
        ("user_id", pa.array(["u1"] * ROWS, pa.large_string())),
        ("user_id", pa.array(["u1"] * ROWS, pa.string_view())),
        ("user_id", pa.array([b"u1"] * ROWS)),
        ("user_id", pa.array([b"u1"] * ROWS).dictionary_encode()),
        ("device_id", pa.array([b"d"] * ROWS, pa.large_binary())),
        ("timestamp", pa.array([f"2025-01-15T12:00:0{n}Z".encode() for n in range(ROWS)])),
        ("timestamp", instants("us").dictionary_encode()),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.type),
)
def test_types_that_say_what_is_meant(tmp_path: Path, column: str, values: pa.Array) -> None:
    for options in ({}, {"store_schema": False}):
        path = written(tmp_path / "a.parquet", options, **{column: values})
        assert whole(read(path)), options


def test_a_uuid_is_text(tmp_path: Path) -> None:
    ids = [uuid.UUID(int=n) for n in range(ROWS)]
    column = pa.array([one.bytes for one in ids], pa.uuid())
    for options in ({}, {"store_schema": False}):
        found = read(written(tmp_path / "a.parquet", options, user_id=column))
        assert [one.user_id for one in found.heartbeats] == [str(one) for one in ids]


@pytest.mark.parametrize(
    ("column", "values", "reason"),
    [
        ("heart_rate", [75.5] * ROWS, "heart_rate_wrong_type"),
        ("heart_rate", ["75"] * ROWS, "heart_rate_wrong_type"),
        ("heart_rate", [True] * ROWS, "heart_rate_wrong_type"),
        ("heart_rate", [Decimal("75.5")] * ROWS, "heart_rate_wrong_type"),
        ("heart_rate", pa.array([75] * ROWS, pa.timestamp("ms")), "heart_rate_wrong_type"),
        ("user_id", [[1]] * ROWS, "user_id_wrong_type"),
        ("user_id", pa.array([b"\0" * 16] * ROWS, pa.binary(16)), "user_id_wrong_type"),
        ("timestamp", [dt.date(2025, 1, 15)] * ROWS, "timestamp_wrong_type"),
        ("timestamp", [NOON] * ROWS, "timestamp_wrong_type"),
    ],
)
def test_types_that_may_mean_anything(
    tmp_path: Path, column: str, values: object, reason: str
) -> None:
    found = read(written(tmp_path / "a.parquet", **{column: values}))
    assert found.reasons == [(n + 1, reason) for n in range(ROWS)]


@pytest.mark.parametrize("unit", ["ms", "us"])
def test_a_clock_beyond_the_calendar_refuses_its_row(tmp_path: Path, unit: str) -> None:
    numbers = instants(unit).cast(pa.int64()).to_pylist()
    for wrong, reason in ((2**62, "timestamp_in_the_future"), (-(2**62), "timestamp_too_old")):
        times = pa.array([numbers[0], wrong, numbers[2]]).cast(pa.timestamp(unit, "UTC"))
        found = read(written(tmp_path / "a.parquet", timestamp=times))
        assert (found.late, found.reasons) == ([0, 2000], [(2, reason)])


@pytest.mark.parametrize("column", ["user_id", "device_id"])
def test_a_bad_byte_refuses_its_row(tmp_path: Path, column: str) -> None:
    bad = pa.array([b"ok", b"secret\xe9", b"ok"])
    for values in (bad, bad.view(pa.string())):
        found = read(written(tmp_path / "a.parquet", **{column: values}))
        assert (found.bpm, found.reasons) == ([71, 73], [(2, "record_unreadable")])
        assert "secret" not in found.refused[0].message


def test_unknown_columns_are_counted(tmp_path: Path) -> None:
    more = {"spo2": [97, None, 98], "note": [None] * ROWS, "samples": [[1], [2], [3]]}
    found = read(written(tmp_path / "a.parquet", **more))
    assert whole(found)
    assert found.done.ignored == {"spo2": 2, "samples": 3}


@pytest.mark.parametrize("names", [["user_id", "user_id"], ["USER_ID", "user_id"]])
def test_a_column_twice(tmp_path: Path, names: list[str]) -> None:
    columns = [["u1"], ["u2"], ["d"], [AT], [75]]
    path = tmp_path / "a.parquet"
    others = ["device_id", "timestamp", "heart_rate"]
    pq.write_table(pa.Table.from_arrays([pa.array(one) for one in columns], names + others), path)
    assert "the column user_id more than once" in read(path).fault


def test_columns_in_any_case(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet")
    pq.write_table(
        pq.read_table(path).rename_columns(["User_ID", "DEVICE_ID", "Timestamp", "Heart_Rate"]),
        path,
    )
    assert whole(read(path))


def test_without_a_column(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", device_id=None, heart_rate=None)
    assert "lacks the columns device_id, heart_rate" in read(path).fault


@pytest.mark.parametrize("content", [b"", b"secret" * 2000, b"PAR1" * 50])
def test_no_parquet(tmp_path: Path, content: bytes) -> None:
    assert "not a Parquet file" in of(tmp_path / "a.parquet", content).fault


def test_a_damaged_page(tmp_path: Path) -> None:
    """The row groups before it are taken."""
    path = written(
        tmp_path / "a.parquet",
        {
            "row_group_size": 1,
            "write_page_checksum": True,
            "compression": "none",
            "use_dictionary": False,
        },
    )
    content = bytearray(path.read_bytes())
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(3)
    content[chunk.data_page_offset + chunk.total_compressed_size - 1] ^= 1
    found = of(path, bytes(content))
    assert found.bpm == [71, 72]
    assert "can't be read to its end" in found.fault


def test_without_pandas(tmp_path: Path) -> None:
    """It is no dependency: its import is blocked."""
    (tmp_path / "pandas.py").write_text("raise ImportError('blocked')")
    path = written(tmp_path / "a.parquet", timestamp=instants("ns", "tzutc()"))
    script = (
        "import sys; from pathlib import Path; "
        "from hb_assets_tests.pipeline.importing.reading import read; "
        "found = read(Path(sys.argv[1])); print(found.late, found.done.fault)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path],
        env={"PYTHONPATH": str(tmp_path)},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[0, 1000, 2000] None\n"
