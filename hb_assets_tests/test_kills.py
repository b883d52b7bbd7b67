"""Each named point (chaos.points) once: killed there, then recovered, and everything reconciles."""

from __future__ import annotations

import datetime as dt
import http.client
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import redis

from chaos import points
from chaos.points import Point
from hb_assets.buffer import depth, keys
from hb_assets.buffer.server import free_port
from hb_assets.buffer.watermark import watermarks
from hb_assets.core import days
from hb_assets.core.errors import HbError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory, minutes, recovery
from hb_assets.lake.compaction import pruning
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments, quarantine
from hb_assets.lake.integrity import known_faults
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain
from hb_assets_tests import victims
from hb_assets_tests.lake.deliveries import consolidated, line, raw, survivors
from hb_assets_tests.pipeline.test_drain import append, consuming, heartbeat, settled, users
from hb_assets_tests.servers import accepts, wait_for

pytestmark = pytest.mark.slow

VALKEY, BOTH = ("valkey",), ("valkey", "redis")
AT_THE_BUFFER = ("claimed", "before acknowledge", "after acknowledge")


def killed_at(process: str) -> pytest.MarkDecorator:
    """Every point of one kind of process; on both servers where the server has a part in it."""
    cases = [
        pytest.param(kind, point, id=f"{point.name}-{kind}")
        for point in points.of(process)
        for kind in (BOTH if point.name in AT_THE_BUFFER else VALKEY)
    ]
    return pytest.mark.parametrize(("redis_url", "point"), cases, indirect=["redis_url"])


def values(client: redis.Redis, lake: Lake, settings: Settings) -> dict[str, int]:
    return {one[0]: one[3] for one in settled(client, lake, settings)}


@killed_at("drain")
def test_drain(client: redis.Redis, settings: Settings, point: Point) -> None:
    append(client, settings, [*users(20), b"bad", heartbeat("u1", bpm=80)])
    client.xadd(keys.stream(1), {"data": b"\n".join([heartbeat("u1", bpm=90), b"{}"])})
    victims.kill_at(settings, point.key, "drain")
    lake = Lake.open(settings)
    with consuming(settings) as heir:
        done = drain(heir, lake, settings, until_empty=True)
    assert done.entries == (0 if point.name == "after acknowledge" else 2)
    assert values(client, lake, settings) == {f"u{n}": 75 for n in range(20)} | {"u1": 90}
    assert quarantine.summary(lake, settings).reasons == {
        "record_not_json": 1,
        "user_id_missing": 1,
    }
    rows = sum(inventory.day_state(lake, day, settings).rows for day in inventory.days(lake))
    assert rows == 22


@killed_at("consolidate")
def test_consolidate(client: redis.Redis, settings: Settings, point: Point) -> None:
    lake = Lake.open(settings)
    with consuming(settings) as consumer:
        append(client, settings, users(20))
        drain(consumer, lake, settings)
        [day] = inventory.days(lake)
        consolidate(lake, day, settings)
        minutes.build(lake, day, settings)
        append(client, settings, [heartbeat("u1", bpm=90), heartbeat("new")])
        drain(consumer, lake, settings)
    before = sorted(consolidated(lake, day))
    victims.kill_at(settings, point.key, "consolidate", "--all")
    after = sorted(consolidated(lake, day))
    whole = sorted(survivors(raw(lake, day)).values())
    if point.name in ("temp file made", "mid-consolidation", "before checks", "before publication"):
        assert after == before, "readers see the old files"
    else:
        assert set(after) <= {*before, *whole}, "readers see old files and new ones, all whole"
    assert audit(client, lake, settings, deep=True).differences == []
    expected = {f"u{n}": 75 for n in range(20)} | {"u1": 90, "new": 75}
    assert values(client, lake, settings) == expected
    minutes.build(lake, day, settings)
    assert inventory.day_state(lake, day, settings).minutes_current


@killed_at("prune")
def test_prune(client: redis.Redis, settings: Settings, point: Point) -> None:
    settings = settings.model_copy(update={"raw_keep": dt.timedelta(0)})
    lake = Lake.open(settings)
    with consuming(settings) as consumer:
        for bpm in (70, 71, 72):
            append(client, settings, [heartbeat(f"u{n}", bpm=bpm) for n in range(20)])
            drain(consumer, lake, settings)
    [day] = inventory.days(lake)
    consolidate(lake, day, settings, watermarks=watermarks(client, settings))
    before = sorted(consolidated(lake, day))
    assert len(fragments.all_listed(lake, day)) == 12
    victims.kill_at(settings, point.key, "prune")
    assert sorted(consolidated(lake, day)) == before
    assert audit(client, lake, settings, deep=True).differences == []
    pruned = pruning.prune(lake, settings)
    assert pruned.faults == ()
    assert fragments.all_listed(lake, day) == []
    with consuming(settings) as consumer:
        append(client, settings, [heartbeat("u1", bpm=90)])
        drain(consumer, lake, settings)
    consolidate(lake, day, settings)
    found = {one[0]: one[3] for one in consolidated(lake, day)}
    assert found == {f"u{n}": 72 for n in range(20)} | {"u1": 90}
    assert audit(client, lake, settings, deep=True).differences == []


