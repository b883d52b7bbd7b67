"""Erasure: nothing of the user is left, everything of the others is, and it still adds up."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
import redis

from hb_assets.buffer import append_only_file, connection, external, keys, server
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.producer import Producer
from hb_assets.core.errors import BufferUnavailableError, FencedError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import erasure as in_lake
from hb_assets.lake import ledger, minutes
from hb_assets.lake.compaction import consolidation, pruning
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.erasure import Whose
from hb_assets.lake.files import erased, fragments, quarantine, tombstones
from hb_assets.lake.ingest.decode import decode
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import erasure
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.drain import drain
from hb_assets.pipeline.erasure import Forgotten, forget
from hb_assets_tests.lake.deliveries import DAY, NOON, entry, line, minute_points

pytestmark = pytest.mark.slow

USER, OTHER = "Zoë-1234", "Zoë-12345"
NEXT = NOON + 86_400_000


def put(client: redis.Redis, settings: Settings, *lines: bytes, user: str = USER) -> None:
    shard = shard_of(user, settings.shards)
    assert Producer(client, settings).append({shard: list(lines)}) == {shard: None}


@pytest.fixture
def redis_url(server_urls: Callable[[str], str]) -> str:
    """One kind of server is enough: what is asked of it is tested on both (`buffer/`)."""
    url = server_urls("valkey")
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushall()
    return url


class House:
    """A buffer and a lake with heartbeats of two users in every place."""

    def __init__(self, client: redis.Redis, settings: Settings) -> None:
        self.client, self.settings = client, settings
        self.lake = Lake.open(settings)
        self.consumer = Consumer(client, settings)
        self.consumer.open()

    def fill(self) -> None:
        for user in (USER, OTHER):
            put(self.client, self.settings, line(user), line(user, bpm=76), user=user)
            put(self.client, self.settings, line(user, at=NEXT), user=user)
            put(self.client, self.settings, line(user, bpm=0), user=user)  # refused
        half = f'{{"user_id": "{USER}", "device_id'.encode()
        external.append(self.client, 0, b"\n".join([half, line(OTHER, at=NOON + 5)]))
        self.drain()
        self.consolidate()
        for user in (USER, OTHER):
            put(self.client, self.settings, line(user, at=NOON + 1), user=user)
        self.drain()  # pending fragments
        for user in (USER, OTHER):
            put(self.client, self.settings, line(user, at=NOON + 2), user=user)  # buffered

    def drain(self) -> None:
        drain(self.consumer, self.lake, self.settings, until_empty=True)

    def consolidate(self) -> None:
        for day in (DAY, DAY + timedelta(days=1)):
            with coordinated(self.lake, self.settings, start_server=False) as known:
                consolidate(
                    self.lake, day, self.settings, watermarks=known.watermarks, lock=known.lock
                )
            minutes.build(self.lake, day, self.settings)

    def forget(self, spool: Callable[..., int] = lambda _: 0) -> Forgotten:
        with coordinated(self.lake, self.settings, start_server=False) as known:
            return forget(USER, self.client, self.consumer, self.lake, self.settings, known, spool)

    def assert_forgotten(self) -> None:
        """Looked at with DuckDB, file by file, and byte by byte."""
        others = 0
        for path in self.lake.root.rglob("*.parquet"):
            rows = duckdb.sql(f"FROM read_parquet('{path}', hive_partitioning = false)").fetchall()
            text = repr(rows)
            assert not re.search(r"Zoë-1234\b|Zo\\xc3\\xab-1234\b", text), path
            others += text.count("1234")
        assert others > 8
        for path in self.settings.home_dir.rglob("*"):
            if path.is_file():
                assert f'"{USER}"'.encode() not in path.read_bytes(), path

    def assert_adds_up(self) -> None:
        assert audit(self.client, self.lake, self.settings, deep=True).differences == []

    def minutes_of(self, user: str) -> int:
        return len(minute_points(self.lake, user, NOON, NEXT + 60_000, None, self.settings))


@pytest.fixture
def house(client: redis.Redis, settings: Settings) -> Iterator[House]:
    # tests that hold a lock and wait in the same process would wait for themselves
    made = House(client, settings.model_copy(update={"lock_wait": timedelta(seconds=1)}))
    with contextlib.closing(made.consumer):
        yield made


def test_everything_of_the_user_goes_and_all_else_stays(house: House) -> None:
    house.fill()
    spoken = [line(USER), line(OTHER), b"nobody's"]
    kept: list[bytes] = []

    def spool(keep: Callable[[bytes], bool]) -> int:
        kept.extend(one for one in spoken if keep(one))
        return len(spoken) - len(kept)

    done = house.forget(spool)
    assert done.left == []
    assert (done.rows, done.buffered, done.quarantined, done.spooled) == (3, 1, 2, 1)
    assert done.days == 2
    assert done.fragments > 0
    assert kept == spoken[1:]
    house.drain()
    house.assert_forgotten()
    house.assert_adds_up()
    house.consolidate()
    house.assert_adds_up()
    assert house.minutes_of(USER) == 0
    assert house.minutes_of(OTHER) == 2
    standing = tombstones.of_user(house.lake, USER)
    assert standing is not None
    assert standing.finished
    assert USER not in standing.user


def test_later_heartbeats_are_welcome_and_may_be_forgotten_again(house: House) -> None:
    house.fill()
    house.forget()
    put(house.client, house.settings, line(USER, at=NOON, bpm=99))
    house.drain()
    assert house.minutes_of(USER) == 1
    house.consolidate()
    assert house.minutes_of(USER) == 1
    house.assert_adds_up()
    again = house.forget()
    assert (again.left, again.rows) == ([], 1)
    house.drain()
    house.assert_forgotten()
    house.assert_adds_up()


def test_who_was_never_there(house: House) -> None:
    done = house.forget()
    assert done.left == []
    assert (done.rows, done.fragments, done.days) == (0, 0, 0)


STEPS: list[tuple[Any, str]] = [
    (erasure, "_drain_past"),
    (in_lake, "forget_quarantine"),
    (erased, "publish"),
    (quarantine, "publish"),
    (Path, "unlink"),
    (in_lake, "forget_day"),
    (consolidation, "merged"),
    (pruning, "fence"),
    (minutes, "build"),
    (in_lake, "sweep_temp"),
    (append_only_file, "rewrite"),
]
ENDS = ("merged", "forget_day", "rewrite")
"""Right after any other is, all but the same, right before the next: `make test-long` does both."""


@pytest.mark.parametrize(
    ("place", "name", "after"),
    [
        pytest.param(
            *(place, name, after),
            id=f"{'after' if after else 'before'}-{place.__name__}-{name}",
            marks=pytest.mark.thorough if after and name not in ENDS else (),
        )
        for place, name in STEPS
        for after in (False, True)
    ],
)
def test_a_crash_at_any_step_is_gone_on_from(
    house: House, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, after: bool
) -> None:
    house.fill()
    original = getattr(place, name)

    def die(*arguments: Any, **named: Any) -> Any:
        if place is Path and "quarantine" not in arguments[0].parts:
            return original(*arguments, **named)
        if after:
            monkeypatch.undo()
            original(*arguments, **named)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(place, name, die)
        with pytest.raises(SystemExit):
            house.forget()
    monkeypatch.undo()
    put(house.client, house.settings, line(USER, at=NOON + 120_000))
    assert house.minutes_of(USER) == 0, "readers pass over what is forgotten from the first step"
    done = house.forget()
    assert done.left == []
    house.drain()
    assert house.minutes_of(USER) == 1, "what came after the first request is welcome"
    house.assert_adds_up()
    house.consolidate()
    house.assert_adds_up()


def test_a_drain_that_slept_brings_nothing_back(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoded before the tombstone stood, published after all was done."""
    house.fill()
    sleeping = Consumer(house.client, house.settings, name="elsewhere:1:1:00")
    sleeping.open()
    entries = sleeping.claim(100, 10**6)
    decoded = decode(entries, house.settings)
    other = Consumer(house.client, house.settings)
    other.open()
    monkeypatch.setattr(other, "_min_idle_ms", 0)
    drain(other, house.lake, house.settings, until_empty=True)
    assert house.forget().left == []
    fragments.publish(house.lake, decoded.rows)
    assert sleeping.acknowledge(list(zip(entries, decoded.counts, strict=True))) == 0
    assert house.minutes_of(USER) == 0
    house.assert_adds_up()
    house.consolidate()
    assert house.minutes_of(USER) == 0
    house.assert_adds_up()
    assert house.forget().left == [], "asked again, the bytes that it brought go as well"
    house.assert_forgotten()
    house.assert_adds_up()


