from __future__ import annotations

import contextlib
import datetime as dt
import json
from collections.abc import Callable
from typing import Any

import httpx
import pyarrow as pa
import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from hb_assets.buffer import contents, external, keys
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.days import MS_PER_DAY
from hb_assets.core.record import parse_instant, shard_of
from hb_assets.core.schema import HEARTBEATS
from hb_assets.core.settings import Settings
from hb_assets.gateway.http.problems import MEDIA_TYPE
from hb_assets.gateway.reads.formats import ENCODERS
from hb_assets.gateway.reads.readings import PARAMETERS, with_offset
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.files.consolidated import mark_incomplete
from hb_assets.lake.query import series
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.drain import drain
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.core.test_record import FORMS
from hb_assets_tests.gateway.conftest import PATH, heartbeat

redis_url = on_valkey

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


def test_granularity_and_pages(two_devices: Settings, http: httpx.Client) -> None:
    asked = HOUR | {"granularity": "1s"}
    whole = http.get(PATH, params=asked).json()
    assert [row["timestamp"][11:] for row in whole["data"]] == [
        "10:00:00Z",
        "10:00:30Z",
        "10:01:00Z",
    ]
    day = http.get(PATH, params=HOUR | {"granularity": "1d", "device_id": "device_b"}).json()
    assert day["data"] == [
        {"timestamp": "2025-01-15T00:00:00Z", "heart_rate": 90, "device_id": "device_b"}
    ]
    found: list[dict[str, Any]] = []
    response = http.get(PATH, params=asked | {"limit": "1", "user_id": "u1"})
    while True:
        assert response.json()["count"] == 1
        found += response.json()["data"]
        if "next" not in response.links:
            break
        assert response.links["next"]["url"] == response.json()["next"]
        response = http.get(response.json()["next"])
    assert found == whole["data"]
    assert "next" not in response.json()


@pytest.mark.parametrize("media_type", ENCODERS)
def test_formats(two_devices: Settings, http: httpx.Client, media_type: str) -> None:
    response = http.get(PATH, params=HOUR | {"limit": "1"}, headers={"accept": media_type})
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == media_type
    assert response.headers["vary"] == "Accept"
    assert "start=2025-01-15T10%3A01%3A00Z" in response.links["next"]["url"]
    assert b"device_a" in response.content
    head = http.head(PATH, params=HOUR | {"limit": "1"}, headers={"accept": media_type})
    assert head.headers["content-length"] == str(len(response.content))
    assert head.content == b""


def test_no_format_that_we_have(http: httpx.Client) -> None:
    response = http.get(PATH, params=HOUR, headers={"accept": "text/html"})
    assert response.status_code == 406
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["offered"] == list(ENCODERS)


# -- what is still in the buffer


def _rates(http: httpx.Client, **more: str) -> list[int]:
    answer = http.get(PATH, params=HOUR | {"granularity": "1s"} | more)
    assert answer.status_code == 200, answer.text
    return [row["heart_rate"] for row in answer.json()["data"]]


def test_fresh_is_what_waits_claimed_or_foreign_too(
    http: httpx.Client, client: redis.Redis, consumer: Consumer, settings: Settings
) -> None:
    user = 'u"1'  # escaped, wherever it is written
    beats = [
        heartbeat(user_id=user, timestamp=f"2025-01-15T10:00:0{n}Z", heart_rate=60 + n)
        for n in range(4)
    ]
    shard = shard_of(user, settings.shards)
    other = (shard + 1) % settings.shards
    http.post(PATH, json=beats[1])
    drain(consumer, Lake.open(settings), settings, until_empty=True)  # in the lake
    external.append(client, other, json.dumps(beats[0]).replace("u", "\\u0075").encode())
    http.post(PATH, json=beats[2])
    assert len(consumer.claim(100, 10**6)) == 2  # pending
    http.post(PATH, json=beats[3] | {"timestamp": beats[1]["timestamp"]})  # corrects it
    http.post(PATH, json=heartbeat(user_id="somebody else"))
    assert _rates(http, user_id=user) == [61]
    assert _rates(http, user_id=user, fresh="true") == [60, 63, 62]
    assert _rates(http, user_id=user, fresh="no") == [61]


