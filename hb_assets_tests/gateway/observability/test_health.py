"""Health: each part that fails is named, and time counts from when something waits."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
import redis

from hb_assets.buffer import keys, liveness
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.errors import SpoolUnavailableError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.gateway import backend
from hb_assets.gateway.observability import health
from hb_assets.gateway.observability.health import MOST_FAULTS
from hb_assets.gateway.spool.queue import Holdings
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import drain
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.gateway.conftest import PATH, heartbeat
from hb_assets_tests.gateway.observability.test_metrics import samples
from hb_assets_tests.lake.deliveries import DAY, NOON, deliver, entry, line
from hb_assets_tests.servers import wait_for

redis_url = on_valkey

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]
PARTS = (
    *("redis", "drain", "backlog", "consumers", "dagster"),
    *("aof", "lake", "space", "spool", "consolidation"),
)


def failing(http: httpx.Client) -> list[str]:
    """Names of the parts that fail; the status code agrees."""
    return told(http)[0]


def unwell(http: httpx.Client) -> list[str]:
    """Names of the parts that have an alarm and fail nothing; the gateway takes heartbeats."""
    failed, alarms = told(http)
    assert failed == []
    assert http.post(PATH, json=heartbeat()).status_code == 200
    return alarms


def told(http: httpx.Client) -> tuple[list[str], list[str]]:
    """Names of the parts that fail, and of those that have an alarm."""
    response = http.get("/health/ready")
    body = response.json()
    assert (response.status_code, body["status"]) == (
        (503, "failing") if body["failing"] else (200, "ok")
    )
    assert ("retry-after" in response.headers) == bool(body["failing"])
    assert all(body["parts"][name] != "ok" for name in body["failing"])
    return body["failing"], [name for name, text in body["parts"].items() if text in body["alarms"]]


@contextlib.contextmanager
def draining(settings: Settings, lake: Lake) -> Iterator[None]:
    """`hb drain --follow` in a thread, for the time of the block."""
    stop = threading.Event()

    def follow() -> None:
        with contextlib.closing(connect(settings)) as client:
            consumer = Consumer(client, settings)
            consumer.open()
            drain.drain(consumer, lake, settings, follow=True, stop=stop.is_set)
            consumer.close()

    thread = threading.Thread(target=follow)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


def test_healthy(http: httpx.Client) -> None:
    """With nothing in the buffer nobody misses a drain or Dagster that never ran."""
    for path in ("/health", "/health/ready"):
        response = http.get(path)
        assert response.status_code == 200
        assert response.json() == {
            "status": "ok",
            "failing": [],
            "parts": dict.fromkeys(PARTS, "ok") | {"dagster": "not seen yet"},
            "durability": "fsync",
            "alarms": [],
        }
    assert http.get("/health/live").json() == {"status": "ok"}


def test_a_lake_that_is_gone_is_named(http: httpx.Client, settings: Settings) -> None:
    settings.lake_dir.rename(settings.lake_dir.with_name("elsewhere"))
    assert failing(http) == ["lake"]
    parts = http.get("/health").json()["parts"]
    assert "can't be read: No such file" in parts["lake"]
    assert parts["lake"] in parts["space"]
    assert parts["redis"] == "ok"


def test_a_lake_of_which_nothing_can_be_answered_fails(
    http: httpx.Client, settings: Settings
) -> None:
    (settings.lake_dir / "raw").touch()  # where a folder belongs
    assert failing(http) == ["lake"]
    assert "can't be read: Not a directory" in http.get("/health").json()["parts"]["lake"]


@pytest.mark.parametrize(
    ("held", "alone", "failing", "healthy"),
    [
        (Holdings(most_bytes=10**9), True, False, True),
        (Holdings(5, 100, 10**9), True, False, True),  # it takes more
        (Holdings(5, 100, 100), False, False, False),  # Redis takes what isn't queued here
        (Holdings(5, 100, 100), True, True, False),
        (SpoolUnavailableError("no disk"), False, False, False),
        (SpoolUnavailableError("no disk"), True, True, False),
    ],
)
def test_a_spool_that_takes_nothing_fails_while_redis_is_away(
    held: Holdings | SpoolUnavailableError, alone: bool, failing: bool, healthy: bool
) -> None:
    part = health._spool(held, alone=alone)
    assert (part.failing, part.healthy) == (failing, healthy)
    assert failing or healthy or part.text in part.alarms


def test_a_buffer_above_its_mark_is_an_alarm(serving: Serving, settings: Settings) -> None:
    bounded = settings.model_copy(update={"buffer_max_heartbeats": settings.shards})
    with serving(bounded) as http:
        assert http.post(PATH, json=heartbeat()).status_code == 200
        response = http.get("/health")
    assert response.status_code == 200
    (alarm,) = response.json()["alarms"]
    assert "HB_BUFFER_HIGH_WATER" in alarm


@pytest.mark.parametrize("mode", ["fsync", "memory"])
def test_the_mode_is_named_and_held_against_the_server(
    serving: Serving, settings: Settings, client: redis.Redis, mode: str
) -> None:
    with serving(settings.model_copy(update={"durability": mode})) as http:
        client.config_set("appendonly", "no")
        try:
            response = http.get("/health")
        finally:
            client.config_set("appendonly", "yes")
    assert response.json()["durability"] == mode
    if mode == "memory":
        assert response.status_code == 200
        (alarm,) = response.json()["alarms"]
        assert "append-only file off: when it ends, what isn't drained is lost" in alarm
    else:
        assert response.json()["failing"] == ["aof"]
        assert "has appendonly=no" in response.json()["parts"]["aof"]


def test_stopping_the_drainer_is_an_alarm_within_its_threshold(
    serving: Serving, settings: Settings, lake: Lake
) -> None:
    threshold = dt.timedelta(seconds=1)
    settings = settings.model_copy(update={"health_drain_age": threshold})
    with serving(settings) as http:
        with draining(settings, lake):
            assert http.post(PATH, json=heartbeat()).status_code == 200
            began = time.monotonic()
            while time.monotonic() - began < 2 * threshold.total_seconds():
                assert failing(http) == []  # it has nothing to do, and beats all the same
                http.post(PATH, json=heartbeat())
        stopped = time.monotonic()
        http.post(PATH, json=heartbeat())
        wait_for(lambda: unwell(http) == ["drain"], "the alarm", 10)
        assert samples(http)["hb_healthy", (("part", "drain"),)] == 0
        assert threshold.total_seconds() * 0.7 < time.monotonic() - stopped < 4
        assert "no drain for" in http.get("/health").json()["parts"]["drain"]
        assert http.get("/health/live").status_code == 200
        with draining(settings, lake):
            wait_for(lambda: told(http) == ([], []), "health")
        assert samples(http)["hb_healthy", (("part", "drain"),)] == 1


@pytest.mark.parametrize("name", [keys.stream, keys.ledger])
def test_another_type_at_a_shards_key_is_that_shards_alarm(
    http: httpx.Client, client: redis.Redis, settings: Settings, name: Callable[[int], str]
) -> None:
    other = (shard_of("u1", settings.shards) + 1) % settings.shards
    client.set(name(other), "something else")
    assert http.post(PATH, json=heartbeat()).status_code == 200
    assert failing(http) == []
    body = http.get("/health").json()
    assert body["parts"]["redis"] == body["parts"]["drain"] == "ok"
    (alarm,) = body["alarms"]
    assert f"shard {other:02d}" in alarm
    assert name(other) in alarm
    found = samples(http)
    shards = [f"{number:02d}" for number in range(settings.shards)]
    unusable = [found["hb_buffer_unusable", (("shard", number),)] for number in shards]
    assert unusable == [number == f"{other:02d}" for number in shards]
    assert found["hb_buffer_heartbeats", (("shard", f"{shard_of('u1', 4):02d}"),)] == 1


def test_an_unknown_part_says_why(http: httpx.Client, client: redis.Redis) -> None:
    """Redis answers: that isn't what keeps the drain's signs of life from being known."""
    client.set(keys.BEATS, "something else")
    assert http.post(PATH, json=heartbeat()).status_code == 200
    assert failing(http) == []
    body = http.get("/health").json()
    assert body["parts"]["redis"] == "ok"
    assert body["parts"]["drain"].startswith("unknown: Redis at ")
    assert keys.BEATS in body["parts"]["drain"]
    (alarm,) = body["alarms"]
    assert keys.BEATS in alarm
    assert (
        sum(samples(http)["hb_buffer_heartbeats", (("shard", f"{n:02d}"),)] for n in range(4)) == 1
    )


def test_where_no_shard_can_be_used_redis_fails(
    serving: Serving, client: redis.Redis, settings: Settings
) -> None:
    """But not as long as the spool takes what Redis doesn't."""
    for number in range(settings.shards):
        client.set(keys.stream(number), "something else")
    with serving(settings) as http:
        assert failing(http) == []
        assert len(http.get("/health").json()["alarms"]) == settings.shards
    with serving(settings.model_copy(update={"spool_max_bytes": 0})) as http:
        assert failing(http) == ["redis"]
        assert http.get("/health").json()["parts"]["redis"] == "no shard of the buffer can be used"


