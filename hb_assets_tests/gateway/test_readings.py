from __future__ import annotations

import datetime as dt
from typing import Any

import httpx
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hb_assets.days import MS_PER_DAY
from hb_assets.gateway.problems import MEDIA_TYPE
from hb_assets.gateway.readings import with_offset
from hb_assets.lake import fragments
from hb_assets.lake.store import Lake
from hb_assets.record import parse_instant, shard_of
from hb_assets.schema import HEARTBEATS
from hb_assets.settings import Settings
from hb_assets_tests.gateway.conftest import PATH

HOUR = {"user_id": "u1", "start": "2025-01-15T10:00:00Z", "end": "2025-01-15T11:00:00Z"}


def test_nobody_known(http: httpx.Client) -> None:
    response = http.get(PATH, params=HOUR)
    assert response.status_code == 200
    assert response.json() == {"user_id": "u1", "data": [], "count": 0}


@pytest.fixture
def two_devices(settings: Settings) -> Settings:
    """A lake where both devices measured u1 at 10:00:00, one of them at 10:00:30 and 10:01 too."""
    at = parse_instant("2025-01-15T10:00:00Z")
    readings = [
        ("u1", "device_b", at, 100),
        ("u1", "device_a", at, 60),
        ("u1", "device_a", at + 30_000, 71),
        ("u1", "device_b", at + 60_000, 80),
        ("u2", "device_a", at, 200),
    ]
    rows = [
        {
            "user_id": user,
            "device_id": device,
            "timestamp": moment,
            "heart_rate": bpm,
            "arrival_ms": moment,
            "arrival_seq": n,
            "arrival_shard": 0,
            "arrival_pos": 0,
        }
        for n, (user, device, moment, bpm) in enumerate(readings)
    ]
    rows.sort(key=lambda row: shard_of(str(row["user_id"]), settings.shards))
    table = pa.Table.from_pylist(rows, schema=HEARTBEATS)
    table = table.append_column("day", [[at // MS_PER_DAY] * len(rows)])
    shards = [shard_of(str(row["user_id"]), settings.shards) for row in rows]
    fragments.publish(Lake.open(settings), table.append_column("shard", [shards]))
    return settings


def test_minutes_of_all_devices_or_of_one(two_devices: Settings, http: httpx.Client) -> None:
    every = http.get(PATH, params=HOUR | {"device_id": ""})
    assert every.status_code == 200
    assert every.headers["content-type"] == "application/json"
    assert every.json() == {
        "user_id": "u1",
        "data": [
            {"timestamp": "2025-01-15T10:00:00Z", "heart_rate": 66, "device_id": "device_a"},
            {"timestamp": "2025-01-15T10:01:00Z", "heart_rate": 80, "device_id": "device_b"},
        ],
        "count": 2,
    }
    one = http.get(PATH, params=HOUR | {"device_id": "device_b"})
    assert [(row["timestamp"], row["heart_rate"]) for row in one.json()["data"]] == [
        ("2025-01-15T10:00:00Z", 100),
        ("2025-01-15T10:01:00Z", 80),
    ]


def test_a_damaged_file_is_one_clear_line(
    two_devices: Settings, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for path in two_devices.lake_dir.rglob("*.parquet"):
        path.write_bytes(b"PAR1 no longer PAR1")
    response = http.get(PATH, params=HOUR)
    assert response.status_code == 500
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["type"].endswith(":damaged-file")
    assert str(two_devices.lake_dir) not in response.text
    assert ".parquet" in caplog.text


@pytest.mark.parametrize(
    ("changes", "status", "fields", "says"),
    [
        ({"user_id": None}, 422, ["user_id"], "required"),
        ({"user_id": ""}, 422, ["user_id"], "128"),
        ({"user_id": "x" * 129}, 422, ["user_id"], "128"),
        ({"device_id": "x" * 129}, 422, ["device_id"], "128"),
        ({"start": None, "end": None}, 422, ["start", "end"], "required"),
        ({"start": None, "end": "never"}, 422, ["start"], "required"),
        ({"granularity": "2m"}, 422, ["granularity"], "1s, 1m, 5m, 1h, 1d"),
        ({"fresh": "maybe"}, 422, ["fresh"], "true or false"),
        ({"limit": "0"}, 422, ["limit"], "HB_QUERY_MAX_POINTS"),
        ({"limit": "100001"}, 422, ["limit"], "100000"),
        ({"limit": "ten"}, 422, ["limit"], "integer"),
        ({"end": ""}, 400, ["end"], "ISO 8601"),
        ({"start": "yesterday"}, 400, ["start"], "ISO 8601"),
        ({"start": "yesterday", "end": "2025-01-15"}, 400, ["start", "end"], "ISO 8601"),
        ({"end": "2025-01-15T10:00:00Z"}, 400, ["start"], "before"),
        ({"end": "2025-01-15T09:00:00Z"}, 400, ["start"], "before"),
        ({"end": "2026-01-15T09:00:00Z"}, 400, ["end"], "HB_QUERY_MAX_RANGE"),
    ],
)
def test_a_query_that_cannot_be_answered(
    http: httpx.Client, changes: dict[str, str | None], status: int, fields: list[str], says: str
) -> None:
    query: dict[str, Any] = HOUR | changes
    response = http.get(PATH, params={n: v for n, v in query.items() if v is not None})
    assert response.status_code == status
    assert response.headers["content-type"] == MEDIA_TYPE
    answer = response.json()
    assert says in answer["detail"]
    assert [error["field"] for error in answer["errors"]] == fields


def test_an_unescaped_plus_is_understood(http: httpx.Client) -> None:
    query = "user_id=u1&start=2025-01-15T10:00:00+05:30&end=2025-01-15T11:00:00+05:30"
    assert http.get(f"{PATH}?{query}").status_code == 200


@given(
    st.datetimes(dt.datetime(1900, 1, 1), timezones=st.just(dt.UTC)),
    st.sampled_from("T "),
    st.integers(-14 * 60, 14 * 60),
)
def test_offsets_survive_a_lost_plus(moment: dt.datetime, sep: str, minutes: int) -> None:
    local = moment.astimezone(dt.timezone(dt.timedelta(minutes=minutes)))
    text = local.isoformat(sep)
    assert parse_instant(with_offset(text.replace("+", " "))) == parse_instant(text)
    naive = local.replace(tzinfo=None).isoformat(sep)
    assert with_offset(naive) == naive
