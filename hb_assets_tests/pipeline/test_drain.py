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
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import redis

from hb_assets.buffer import depth, keys, liveness
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core import days
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings, environment
from hb_assets.lake import inventory
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments, quarantine
from hb_assets.lake.ingest import isolation
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import drain as drain_module
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import Drained, drain, drain_cycle
from hb_assets_tests import victims
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.lake.deliveries import Row, consolidated, left_behind, raw, rows_of, survivors
from hb_assets_tests.servers import wait_for

pytestmark = pytest.mark.slow

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


def heartbeat(user: str, at: int = MIDNIGHT, bpm: int = 75) -> bytes:
    fields = {"user_id": user, "device_id": "d", "timestamp_ms": at, "heart_rate": bpm}
    return json.dumps(fields).encode()


def append(client: redis.Redis, settings: Settings, lines: list[bytes], shard: int = 0) -> None:
    assert Producer(client, settings).append({shard: lines}) == {shard: None}


def users(count: int) -> list[bytes]:
    return [heartbeat(f"u{n}") for n in range(count)]


def buffered(client: redis.Redis, settings: Settings) -> int:
    return sum(one.entries for one in depth.depths(client, settings).states)


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
    append(client, settings, [*users(20), b"bad", heartbeat("u1", bpm=5)], shard=2)
    client.xadd(keys.stream(3), {"data": b"\n".join([heartbeat("u1", bpm=80), b"{}"])})
    client.xadd(keys.stream(3), {"other": b"field"})
    told: list[Drained] = []
    done = drain(consumer, lake, settings, on_cycle=told.append)
    assert (done.rows, done.quarantined, done.entries, done.empty) == (21, 4, 3, True)
    assert told[-1].rows == 21
    assert buffered(client, settings) == 0
    reasons = quarantine.summary(lake, settings).reasons
    assert reasons == {
        "record_not_json": 1,
        "heart_rate_out_of_range": 1,
        "user_id_missing": 1,
        "record_no_data": 1,
    }
    found = settled(client, lake, settings)
    assert {one[0]: one[3] for one in found}["u1"] == 80
    assert len(found) == 20


@VALKEY
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