def test_entries_that_nobody_finishes(
    serving: Serving, settings: Settings, client: redis.Redis
) -> None:
    """A drainer claims and dies; others look at the shard, and can't get it done."""
    short = dt.timedelta(milliseconds=100)
    changes = {"health_entry_age": short, "health_consumer_idle": short, "claim_min_idle": short}
    settings = settings.model_copy(update=changes)
    with serving(settings) as http:
        assert http.post(PATH, json=heartbeat()).status_code == 200
        consumer = Consumer(client, settings)
        consumer.open()
        assert consumer.claim(10, 10_000)
        wait_for(lambda: told(http) == ([], ["backlog", "consumers"]), "both to be seen")
        consumer.mark_alive()
        assert "drainers are gone" in http.get("/health").json()["parts"]["consumers"]
        consumer.acknowledge([(one, 1) for one in consumer.claim(10, 10_000)])
        wait_for(lambda: told(http) == ([], []), "health")


def test_dagster_is_missed_once_it_was_seen(
    serving: Serving, settings: Settings, client: redis.Redis
) -> None:
    settings = settings.model_copy(update={"health_dagster_age": dt.timedelta(seconds=1)})
    with serving(settings) as http:
        liveness.mark_alive(client, [liveness.DAGSTER], {})
        assert http.get("/health").json()["parts"]["dagster"] == "ok"
        wait_for(lambda: unwell(http) == ["dagster"], "Dagster to be missed")


