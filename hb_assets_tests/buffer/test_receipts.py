"""Receipts: a ledger that has less than Redis once confirmed is found out, to the heartbeat."""

from __future__ import annotations

import fcntl
import logging
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from hb_assets.buffer import keys
from hb_assets.buffer.depth import depths
from hb_assets.buffer.producer import Producer
from hb_assets.buffer.receipts import Receipts
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings
from hb_assets_tests.lake.deliveries import line


def ledger(client: redis.Redis, settings: Settings) -> list[tuple[int, int, int]]:
    return [
        (one.appended, one.acknowledged, one.heartbeats) for one in depths(client, settings).states
    ]


def test_every_append_gets_its_receipt(client: redis.Redis, settings: Settings) -> None:
    producer = Producer(client, settings)
    producer.append({0: [line()] * 3, 2: [line()]})
    producer.append({0: [line()] * 2})
    assert Receipts(settings).known() == [5, 0, 1, 0]


def test_a_refused_append_gets_none(client: redis.Redis, settings: Settings) -> None:
    tight = settings.model_copy(update={"buffer_max_heartbeats": 8})
    assert Producer(client, tight).append({0: [line()] * 3})[0] is not None
    assert Receipts(settings).known()[0] == 0


def test_a_ledger_that_was_set_back(
    client: redis.Redis, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    """What is gone counts on both sides, once, and the buffer's bound stays right."""
    producer = Producer(client, settings)
    producer.append({0: [line()] * 5})
    client.delete(keys.stream(0))
    client.hset(keys.ledger(0), mapping={"appended": 2, "acknowledged": 2})
    with caplog.at_level(logging.ERROR):
        producer.append({0: [line()] * 4})
    assert "3 heartbeats that it had confirmed are no longer in shard 00" in caplog.text
    assert ledger(client, settings)[0] == (9, 5, 4)
    caplog.clear()
    producer.append({0: [line()]})
    assert ledger(client, settings)[0] == (10, 5, 5)
    assert not caplog.records


def test_many_at_once_keep_the_highest(settings: Settings) -> None:
    program = (
        "import sys\n"
        "from hb_assets.buffer.receipts import Receipts\n"
        "from hb_assets.core.settings import load\n"
        "receipts = Receipts(load(home=sys.argv[1], shards=4))\n"
        "for count in range(int(sys.argv[2]), 4000, 3): receipts.enter({1: count})\n"
    )
    own = Receipts(settings)
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(settings.home_dir), str(first)])
        for first in (0, 1)
    ]
    barrier = threading.Barrier(2)

    def enter(step: int) -> None:
        barrier.wait()
        for count in range(2 + step, 4000, 6):
            own.enter({1: count})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(enter, (0, 3)))
    assert [process.wait(timeout=60) for process in processes] == [0, 0]
    assert own.known() == [0, 3999, 0, 0]


def test_a_home_that_cannot_be_written(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match=r"HB_HOME: can't write to .*receipts"):
        Receipts(settings.model_copy(update={"home": tmp_path / "file"}))


def test_a_stopped_process_that_holds_the_lock_stops_nobody(
    settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    receipts = Receipts(settings)
    with (settings.home_dir / "receipts").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for count in (3, 4):
            receipts.enter({1: count})
        assert receipts.known()[1] == 4
        assert Receipts(settings).known()[1] == 0
        assert len(caplog.records) == 1
    receipts.enter({1: 2})
    assert Receipts(settings).known()[1] == 4


def test_a_full_disk_leaves_the_receipt_behind_and_ends_nobody(settings: Settings) -> None:
    program = (
        "import resource, signal, sys\n"
        "from hb_assets.buffer.receipts import Receipts\n"
        "from hb_assets.core.settings import load\n"
        "receipts = Receipts(load(home=sys.argv[1], shards=4))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))\n"
        "receipts.enter({1: 7})\n"
        "print(receipts.known()[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(settings.home_dir)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "7\n"), done.stderr
    assert "receipts is behind" in done.stderr
    assert Receipts(settings).known()[1] == 0
