"""Mode `replicated`, with a real primary and a real replica: what was answered survives."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from hb_assets.buffer import durability
from hb_assets.buffer.connection import connect, connect_async
from hb_assets.buffer.depth import scanned
from hb_assets.buffer.producer import AsyncProducer, Outcomes, Producer
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.settings import Settings
from hb_assets.gateway.spool.queue import Spool
from hb_assets_tests.gateway.conftest import PATH, heartbeat, running
from hb_assets_tests.gateway.ingest.test_heartbeats import problem
from hb_assets_tests.servers import process_of, replica_of, running_server, server_program, wait_for

pytestmark = pytest.mark.slow

LINE = b'{"user_id":"u1"}'


@pytest.fixture
def primary(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "primary"
    folder.mkdir()
    with running_server(server_program("valkey"), folder) as url:
        yield url


@pytest.fixture
def replica(primary: str, tmp_path: Path) -> Iterator[str]:
    with replica_of(primary, tmp_path / "replica") as url:
        yield url


@pytest.fixture
def settings(primary: str, tmp_path: Path) -> Settings:
    return Settings(
        home=tmp_path / "home",
        redis_url=primary,
        shards=2,
        durability="replicated",
        redis_timeout=dt.timedelta(seconds=2),
    )


@pytest.fixture
def client(settings: Settings) -> Iterator[redis.Redis]:
    with contextlib.closing(connect(settings)) as connected:
        yield connected


@contextlib.contextmanager
def stopped(url: str) -> Iterator[None]:
    """The server at `url` neither reads nor answers, for the time of the block."""
    pid = process_of(url)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def appended_async(settings: Settings, *calls: dict[int, list[bytes]]) -> list[Outcomes]:
    async def run() -> list[Outcomes]:
        async with connect_async(settings) as client:
            producer = AsyncProducer(client, settings)
            await producer.start()
            try:
                return list(await asyncio.gather(*map(producer.append, calls)))
            finally:
                await producer.close()

    return asyncio.run(run())


def refusals(outcomes: Outcomes) -> list[str]:
    assert all(isinstance(outcome, BufferUnavailableError) for outcome in outcomes.values())
    return [str(outcome) for outcome in outcomes.values()]


def test_what_is_answered_lies_on_the_replicas_disk(
    settings: Settings, client: redis.Redis, replica: str
) -> None:
    durability.require(client, settings)
    client.script_flush()  # what is sent again is confirmed, too
    assert Producer(client, settings).append({0: [LINE], 1: [LINE]}) == {0: None, 1: None}
    assert appended_async(settings, {0: [LINE]}, {1: [LINE] * 2}) == [{0: None}, {1: None}]
    at_replica = settings.model_copy(update={"redis_url": type(settings.redis_url)(replica)})
    with contextlib.closing(connect(at_replica)) as reader:
        assert scanned(reader, settings) == {0: 2, 1: 3}


@pytest.mark.parametrize("flushed", [False, True])
def test_a_replica_that_stands_still_confirms_nothing(
    settings: Settings, client: redis.Redis, replica: str, flushed: bool
) -> None:
    producer = Producer(client, settings)
    assert producer.append({0: [LINE]}) == {0: None}
    with stopped(replica):
        if flushed:
            client.script_flush()
        lines = refusals(producer.append({0: [LINE], 1: [LINE]}))
        if flushed:
            client.script_flush()
        lines += refusals(appended_async(settings, {0: [LINE]})[0])
    assert len(lines) == 3
    assert "shard 01: not confirmed within 1 s by 1 of 1 replicas" in lines[1]
    assert all("\n" not in line for line in lines)
    wait_for(lambda: producer.append({1: [LINE]}) == {1: None}, "the replica to confirm again")


def test_a_full_shard_is_refused_as_full_whoever_confirms(
    settings: Settings, client: redis.Redis, replica: str
) -> None:
    tight = settings.model_copy(update={"buffer_max_heartbeats": 4})
    outcomes = Producer(client, tight).append({0: [LINE] * 3, 1: [LINE]})
    assert "buffer full" in str(outcomes[0])
    assert outcomes[1] is None


def test_the_replica_that_takes_over_has_all_that_was_answered(
    settings: Settings, client: redis.Redis, primary: str, replica: str
) -> None:
    producer = Producer(client, settings)
    answered = dict.fromkeys(range(settings.shards), 0)
    for turn in range(30):
        sizes = {shard: 1 + (turn + shard) % 7 for shard in answered}
        outcomes = producer.append({shard: [LINE] * size for shard, size in sizes.items()})
        assert set(outcomes.values()) == {None}
        answered = {shard: held + sizes[shard] for shard, held in answered.items()}
    os.kill(process_of(primary), signal.SIGKILL)
    with contextlib.closing(redis.Redis.from_url(replica)) as heir:
        heir.execute_command("REPLICAOF", "NO", "ONE")
    taken_over = settings.model_copy(
        update={"redis_url": type(settings.redis_url)(replica), "durability": "fsync"}
    )
    with contextlib.closing(connect(taken_over)) as client_of_heir:
        durability.require(client_of_heir, taken_over)
        assert scanned(client_of_heir, taken_over) == answered
        assert Producer(client_of_heir, taken_over).append({0: [LINE]}) == {0: None}


@pytest.mark.parametrize("wanted", [1, 2])
def test_fewer_replicas_than_asked_for_are_a_clear_error(
    settings: Settings, client: redis.Redis, tmp_path: Path, wanted: int
) -> None:
    asked = settings.model_copy(update={"replicas": wanted})
    with contextlib.ExitStack() as stack:
        if wanted == 2:
            url = settings.redis_url.get_secret_value() if settings.redis_url else ""
            stack.enter_context(replica_of(url, tmp_path / "replica"))
        with pytest.raises(BufferUnavailableError) as refused:
            durability.require(client, asked)
        standing = durability.standing(client, asked)
    line = str(refused.value)
    assert f"by 1 of {wanted} replicas: start {wanted} replicas (HB_REPLICAS)" in line
    assert "\n" not in line
    assert f"has {wanted - 1} replicas, HB_REPLICAS asks for {wanted}" in str(standing.fault)


def test_a_replica_without_an_append_only_file_does_not_count(
    settings: Settings, client: redis.Redis, replica: str
) -> None:
    with contextlib.closing(redis.Redis.from_url(replica)) as forgetful:
        forgetful.config_set("appendonly", "no")
        with pytest.raises(BufferUnavailableError, match="by 1 of 1 replicas"):
            durability.require(client, settings)


def test_a_full_server_can_still_be_started_on(
    settings: Settings, client: redis.Redis, replica: str
) -> None:
    client.config_set("maxmemory", 1)
    durability.require(client, settings)
    [outcome] = Producer(client, settings).append({0: [LINE]}).values()
    assert "out of memory" in str(outcome)


def test_a_primary_that_may_forget_is_refused(
    settings: Settings, client: redis.Redis, replica: str
) -> None:
    client.config_set("appendfsync", "everysec")
    with pytest.raises(BufferUnavailableError, match="HB_DURABILITY=replicated needs appendonly"):
        durability.require(client, settings)


def test_a_server_without_waitaof_is_a_clear_error(tmp_path: Path) -> None:
    with running_server(server_program("redis"), tmp_path) as url:
        settings = Settings(home=tmp_path, redis_url=url, shards=2, durability="replicated")
        with contextlib.closing(connect(settings)) as old:
            with pytest.raises(BufferUnavailableError) as refused:
                durability.require(old, settings)
            [outcome] = Producer(old, settings).append({0: [LINE]}).values()
    assert "has no WAITAOF, which HB_DURABILITY=replicated needs" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "not confirmed: WAITAOF was refused" in str(outcome)


def test_one_connection_carries_appends_and_their_confirmation(
    settings: Settings, client: redis.Redis, replica: str
) -> None:
    """A WAITAOF of another connection would confirm what that one wrote: nothing."""
    seen: list[dict[str, Any]] = []
    with contextlib.closing(connect(settings)) as watcher, watcher.monitor() as monitor:
        client.script_flush()
        Producer(client, settings).append({0: [LINE], 1: [LINE]})
        appended_async(settings, {0: [LINE]})
        watcher.ping()
        while (command := monitor.next_command())["command"] != "PING":
            seen.append(command)
    senders = {
        (one["client_address"], one["client_port"])
        for one in seen
        if one["command"].startswith(("EVALSHA", "WAITAOF")) and one["client_type"] != "lua"
    }
    order = [one["command"].split()[0] for one in seen if one["client_type"] != "lua"]
    assert len(senders) == 2, "one of the client, one of the event loop's"
    assert [name for name in order if name in ("EVALSHA", "WAITAOF")][-2:] == ["EVALSHA", "WAITAOF"]


def test_the_gateway_refuses_what_replicas_have_not_confirmed(
    settings: Settings, replica: str
) -> None:
    with running(settings) as http, contextlib.closing(Spool(settings)) as spool:
        assert http.post(PATH, json=heartbeat()).status_code == 200
        with stopped(replica):
            response = http.post(PATH, json=heartbeat())
            problem(response, 503, "unconfirmed")
            assert int(response.headers["retry-after"]) >= 1
            assert spool.holdings().heartbeats == 0
        wait_for(lambda: http.post(PATH, json=heartbeat()).status_code == 200, "the replica")
