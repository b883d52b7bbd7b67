from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import uvloop
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st

from hb_assets.buffer import keys
from hb_assets.buffer.connection import connect_async
from hb_assets.buffer.depth import depths, scanned
from hb_assets.buffer.producer import AsyncProducer, Joined, Producer
from hb_assets.buffer.server import free_port
from hb_assets.core.errors import BufferFullError, BufferUnavailableError
from hb_assets.core.settings import Settings

pytestmark = pytest.mark.slow

LINE = b'{"user_id":"u1"}'


def changed(settings: Settings, **changes: Any) -> Settings:
    return settings.model_copy(update=changes)


def entries(client: redis.Redis, shard: int) -> list[dict[bytes, bytes]]:
    return [fields for _, fields in client.xrange(keys.stream(shard))]


@contextlib.asynccontextmanager
async def producing(settings: Settings) -> AsyncIterator[AsyncProducer]:
    async with connect_async(settings) as client:
        producer = AsyncProducer(client, settings)
        await producer.start()
        yield producer
        await producer.close()


def test_lines_become_entries_of_bounded_size(client: redis.Redis, settings: Settings) -> None:
    small = changed(settings, entry_max_heartbeats=2)

    outcomes = Producer(client, small).append({0: [b"1", b"2", b"3"], 2: [b"4"], 3: []})

    assert outcomes == {0: None, 2: None, 3: None}
    assert entries(client, 0) == [{b"data": b"1\n2", b"n": b"2"}, {b"data": b"3", b"n": b"1"}]
    assert entries(client, 2) == [{b"data": b"4", b"n": b"1"}]
    assert entries(client, 3) == []


def test_joined_lines_are_taken_apart_only_where_an_entry_would_be_too_large(
    client: redis.Redis, settings: Settings
) -> None:
    small = changed(settings, entry_max_heartbeats=3)
    five = Joined(5, b"1\n2\n3\n4\n5")

    async def append() -> None:
        async with producing(small) as producer:
            calls = [
                producer.append({1: Joined(2, b"6\n7"), 2: [b"a"]}),
                producer.append({1: Joined(2, b"8\n9"), 2: Joined(2, b"b\nc")}),
            ]
            assert await asyncio.gather(*calls) == [{1: None, 2: None}] * 2

    assert Producer(client, small).append({0: five}) == {0: None}
    asyncio.run(append())

    assert entries(client, 0) == [
        {b"data": b"1\n2\n3", b"n": b"3"},
        {b"data": b"4\n5", b"n": b"2"},
    ]
    assert entries(client, 1) == [{b"data": b"6\n7", b"n": b"2"}, {b"data": b"8\n9", b"n": b"2"}]
    assert entries(client, 2) == [{b"data": b"a\nb\nc", b"n": b"3"}]
    assert len(five) == 5
    assert list(five) == five[:] == [b"1", b"2", b"3", b"4", b"5"]


def test_scripts_are_loaded_anew_when_the_server_lost_them(
    client: redis.Redis, settings: Settings
) -> None:
    client.script_flush()

    assert Producer(client, settings).append({0: [LINE], 1: [LINE]}) == {0: None, 1: None}
    assert scanned(client, settings) == {0: 1, 1: 1, 2: 0, 3: 0}


