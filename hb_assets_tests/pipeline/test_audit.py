"""The audit, on a real server: it adds up after anything legal, and finds what isn't."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import msgspec
import pyarrow.parquet as pq
import pytest
import redis

from hb_assets.buffer import keys
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core import days
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import recovery
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments, quarantine
from hb_assets.lake.files.consolidated import ConsolidatedMetadata
from hb_assets.lake.storage import layout, parquet
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain, drain_cycle
from hb_assets_tests.lake.deliveries import DAY, NOON, line

SHARD = shard_of("u1", 4)


def append(client: redis.Redis, settings: Settings, lines: list[bytes], shard: int = SHARD) -> None:
    assert Producer(client, settings).append({shard: lines}) == {shard: None}


@pytest.fixture
def mixed(client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings) -> None:
    """Own and external entries, drained and consolidated and pending, quarantined and buffered."""
    append(client, settings, [line(), line(bpm=80), line("u2"), b"bad", line(bpm=5)])
    client.xadd(keys.stream(0), {"data": b"\n".join([line("u3"), b"bad", b"", line("u4")])})
    client.xadd(keys.stream(0), {"nothing": b"of ours"})
    drain(consumer, lake, settings)
    consolidate(lake, DAY, settings)
    append(client, settings, [line(at=NOON + 1)])
    drain(consumer, lake, settings)
    append(client, settings, [line(at=NOON + 2), b"bad"])


def test_nothing_at_all(client: redis.Redis, lake: Lake, settings: Settings) -> None:
    verdict = audit(client, lake, settings)
    assert verdict.adds_up
    assert (verdict.days, verdict.rows, verdict.buffer.appended) == ([], 0, 0)


def test_a_mix_adds_up(client: redis.Redis, lake: Lake, settings: Settings, mixed: None) -> None:
    verdict = audit(client, lake, settings, deep=True)
    assert verdict.differences == []
    side = verdict.buffer
    assert (side.appended, side.acknowledged, side.buffered, side.in_flight) == (12, 10, 2, 0)
    assert (verdict.rows, verdict.quarantined, verdict.released) == (6, 4, 0)
    [day] = verdict.days
    assert (day.rows, day.unique, day.superseded, day.pending) == (6, 4, 1, 1)


def test_records_put_back(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings, mixed: None
) -> None:
    found = list(quarantine.records(lake, settings))
    append(client, settings, [line("u9")])
    quarantine.release(lake, found[:1])
    drain(consumer, lake, settings)
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert verdict.released == 1


def test_claimed_and_durable_but_not_acknowledged(
    client: redis.Redis,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    mixed: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(consumer, "acknowledge", lambda _: 0)
    drain_cycle(consumer, lake, settings)
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert verdict.buffer.in_flight == 2
    monkeypatch.undo()
    drain(consumer, lake, settings, until_empty=True)
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert (verdict.rows, verdict.quarantined, verdict.buffer.in_flight) == (7, 5, 0)


def test_a_loss_that_a_person_accepted(
    client: redis.Redis, lake: Lake, settings: Settings, mixed: None
) -> None:
    """It is missing until then, and no more than that is written off."""
    [fragment] = fragments.listed(lake, DAY, SHARD)[-1:]  # the pending one
    content = bytearray(fragment.path.read_bytes())
    content[10] ^= 1
    fragment.path.write_bytes(content)
    consolidate(lake, DAY, settings)
    verdict = audit(client, lake, settings)
    assert (verdict.missing, verdict.written_off, verdict.adds_up) == (1, 0, False)
    recovery.accept(
        lake, fragment.path, settings, reason="disk 3", shortfall=lambda: pytest.fail("it tells")
    )
    verdict = audit(client, lake, settings)
    assert (verdict.missing, verdict.written_off, verdict.differences) == (0, 1, [])
    next((lake.root / layout.QUARANTINE).rglob("*.parquet")).unlink()
    verdict = audit(client, lake, settings)
    assert verdict.missing > 0
    assert verdict.written_off == 1


def delete_fragment(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    fragments.listed(lake, DAY, SHARD)[-1].path.unlink()  # the pending one


def tamper_count(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    path = layout.consolidated_file(lake.root, DAY, SHARD)
    metadata = parquet.metadata(path, ConsolidatedMetadata)
    rows = pq.read_table(path, partitioning=None)
    changed = {
        "rows": metadata.rows + 1,
        "superseded": metadata.superseded + 1,
        "repeats": metadata.repeats + 1,
    }
    parquet.write(path, rows, msgspec.structs.replace(metadata, **changed))


def set_back(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    client.hset(keys.ledger(SHARD), "acknowledged", 1)


def lose_ledger(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    client.delete(keys.ledger(SHARD))


def flush(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    client.flushall()


def delete_entry(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    found: Any = client.xrange(keys.stream(SHARD))
    client.xdel(keys.stream(SHARD), found[0][0])


def delete_quarantine(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    next((lake.root / layout.QUARANTINE).rglob("*.parquet")).unlink()


def cut_consolidated(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    layout.consolidated_file(lake.root, DAY, SHARD).write_bytes(b"PAR1")


@pytest.mark.parametrize(
    ("harm", "difference"),
    [
        (delete_fragment, "1 heartbeats are missing: 10 were acknowledged"),
        (tamper_count, "distinct rows lie in the listed fragments"),
        (set_back, "but 2 lie in the stream"),
        (lose_ledger, "Redis was set back by 8 that it had confirmed"),
        (flush, "more than this buffer ever acknowledged"),
        (delete_entry, "but 0 lie in the stream instead of 2"),
        (delete_quarantine, "heartbeats are missing"),
        (cut_consolidated, "is damaged"),
    ],
)
def test_finds(
    client: redis.Redis,
    lake: Lake,
    settings: Settings,
    mixed: None,
    harm: Callable[[Lake, redis.Redis, Settings], None],
    difference: str,
) -> None:
    harm(lake, client, settings)
    verdict = audit(client, lake, settings)
    assert not verdict.adds_up
    assert any(difference in found for found in verdict.differences), verdict.differences
    assert all("u1" not in found and "\n" not in found for found in verdict.differences)


def test_while_traffic_goes_on(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    """No false alarm while appends, drains and consolidations go on."""
    stop = threading.Event()

    def traffic() -> None:
        own = connect(settings)
        n = 0
        while not stop.is_set():
            n += 1
            texts = [line(f"u{n % 5}", at=NOON + n), b"bad"]
            assert Producer(own, settings).append({n % 4: texts}) == {n % 4: None}
        own.close()

    with ThreadPoolExecutor(2) as pool:
        running: list[Future[Any]] = [
            pool.submit(traffic),
            pool.submit(drain, consumer, lake, settings, follow=True, stop=stop.is_set),
        ]
        try:
            for _ in range(3):
                assert audit(client, lake, settings).differences == []
        finally:
            stop.set()
        for one in running:
            one.result()
    drain(consumer, lake, settings, until_empty=True)
    assert audit(client, lake, settings).differences == []


def test_a_record_is_counted_by_the_day_of_its_timestamp(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    next_day = days.end_ms(DAY)
    append(client, settings, [json.dumps(json.loads(line(at=next_day))).encode(), line()])
    drain(consumer, lake, settings)
    assert [(one.day, one.rows) for one in audit(client, lake, settings).days] == [
        (DAY, 1),
        (days.day_of(next_day), 1),
    ]


def test_a_foreign_entry_that_is_published_and_not_acknowledged_yet(
    client: redis.Redis, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No ledger has it, and the lake does: its lines are in flight until somebody drains it."""
    lake = Lake.open(settings)
    client.xadd(keys.stream(0), {"data": b"\n".join([line(), line(at=NOON + 1)])})
    dying = Consumer(client, settings)
    dying.open()
    monkeypatch.setattr(dying, "acknowledge", lambda _: 0)
    drain_cycle(dying, lake, settings)
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert verdict.buffer.in_flight == 2


def test_a_foreign_entry_that_lies_about_its_lines(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    """Its n is none of ours: believed, it would break the ledger, and the bound, for good."""
    client.xadd(keys.stream(0), {"data": line(), "n": 999_999_999})
    drain(consumer, lake, settings)
    verdict = audit(client, lake, settings)
    assert verdict.differences == []
    assert verdict.buffer.acknowledged == 1


def test_entries_deleted_while_pending_are_named(
    client: redis.Redis, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    append(client, settings, [line()])
    client.xadd(keys.stream(SHARD), {"data": line("u2")})
    for entry in consumer.claim(100, 10**6):
        client.xdel(keys.stream(SHARD), entry.id)
    drain(consumer, lake, settings)
    assert "data loss: 2 entries of shard" in audit(client, lake, settings).differences[0]
