"""The faults of the old system that README's table counts, one test each: the cure shows.

docs/reliability.md says what was taken out of the code to see each of them fail.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import redis

from chaos.buffer_server import BufferServer
from chaos.proxy import Proxy
from hb_assets.buffer import depth, keys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.producer import Producer
from hb_assets.core.errors import BufferFullError
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain
from hb_assets_tests import victims
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.pipeline.test_drain import (
    MIDNIGHT,
    append,
    consuming,
    heartbeat,
    settled,
    users,
)


@contextmanager
def embedded(settings: Settings) -> Iterator[BufferServer]:
    """The embedded server of this home, to be killed."""
    with closing(Proxy(str(settings.run_dir / "redis.sock"))) as proxy:
        server = BufferServer(settings, proxy)
        server.start()
        try:
            yield server
        finally:
            server.end()


def drained(settings: Settings, lake: Lake) -> int:
    """Drains what is there in this process; returns rows."""
    with consuming(settings) as consumer:
        return drain(consumer, lake, settings).rows


@VALKEY
def test_fault_01_batchers_race_on_one_file(client: redis.Redis, settings: Settings) -> None:
    """The slower of two writers of one day puts its file beside the other's, not over it."""
    free = settings.model_copy(update={"locks": "none"})
    lake = Lake.open(free)
    append(client, free, [heartbeat("u1", at=MIDNIGHT)])
    with victims.paused_at(free, "drain/before fsync", "drain") as slow:
        append(client, free, [heartbeat("u1", at=MIDNIGHT + 1)])
        assert drained(free, lake) == 1
        victims.resume(slow, free)
    assert len(settled(client, lake, free)) == 2

    append(client, free, [heartbeat("u1", at=MIDNIGHT + 2)])
    drained(free, lake)
    with victims.paused_at(free, "consolidate/before publication", "consolidate", "--all") as slow:
        append(client, free, [heartbeat("u1", at=MIDNIGHT + 3)])
        drained(free, lake)
        [day] = inventory.days(lake)
        consolidate(lake, day, free)
        victims.resume(slow, free)
    assert len(settled(client, lake, free)) == 4


def test_fault_02_buffer_without_a_limit_and_gone_when_redis_restarts(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", shards=4, buffer_max_heartbeats=400)
    lake = Lake.open(settings)
    with embedded(settings) as server, closing(connect(settings)) as client:
        producer = Producer(client, settings)
        assert producer.append({0: users(60)}) == {0: None}
        [refusal] = producer.append({0: users(60)}).values()
        assert isinstance(refusal, BufferFullError)
        assert refusal.retry_after > 0
        server.kill()
        assert [one.heartbeats for one in depth.depths(client, settings).states] == [60, 0, 0, 0]
        assert drained(settings, lake) == 60
        assert producer.append({0: users(60)}) == {0: None}


@VALKEY
def test_fault_03_records_removed_before_they_are_written(
    client: redis.Redis, settings: Settings
) -> None:
    append(client, settings, users(20))
    victims.kill_at(settings, "drain/decoded", "drain")
    assert client.xlen(keys.stream(0)) == 1
    lake = Lake.open(settings)
    assert inventory.days(lake) == []
    assert drained(settings, lake) == 20
    assert client.xlen(keys.stream(0)) == 0
    assert len(settled(client, lake, settings)) == 20


@VALKEY
def test_fault_05_one_batcher(client: redis.Redis, settings: Settings) -> None:
    """While one drainer holds its share, another does the rest, of one shard and of all."""
    small = settings.model_copy(update={"entry_max_heartbeats": 5, "drain_max_rows": 5})
    lake = Lake.open(small)
    for shard in (0, 0, 1, 2):
        append(client, small, users(5), shard)
    with victims.paused_at(small, "drain/claimed", "drain") as one:
        assert drained(small, lake) == 15
        assert sum(found.pending for found in depth.depths(client, small).states) == 1
        victims.resume(one, small)
    assert sum(found.acknowledged for found in depth.depths(client, small).states) == 20
    assert len(settled(client, lake, small)) == 5


@VALKEY
def test_fault_08_no_deduplication(client: redis.Redis, settings: Settings) -> None:
    """Of each key the latest arrival is there, and what it superseded is counted."""
    lake = Lake.open(settings)
    sent = [[75, 75, 80], [80], [75]]
    for values in sent:
        for bpm in values:
            append(client, settings, [heartbeat("u1", bpm=bpm), heartbeat("u2")])
        drained(settings, lake)
        [day] = inventory.days(lake)
        consolidate(lake, day, settings)
    assert {one[0]: one[3] for one in settled(client, lake, settings)} == {"u1": 75, "u2": 75}
    state = inventory.day_state(lake, day, settings)
    assert (state.rows, state.unique, state.repeats, state.corrections) == (10, 2, 6, 2)


@VALKEY
def test_fault_09_order_not_guaranteed(client: redis.Redis, settings: Settings) -> None:
    lake = Lake.open(settings)
    instants = list(range(300))
    random.Random(9).shuffle(instants)
    for start in range(0, 300, 60):
        lines = [heartbeat(f"u{n % 7}", at=MIDNIGHT + n) for n in instants[start : start + 60]]
        append(client, settings, lines)
        drained(settings, lake)
        [day] = inventory.days(lake)
        consolidate(lake, day, settings)
    files = sorted((lake.root / "heartbeats").rglob("*.parquet"))
    for file in files:
        rows = duckdb.sql(
            "SELECT user_id, timestamp, device_id FROM read_parquet($file)",
            params={"file": str(file)},
        ).fetchall()
        assert rows == sorted(rows)
    assert len(settled(client, lake, settings)) == 300


@VALKEY
def test_fault_10_no_transactions(client: redis.Redis, settings: Settings) -> None:
    """Whenever a writer dies, readers see whole files only, and all that was acknowledged."""
    lake = Lake.open(settings)
    append(client, settings, users(20))
    for key in ("drain/mid-write of a fragment", "drain/after link"):
        victims.kill_at(settings, key, "drain")
        assert all(pq.read_table(file).num_rows for file in lake.root.rglob("*.parquet"))
        assert audit(client, lake, settings, deep=True).differences == []
    assert drained(settings, lake) == 20
    [day] = inventory.days(lake)
    assert len(fragments.all_listed(lake, day)) > 4, "the first try's are there as well"
    for key in ("consolidate/mid-consolidation", "consolidate/after publication"):
        victims.kill_at(settings, key, "consolidate", "--all")
        assert all(pq.read_table(file).num_rows for file in lake.root.rglob("*.parquet"))
        assert audit(client, lake, settings, deep=True).differences == []
    assert len(settled(client, lake, settings)) == 20