def test_a_full_disk_and_a_day_that_nobody_consolidates(
    serving: Serving, settings: Settings, lake: Lake
) -> None:
    settings = settings.model_copy(update={"health_free_space": 2**62})
    late = time.time() - 3 * 3600
    for fragment in deliver(lake, settings, entry([line()])):
        os.utime(fragment.path, (late, late))
    with serving(settings) as http:
        wait_for(lambda: unwell(http) == ["space", "consolidation"], "both alarms")
        parts = http.get("/health").json()["parts"]
    assert f"day {DAY} should have been consolidated 3 h ago" in parts["consolidation"]
    assert "HB_HEALTH_FREE_SPACE" in parts["space"]


def test_nothing_is_watched_where_the_thresholds_are_0(
    serving: Serving, settings: Settings, lake: Lake, client: redis.Redis
) -> None:
    watched = [name for name in Settings.model_fields if name.startswith("health_")]
    nothing = settings.model_copy(update={name: dt.timedelta(0) for name in watched})
    nothing = nothing.model_copy(update={"health_free_space": 0})
    late = time.time() - 7 * 86400
    for fragment in deliver(lake, settings, entry([line()])):
        os.utime(fragment.path, (late, late))
    client.xadd("hb:{00}:stream", {"data": b"{}"}, id="1-1")
    client.hset("hb:{all}:beats", "dagster", 1)
    with serving(nothing) as http:
        assert failing(http) == []
        parts = http.get("/health").json()["parts"]
    assert {name for name, text in parts.items() if text == "off"} == {
        *("drain", "backlog", "consumers", "dagster", "space", "consolidation"),
    }


