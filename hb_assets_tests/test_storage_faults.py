"""Full and broken disks, on each write path: nothing acknowledged, nothing half visible, then well.

A failed fsync is never tried again on the same file: the kernel forgets the pages that it couldn't
write, and a second fsync of them succeeds without having written anything.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq
import pytest
import redis

from hb_assets.buffer import durability
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.depth import depths, scanned
from hb_assets.buffer.producer import Producer
from hb_assets.core.errors import BufferUnavailableError, HbError
from hb_assets.core.settings import Settings, environment
from hb_assets.lake import minutes
from hb_assets.lake.compaction import pruning
from hb_assets.lake.compaction.consolidation import consolidate
from hb_assets.lake.files import fragments, quarantine, tombstones
from hb_assets.lake.files.tombstones import Tombstone
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit
from hb_assets.pipeline.drain import drain, drain_cycle
from hb_assets_tests.faults import Call, Fault, failing
from hb_assets_tests.lake.deliveries import DAY, NOON, consolidated, left_behind, line
from hb_assets_tests.servers import process_of, running_server, server_program, wait_for

pytestmark = pytest.mark.slow

USERS = 20


@pytest.fixture
def redis_url(server_urls: Callable[[str], str]) -> str:
    """One kind of server is enough for faults of the lake's disk."""
    url = server_urls("valkey")
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        client.flushall()
    return url


@dataclass
class Plant:
    """Buffer and lake with 20 heartbeats and two records that can't be used."""

    client: redis.Redis
    settings: Settings
    consumers: list[Consumer] = field(default_factory=list)

    @property
    def lake(self) -> Lake:
        return Lake.open(self.settings)

    def append(self) -> None:
        lines = [line(f"u{n}", at=NOON + n) for n in range(USERS)] + [b"bad", line(bpm=5)]
        assert Producer(self.client, self.settings).append({0: lines}) == {0: None}

    def drain(self) -> None:
        if not self.consumers:
            self.consumers.append(Consumer(self.client, self.settings))
            self.consumers[0].open()
        drain_cycle(self.consumers[0], self.lake, self.settings)

    def consolidate(self) -> None:
        consolidate(self.lake, DAY, self.settings).require()

    def minutes(self) -> None:
        minutes.build(self.lake, DAY, self.settings)

    def release(self) -> None:
        records = [one for one in quarantine.records(self.lake, self.settings) if not one.released]
        quarantine.release(self.lake, records)

    def acknowledged(self) -> int:
        return sum(state.acknowledged for state in depths(self.client, self.settings).states)


@pytest.fixture
def plant(client: redis.Redis, settings: Settings) -> Iterator[Plant]:
    # many failures in a row would make its entry a suspect, which is none of this module's matter
    made = Plant(client, settings.model_copy(update={"poison_deliveries": 99}))
    yield made
    for consumer in made.consumers:
        consumer.close()


STEPS: dict[str, Callable[[Plant], object]] = {
    "lake": lambda plant: plant.lake,
    "raw": Plant.drain,
    "quarantine": Plant.drain,
    "released": Plant.release,
    "heartbeats": Plant.consolidate,
    "minutes": Plant.minutes,
}
"""What writes to each part of the lake; each needs what the ones before it have done."""


Failing = tuple[Call | Literal["fsync name"], int]
FAULTS: list[Failing] = [
    ("create", errno.ENOSPC),
    ("write", errno.ENOSPC),
    ("write", errno.EIO),
    ("short write", errno.ENOSPC),
    ("fsync", errno.EIO),
    ("fsync", errno.ENOSPC),
    ("name", errno.ENOSPC),
    ("fsync folder", errno.EIO),
    ("fsync name", errno.EIO),
]
"""What fails, and how; "fsync name" is the folder's sync after the file has got its name."""

ALONE = ("fsync folder", "fsync name")
"""They need a folder that is new, or leave something behind."""
IN_TURN = [
    [one for one in FAULTS if one[0] not in ALONE],
    *([one] for one in FAULTS if one[0] in ALONE),
]
"""Those that leave everything as it was come one after the other."""