def test_a_drain_that_slept_through_the_first_consolidation(house: House) -> None:
    """The row was withheld, and counted, before its day had any file."""
    sleeping = Consumer(house.client, house.settings, name="elsewhere:1:1:00")
    sleeping.open()
    put(house.client, house.settings, line(USER), line(USER, bpm=70))
    entries = sleeping.claim(100, 10**6)
    decoded = decode(entries, house.settings)
    house.consumer._min_idle_ms = 0
    done = house.forget()
    assert (done.left, done.buffered) == ([], 2)
    fragments.publish(house.lake, decoded.rows)
    house.assert_adds_up()
    put(house.client, house.settings, line(OTHER), user=OTHER)
    house.drain()
    house.consolidate()
    house.assert_adds_up()
    assert house.minutes_of(USER) == 0
    assert house.forget().left == []
    house.assert_adds_up()


def test_a_neighbour_that_lies_in_quarantine_too_stops_nothing(house: House) -> None:
    """Decoded once, refused the next time: one heartbeat, before and after."""
    neighbour = next(f"n{n}" for n in range(99) if shard_of(f"n{n}", 4) == shard_of(USER, 4))
    decoded = decode([entry([line(USER), line(neighbour)], 3)], house.settings)
    fragments.publish(house.lake, decoded.rows)
    stricter = house.settings.model_copy(update={"start_date": DAY + timedelta(days=1)})
    refused = decode([entry([line(USER), line(neighbour)], 3)], stricter)
    quarantine.publish(house.lake, refused.rejected)
    house.consolidate()
    before = ledger.of_quarantine(house.lake, house.settings)
    assert (before.records, before.in_fragments) == (2, 2)
    assert house.forget().left == []
    after = ledger.of_quarantine(house.lake, house.settings)
    assert (after.records, after.in_fragments) == (0, 0)
    assert ledger.of_erased(house.lake, house.settings) == 0
    [day] = ledger.of_days(house.lake, house.settings, deep=True)
    assert (day.rows, day.unique, day.erased, day.faults) == (2, 1, 1, [])