@given(sizes=st.lists(st.integers(1, 9), max_size=12))
@examples(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_bound_holds_and_a_call_is_stored_whole_or_not_at_all(
    client: redis.Redis, settings: Settings, sizes: list[int]
) -> None:
    client.flushdb()
    tight = changed(settings, buffer_max_heartbeats=4 * 20, entry_max_heartbeats=3)
    producer = Producer(client, tight)
    held = 0
    for size in sizes:
        [outcome] = producer.append({1: [LINE] * size}).values()
        fits = held + size <= 20
        assert (outcome is None) == fits
        held += size if fits else 0
        assert scanned(client, tight)[1] == depths(client, tight).states[1].heartbeats == held


def test_the_bound_holds_in_bytes_too(client: redis.Redis, settings: Settings) -> None:
    tight = changed(settings, buffer_max_bytes=4 * 40)
    producer = Producer(client, tight)

    assert producer.append({0: [b"x" * 40]}) == {0: None}
    [outcome] = producer.append({0: [b"x"]}).values()

    assert isinstance(outcome, BufferFullError)
    assert depths(client, tight).states[0].bytes == 40


def test_a_full_buffer_says_which_shard_how_full_and_what_to_do(
    client: redis.Redis, settings: Settings
) -> None:
    tight = changed(settings, buffer_max_heartbeats=4 * 10)
    producer = Producer(client, tight)
    producer.append({1: [LINE] * 8})

    outcomes = producer.append({1: [LINE] * 3, 2: [LINE]})

    assert outcomes[2] is None, "a full shard keeps the others from nothing"
    full = outcomes[1]
    assert isinstance(full, BufferFullError)
    assert "shard 01 holds 8 of 10 heartbeats" in str(full)
    assert "HB_BUFFER_MAX_HEARTBEATS" in str(full)
    assert full.retry_after >= 1


def test_another_type_at_a_key_is_named(client: redis.Redis, settings: Settings) -> None:
    client.set(keys.stream(0), "something else")

    outcomes = Producer(client, settings).append({0: [LINE], 1: [LINE]})

    assert isinstance(outcomes[0], BufferUnavailableError)
    assert keys.stream(0) in str(outcomes[0])
    assert outcomes[1] is None


def test_no_server_fails_every_shard(client: redis.Redis, settings: Settings) -> None:
    nowhere = changed(settings, redis_url=f"redis://127.0.0.1:{free_port()}")

    async def append() -> dict[int, Any]:
        nowhere_too = Settings(home=settings.home, redis_url=nowhere.redis_url, shards=4)
        async with producing(nowhere_too) as producer:
            return await producer.append({0: [LINE], 1: [LINE]})

    outcomes = asyncio.run(append())

    assert {shard: type(outcome) for shard, outcome in outcomes.items()} == {
        0: BufferUnavailableError,
        1: BufferUnavailableError,
    }


def test_concurrent_calls_share_entries(client: redis.Redis, settings: Settings) -> None:
    async def append() -> None:
        async with producing(settings) as producer:
            calls = [producer.append({n % 2: [b"%d" % n]}) for n in range(200)]
            for n, outcomes in enumerate(await asyncio.gather(*calls)):
                assert outcomes == {n % 2: None}

    asyncio.run(append())

    assert scanned(client, settings) == {0: 100, 1: 100, 2: 0, 3: 0}
    assert len(entries(client, 0)) < 10
    stored = b"\n".join(fields[b"data"] for fields in entries(client, 0)).split(b"\n")
    assert stored == [b"%d" % n for n in range(0, 200, 2)], "in the order they came"


def test_a_batch_that_does_not_fit_leaves_its_neighbours_alone(
    client: redis.Redis, settings: Settings
) -> None:
    tight = changed(settings, buffer_max_heartbeats=4 * 50, entry_max_heartbeats=10)

    async def append() -> list[Any]:
        async with producing(tight) as producer:
            return await asyncio.gather(
                producer.append({0: [LINE]}),
                producer.append({0: [LINE] * 60, 1: [LINE]}),
                producer.append({0: [LINE] * 2}),
            )

    first, large, second = asyncio.run(append())

    assert first == second == {0: None}
    assert large[1] is None
    assert isinstance(large[0], BufferFullError)
    assert scanned(client, tight) == {0: 3, 1: 1, 2: 0, 3: 0}


def test_closing_sends_what_waits_and_takes_no_more(
    client: redis.Redis, settings: Settings
) -> None:
    async def append() -> None:
        async with connect_async(settings) as connected:
            producer = AsyncProducer(connected, settings)
            await producer.start()
            waiting = [asyncio.ensure_future(producer.append({0: [LINE]})) for _ in range(5)]
            await asyncio.sleep(0)
            await producer.close()
            assert await asyncio.gather(*waiting) == [{0: None}] * 5
            [late] = (await producer.append({0: [LINE]})).values()
            assert isinstance(late, BufferUnavailableError)

    asyncio.run(append())

    assert scanned(client, settings)[0] == 5


def test_a_caller_that_gave_up_does_not_disturb_the_rest(
    client: redis.Redis, settings: Settings
) -> None:
    async def append() -> None:
        async with producing(settings) as producer:
            lost = asyncio.ensure_future(producer.append({0: [LINE]}))
            kept = asyncio.ensure_future(producer.append({0: [LINE]}))
            await asyncio.sleep(0)
            lost.cancel()
            assert await kept == {0: None}
            with pytest.raises(asyncio.CancelledError):
                await lost

    asyncio.run(append())


@contextlib.contextmanager
def hanging_up() -> Iterator[int]:
    """A port where every connection is reset as soon as it is there."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset() -> None:
            with contextlib.suppress(OSError):
                while True:
                    caller, _ = listener.accept()
                    with caller:
                        at_once = struct.pack("ii", 1, 0)
                        caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)

        thread = threading.Thread(target=reset)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_server_that_hangs_up_at_any_moment(tmp_path: Path) -> None:
    """The gateway's loop, uvloop, raises an error of its own when the peer was faster."""

    async def append(away: Settings) -> list[object]:
        found = []
        for _ in range(15):
            async with producing(away) as producer:
                found += (await producer.append({0: [LINE]})).values()
        return found

    with hanging_up() as port:
        away = Settings(home=tmp_path, shards=4, redis_url=f"redis://127.0.0.1:{port}")  # type: ignore[arg-type]  # as a variable says it
        outcomes = uvloop.run(append(away))
    assert {type(outcome) for outcome in outcomes} == {BufferUnavailableError}