def test_fresh_misses_nothing_that_is_drained_meanwhile(
    http: httpx.Client,
    consumer: Consumer,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The buffer is read before the lake: between the two everything goes from one to the other."""
    http.post(PATH, json=heartbeat())
    drained = []

    def followed_by_a_drain(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            found = original(*arguments)
            if not drained:
                drain(consumer, Lake.open(settings), settings, until_empty=True)
            drained.append(original)
            return found

        return call

    for module, name in ((contents, "that_may_concern"), (series, "answer")):
        monkeypatch.setattr(module, name, followed_by_a_drain(getattr(module, name)))
    assert _rates(http, fresh="1") == [75]
    assert len(drained) == 2
    assert consumer.empty()


def test_a_buffer_that_cannot_be_asked(
    http: httpx.Client,
    client: redis.Redis,
    settings: Settings,
    serving: Callable[[Settings], contextlib.AbstractContextManager[httpx.Client]],
) -> None:
    small = settings.model_copy(update={"fresh_max_bytes": 1024})
    with serving(small) as narrow:
        for _ in range(20):
            narrow.post(PATH, json=heartbeat())
        response = narrow.get(PATH, params=HOUR | {"fresh": "true"})
        assert response.status_code == 503
        assert response.json()["type"].endswith(":buffer-too-large")
        assert "HB_FRESH_MAX_BYTES" in response.json()["detail"]
        assert int(response.headers["retry-after"]) >= 1
        assert _rates(narrow) == []
    client.set(keys.stream(0), "something else")
    client.delete(keys.stream(1))
    response = http.get(PATH, params=HOUR | {"fresh": "true"})
    assert response.status_code == 503
    assert response.json()["type"].endswith(":buffer-unavailable")
    assert _rates(http) == []


def test_a_damaged_file_is_one_clear_line(
    two_devices: Settings, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    for path in two_devices.lake_dir.rglob("*.parquet"):
        path.write_bytes(b"PAR1 no longer PAR1")
    response = http.get(PATH, params=HOUR)
    assert response.status_code == 500
    assert response.headers["content-type"] == MEDIA_TYPE
    assert response.json()["type"].endswith(":damaged-file")
    answer = response.json()
    shard = shard_of("u1", two_devices.shards)
    assert (answer["day"], answer["shard"]) == ("2025-01-15", shard)
    assert "hb damaged list" in answer["detail"]
    assert str(two_devices.lake_dir) not in response.text
    assert ".parquet" in caplog.text


@pytest.mark.parametrize("media_type", list(ENCODERS))
def test_a_range_is_answered_up_to_the_bad_day_and_past_what_raw_has(
    two_devices: Settings, http: httpx.Client, media_type: str
) -> None:
    lake = Lake.open(two_devices)
    day, shard = dt.date(2025, 1, 15), shard_of("u1", lake.shards)
    consolidate(lake, day, two_devices)
    path = layout.consolidated_file(lake.root, day, shard)
    path.write_bytes(path.read_bytes()[:-1])
    span = HOUR | {"start": "2025-01-14T00:00:00Z"}
    response = http.get(PATH, params=span, headers={"accept": media_type})
    assert response.status_code == 200
    [warning] = json.loads(response.headers["hb-warnings"])
    assert warning.startswith(f"day 2025-01-15, shard {shard:02d}: a file is damaged")
    assert str(lake.root) not in warning
    assert "link" not in response.headers
    if media_type == "application/json":
        assert response.json()["warnings"] == [warning]
        assert [row["heart_rate"] for row in response.json()["data"]] == [66, 80]
    mark_incomplete(lake, day, shard)
    response = http.get(PATH, params=span, headers={"accept": media_type})
    assert response.status_code == 200
    assert "hb-warnings" not in response.headers
    following = response.links["next"]["url"]
    assert "start=2025-01-15T00%3A00%3A00Z" in following
    response = http.get(following, headers={"accept": media_type})
    assert response.status_code == 500
    assert response.json()["day"] == "2025-01-15"


CANNOT_BE_ANSWERED: list[tuple[dict[str, str | None], int, list[str], str]] = [
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
    ({"start": "2025-01-15 10.30"}, 400, ["start"], "ISO 8601"),
    ({"start": "2025-01-15T10:00:00 Z"}, 400, ["start"], "ISO 8601"),
    ({"start": "yesterday", "end": "2025-01-15"}, 400, ["start", "end"], "ISO 8601"),
    ({"end": "2025-01-15T10:00:00Z"}, 400, ["start"], "before"),
    ({"end": "2025-01-15T09:00:00Z"}, 400, ["start"], "before"),
    ({"end": "2026-01-15T09:00:00Z"}, 400, ["end"], "HB_QUERY_MAX_RANGE"),
    ({"end": "2027-01-15T09:00:00Z"}, 400, ["end"], "first with end=2025-02-15T10:00:00Z"),
]


def test_queries_that_cannot_be_answered(http: httpx.Client) -> None:
    for changes, status, fields, says in CANNOT_BE_ANSWERED:
        query: dict[str, Any] = HOUR | changes
        response = http.get(PATH, params={n: v for n, v in query.items() if v is not None})
        assert response.status_code == status, changes
        assert response.headers["content-type"] == MEDIA_TYPE
        answer = response.json()
        assert says in answer["detail"]
        assert [error["field"] for error in answer["errors"]] == fields


def test_a_parameter_counts_once_and_an_unknown_one_is_named(http: httpx.Client) -> None:
    for name in PARAMETERS:
        other = {"user_id": "u2", "granularity": "1m"}.get(name, HOUR.get(name, "1"))
        query = httpx.QueryParams(HOUR | {name: HOUR.get(name, other)}).add(name, other)
        response = http.get(PATH, params=query)
        assert response.status_code == 422, name
        assert {"field": name, "message": f"{name} is given more than once"} in response.json()[
            "errors"
        ]
    response = http.get(PATH, params=HOUR | {"device": "a", "x, y": ""})
    assert response.status_code == 200
    assert response.headers["hb-ignored"] == "device, x%2C%20y"
    assert "hb-ignored" not in http.get(PATH, params=HOUR).headers


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


@pytest.mark.parametrize(("form", "ms"), [form for form in FORMS if form[1] != "refused"])
def test_what_is_a_time_is_left_as_it_is(form: str, ms: str) -> None:
    assert with_offset(form) == form