@VALKEY
def test_second_drain_of_the_same_entries_changes_no_result(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    lines = [*users(5), heartbeat("u1", bpm=80), b"bad"]
    entries = [client.xadd(keys.stream(0), {"data": b"\n".join(lines)}, id="123456789012-5")]
    entries += [client.xadd(keys.stream(0), {"data": heartbeat("u2", bpm=90)}, id="123456789013-0")]
    early = settings.model_copy(update={"start_date": days.parse_day("1970-01-01")})
    future = early.model_copy(update={"max_future": dt.timedelta(days=365 * 80)})
    drain(consumer, lake, future)
    before = settled(client, lake, future)
    client.delete(keys.stream(0))
    consumer.open()
    client.xadd(keys.stream(0), {"data": b"\n".join(lines)}, id=entries[0])
    client.xadd(keys.stream(0), {"data": heartbeat("u2", bpm=90)}, id=entries[1])
    assert drain(consumer, lake, future).entries == 2
    for day in inventory.days(lake):
        done = consolidate(lake, day, future)
        assert (done.replayed, done.rows, done.superseded) == (7, 7, 2)
    assert [one for day in inventory.days(lake) for one in consolidated(lake, day)] == before
    assert quarantine.summary(lake, settings).reasons == {"record_not_json": 1}


@VALKEY
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
    assert [one.acknowledged for one in depth.depths(client, settings).states] == [0] * 4
    assert buffered(client, settings) == 1
    assert audit(client, lake, settings).differences == []
    assert drain(consumer, lake, settings, until_empty=True).rows == 20
    assert len(settled(client, lake, settings)) == 20
    assert [one.attempts for one in quarantine.records(lake, settings)] == [3]


@VALKEY
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


@VALKEY
def test_a_drain_looks_at_nothing_that_the_day_holds(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    """Neither lists nor opens it: its time doesn't depend on how much there is."""
    append(client, settings, users(20))
    drain(consumer, lake, settings)
    [day] = inventory.days(lake)
    consolidate(lake, day, settings)
    append(client, settings, users(20))
    looks: list[str] = []
    watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event in ("open", "os.scandir", "os.listdir") and lake.root.exists():
            looks.append(f"{event} {arguments[0]}")

    sys.addaudithook(watch)
    try:
        assert drain(consumer, lake, settings).rows == 20
    finally:
        watching = False
    held = (str(lake.root / layout.RAW), str(lake.root / layout.HEARTBEATS))
    inside = [look for look in looks if any(part in look for part in held)]
    synced = {f"open {layout.shard_folder(lake.root, layout.RAW, day, n)}" for n in range(4)}
    assert synced == {*inside}


# -- poison


ROOT = Path(__file__).parents[2]


def dying(settings: Settings) -> int:
    """A drain in a process of its own; its exit code."""
    command = [sys.executable, "-m", "hb_assets_tests.dying_drain"]
    environ = environment(settings)
    return subprocess.run(command, env=environ, cwd=ROOT, check=False).returncode


def held_by_the_dead(client: redis.Redis, settings: Settings, deliveries: int) -> None:
    """Every entry that is there becomes one that was handed out so often."""
    for shard in range(settings.shards):
        ids = [entry for entry, _ in client.xrange(keys.stream(shard))]
        if ids:
            stream, last = keys.stream(shard), ids[-1]
            client.xgroup_create(stream, keys.GROUP, "0")
            client.xgroup_setid(stream, keys.GROUP, last)
            client.xclaim(
                *(stream, keys.GROUP, "somebody", 0, ids),
                idle=10**9,
                retrycount=deliveries,
                force=True,
                justid=True,
            )


@pytest.fixture
def acting_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspects are decoded by a child that does what an entry says."""
    command = (sys.executable, "-m", "hb_assets_tests.dying_decoder")
    monkeypatch.setattr(isolation, "COMMAND", command)


@VALKEY
@pytest.mark.parametrize("harmless", [True, False])
def test_an_entry_that_ends_its_drainer(
    client: redis.Redis,
    lake: Lake,
    settings: Settings,
    harmless: bool,
    request: pytest.FixtureRequest,
) -> None:
    """It ends two drainers; then it is decoded apart: used if that can be done, or quarantined."""
    impatient = settings.model_copy(update={"poison_deliveries": 2})
    append(client, settings, users(20))
    append(client, settings, [heartbeat("poison"), heartbeat("own"), b"bad"])
    client.xadd(
        keys.stream(1), {"data": b"\n".join([heartbeat("external"), b"", b'"poison"', b""])}
    )
    client.xadd(keys.stream(2), {"data": heartbeat("neighbour")})
    for _ in range(2):
        assert dying(impatient) == -signal.SIGKILL
    assert buffered(client, settings) == 4
    if not harmless:
        request.getfixturevalue("acting_decoder")
    with consuming(impatient) as heir:
        done = drain(heir, lake, impatient, until_empty=True)
    found = {one[0] for one in settled(client, lake, settings)}
    assert {f"u{n}" for n in range(20)} | {"neighbour"} <= found
    kept = list(quarantine.records(lake, settings))
    if harmless:
        assert {"poison", "own", "external"} <= found
        assert {one.raw for one in kept} == {b"bad", b'"poison"'}
        assert done.rows == 24
    else:
        assert {one.reason for one in kept} == {"record_poison"}
        assert sorted(one.raw for one in kept) == sorted(
            [heartbeat("poison"), heartbeat("own"), b"bad", heartbeat("external"), b'"poison"']
        )
        assert {one.attempts for one in kept} <= {3, 4}  # one poison a cycle


@VALKEY
def test_a_row_in_a_fragment_and_in_the_quarantine_is_the_fragments(
    client: redis.Redis, lake: Lake, settings: Settings, acting_decoder: None
) -> None:
    """A drainer made the fragments durable and died; later the entry turned out to be poison."""
    append(client, settings, [heartbeat("poison"), heartbeat("u1"), b"bad"])
    victims.kill_at(settings, "drain/fragments durable", "drain")
    impatient = settings.model_copy(update={"poison_deliveries": 1})
    with consuming(impatient) as heir:
        assert drain(heir, lake, impatient, until_empty=True).quarantined == 3
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert (verdict.rows, verdict.quarantined) == (2, 1)
    assert len(settled(client, lake, settings)) == 2


@VALKEY
def test_many_suspects_are_innocent(client: redis.Redis, lake: Lake, settings: Settings) -> None:
    """Kills, full disks and slow drainers raise the count: what decodes is used."""
    small = settings.model_copy(update={"entry_max_heartbeats": 2})
    for shard in range(4):
        append(client, small, [heartbeat(f"u{n}", at=MIDNIGHT + shard) for n in range(20)], shard)
    held_by_the_dead(client, settings, 50)
    with consuming(settings) as consumer:
        assert drain(consumer, lake, settings, until_empty=True).rows == 80
    assert len(settled(client, lake, settings)) == 80


@VALKEY
def test_errors_of_storage_never_count_against_an_entry(
    client: redis.Redis,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append(client, settings, [*users(3), b"bad"])

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for _ in range(settings.poison_deliveries + 2):
        with pytest.raises(OSError, match="No space left"):
            drain_cycle(consumer, lake, settings)
    monkeypatch.undo()
    assert drain(consumer, lake, settings).rows == 3
    assert quarantine.summary(lake, settings).reasons == {"record_not_json": 1}
    assert len(settled(client, lake, settings)) == 3


ODD: dict[str, tuple[bytes | None, dict[str, int]]] = {
    "not JSON": (b"\x89PNG\r\n\x1a\n", {"record_not_json": 2}),
    "wrong types": (
        b'[1]\n5\n"x"\nnull\n{"user_id": 1}\n' + heartbeat("x").replace(b"75", b'"75"'),
        {
            "record_not_an_object": 4,
            "user_id_wrong_type": 1,
            "heart_rate_wrong_type": 1,
        },
    ),
    "huge numbers": (
        b"\n".join(
            heartbeat("x").replace(b"75", n) for n in (b"9" * 400, b"1e308", b"-" + b"9" * 5000)
        ),
        {"heart_rate_out_of_range": 2, "record_not_json": 1},
    ),
    "NaN": (heartbeat("x").replace(b"75", b"NaN"), {"record_not_json": 1}),
    "deep nesting": (
        b"[" * 100_000 + b"]" * 100_000 + b"\n" + b'{"a":' * 100_000,
        {"record_not_json": 2},
    ),
    "control characters": (
        b"\x00\n\x01\x02\n" + heartbeat("x").replace(b"x", b"\x00"),
        {"record_not_json": 3},
    ),
    "invalid UTF-8": (
        b"\xff\xfe\n" + heartbeat("x").replace(b"x", b"\xc3"),
        {"record_not_json": 2},
    ),
    "lone surrogates": (
        heartbeat("x").replace(b"x", b"\\ud800")
        + b"\n"
        + heartbeat("x").replace(b"x", b"\xed\xa0\x80"),
        {"record_not_json": 2},
    ),
    "1 MB strings": (
        heartbeat("x" * 2**20) + b"\n" + heartbeat("x").replace(b'"d"', b'"' + b"d" * 2**20 + b'"'),
        {"user_id_wrong_length": 1, "device_id_wrong_length": 1},
    ),
    "empty data": (b"", {"record_no_data": 1}),
    "blank lines": (b"\n \r\n\n", {"record_no_data": 1}),
    "no field data": (None, {"record_no_data": 1}),
    "tiny rows": (b"{}\n" * 30_000, {"user_id_missing": 30_000}),
}


@VALKEY
@pytest.mark.parametrize("suspected", [False, True])
def test_odd_entries(client: redis.Redis, lake: Lake, settings: Settings, suspected: bool) -> None:
    """All at once, among neighbours: each record ends in one place, usually and as a suspect."""
    expected: dict[str, int] = {}
    for number, (data, reasons) in enumerate(ODD.values()):
        stream = keys.stream(number % 4)
        client.xadd(stream, {"data": heartbeat(f"before{number}")})
        client.xadd(stream, {"other": b"x"} if data is None else {"data": data})
        client.xadd(stream, {"data": heartbeat(f"after{number}")})
        for reason, count in reasons.items():
            expected[reason] = expected.get(reason, 0) + count
    if suspected:
        held_by_the_dead(client, settings, 6)
    tight = settings.model_copy(update={"drain_max_rows": 10_000})
    with consuming(tight) as consumer:
        done = drain(consumer, lake, tight, until_empty=True)
    assert (done.rows, done.entries) == (2 * len(ODD), 3 * len(ODD))
    assert quarantine.summary(lake, settings).reasons == expected
    found = {one[0] for one in settled(client, lake, settings)}
    assert found == {f"{side}{n}" for side in ("before", "after") for n in range(len(ODD))}


@VALKEY
def test_follow_goes_on_after_a_fault_and_rests_in_between(
    client: redis.Redis,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here the quarantine can't be written: nothing is acknowledged, nothing spins."""
    monkeypatch.setattr(drain_module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(drain_module, "LONGEST_PAUSE", 0.2)
    rests: list[float] = []
    rest = drain_module._rest

    def noted(seconds: float, stop: Callable[[], bool]) -> None:
        began = time.monotonic()
        rest(seconds, stop)
        assert stop() or time.monotonic() - began >= seconds
        rests.append(seconds)

    monkeypatch.setattr(drain_module, "_rest", noted)
    append(client, settings, [*users(3), b"bad"])
    blocked = lake.root / layout.QUARANTINE
    blocked.write_bytes(b"a file in the way")
    stop = threading.Event()
    faults: list[Exception] = []
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            drain,
            *(consumer, lake, settings),
            follow=True,
            stop=stop.is_set,
            on_fault=faults.append,
        )
        try:
            wait_for(lambda: len(rests) >= 4, "faults")
            assert buffered(client, settings) == 1
            blocked.unlink()
            wait_for(lambda: buffered(client, settings) == 0, "the drain")
        finally:
            stop.set()
        assert running.result().rows == 3
    assert all(str(blocked) in str(error) for error in faults)
    assert rests[:4] == [0.05, 0.1, 0.2, 0.2]
    assert len(settled(client, lake, settings)) == 3


@VALKEY
def test_follow_goes_on_after_an_error_of_ours(
    client: redis.Redis,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing is acknowledged, and the others of the shard come as soon as it is mended."""
    append(client, settings, users(3))
    with monkeypatch.context() as broken:

        def invalid(*_: object) -> None:
            raise pa.ArrowInvalid("secret 177")

        broken.setattr(drain_module, "FIRST_PAUSE", 0.01)
        broken.setattr(fragments, "publish", invalid)
        faults: list[Exception] = []
        done = drain(
            *(consumer, lake, settings),
            follow=True,
            stop=lambda: len(faults) == 3,
            on_fault=faults.append,
        )
    assert {type(fault) for fault in faults} == {pa.ArrowInvalid}
    assert (done.rows, buffered(client, settings)) == (0, 1)
    assert drain(consumer, lake, settings).rows == 3


def test_pauses_grow_and_end_growing() -> None:
    assert [drain_module.pause_after(faults) for faults in (1, 2, 3, 7, 8, 10**6)] == [
        *(0.5, 1.0, 2.0, 30.0, 30.0, 30.0)
    ]


def test_a_shard_with_something_else_at_its_key_hinders_no_other(
    client: redis.Redis, lake: Lake, settings: Settings
) -> None:
    for shard in range(4):
        append(client, settings, users(3), shard)
    client.rename(keys.stream(2), "kept")
    client.set(keys.stream(2), "something else")
    with consuming(settings) as consumer:
        assert drain(consumer, lake, settings, until_empty=True).rows == 9
        assert keys.stream(2) in consumer.unusable[2]
    client.rename("kept", keys.stream(2))
    with consuming(settings) as consumer:
        assert drain(consumer, lake, settings, until_empty=True).rows == 3
    assert len(settled(client, lake, settings)) == 3


# -- budgets and ends


@VALKEY
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


@VALKEY
def test_no_cycle_starts_after_the_time(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    append(client, settings, users(3))
    assert drain(consumer, lake, settings, seconds=0).cycles == 0
    assert buffered(client, settings) == 1
    assert drain(consumer, lake, settings, seconds=60).rows == 3


@VALKEY
def test_stop(client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings) -> None:
    append(client, settings, users(3))
    assert drain(consumer, lake, settings, stop=lambda: True).rows == 0
    stop = threading.Event()
    done = drain(
        consumer, lake, settings, follow=True, stop=stop.is_set, on_cycle=lambda _: stop.set()
    )
    assert done.rows == 3


@VALKEY
def test_follow_takes_what_comes_later(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    stop = threading.Event()
    quick = settings.model_copy(
        update={"drain_poll": dt.timedelta(milliseconds=5), "drain_max_wait": dt.timedelta(0)}
    )
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(drain, consumer, lake, quick, follow=True, stop=stop.is_set)
        try:
            for seq in range(3):
                append(client, settings, [heartbeat(f"u{seq}")])
                wait_for(lambda: buffered(client, settings) == 0, "the drain")
        finally:
            stop.set()
        assert running.result().rows == 3


@contextmanager
def following(
    consumer: Consumer, lake: Lake, settings: Settings, **changes: Any
) -> Iterator[Future[Drained]]:
    """A drain that follows, and looks often."""
    often = {"drain_poll": dt.timedelta(milliseconds=5), **changes}
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield pool.submit(
                drain,
                *(consumer, lake, settings.model_copy(update=often)),
                follow=True,
                stop=stop.is_set,
            )
        finally:
            stop.set()


@VALKEY
def test_little_is_gathered_until_it_is_much(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    wait = dt.timedelta(seconds=30)
    with following(consumer, lake, settings, drain_max_wait=wait, drain_max_rows=3) as running:
        for seq in range(2):
            append(client, settings, [heartbeat(f"u{seq}")])
            wait_for(
                lambda: depth.depths(client, settings).states[0].pending == seq + 1,  # noqa: B023  # called at once
                "its claim",
            )
        append(client, settings, [heartbeat("u2")])
        wait_for(lambda: buffered(client, settings) == 0, "the drain")
    assert (running.result().rows, running.result().cycles) == (3, 1)
    assert liveness.read(client).labelled("drain_flushes") == {"rows": 1}


@VALKEY
def test_little_is_flushed_when_it_has_waited(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    wait = dt.timedelta(milliseconds=100)
    with following(consumer, lake, settings, drain_max_wait=wait) as running:
        append(client, settings, users(3))
        wait_for(lambda: buffered(client, settings) == 0, "the drain")
    assert running.result().rows == 3
    assert liveness.read(client).labelled("drain_flushes") == {"age": 1}


@VALKEY
def test_what_is_gathered_when_it_has_to_stop_is_brought(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    with following(consumer, lake, settings, drain_max_wait=dt.timedelta(seconds=30)) as running:
        append(client, settings, users(3))
        wait_for(lambda: depth.depths(client, settings).states[0].pending == 1, "its claim")
    assert running.result().rows == 3
    assert buffered(client, settings) == 0


@VALKEY
def test_what_lies_ahead_of_a_failing_cycle_is_claimed_again(
    client: redis.Redis,
    lake: Lake,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = settings.model_copy(update={"entry_max_heartbeats": 5, "drain_max_rows": 10})
    for shard in range(4):
        append(client, small, users(20), shard)
    publish, calls = fragments.publish, [0]

    def failing(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2:
            wait_for(
                lambda: sum(one.pending for one in depth.depths(client, settings).states) > 3,
                "more",
            )
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return publish(*arguments)

    monkeypatch.setattr(fragments, "publish", failing)
    with consuming(small) as consumer:
        with pytest.raises(OSError, match="No space left"):
            drain(consumer, lake, small)
        assert drain(consumer, lake, small).rows == 70
    assert buffered(client, settings) == 0
    assert len(settled(client, lake, settings)) == 20


@VALKEY
def test_it_ends_once_it_has_caught_up(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    """What comes meanwhile would make a fragment for each handful."""
    append(client, settings, users(3))
    done = drain(
        *(consumer, lake, settings), on_cycle=lambda _: append(client, settings, users(2), 1)
    )
    assert (done.rows, done.cycles, done.empty) == (3, 1, True)
    assert buffered(client, settings) == 1


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


@VALKEY
def test_several_drainers_at_once(client: redis.Redis, lake: Lake, settings: Settings) -> None:
    small = settings.model_copy(
        update={
            "entry_max_heartbeats": 5,
            "drain_max_rows": 20,
            "drain_poll": dt.timedelta(milliseconds=5),
        }
    )
    for shard in range(4):
        append(client, small, [heartbeat(f"u{n}", at=MIDNIGHT + shard) for n in range(50)], shard)

    def work(_: int) -> int:
        with consuming(small) as consumer:
            return drain(consumer, lake, small, until_empty=True).rows

    with ThreadPoolExecutor(3) as pool:
        drainers = pool.map(work, range(3))
        with victims.running(small, "drain", point="drain/before acknowledge") as victim:
            assert victim.wait(timeout=60) in (0, -signal.SIGKILL), victims.said(small)
        assert sum(drainers) <= 200
    work(0)
    assert len(settled(client, lake, small)) == 200


def test_totals_add_up() -> None:
    one = Drained(1, 2, 3, 4, 5, 6, 7.0, empty=True)
    assert one.plus(one) == Drained(2, 4, 6, 8, 10, 12, 14.0, empty=True)
    assert not one.plus(Drained()).empty


def test_a_drain_leaves_beats_and_counts(
    client: redis.Redis, lake: Lake, settings: Settings
) -> None:
    small = settings.model_copy(update={"drain_max_rows": 24})
    append(client, settings, [*users(20), b"bad", heartbeat("u1", bpm=5)], shard=2)
    append(client, settings, users(3), shard=1)
    with consuming(small) as consumer:
        done = drain(consumer, lake, small, until_empty=True)
    signs = liveness.read(client)
    assert signs.seen_ms.keys() == {liveness.drained(shard) for shard in range(settings.shards)}
    assert signs.counts["drained_rows"] == done.rows == 23
    assert signs.counts["drained_entries"] == done.entries == 2
    assert signs.counts["drained_fragments"] == done.fragments
    assert signs.counts["drain_us"] > 0
    assert sum(signs.labelled("drain_le").values()) == 2
    assert signs.labelled("quarantined") == {"record_not_json": 1, "heart_rate_out_of_range": 1}
    assert signs.labelled("drain_flushes") == {"rows": 1, "all": 1}
