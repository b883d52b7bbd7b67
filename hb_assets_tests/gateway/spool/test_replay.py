from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis as redis_py
from pydantic import SecretStr

from hb_assets.buffer import keys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.producer import Producer
from hb_assets.buffer.server import free_port
from hb_assets.core.errors import BufferUnavailableError, SpoolUnavailableError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Quota, Settings
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.spool.queue import Spool
from hb_assets.gateway.spool.replay import Replayer
from hb_assets_tests.conftest import SERVERS
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, plain_client, running
from hb_assets_tests.gateway.ingest.test_heartbeats import problem, stored
from hb_assets_tests.gateway.observability.test_metrics import samples
from hb_assets_tests.gateway.test_server import Redis, process
from hb_assets_tests.servers import wait_for

pytestmark = pytest.mark.slow

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]
SHARDS = 4
_THINKING_SECONDS = 0.005
"""Between a client's requests: it shares its CPU with the servers that it waits for."""


BOTH = pytest.mark.parametrize("redis", SERVERS, indirect=True)
"""For the whole of it, and where a server tells what it keeps; elsewhere one kind is enough."""


@pytest.fixture
def redis(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Redis]:
    """A Redis that runs, and that the test may kill and start again."""
    server = Redis(tmp_path, free_port(), getattr(request, "param", "valkey"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def settings(redis: Redis, tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        redis_url=SecretStr(redis.url),
        shards=SHARDS,
        redis_timeout="500ms",  # type: ignore[arg-type]  # pydantic reads it
    )


@pytest.fixture
def spool(settings: Settings) -> Iterator[Spool]:
    """The gateway's spool, as another process sees it."""
    with contextlib.closing(Spool(settings)) as opened:
        yield opened


def rates(settings: Settings) -> list[int]:
    """Heart rates in the streams, in the order of each."""
    with contextlib.closing(connect(settings)) as client:
        return [row["heart_rate"] for row in stored(client, settings.shards)]


def post(http: httpx.Client, **changes: Any) -> None:
    response = http.post(PATH, json=heartbeat(**changes))
    assert (response.status_code, response.json()) == (200, {"status": "accepted"}), response.text


def user_of(shard: int) -> str:
    return next(user for n in range(999) if shard_of(user := f"u{n}", SHARDS) == shard)


def empty(spool: Spool) -> bool:
    return spool.holdings().heartbeats == 0 and not any(spool.queued())


# -- the whole of it


@BOTH
def test_fault_06_redis_away_loses_nothing(redis: Redis, settings: Settings, spool: Spool) -> None:
    """Clients post all the time while Redis and the gateway are killed again and again."""
    served = settings.model_copy(update={"gateway_port": free_port()})
    accepted: list[set[tuple[str, int]]] = [set() for _ in range(4)]
    counts = [0] * 4
    ending = threading.Event()

    def client(worker: int) -> None:
        url = f"http://127.0.0.1:{served.gateway_port}"
        with plain_client(url) as http:
            while not ending.wait(_THINKING_SECONDS):
                counts[worker] += 1
                moment = 1_736_935_200_000 + counts[worker] * 100
                rows = [
                    heartbeat(user_id=f"u{worker}-{n % 7}", timestamp_ms=moment + n)
                    for n in range(1 if worker % 2 else 20)
                ]
                path, body = (BATCH, rows) if len(rows) > 1 else (PATH, rows[0])
                with contextlib.suppress(httpx.TransportError):
                    response = http.post(path, json=body)
                    assert response.status_code == 200, response.text
                    accepted[worker] |= {(r["user_id"], r["timestamp_ms"]) for r in rows}

    def go_on() -> None:
        """Until each client has had some more answers."""
        before = list(map(len, accepted))
        wait_for(
            lambda: all(len(now) > was + 5 for now, was in zip(accepted, before, strict=True)),
            "answers",
        )

    threads = [threading.Thread(target=client, args=(n,)) for n in range(4)]
    with contextlib.ExitStack() as stack:
        gateway = stack.enter_context(process(served))
        for thread in threads:
            thread.start()
        try:
            go_on()
            redis.kill()
            go_on()
            assert spool.holdings().heartbeats > 0
            gateway.send_signal(signal.SIGKILL)
            gateway.wait(timeout=30)
            gateway = stack.enter_context(process(served))  # while Redis is away
            go_on()
            redis.start()
            wait_for(lambda: empty(spool), "the replay")
            go_on()
            redis.kill()
            go_on()
            gateway.send_signal(signal.SIGKILL)
            gateway.wait(timeout=30)
            redis.start()
            gateway = stack.enter_context(process(served))
            go_on()
        finally:
            ending.set()
            for thread in threads:
                thread.join(timeout=60)
        wait_for(lambda: empty(spool), "the replay")
        with contextlib.closing(connect(settings)) as connected:
            found = {(row["user_id"], row["timestamp_ms"]) for row in stored(connected, SHARDS)}
        lost = set[tuple[str, int]]().union(*accepted) - found
        assert not lost


# -- order


def test_a_correction_after_the_outage_wins(redis: Redis, settings: Settings, spool: Spool) -> None:
    with running(settings) as http:
        post(http, heart_rate=70)
        redis.kill()
        post(http, heart_rate=71)
        with spool.replaying() as ours:
            assert ours  # nobody else replays now
            redis.start()
            wait_for(lambda: http.get("/health").json()["parts"]["redis"] == "ok", "Redis")
            post(http, heart_rate=72)
            assert rates(settings) == [70]  # 72 queues behind 71
        wait_for(lambda: empty(spool), "the replay")
        post(http, heart_rate=73)
        assert rates(settings) == [70, 71, 72, 73]


def test_two_gateways_share_one_spool(redis: Redis, settings: Settings, spool: Spool) -> None:
    with running(settings) as first, running(settings) as second:
        redis.kill()
        post(first, heart_rate=61)
        with spool.replaying():
            redis.start()
            # the second one has never noticed that Redis was away
            post(second, heart_rate=62)
            post(first, heart_rate=63)
            assert rates(settings) == []
        wait_for(lambda: empty(spool), "the replay")
        post(second, heart_rate=64)
        assert rates(settings) == [61, 62, 63, 64]
        figures = [samples(http)["hb_spool_replayed_total", ()] for http in (first, second)]
        assert figures == [3, 3]


def test_two_processes_that_spool_and_replay_keep_each_users_order(
    redis: Redis, settings: Settings, spool: Spool
) -> None:
    """Each user's answers come in order, now from the one, now from the other gateway."""
    served = [settings.model_copy(update={"gateway_port": free_port()}) for _ in range(2)]
    sent: dict[str, list[int]] = {}
    ending = threading.Event()

    def client(user: str) -> None:
        sent[user] = []
        with contextlib.ExitStack() as stack:
            urls = [f"http://127.0.0.1:{one.gateway_port}" for one in served]
            https = [stack.enter_context(plain_client(u)) for u in urls]
            moment = 1_736_935_200_000
            while not ending.wait(_THINKING_SECONDS):
                moment += 1
                post(https[moment % 2], user_id=user, timestamp_ms=moment)
                sent[user].append(moment)

    def go_on() -> None:
        before = {user: len(moments) for user, moments in sent.items()}
        wait_for(lambda: all(len(sent[u]) > n + 10 for u, n in before.items()), "answers")

    threads = [threading.Thread(target=client, args=(f"u{n}",)) for n in range(6)]
    with process(served[0]), process(served[1]):
        for thread in threads:
            thread.start()
        try:
            wait_for(lambda: len(sent) == len(threads), "clients")
            for _ in range(3):
                go_on()
                redis.kill()
                go_on()
                redis.start()
                wait_for(lambda: empty(spool), "the replay")
        finally:
            ending.set()
            for thread in threads:
                thread.join(timeout=60)
        wait_for(lambda: empty(spool), "the replay")
        found: dict[str, list[int]] = {user: [] for user in sent}
        with contextlib.closing(connect(settings)) as connected:
            for row in stored(connected, SHARDS):
                found[row["user_id"]].append(row["timestamp_ms"])
    for user, moments in sent.items():
        # a retried append comes twice, which is harmless as long as nothing newer came before it
        assert found[user] == sorted(found[user])
        assert set(moments) == set(found[user])


@pytest.mark.parametrize("patience", [30, 0.01])
def test_a_heartbeat_waits_a_moment_for_the_last_ones_before_it(
    settings: Settings, spool: Spool, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    """Else a busy shard would go through the spool for ever."""
    monkeypatch.setattr("hb_assets.gateway.ingest.intake._CLOSING_SECONDS", patience)
    shard = shard_of("u1", SHARDS)
    with running(settings) as http, spool.replaying():
        spool.put([{shard: [b"before"]}])
        last = spool.read(0, frozenset())
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, http)
            if patience < 1:
                answer.result(timeout=30)
                assert spool.holdings().heartbeats == 2
            else:
                with pytest.raises(TimeoutError):
                    answer.result(timeout=0.2)
                spool.remove(last)
                answer.result(timeout=30)
                assert empty(spool)
                assert rates(settings) == [75]


# -- what is spooled and what is not


def test_a_hung_redis_costs_one_timeout(redis: Redis, settings: Settings, spool: Spool) -> None:
    seconds = 2
    patient = settings.model_copy(update={"redis_timeout": dt.timedelta(seconds=seconds)})
    with running(patient) as http:
        post(http, heart_rate=60)
        redis.signal(signal.SIGSTOP)
        started = time.monotonic()
        try:
            for shard in range(SHARDS):
                post(http, user_id=user_of(shard), heart_rate=80)
            assert seconds < time.monotonic() - started < 2 * seconds
            assert spool.holdings().heartbeats == SHARDS
        finally:
            redis.signal(signal.SIGCONT)
        wait_for(lambda: empty(spool), "the replay")
    assert rates(settings).count(80) >= SHARDS


def test_a_full_buffer_is_not_spooled(settings: Settings, spool: Spool) -> None:
    bounded = settings.model_copy(update={"buffer_max_heartbeats": SHARDS})
    with running(bounded) as http:
        post(http)
        problem(http.post(PATH, json=heartbeat()), 503, "buffer-full")
        assert empty(spool)


def test_one_shard_that_redis_refuses(settings: Settings, spool: Spool) -> None:
    """Its heartbeats are spooled; the others' go on, and its own follow once it is mended."""
    broken = 2
    with contextlib.closing(connect(settings)) as client, running(settings) as http:
        client.set(keys.stream(broken), "not a stream")
        for n in range(3):
            batch = [heartbeat(user_id=user_of(s), heart_rate=70 + n) for s in range(SHARDS)]
            answer = http.post(BATCH, json=batch)
            assert answer.json() == {
                "accepted": SHARDS,
                "refused": [],
                "unknown_fields": 0,
                "ignored": {},
            }
        wait_for(lambda: spool.holdings().heartbeats == 3, "the others")
        before = [row["heart_rate"] for row in stored(client, broken)]  # of the shards below it
        assert sorted(before) == sorted([70, 71, 72] * broken)
        client.delete(keys.stream(broken))
        wait_for(lambda: empty(spool), "the replay")
        assert client.xlen(keys.stream(broken)) >= 1
    assert sorted(rates(settings)) == [70] * 4 + [71] * 4 + [72] * 4


def test_a_replay_keeps_to_the_buffers_bound(
    redis: Redis, settings: Settings, spool: Spool
) -> None:
    bounded = settings.model_copy(
        update={"buffer_max_heartbeats": 5 * SHARDS, "drain_sensor_interval": 1}
    )
    with running(bounded) as http:
        redis.kill()
        for n in range(12):
            post(http, heart_rate=50 + n)
        redis.start()
        shard = shard_of("u1", SHARDS)
        with contextlib.closing(connect(settings)) as client:
            for first in (50, 55):
                wait_for(lambda: client.xlen(keys.stream(shard)) == 5, "a full buffer")
                assert rates(settings) == list(range(first, first + 5))
                # they are appended first, and then leave the spool
                left = 12 - (first - 45)
                wait_for(lambda left=left: spool.holdings().heartbeats == left, "their leaving")
                client.delete(keys.stream(shard), keys.ledger(shard))  # as if it were drained
            wait_for(lambda: empty(spool), "the replay")
        assert rates(settings) == [60, 61]


def test_limits_hold_while_redis_is_away_and_after(
    redis: Redis, settings: Settings, spool: Spool
) -> None:
    """By what this gateway knows by itself; what it couldn't charge meanwhile ends nothing."""
    quota = Quota(6, dt.timedelta(hours=1))
    with running(settings.model_copy(update={"limit_user": quota})) as http:
        post(http)
        redis.kill()
        for rate in range(60, 64):
            post(http, heart_rate=rate)
        assert not empty(spool)
        redis.start()
        wait_for(lambda: empty(spool), "the replay")
        post(http, heart_rate=64)
        problem(http.post(PATH, json=heartbeat()), 429, "rate-limited")
        redis.kill()
        problem(http.post(PATH, json=heartbeat()), 429, "rate-limited")
        post(http, user_id="u2")
        redis.start()
        wait_for(lambda: empty(spool), "the replay")
    assert sorted(rates(settings)) == [60, 61, 62, 63, 64, 75, 75]


def test_a_full_spool_answers_503(redis: Redis, settings: Settings, spool: Spool) -> None:
    line = len(
        '{"user_id":"u1","device_id":"device_a","timestamp_ms":1736935200000,"heart_rate":75}'
    )
    small = settings.model_copy(update={"spool_max_bytes": 3 * (line + 1)})
    with running(small) as http:
        redis.kill()
        for _ in range(2):
            post(http)
        other = user_of((shard_of("u1", SHARDS) + 1) % SHARDS)
        batch = [heartbeat(), heartbeat(heart_rate=0), heartbeat(user_id=other)]
        some = http.post(BATCH, json=[heartbeat(user_id=other), *[heartbeat()] * 5])
        assert some.json()["accepted"] == 1
        assert {(r["reason"], r["retry"]) for r in some.json()["refused"]} == {("spool_full", True)}
        assert int(some.headers["retry-after"]) >= 1
        single = http.post(PATH, json=heartbeat())
        problem(single, 503, "spool-full")
        assert int(single.headers["retry-after"]) >= 1
        answer = problem(http.post(BATCH, json=batch), 503, "spool-full")
        assert [row["retry"] for row in answer["refused"]] == [True, False, True]
        health = http.get("/health")
        assert health.status_code == 503
        assert health.json()["parts"]["spool"].startswith("full")
        redis.start()
        wait_for(lambda: empty(spool), "the replay")
        post(http)
    assert len(rates(settings)) == 4


def test_a_spool_that_cannot_be_written_answers_503(
    redis: Redis, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    settings.home_dir.mkdir()
    settings.spool_dir.touch()  # no folder can be made there
    with running(settings) as http:
        post(http)
        redis.kill()
        for _ in range(3):
            response = http.post(PATH, json=heartbeat())
            problem(response, 503, "spool-unavailable")
            assert str(settings.home_dir) not in response.text
        assert http.get("/health").json()["failing"] == ["redis", "spool"]
        assert "spool" in http.get("/health").json()["parts"]["spool"]
        assert samples(http)["hb_spool_up", ()] == 0
        settings.spool_dir.unlink()  # mended
        post(http)
        redis.start()
        wait_for(lambda: http.get("/health").json()["parts"]["spool"] == "ok", "the replay")
        post(http)
    assert len(rates(settings)) == 3
    alarms = [r for r in caplog.records if r.levelno == logging.ERROR and "spool" in r.message]
    assert len(alarms) == 1


# -- telling


def test_health_metrics_and_log_tell(
    redis: Redis, settings: Settings, spool: Spool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with running(settings) as http:
        assert http.get("/health").json()["parts"]["spool"] == "ok"
        redis.kill()
        for _ in range(3):
            post(http)
        wait_for(lambda: len(http.get("/health").json()["alarms"]) == 2, "health to see both")
        health = http.get("/health")
        assert health.status_code == 200, "the spool takes heartbeats"
        assert str(redis.port) in health.json()["parts"]["redis"]
        assert health.json()["parts"]["redis"].endswith("; the spool takes heartbeats")
        assert health.json()["parts"]["spool"].startswith("holds 3 heartbeats")
        away, alarm = health.json()["alarms"]
        assert away == health.json()["parts"]["redis"]
        assert "3 heartbeats" in alarm
        found = samples(http)
        assert found["hb_heartbeats_accepted_total", ()] == 3
        assert found["hb_spool_heartbeats", ()] == 3
        assert found["hb_spool_bytes", ()] > 200
        assert found["hb_spool_replayed_total", ()] == 0
        with spool.replaying():
            redis.start()
            wait_for(lambda: http.get("/health").json()["parts"]["redis"] == "ok", "Redis")
            assert http.get("/health/ready").json()["parts"]["spool"].startswith("holds 3")
        wait_for(lambda: empty(spool), "the replay")
        wait_for(lambda: http.get("/health").json()["alarms"] == [], "health")
        wait_for(lambda: samples(http)["hb_spool_heartbeats", ()] == 0, "metrics")
        found = samples(http)
        assert found["hb_spool_replayed_total", ()] == 3
        wait_for(lambda: "buffer answers again" in caplog.text, "the log")
    warnings = [r for r in caplog.records if r.levelname == "WARNING" and "Redis at" in r.message]
    assert len(warnings) == 1


# -- starting and dying


def test_a_first_start_needs_redis_a_restart_does_not(
    redis: Redis, settings: Settings, spool: Spool
) -> None:
    async def start(chosen: Settings) -> None:
        async with Backend(chosen).opened():
            pass

    redis.kill()
    with pytest.raises(BufferUnavailableError):
        asyncio.run(start(settings))
    redis.start()
    asyncio.run(start(settings))
    redis.kill()
    with running(settings) as http:
        post(http)
    with pytest.raises(BufferUnavailableError):  # in this mode it was never verified
        asyncio.run(start(settings.model_copy(update={"durability": "memory"})))
    redis.start()
    with running(settings):
        wait_for(lambda: empty(spool), "the replay")
    assert rates(settings) == [75]


@BOTH
def test_a_redis_that_came_back_less_durable_gets_nothing(
    redis: Redis, settings: Settings, spool: Spool
) -> None:
    with running(settings) as http:
        redis.kill()
        post(http)
        redis.appendfsync = "everysec"
        redis.start()
        wait_for(
            lambda: "appendfsync=everysec" in http.get("/health").json()["parts"]["aof"],
            "health to see that Redis is back, and how",
        )
        post(http)
        post(http, user_id="u2")
        assert rates(settings) == []
        assert spool.holdings().heartbeats == 3
        with contextlib.closing(redis_py.Redis.from_url(redis.url)) as client:
            client.config_set("appendfsync", "always")
        wait_for(lambda: empty(spool), "the replay")
    assert len(rates(settings)) == 3


def test_dying_between_append_and_delete_only_repeats(
    redis: Redis, settings: Settings, spool: Spool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of("u1", SHARDS)
    lines = [json.dumps({"user_id": "u1", "heart_rate": rate}).encode() for rate in (61, 62)]
    for line in lines:
        spool.put([{shard: [line]}])
    with contextlib.closing(connect(settings)) as client:
        dying, heir = (Replayer(client, spool, settings) for _ in range(2))

        def full_disk(_: object) -> None:
            raise SpoolUnavailableError("spool: full")

        with monkeypatch.context() as patch:
            patch.setattr(spool, "remove", full_disk)
            for _ in range(3):
                with pytest.raises(SpoolUnavailableError):
                    dying.turn()
            # while it can't delete them, it doesn't append them again and again
            assert rates(settings) == [61, 62]
        heir.turn()
        assert rates(settings) == [61, 62, 61, 62]
        assert empty(spool)
        dying.turn()
        assert rates(settings) == [61, 62, 61, 62]


@BOTH
@pytest.mark.parametrize("spooling", [True, False])
def test_a_restart_that_nobody_saw_is_verified_before_the_next_append(
    redis: Redis, settings: Settings, spooling: bool
) -> None:
    """Redis comes back less durable while the gateway is idle, and no request met the outage."""
    most = settings.spool_max_bytes if spooling else 0
    settings = settings.model_copy(update={"spool_max_bytes": most})
    with (
        running(settings) as http,
        contextlib.closing(connect(settings)) as importing,
        contextlib.closing(Producer(importing, settings)) as producer,
    ):
        post(http)
        assert producer.append({0: [b"{}"]}) == {0: None}
        redis.kill()
        redis.appendfsync = "everysec"
        redis.start()
        response = http.post(PATH, json=heartbeat(user_id="u2"))
        [refused] = producer.append({0: [b"{}"]}).values()
        assert isinstance(refused, BufferUnavailableError)
        assert "has appendonly=yes, appendfsync=everysec" in str(refused)
        assert len(importing.keys("hb:*:stream")) > 0
        assert sum(importing.xlen(keys.stream(shard)) for shard in range(SHARDS)) == 2
        if spooling:
            assert response.status_code == 200
            with contextlib.closing(Spool(settings)) as opened:
                assert opened.holdings().heartbeats == 1
        else:
            problem(response, 503, "buffer-unavailable")
