"""A server at its maxmemory: refused, nothing lost, and draining makes room again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from hb_assets.buffer import keys
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.depth import depths, losses
from hb_assets.buffer.producer import Producer
from hb_assets.core.errors import BufferFullError
from hb_assets.core.settings import Settings
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain
from hb_assets.pipeline.importing.importer import Importer
from hb_assets_tests.gateway.conftest import PATH, heartbeat, running
from hb_assets_tests.lake.deliveries import DAY, NOON, consolidated, line
from hb_assets_tests.servers import wait_for

pytestmark = pytest.mark.slow

ROOM = 2 * 2**20


@pytest.fixture
def full(client: redis.Redis) -> Iterator[redis.Redis]:
    """A client of a server with a little room, that never evicts."""
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", client.info("memory")["used_memory"] + ROOM)
    yield client
    client.config_set("maxmemory", 0)


def fill(client: redis.Redis, settings: Settings) -> int:
    """Append until the server is full; how many heartbeats were taken."""
    producer, taken = Producer(client, settings), 0
    while True:
        lines = [line(f"u{taken + n}", at=NOON + n) for n in range(500)]
        [outcome] = producer.append({0: lines}).values()
        if outcome is not None:
            assert isinstance(outcome, BufferFullError)
            assert "out of memory (its maxmemory)" in str(outcome)
            # not only just full: what comes and goes with a connection makes no room
            limit = int(client.config_get("maxmemory")["maxmemory"])
            client.config_set("maxmemory", limit - ROOM // 4)
            return taken
        taken += len(lines)
        assert taken < 200_000, "never full"


@pytest.mark.parametrize("flushed", [False, True])
def test_what_was_taken_is_drained_and_makes_room(
    full: redis.Redis, lake: Lake, settings: Settings, flushed: bool
) -> None:
    """A new drain: it opens its consumer, claims and acknowledges while nothing may be added."""
    taken = fill(full, settings)
    if flushed:
        full.script_flush()
    consumer = Consumer(full, settings)
    consumer.open()
    assert drain(consumer, lake, settings, until_empty=True).rows == taken

    assert Producer(full, settings).append({0: [line("late")]}) == {0: None}

    assert drain(consumer, lake, settings, until_empty=True).rows == 1
    consumer.close()
    consolidate(lake, DAY, settings)
    assert len(consolidated(lake)) == taken + 1
    assert audit(full, lake, settings, deep=True).differences == []


def test_the_gateway_refuses_and_takes_again(
    full: redis.Redis, lake: Lake, settings: Settings
) -> None:
    with running(settings) as http:
        taken = fill(full, settings)
        refused = http.post(PATH, json=heartbeat())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert http.get("/health").status_code == 200
        consumer = Consumer(full, settings)
        consumer.open()
        assert drain(consumer, lake, settings, until_empty=True).rows == taken
        assert http.post(PATH, json=heartbeat()).status_code == 200
        consumer.close()


def test_an_import_waits_for_room(
    full: redis.Redis, lake: Lake, settings: Settings, tmp_path: Path
) -> None:
    taken = fill(full, settings)
    file = tmp_path / "some.ndjson"
    file.write_bytes(b"\n".join(line(f"v{n}") for n in range(100)))
    consumer = Consumer(full, settings)
    consumer.open()
    rows = []
    importer = Importer(
        Producer(full, settings),
        settings,
        make_room=lambda: rows.append(drain(consumer, lake, settings).rows),
    )
    done = importer.run(file)
    assert (done.accepted, done.refused) == (100, 0)
    assert rows == [taken]
    assert done.waited > 0
    consumer.close()


def test_an_import_waits_for_a_drain_elsewhere(
    client: redis.Redis, lake: Lake, settings: Settings, tmp_path: Path
) -> None:
    tight = settings.model_copy(update={"buffer_max_heartbeats": 4 * 20})
    file = tmp_path / "some.ndjson"
    file.write_bytes(b"\n".join(line("u1", at=NOON + n) for n in range(50)))
    consumer = Consumer(client, tight)
    consumer.open()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(Importer(Producer(client, tight), tight).run, file)
        wait_for(
            lambda: sum(one.heartbeats for one in depths(client, tight).states) == 20,
            "it to be full",
        )
        assert not running.done()
        wait_for(lambda: drain(consumer, lake, tight).empty and running.done(), "the import")
        done = running.result()
    drain(consumer, lake, tight, until_empty=True)
    assert (done.accepted, done.waited > 0) == (50, True)
    assert audit(client, lake, tight).differences == []
    consumer.close()


def test_nothing_that_is_unread_is_ever_trimmed(
    client: redis.Redis, lake: Lake, settings: Settings
) -> None:
    """Far over the bound, by a producer that nothing holds off: all of it stays until read."""
    tight = settings.model_copy(
        update={"buffer_max_heartbeats": 40, "buffer_max_bytes": 4096, "drain_max_rows": 50}
    )
    for n in range(1000):
        client.xadd(keys.stream(n % 4), {"data": line(f"u{n}")})
    producer = Producer(client, tight)
    own = sum(
        outcome is None
        for n in range(100)
        for outcome in producer.append({n % 4: [line(f"own{n}")]}).values()
    )
    assert own == 40
    assert sum(state.entries for state in depths(client, tight).states) == 1040
    consumer = Consumer(client, tight)
    consumer.open()
    assert drain(consumer, lake, tight, until_empty=True).rows == 1040
    assert losses(depths(client, tight).states) == []
    assert audit(client, lake, tight).differences == []
    consumer.close()


def test_ids_never_go_back_when_the_clock_does(
    client: redis.Redis, lake: Lake, settings: Settings
) -> None:
    """What a clock that was two hours ahead leaves behind: later arrivals still come later."""
    seconds, _ = client.time()
    ahead = seconds * 1000 + 2 * 3_600_000
    client.xadd(keys.stream(0), {"data": line(bpm=60)}, id=f"{ahead}-0")
    producer = Producer(client, settings)
    for bpm in (70, 80):
        assert producer.append({0: [line(bpm=bpm)]}) == {0: None}
    consumer = Consumer(client, settings)
    consumer.open()
    assert drain(consumer, lake, settings, until_empty=True).rows == 3
    consolidate(lake, DAY, settings)
    [(_, _, _, bpm, identity)] = consolidated(lake)
    assert bpm == 80
    assert identity[:2] == (ahead, 2)
    assert audit(client, lake, settings, deep=True).differences == []
    consumer.close()