def test_it_ends_while_heartbeats_keep_coming(house: House) -> None:
    house.fill()
    stop = threading.Event()

    def feed() -> None:
        with contextlib.closing(connection.connect(house.settings)) as client:
            while not stop.is_set():
                put(client, house.settings, line(OTHER, at=NOON + 7), user=OTHER)

    with ThreadPoolExecutor(1) as pool:
        feeding = pool.submit(feed)
        try:
            done = house.forget()
        finally:
            stop.set()
        feeding.result()
    assert done.left == []
    house.drain()
    house.assert_adds_up()


def test_what_came_by_an_older_redis_goes_too(house: House) -> None:
    """Its clock was ahead, so that the present one's ids lie below."""
    ahead = int(time.time() * 1000) + 3_600_000
    decoded = decode([entry([line(USER), line(OTHER)], ms=ahead)], house.settings)
    fragments.publish(house.lake, decoded.rows)
    done = house.forget()
    assert (done.left, done.rows) == ([], 1)
    assert house.minutes_of(USER) == 0
    assert house.minutes_of(OTHER) == 1


def test_ids_that_are_ahead_elsewhere_take_nothing_that_comes_later(house: House) -> None:
    ahead = int(time.time() * 1000) + 3_600_000
    other_shard = (shard_of(USER, house.settings.shards) + 1) % house.settings.shards
    house.client.xadd(keys.stream(other_shard), {"data": line(OTHER)}, id=f"{ahead}-0")
    house.forget()
    put(house.client, house.settings, line(USER))
    house.drain()
    assert house.minutes_of(USER) == 1