@pytest.mark.parametrize(
    ("part", "faults"),
    [(part, faults) for part in STEPS for faults in IN_TURN],
    ids=lambda value: value if isinstance(value, str) else value[-1][0],
)
def test_nothing_half_done_then_well(plant: Plant, part: str, faults: list[Failing]) -> None:
    plant.append()
    # quarantine is written by the drain, as raw is
    for earlier in [] if part == "quarantine" else list(STEPS)[: list(STEPS).index(part)]:
        STEPS[earlier](plant)
    root = plant.settings.lake_dir
    acknowledged = plant.acknowledged()

    for call, number in faults:
        # What has its name is there, though not for certain: what doesn't look again, finds it.
        named = call == "fsync name" or (part == "lake" and call == "fsync folder")
        for _ in range(1 if named else 2):
            faulty: Call = "fsync folder" if call == "fsync name" else call
            with (
                failing(faulty, number, place(root, part, call)) as fault,
                pytest.raises((HbError, OSError)) as raised,
            ):
                STEPS[part](plant)
            assert fault.hits, "the fault was met"
            assert_never_synced_again(fault)
            assert_one_clear_line(raised.value, number)
            assert left_behind(root) == []
            assert_whole(root)
            assert plant.acknowledged() == acknowledged, "nothing more is acknowledged"

    STEPS[part](plant)
    for later in list(STEPS)[list(STEPS).index(part) :]:
        STEPS[later](plant)
    assert plant.acknowledged() == USERS + 2
    assert len(consolidated(plant.lake)) == USERS
    assert sum(quarantine.summary(plant.lake, plant.settings).reasons.values()) == 2
    assert audit(plant.client, plant.lake, plant.settings, deep=True).differences == []
    assert left_behind(root) == []


ALL = dict.fromkeys(range(4), (2**64 - 1, 0))
"""Cutoffs and watermarks above whatever arrives here."""


def put_tombstone(plant: Plant) -> None:
    user = tombstones.hashed(plant.lake, "u1")
    tombstones.put(plant.lake, Tombstone(user=user, shard=0, cutoffs=ALL, asked_ms=0))


@pytest.mark.parametrize(
    ("part", "step", "faults"),
    [
        (part, step, faults)
        for part, step in (("tombstones", put_tombstone), ("erased", Plant.drain))
        for faults in IN_TURN
    ],
    ids=lambda value: (
        value[-1][0] if isinstance(value, list) else getattr(value, "__name__", value)
    ),
)
def test_forgetting(
    plant: Plant, part: str, step: Callable[[Plant], None], faults: list[Failing]
) -> None:
    """A tombstone that can't be written is none; what can't be withheld durably comes again."""
    plant.append()
    root = plant.lake.root
    if part == "erased":
        put_tombstone(plant)
    for call, number in faults:
        faulty: Call = "fsync folder" if call == "fsync name" else call
        where = f"{root}/{part}/day=" if (part, call) == ("erased", "fsync name") else None
        with (
            failing(faulty, number, where or place(root, part, faulty)) as fault,
            pytest.raises((HbError, OSError)) as raised,
        ):
            step(plant)
        assert fault.hits
        assert_never_synced_again(fault)
        assert_one_clear_line(raised.value, number)
        assert left_behind(root) == []
        assert plant.acknowledged() == 0
    put_tombstone(plant)
    plant.drain()
    assert plant.acknowledged() == USERS + 2
    plant.consolidate()
    assert "u1" not in {one[0] for one in consolidated(plant.lake)}
    assert audit(plant.client, plant.lake, plant.settings, deep=True).differences == []


@pytest.mark.parametrize("faults", IN_TURN, ids=lambda faults: faults[-1][0])
def test_pruning(plant: Plant, faults: list[Failing]) -> None:
    """Nothing is deleted before it is noted, durably, that raw isn't whole any more."""
    plant.append()
    plant.drain()
    consolidate(plant.lake, DAY, plant.settings, watermarks=ALL)
    soon = plant.settings.model_copy(update={"raw_keep": dt.timedelta(0)})
    before = len(fragments.all_listed(plant.lake, DAY))
    root = plant.lake.root
    for call, number in faults:
        faulty: Call = "fsync folder" if call == "fsync name" else call
        where = f"{root}/pruned/day=" if call == "fsync name" else place(root, "pruned", faulty)
        with failing(faulty, number, where) as fault:
            done = pruning.prune(plant.lake, soon)
        assert fault.hits
        assert len(done.faults) == before, "each shard says so"
        assert os.strerror(number) in done.faults[0]
        assert len(fragments.all_listed(plant.lake, DAY)) == before
        assert left_behind(root) == []
    assert pruning.prune(plant.lake, soon).fragments == before
    assert audit(plant.client, plant.lake, plant.settings, deep=True).differences == []