def of_fragment(client: redis.Redis, lake: Lake, settings: Settings, day: dt.date) -> Path:
    """A pending fragment."""
    with consuming(settings) as consumer:
        append(client, settings, [heartbeat("u1", bpm=90), heartbeat("u1", bpm=91)])
        drain(consumer, lake, settings)
    return fragments.listed(lake, day, shard_of("u1", lake.shards))[-1].path


def of_consolidated(client: redis.Redis, lake: Lake, settings: Settings, day: dt.date) -> Path:
    """A consolidated file whose raw fragments were pruned."""
    consolidate(lake, day, settings, rewrite=True, watermarks=watermarks(client, settings))
    assert pruning.prune(lake, settings).fragments
    return layout.consolidated_file(lake.root, day, shard_of("u1", lake.shards))


RESOLVED = {
    of_fragment: {
        "consolidate": (("before set-aside's rename", 1), ("after set-aside's rename", 1)),
        "accept": (("before replacing", 1), ("after replacing", 1)),
        "restore": (
            ("before restore's link", 1),
            ("after restore's link", 1),
            ("before an acceptance is taken back", 1),
            ("after an acceptance is taken back", 1),
            ("before set-aside's rename", 1),  # of the damaged one, which goes for good
            ("after set-aside's rename", 1),
        ),
    },
    of_consolidated: {
        "accept": (
            ("before acceptance", 1),
            ("after acceptance", 1),
            ("before replacing", 2),
            ("after replacing", 2),
        ),
        "restore": (("before replacing", 1), ("after replacing", 1)),
    },
}
"""How damage is resolved, step by step, and the points (with the hit that is meant) of each."""


@pytest.mark.parametrize(
    ("redis_url", "harmed", "killed", "point", "hit"),
    [
        pytest.param("valkey", harmed, command, name, hit, id=f"{command}-{name}-{harmed.__name__}")
        for harmed, commands in RESOLVED.items()
        for command, met in commands.items()
        for name, hit in met
    ],
    indirect=["redis_url"],
)
def test_damaged(
    client: redis.Redis,
    settings: Settings,
    tmp_path: Path,
    harmed: Callable[[redis.Redis, Lake, Settings, dt.date], Path],
    killed: str,
    point: str,
    hit: int,
) -> None:
    """Killed at any step, then done again: in the end nothing is lost, or counted twice."""
    settings = settings.model_copy(update={"raw_keep": dt.timedelta(0)})
    lake = Lake.open(settings)
    with consuming(settings) as consumer:
        append(client, settings, users(20))
        drain(consumer, lake, settings)
    [day] = inventory.days(lake)
    consolidate(lake, day, settings)
    path = harmed(client, lake, settings, day)
    rows = audit(client, lake, settings).rows
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    path.write_bytes(copy.read_bytes()[:10] + b"\0\0" + copy.read_bytes()[12:])
    commands: dict[str, tuple[list[str], Callable[[], object]]] = {
        "consolidate": (["consolidate", "--all"], lambda: consolidate(lake, day, settings)),
        "accept": (
            ["damaged", "accept", str(path), "--yes"],
            lambda: recovery.accept(lake, path, settings, reason="", shortfall=lambda: 0),
        ),
        "restore": (
            ["damaged", "restore", str(copy)],
            lambda: recovery.restore(lake, copy, settings),
        ),
    }
    for command in RESOLVED[harmed]:
        arguments, again = commands[command]
        if command == killed:
            with victims.running(
                settings, *arguments, point=f"damaged/{point}", hit=hit
            ) as process:
                assert process.wait(timeout=60) == -signal.SIGKILL, victims.said(settings)
        with suppress(HbError):  # the killed one may have done all of it
            again()
        if command == "accept":
            found = audit(client, lake, settings)
            assert found.differences == []
            assert found.rows + found.written_off == rows
            assert found.written_off > 0
    assert known_faults.faults(lake) == []
    consolidate(lake, day, settings, watermarks=watermarks(client, settings)).require()
    bpm = 91 if harmed is of_fragment else 75
    values_found = {row[0]: row[3] for row in consolidated(lake, day)}
    assert values_found == {f"u{n}": 75 for n in range(20)} | {"u1": bpm}
    last = audit(client, lake, settings, deep=True)
    assert (last.differences, last.written_off, last.rows) == ([], 0, rows)


@contextmanager
def gateway(settings: Settings, **told: object) -> Iterator[None]:
    with victims.running(settings, "serve", **told) as process:
        wait_for(
            lambda: process.poll() is not None or accepts(settings.gateway_port), "the gateway"
        )
        assert process.poll() is None, victims.said(settings)
        yield
        if told:
            assert process.wait(timeout=60) == -signal.SIGKILL, victims.said(settings)
        else:
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=60) == 0, victims.said(settings)