@pytest.mark.parametrize("where", ["merged", "_figures"])
def test_a_consolidator_that_slept_publishes_nobody_who_was_forgotten(
    house: House, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    house.fill()
    original = getattr(consolidation, where)
    came: list[object] = []

    def asleep(*arguments: Any, **named: Any) -> Any:
        monkeypatch.setattr(consolidation, where, original)
        try:
            came.append(house.forget().left)
        except BaseException as error:
            came.append(error)  # here it would be one more shard that fails
            raise
        return original(*arguments, **named)

    monkeypatch.setattr(consolidation, where, asleep)
    with contextlib.suppress(FencedError):
        house.consolidate()
    assert came == [[]]
    house.drain()
    house.assert_forgotten()
    house.assert_adds_up()


def test_what_came_after_an_unfinished_request_needs_another(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.fill()
    with monkeypatch.context() as patch:
        patch.setattr(append_only_file, "rewrite", lambda _: exit(1))
        with pytest.raises(SystemExit):
            house.forget()
    put(house.client, house.settings, line(USER))
    house.drain()
    resumed = house.forget()
    assert resumed.resumed_ms is not None
    assert house.minutes_of(USER) == 1
    again = house.forget()
    assert again.resumed_ms is None
    assert house.minutes_of(USER) == 0


def test_a_server_that_forbids_it_is_told(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.fill()

    def forbidden(_: object) -> bool:
        raise BufferUnavailableError("Redis refuses")

    monkeypatch.setattr(append_only_file, "rewrite", forbidden)
    [said] = house.forget().left
    assert "append-only file may hold" in said


def test_newer_heartbeats_keep_only_the_servers_log_from_the_scan(house: House) -> None:
    house.fill()
    left_over = house.settings.home_dir / "logs" / "old.log"
    left_over.parent.mkdir(parents=True, exist_ok=True)
    left_over.write_text(f'{{"user_id": "{USER}"}}')
    put(house.client, house.settings, line(OTHER, device=USER), user=OTHER)
    house.consumer.claim(100, 10**6)
    busy = Consumer(house.client, house.settings, name="elsewhere:1:1:00")
    busy.open()
    put(house.client, house.settings, line(OTHER, device=USER), user=OTHER)
    whose = Whose(USER, {})
    [said] = erasure._left(whose, house.lake, house.settings, newer=True)
    assert str(left_over) in said


def test_entries_that_another_drainer_keeps_are_told(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.fill()
    asleep = Consumer(house.client, house.settings, name="elsewhere:1:1:00")
    asleep.open()
    assert asleep.claim(100, 10**6)
    monkeypatch.setattr(erasure, "_PATIENCE_SECONDS", -60.0)
    with pytest.raises(BufferUnavailableError, match="stay with another drainer"):
        house.forget()


def test_damaged_files_are_told(house: House) -> None:
    house.fill()
    path = house.lake.root / "damaged" / "raw" / "part.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"?")
    done = house.forget()
    [said] = done.left
    assert str(path) in said
    path.unlink()
    assert house.forget().left == []


def test_nothing_is_left_in_the_embedded_servers_log(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home", shards=4)
    with (
        server.borrowed(settings),
        contextlib.closing(connection.connect(settings)) as client,
    ):
        house = House(client, settings)
        with contextlib.closing(house.consumer):
            house.fill()
            logged = b"".join(p.read_bytes() for p in settings.redis_dir.rglob("*.aof"))
            assert f'"{USER}"'.encode() in logged
            done = house.forget()
            assert done.left == []
            assert done.log_rewritten
            house.drain()
            house.assert_forgotten()


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        (b'{"user_id":"Zo\\u00eb-1234","x":1}', True),
        ('{"user_id": "Zoë-1234"}'.encode(), True),
        ('{"user_id": "Zoë-12345", "device_id": "Zoë-1234"}'.encode(), False),
        ('{"user_id": "Zoë-1234", "devi'.encode(), True),
        ('{"user_id": "Zoë-12345", "devi'.encode(), False),
        (b"\xff", False),
        ('["Zoë-1234"]'.encode(), True),
    ],
)
def test_which_records_speak_of_the_user(text: bytes, spoken: bool) -> None:
    assert Whose(USER, {}).said_in(text) == spoken