def place(root: Path, part: str, call: str) -> str:
    """What stands in the path that fails: temp files are named by the folder that they are for."""
    if part == "lake" and call in ("fsync folder", "fsync name"):
        return str(root)
    if call == "fsync folder":
        return f"{root}/{part}"
    if call == "fsync name":
        shards = part in ("raw", "heartbeats", "minutes")
        return f"{root}/{part}/day={DAY if shards else ''}{'/shard=' if shards else ''}"
    return f"{root}/tmp/{part}-"


def assert_never_synced_again(fault: Fault) -> None:
    if fault.call == "fsync":
        assert len(set(fault.hits)) == len(fault.hits), "a file that failed was tried again"
        assert not set(fault.hits) & set(fault.synced)


def assert_one_clear_line(error: BaseException, number: int) -> None:
    if isinstance(error, HbError):
        assert os.strerror(number) in str(error)
        assert "\n" not in str(error)
    else:
        assert isinstance(error, OSError)
        assert error.errno == number


def assert_whole(root: Path) -> None:
    """Whatever readers can see is a whole file."""
    for path in root.rglob("*.parquet"):
        pq.read_table(path, partitioning=None)


def test_a_limit_of_the_kernel(plant: Plant) -> None:
    """The same by a real kernel: `hb drain` may write no file over 1 KiB, then any."""
    plant.append()
    assert plant.lake.shards == 4

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))

    refused = hb_drain(plant.settings, limited)
    assert refused.returncode == 2, refused.stderr
    assert os.strerror(errno.EFBIG) in refused.stderr
    assert f"({plant.lake.root}/tmp/" in refused.stderr, "it says where"
    assert "Traceback" not in refused.stderr
    assert plant.acknowledged() == 0
    assert left_behind(plant.lake.root) == []
    assert_whole(plant.lake.root)

    done = hb_drain(plant.settings, lambda: None)
    assert done.returncode == 0, done.stderr
    plant.consolidate()
    assert len(consolidated(plant.lake)) == USERS
    assert audit(plant.client, plant.lake, plant.settings, deep=True).differences == []


def hb_drain(settings: Settings, before: Callable[[], None]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hb_assets", "drain", "--until-empty"],
        env=environment(settings) | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=before,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("kind", ["valkey", "redis"])
@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_the_append_only_file_has_no_room(tmp_path: Path, kind: str, fsync: str) -> None:
    """What was answered stays; with `always` the server ends itself, and its heir has it all."""
    folder = tmp_path / "server"
    folder.mkdir()
    options = ("--port", "{port}", "--appendfsync", fsync)
    mode = {"always": "fsync", "everysec": "memory"}[fsync]
    answered = 0
    with running_server(server_program(kind), folder, *options) as url:
        settings = Settings(home=tmp_path / "home", redis_url=url, shards=1, durability=mode)
        with contextlib.closing(connect(settings)) as client:
            pid = process_of(url)
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            producer = Producer(client, settings)

            def append() -> HbError | None:
                nonlocal answered
                lines = [line(f"u{answered + n}", at=NOON + n) for n in range(10)]
                [outcome] = producer.append({0: lines}).values()
                answered += 0 if outcome else len(lines)
                return outcome

            refused: list[HbError] = []
            wait_for(lambda: refused.extend(filter(None, [append()])) or bool(refused), "no room")
            assert answered > 0
            [error] = refused
            assert isinstance(error, BufferUnavailableError)
            assert "\n" not in str(error)
            if fsync == "everysec":
                fault = durability.standing(client, settings).fault
                assert "can't write its append-only file: is its disk full?" in str(fault)
                assert "can't write its file (its disk is full?)" in str(error)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (-1, -1))
                wait_for(lambda: append() is None, "room again")
                drain_all(client, settings, answered)
                return
    with running_server(server_program(kind), folder, *options) as url:
        heir = settings.model_copy(update={"redis_url": type(settings.redis_url)(url)})
        with contextlib.closing(connect(heir)) as client:
            drain_all(client, heir, answered)
            assert Producer(client, heir).append({0: [line()]}) == {0: None}


def drain_all(client: redis.Redis, settings: Settings, answered: int) -> None:
    """All that was answered is there; of what was refused, all or nothing of an append."""
    held = scanned(client, settings)[0]
    assert answered <= held <= answered + 10
    assert held % 10 == 0
    lake = Lake.open(settings)
    consumer = Consumer(client, settings)
    consumer.open()
    assert drain(consumer, lake, settings, until_empty=True).rows == held
    consumer.close()
    assert audit(client, lake, settings).differences == []
