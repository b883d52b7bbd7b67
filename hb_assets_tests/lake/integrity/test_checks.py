"""Checks: each one is shown a file that must fail it, and tells why without any value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from hb_assets.core import days
from hb_assets.core.errors import CheckFailedError
from hb_assets.core.schema import HEARTBEATS, MINUTES
from hb_assets.core.settings import Settings
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.integrity import checks
from hb_assets.lake.integrity.checks import Figure
from hb_assets.lake.storage import parquet
from hb_assets_tests.lake.deliveries import DAY, NOON

SECRET = "very-secret-user"


def heartbeat(**other: object) -> dict[str, object]:
    return {
        "user_id": SECRET,
        "device_id": "device_a",
        "timestamp": NOON,
        "heart_rate": 177,
        "arrival_ms": NOON,
        "arrival_seq": 0,
        "arrival_shard": 0,
        "arrival_pos": 0,
    } | other


def written(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    file = path / "rows.parquet"
    file.touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet, "_encoding", lambda *_: None)  # ours are for our types
        parquet.write(
            file, pa.Table.from_pylist(rows, schema=schema), ConsolidatedMetadata.nothing()
        )
    return file


def loose(schema: pa.Schema) -> pa.Schema:
    return pa.schema([field.with_nullable(True) for field in schema])


def figure_of(name: str, path: Path, settings: Settings) -> Figure:
    [found] = [one for one in checks.heartbeats(path, DAY, settings) if one.name == name]
    return found


def test_a_file_that_passes(tmp_path: Path, settings: Settings) -> None:
    path = written(tmp_path, [heartbeat(), heartbeat(timestamp=NOON + 1)], HEARTBEATS)
    results = [
        *checks.heartbeats(path, DAY, settings),
        checks.counts_add_up(rows_in=3, unique=2, superseded=1, erased=0, rows_in_file=2),
    ]
    assert {one.name for one in results} == set(checks.HEARTBEAT_CHECKS)
    assert all(one.passed and not one.message for one in results)
    checks.require(results, "day")
    assert results[:-1] == checks.passed(2)


@pytest.mark.parametrize(
    "other",
    [
        {"user_id": None},
        {"user_id": ""},
        {"user_id": SECRET * 10},
        {"device_id": None},
        {"device_id": ""},
        {"timestamp": None},
        {"heart_rate": None},
        {"heart_rate": 29},
        {"heart_rate": 221},
        {"arrival_shard": 100},
        {"arrival_shard": -1},
        {"arrival_pos": -1},
        {"arrival_ms": None},
    ],
)
def test_nulls_lengths_and_ranges(
    tmp_path: Path, settings: Settings, other: dict[str, object]
) -> None:
    path = written(tmp_path, [heartbeat(), heartbeat(**other)], loose(HEARTBEATS))
    assert_refused(figure_of(checks.SCHEMA_AND_RANGES, path, settings), next(iter(other)))


def assert_refused(figure: Figure, column: str) -> None:
    assert not figure.passed
    assert figure.figures["faults"] >= 1
    assert figure.figures["bad_rows"] >= 1
    assert column in figure.message
    for value in (SECRET, "177", "221", "29"):
        assert value not in figure.message


@pytest.mark.parametrize(
    ("column", "arrow"),
    [
        ("heart_rate", pa.int32()),
        ("heart_rate", pa.float64()),
        ("user_id", pa.binary()),
        ("timestamp", pa.timestamp("us", tz="UTC")),
        ("timestamp", pa.timestamp("ms")),
        ("arrival_ms", pa.int64()),
    ],
)
def test_wrong_type(tmp_path: Path, settings: Settings, column: str, arrow: pa.DataType) -> None:
    place = HEARTBEATS.get_field_index(column)
    schema = HEARTBEATS.set(place, pa.field(column, arrow))
    assert_refused(
        figure_of(checks.SCHEMA_AND_RANGES, written(tmp_path, [heartbeat()], schema), settings),
        column,
    )


def test_columns_too_many_too_few_and_out_of_order(tmp_path: Path, settings: Settings) -> None:
    extra = HEARTBEATS.append(pa.field("surplus", pa.int16()))
    assert_refused(
        figure_of(checks.SCHEMA_AND_RANGES, written(tmp_path, [heartbeat()], extra), settings),
        "column_in_schema",
    )
    fewer = HEARTBEATS.remove(HEARTBEATS.get_field_index("device_id"))
    assert not figure_of(
        checks.SCHEMA_AND_RANGES, written(tmp_path, [heartbeat()], fewer), settings
    ).passed
    turned = pa.schema(list(HEARTBEATS)[::-1])
    assert not figure_of(
        checks.SCHEMA_AND_RANGES, written(tmp_path, [heartbeat()], turned), settings
    ).passed


@pytest.mark.parametrize(
    ("at", "passed"),
    [
        (days.start_ms(DAY), True),
        (days.start_ms(DAY) - 1, False),
        (days.end_ms(DAY) - 1, True),
        (days.end_ms(DAY), False),
    ],
)
def test_partition_day(tmp_path: Path, settings: Settings, at: int, passed: bool) -> None:
    path = written(tmp_path, [heartbeat(), heartbeat(timestamp=at)], HEARTBEATS)
    figure = figure_of(checks.PARTITION_DAY, path, settings)
    assert figure.passed == passed
    assert SECRET not in figure.message


@pytest.mark.parametrize(
    ("instants", "disorder", "duplicates"),
    [
        ([0, 1, 2], 0, 0),
        ([], 0, 0),
        ([0, 0, 1, 1, 1], 0, 3),
        ([0, 2, 1], 1, 0),
        ([1, 0, 1, 0], 2, 2),
    ],
)
@pytest.mark.parametrize("at_once", [1, 2, 10])
def test_order_and_key(
    tmp_path: Path,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    instants: list[int],
    disorder: int,
    duplicates: int,
    at_once: int,
) -> None:
    """Across the borders of what is read at once, too."""
    monkeypatch.setattr(checks, "_AT_ONCE", at_once)
    rows = [heartbeat(timestamp=NOON + at, heart_rate=60 + n) for n, at in enumerate(instants)]
    path = written(tmp_path, rows, HEARTBEATS)
    in_order, unique = (
        figure_of(name, path, settings) for name in (checks.SORTED, checks.KEY_UNIQUE)
    )
    assert in_order.figures == {"rows": len(rows), "bad_rows": disorder}
    assert unique.figures == {"rows": len(rows), "bad_rows": duplicates}
    assert (in_order.passed, unique.passed) == (not disorder, not duplicates)


@pytest.mark.parametrize(
    ("first", "second"), [("a", "\x00a"), ("b", "a"), ("é", "e"), ("a\x00", "a")]
)
def test_order_of_users_is_that_of_their_bytes(
    tmp_path: Path, settings: Settings, first: str, second: str
) -> None:
    path = written(tmp_path, [heartbeat(user_id=first), heartbeat(user_id=second)], HEARTBEATS)
    assert not figure_of(checks.SORTED, path, settings).passed
    assert figure_of(checks.KEY_UNIQUE, path, settings).passed


@pytest.mark.parametrize(
    ("rows_in", "unique", "superseded", "erased", "in_file", "passed"),
    [
        (3, 2, 1, 0, 2, True),
        (4, 2, 1, 1, 2, True),
        (4, 2, 1, 0, 2, False),
        (3, 2, 1, 0, 3, False),
        (0, 0, 0, 0, 0, True),
    ],
)
def test_counts(
    rows_in: int, unique: int, superseded: int, erased: int, in_file: int, passed: bool
) -> None:
    figure = checks.counts_add_up(
        rows_in=rows_in,
        unique=unique,
        superseded=superseded,
        erased=erased,
        rows_in_file=in_file,
    )
    assert figure.passed == passed == (not figure.message)


def minute(**other: object) -> dict[str, object]:
    return {
        "user_id": SECRET,
        "minute": NOON,
        "device_id": "device_a",
        "sum": 177,
        "count": 1,
        "min": 177,
        "max": 177,
        "kept_sum": 0,
        "kept_count": 0,
        "kept_min": None,
        "kept_max": None,
    } | other


@pytest.mark.parametrize(
    ("other", "passed"),
    [
        ({}, True),
        ({"kept_sum": 177, "kept_count": 1, "kept_min": 177, "kept_max": 177}, True),
        ({"count": 0}, False),
        ({"kept_count": -1}, False),
        ({"min": 29}, False),
        ({"max": 221}, False),
        ({"kept_max": 221}, False),
        ({"minute": None}, False),
        ({"sum": None}, False),
    ],
)
def test_minutes_values(tmp_path: Path, other: dict[str, object], passed: bool) -> None:
    path = written(tmp_path, [minute(**other)], loose(MINUTES))
    figure = checks.minutes(path)
    assert figure.passed == passed
    if not passed:
        assert_refused(figure, next(iter(other)))


@pytest.mark.parametrize(
    ("readings", "counted", "kept", "rows", "passed"),
    [(5, 5, 3, 2, True), (5, 4, 3, 2, False), (5, 5, 6, 2, False), (5, 5, 5, 6, False)],
)
def test_minutes_add_up(readings: int, counted: int, kept: int, rows: int, passed: bool) -> None:
    figure = checks.minutes_add_up(readings=readings, counted=counted, kept=kept, rows=rows)
    assert figure.passed == passed == (not figure.message)


def test_require() -> None:
    results = [Figure("a", True), Figure("b", False, {"n": 2}, "2 are wrong"), Figure("c", False)]
    with pytest.raises(
        CheckFailedError, match=r"^day 7 failed .* not published: b: 2 are wrong; c: "
    ):
        checks.require(results, "day 7")


def test_summed() -> None:
    results = [
        Figure("a", True, {"n": 1}),
        Figure("b", True, {"n": 1}),
        Figure("a", False, {"n": 2, "m": 1}, "bad"),
        Figure("a", True, {"n": 3}),
    ]
    assert checks.summed(results) == [
        Figure("a", False, {"m": 1, "n": 6}, "bad"),
        Figure("b", True, {"n": 1}),
    ]
    assert checks.summed([]) == []


def test_every_check_is_described() -> None:
    assert set(checks.DESCRIPTIONS) == {*checks.HEARTBEAT_CHECKS, *checks.MINUTE_CHECKS}
