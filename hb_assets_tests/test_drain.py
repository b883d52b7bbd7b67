"""The drain, on real servers: nothing is acknowledged that isn't durable; replay is harmless."""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from hb_assets import days
from hb_assets.audit import audit
from hb_assets.buffer import depth, keys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.drain import Drained, drain, drain_cycle
from hb_assets.lake import fragments, inventory, layout, quarantine
from hb_assets.lake.consolidation import consolidate
from hb_assets.lake.store import Lake
from hb_assets.record import shard_of
from hb_assets.settings import Settings, environment
from hb_assets_tests.dying_drain import ACKNOWLEDGED, MOMENTS
from hb_assets_tests.lake.deliveries import (
    Row,
    consolidated,
    left_behind,
    raw,
    rows_of,
    survivors,
)
from hb_assets_tests.servers import wait_for

DAY = days.day_of(time.time_ns() // 1_000_000)
MIDNIGHT = days.start_ms(DAY)


@pytest.fixture
def lake(settings: Settings) -> Iterator[Lake]:
    opened = Lake.open(settings)
    yield opened
    assert left_behind(opened.root) == []


@contextmanager
def consuming(settings: Settings) -> Iterator[Consumer]:
    client = connect(settings)
    consumer = Consumer(client, settings)
    consumer.open()
    try:
        yield consumer
    finally:
        consumer.close()
        client.close()


@pytest.fixture
def consumer(settings: Settings) -> Iterator[Consumer]:
    with consuming(settings) as opened:
        yield opened


def beat(user: str, at: int = MIDNIGHT, bpm: int = 75) -> bytes:
    fields = {"user_id": user, "device_id": "d", "timestamp_ms": at, "heart_rate": bpm}
    return json.dumps(fields).encode()


def append(client: redis.Redis, settings: Settings, lines: list[bytes], shard: int = 0) -> None:
    assert Producer(client, settings).append({shard: lines}) == {shard: None}


def users(count: int) -> list[bytes]:
    return [beat(f"u{n}") for n in range(count)]


def buffered(client: redis.Redis, settings: Settings) -> int:
    return sum(one.entries for one in depth.depths(client, settings))


def settled(client: redis.Redis, lake: Lake, settings: Settings) -> list[Row]:
    """Consolidates everything; every row that came is there once, and it all adds up."""
    for day in inventory.days(lake):
        consolidate(lake, day, settings)
    rows = [one for day in inventory.days(lake) for one in raw(lake, day)]
    found = [one for day in inventory.days(lake) for one in consolidated(lake, day)]
    assert sorted(found) == sorted(survivors(rows).values())
    assert audit(client, lake, settings, deep=True).differences == []
    return found


def test_from_buffer_to_lake(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    append(client, settings, [*users(20), b"bad", beat("u1", bpm=5)], shard=2)
    client.xadd(keys.stream(3), {"data": b"\n".join([beat("u1", bpm=80), b"{}"])})
    client.xadd(keys.stream(3), {"other": b"field"})
    told: list[Drained] = []
    done = drain(consumer, lake, settings, on_cycle=told.append)
    assert (done.rows, done.quarantined, done.entries, done.empty) == (21, 4, 3, True)
    assert told[-1].rows == 21
    assert buffered(client, settings) == 0
    reasons = quarantine.counts(lake)
    assert reasons == {
        "record_not_json": 1,
        "heart_rate_out_of_range": 1,
        "user_id_missing": 1,
        "record_no_data": 1,
    }
    found = settled(client, lake, settings)
    assert {one[0]: one[3] for one in found}["u1"] == 80
    assert len(found) == 20


def test_rows_go_where_their_user_hashes_to(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    for shard in range(settings.shards):
        append(client, settings, users(9), shard)
    drain(consumer, lake, settings)
    sources = set()
    for shard in range(settings.shards):
        for fragment in fragments.listed(lake, DAY, shard):
            rows = rows_of(fragment.path)
            assert {shard_of(one[0], settings.shards) for one in rows} == {shard}
            sources |= {one[4][2] for one in rows}
    assert sources == set(range(settings.shards))
    assert len(settled(client, lake, settings)) == 9


def test_second_drain_of_the_same_entries_changes_no_result(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    lines = [*users(5), beat("u1", bpm=80), b"bad"]
    entries = [client.xadd(keys.stream(0), {"data": b"\n".join(lines)}, id="123456789012-5")]
    entries += [client.xadd(keys.stream(0), {"data": beat("u2", bpm=90)}, id="123456789013-0")]
    early = settings.model_copy(update={"start_date": days.parse_day("1970-01-01")})
    future = early.model_copy(update={"max_future": dt.timedelta(days=365 * 80)})
    drain(consumer, lake, future)
    before = settled(client, lake, future)
    client.delete(keys.stream(0))
    consumer.open()
    client.xadd(keys.stream(0), {"data": b"\n".join(lines)}, id=entries[0])
    client.xadd(keys.stream(0), {"data": beat("u2", bpm=90)}, id=entries[1])
    assert drain(consumer, lake, future).entries == 2
    for day in inventory.days(lake):
        done = consolidate(lake, day, future)
        assert (done.replayed, done.rows, done.superseded) == (7, 7, 2)
    assert [one for day in inventory.days(lake) for one in consolidated(lake, day)] == before
    assert quarantine.counts(lake) == {"record_not_json": 1}


@pytest.mark.parametrize("times", [1, 2, 5])
def test_disk_that_is_full(
    client: redis.Redis,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    times: int,
) -> None:
    """Nothing is acknowledged; when there is room again, everything is drained."""
    append(client, settings, [*users(20), b"bad"])
    fsync, calls = os.fsync, [0]

    def full(handle: int) -> None:
        calls[0] += 1
        if calls[0] > 3 * times:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            drain_cycle(consumer, lake, settings)
    monkeypatch.undo()
    assert [one.acknowledged for one in depth.depths(client, settings)] == [0] * 4
    assert buffered(client, settings) == 1
    assert audit(client, lake, settings).differences == []
    assert drain(consumer, lake, settings, until_empty=True).rows == 20
    assert len(settled(client, lake, settings)) == 20
    assert [one.attempts for one in quarantine.records(lake)] == [3]


def test_quarantine_that_cannot_be_written(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    append(client, settings, [*users(3), b"bad"])
    (lake.root / layout.QUARANTINE).write_bytes(b"a file in the way")
    with pytest.raises(OSError, match=layout.QUARANTINE):
        drain(consumer, lake, settings)
    assert buffered(client, settings) == 1
    (lake.root / layout.QUARANTINE).unlink()
    drain(consumer, lake, settings)
    assert len(settled(client, lake, settings)) == 3


@pytest.mark.parametrize("moment", [*MOMENTS, ACKNOWLEDGED])
def test_killed(client: redis.Redis, lake: Lake, settings: Settings, moment: str) -> None:
    append(client, settings, [*users(20), b"bad", beat("u1", bpm=80)])
    client.xadd(keys.stream(1), {"data": b"\n".join([beat("u1", bpm=90), b"{}"])})
    killed = subprocess.run(
        [sys.executable, "-m", "hb_assets_tests.dying_drain", moment],
        env=environment(settings),
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    with consuming(settings) as heir:
        done = drain(heir, lake, settings, until_empty=True)
    assert done.entries == (0 if moment == ACKNOWLEDGED else 2)
    found = settled(client, lake, settings)
    assert {one[0]: one[3] for one in found} == {f"u{n}": 75 for n in range(20)} | {"u1": 90}
    assert quarantine.counts(lake) == {"record_not_json": 1, "user_id_missing": 1}
    rows = sum(inventory.day_state(lake, day, settings).rows for day in inventory.days(lake))
    assert rows == 22


# -- budgets and ends


@pytest.mark.parametrize(
    "budget", [{"drain_max_rows": 10}, {"drain_max_bytes": 1024}, {"drain_max_rows": 1}]
)
def test_budgets(
    client: redis.Redis, lake: Lake, settings: Settings, budget: dict[str, Any]
) -> None:
    small = settings.model_copy(update={"entry_max_heartbeats": 5, **budget})
    for shard in range(4):
        append(client, small, users(10), shard)
    told: list[Drained] = []
    with consuming(small) as consumer:
        done = drain(consumer, lake, small, on_cycle=told.append)
    steps = [
        after.rows - before.rows for before, after in zip([Drained(), *told], told, strict=False)
    ]
    assert done.rows == sum(steps) == 40
    assert max(steps) <= max(5, budget.get("drain_max_rows", 15))
    assert done.cycles > 3
    assert len(settled(client, lake, small)) == 10


def test_no_cycle_starts_after_the_time(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    append(client, settings, users(3))
    assert drain(consumer, lake, settings, seconds=0).cycles == 0
    assert buffered(client, settings) == 1
    assert drain(consumer, lake, settings, seconds=60).rows == 3


def test_stop(client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings) -> None:
    append(client, settings, users(3))
    assert drain(consumer, lake, settings, stop=lambda: True).rows == 0
    stop = threading.Event()
    done = drain(
        consumer, lake, settings, follow=True, stop=stop.is_set, on_cycle=lambda _: stop.set()
    )
    assert done.rows == 3


def test_follow_takes_what_comes_later(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    stop = threading.Event()
    quick = settings.model_copy(update={"drain_poll": dt.timedelta(milliseconds=5)})
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(drain, consumer, lake, quick, follow=True, stop=stop.is_set)
        try:
            for seq in range(3):
                append(client, settings, [beat(f"u{seq}")])
                wait_for(lambda: buffered(client, settings) == 0, "the drain")
        finally:
            stop.set()
        assert running.result().rows == 3


def test_until_empty_waits_for_what_another_one_holds(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    append(client, settings, users(3))
    quick = settings.model_copy(update={"drain_poll": dt.timedelta(milliseconds=5)})
    with consuming(settings) as other:
        [held] = other.claim(100, 10_000)
        looks = threading.Semaphore(0)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(
                drain, consumer, lake, quick, until_empty=True, on_cycle=lambda _: looks.release()
            )
            for _ in range(3):
                assert looks.acquire(timeout=30)
            assert not running.done()
            assert drain(consumer, lake, quick, seconds=0).rows == 0
            other.acknowledge([(held, 3)])
            assert running.result(timeout=30).rows == 0


def test_several_drainers_at_once(client: redis.Redis, lake: Lake, settings: Settings) -> None:
    small = settings.model_copy(
        update={
            "entry_max_heartbeats": 5,
            "drain_max_rows": 20,
            "drain_poll": dt.timedelta(milliseconds=5),
        }
    )
    for shard in range(4):
        append(client, small, [beat(f"u{n}", at=MIDNIGHT + shard) for n in range(50)], shard)

    def work(_: int) -> int:
        with consuming(small) as consumer:
            return drain(consumer, lake, small, until_empty=True).rows

    with ThreadPoolExecutor(3) as pool:
        drainers = pool.map(work, range(3))
        process = subprocess.run(
            [sys.executable, "-m", "hb_assets_tests.dying_drain", "all is durable"],
            env=environment(small),
            cwd=Path(__file__).parent.parent,
            capture_output=True,
            check=False,
        )
        assert process.returncode in (0, -signal.SIGKILL), process.stderr.decode()
        assert sum(drainers) <= 200
    work(0)
    assert len(settled(client, lake, small)) == 200


def test_totals_add_up() -> None:
    one = Drained(1, 2, 3, 4, 5, 6, 7.0, empty=True)
    assert one.plus(one) == Drained(2, 4, 6, 8, 10, 12, 14.0, empty=True)
    assert not one.plus(Drained()).empty