@pytest.fixture
def seen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lake is looked at as often as anybody asks."""
    monkeypatch.setattr(backend, "SURVEY_SECONDS", 0)
    monkeypatch.setattr(backend, "SURVEY_SHARE", 1)


def test_a_damaged_day_and_a_stopped_sensor_keep_no_gateway_from_its_work(
    seen_at_once: None,
    serving: Serving,
    settings: Settings,
    lake: Lake,
    client: redis.Redis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is an alarm everywhere, from when a running gateway can notice it until it is mended."""
    caplog.set_level(logging.INFO)
    [fragment] = deliver(lake, settings, entry([line()]))
    whole = fragment.path.read_bytes()
    damaged = "hb_lake_faults", (("kind", "damaged"),)
    with serving(settings) as http:
        wait_for(lambda: told(http) == ([], []), "health")
        assert http.get("/health").json()["alarms"] == []
        assert samples(http)[damaged] == samples(http)["hb_lake_damaged_partitions", ()] == 0
        liveness.mark_alive(client, [liveness.DAGSTER, liveness.stopped("drain")], {})
        assert points(http) == 1
        fragment.path.write_bytes(whole[:-1] + b"X")  # in place: its folder doesn't change
        wait_for(lambda: len(http.get("/health").json()["alarms"]) == 2, "both alarms")
        assert unwell(http) == ["dagster"]
        assert "hb sensors start drain" in http.get("/health").json()["parts"]["dagster"]
        assert http.get("/health/ready").status_code == 200
        assert points(http) is None, "no answer is made of it, although it was read before"
        [of_day] = [one for one in http.get("/health").json()["alarms"] if str(DAY) in one]
        assert str(settings.home_dir) not in of_day, "who asks needs no key, and gets no path"
        assert samples(http)[damaged] == samples(http)["hb_lake_damaged_partitions", ()] == 1
        fragment.path.write_bytes(whole)
        wait_for(lambda: len(http.get("/health").json()["alarms"]) == 1, "the file to be whole")
        assert points(http) == 1
        assert samples(http)[damaged] == 0
    lines = [one.getMessage() for one in caplog.records if "alarm lake_damaged" in one.message]
    assert [line.split()[2] for line in lines] == ["(error):", "(resolved):"]
    assert all(str(fragment.path) in line for line in lines)


def points(http: httpx.Client) -> int | None:
    """How many of that day's there are; None where that can't be answered."""
    span = {"start": f"{DAY}T00:00:00Z", "end": f"{DAY}T23:00:00Z"}
    answer = http.get(PATH, params={"user_id": "u1", **span})
    return answer.json()["count"] if answer.status_code == 200 else None


def test_many_faults_are_told_shortly(
    seen_at_once: None, serving: Serving, settings: Settings, lake: Lake
) -> None:
    days = MOST_FAULTS + 5
    for back in range(days):
        for fragment in deliver(lake, settings, entry([line(at=NOON - back * 86_400_000)], back)):
            fragment.path.write_bytes(b"PAR1")
    with serving(settings) as http:
        wait_for(lambda: bool(http.get("/health").json()["alarms"]), "the alarms")
        alarms = http.get("/health").json()["alarms"]
        assert len(alarms) == MOST_FAULTS + 1
        assert "5 more" in alarms[-1]
        assert samples(http)["hb_lake_faults", (("kind", "damaged"),)] == days