def post(settings: Settings, lines: list[bytes]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", settings.gateway_port, timeout=20)
    try:
        connection.request("POST", "/metrics/heart-rate/batch", b"\n".join(lines))
        return connection.getresponse().status
    finally:
        connection.close()


@killed_at("gateway")
def test_gateway(client: redis.Redis, settings: Settings, point: Point) -> None:
    """The client has no answer and sends again; what was appended twice is there once."""
    settings = settings.model_copy(update={"gateway_port": free_port()})
    lake = Lake.open(settings)
    with gateway(settings, point=point.key), pytest.raises(ConnectionError):
        post(settings, users(10))
    with gateway(settings):
        assert post(settings, users(10)) == 200
    copies = 2 if point.name == "after append" else 1
    assert sum(one.heartbeats for one in depth.depths(client, settings).states) == 10 * copies
    with consuming(settings) as consumer:
        drain(consumer, lake, settings, until_empty=True)
    assert len(settled(client, lake, settings)) == 10
    [day] = inventory.days(lake)
    assert inventory.day_state(lake, day, settings).superseded == 10 * (copies - 1)


@pytest.mark.parametrize("redis_url", VALKEY, indirect=True)
@pytest.mark.parametrize("key", ["drain/claimed", "drain/before link", "drain/before acknowledge"])
def test_a_zombie_wakes_up(client: redis.Redis, settings: Settings, key: str) -> None:
    """Paused for longer than HB_CLAIM_MIN_IDLE; another one has taken over and done its work."""
    hasty = settings.model_copy(update={"claim_min_idle": dt.timedelta(milliseconds=50)})
    append(client, hasty, [*users(20), b"bad"])
    lake = Lake.open(hasty)
    with victims.paused_at(hasty, key, "drain") as zombie:
        with consuming(hasty) as heir:
            taken_over = drain(heir, lake, hasty, until_empty=True)
        assert (taken_over.rows, taken_over.quarantined) == (20, 1)
        for day in inventory.days(lake):
            consolidate(lake, day, hasty)
        victims.resume(zombie, hasty)
    assert len(settled(client, lake, hasty)) == 20
    assert sum(one.acknowledged for one in depth.depths(client, hasty).states) == 21
    assert quarantine.summary(lake, settings).reasons == {"record_not_json": 1}


@pytest.mark.parametrize("redis_url", VALKEY, indirect=True)
@pytest.mark.parametrize(
    "key",
    ["consolidate/temp file made", "consolidate/before checks", "consolidate/before publication"],
)
def test_a_consolidator_wakes_up_after_the_prune(
    client: redis.Redis, settings: Settings, key: str
) -> None:
    """Paused for longer than the grace period; what it had read, and what came since, is pruned."""
    settings = settings.model_copy(
        update={"raw_keep": dt.timedelta(0), "lock_wait": dt.timedelta(milliseconds=50)}
    )
    lake = Lake.open(settings)

    def arrive(*beats: bytes) -> None:
        append(client, settings, list(beats))
        with consuming(settings) as consumer:
            drain(consumer, lake, settings)

    arrive(*users(20))
    with victims.paused_at(settings, key, "consolidate", "--all") as zombie:
        arrive(heartbeat("u1", bpm=90), heartbeat("new"))
        [day] = inventory.days(lake)
        consolidate(lake, day, settings, watermarks=watermarks(client, settings))
        assert pruning.prune(lake, settings).faults == ()
        assert fragments.all_listed(lake, day) == []
        zombie.send_signal(signal.SIGCONT)
        assert zombie.wait(timeout=60) == 1, "it says that it was fenced off, and ends"
        assert "start again" in victims.said(settings)
    found = {one[0]: one[3] for one in consolidated(lake, day)}
    assert found == {f"u{n}": 75 for n in range(20)} | {"u1": 90, "new": 75}
    assert audit(client, lake, settings, deep=True).differences == []


@pytest.mark.parametrize("redis_url", VALKEY, indirect=True)
@pytest.mark.parametrize("hours", [-48, 48])
def test_a_drainer_whose_clock_is_wrong(
    client: redis.Redis, settings: Settings, hours: int
) -> None:
    """What is too far ahead is told by the entry's arrival; it refuses nothing, and all of that."""
    now = time.time_ns() // 1_000_000
    ahead = 20 * 3_600_000
    append(client, settings, [line("u1", at=now + ahead), line("u2", at=now + 2 * ahead)])
    with victims.running(settings, "drain", clock=hours * 3600) as process:
        assert process.wait(timeout=60) == 0, victims.said(settings)
    lake = Lake.open(settings)
    assert [one[0] for one in settled(client, lake, settings)] == ["u1"]
    assert quarantine.summary(lake, settings).reasons == {"timestamp_in_the_future": 1}
    assert inventory.days(lake) == [days.day_of(now + ahead)]


@pytest.mark.parametrize("redis_url", VALKEY, indirect=True)
def test_a_drainer_whose_clock_is_ahead_takes_nothing_from_the_living(
    client: redis.Redis, settings: Settings
) -> None:
    append(client, settings, users(3))
    with consuming(settings) as living:
        [held] = living.claim(100, 10_000)
        with victims.running(settings, "drain", clock=48 * 3600) as process:
            assert process.wait(timeout=60) == 0, victims.said(settings)
        assert living.acknowledge([(held, 3)]) == 1
