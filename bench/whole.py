"""End-to-end load test: POST, gateway, Redis, drain and lake, all on this machine.

The processes of that run, the buffer's depth meanwhile, what is in the lake at the end and how long
each heartbeat took there. The load itself is in `pace`.

A heartbeat is queryable when its fragment has its name: readers list those. Its way there is from
its entry's id, which is Redis' time when it was appended and before it was answered with 200, to
the file's last change of links.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from pydantic import SecretStr

from bench import pace, servers
from bench.measure import ROOT, FailedMeasurementError
from bench.run import Bench
from bench.table import Row
from bench.ways import settings_in
from hb_assets.buffer import connection, depth
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.files import fragments
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import audit

PER_SECOND = 100_000
_LOOK_SECONDS = 0.25
_PATIENCE_SECONDS = 60.0
_HIGH_WATER = 0.8 * 4_000_000
"""Heartbeats at which a buffer with default settings raises its alarm."""
DRAINS = {
    "hb drain --follow": ([sys.executable, "-m", "hb_assets", "drain", "--follow"], 5),
    "the sensor's ticks": ([sys.executable, "-m", "bench.ticks"], 12),
}


@dataclass(slots=True)
class _Depths:
    """Heartbeats in the buffer, look by look, each with its time."""

    seconds: list[float] = field(default_factory=list)
    heartbeats: list[int] = field(default_factory=list)


def whole(bench: Bench) -> Iterator[Row]:
    """At 100,000 heartbeats a second, drained in either way."""
    seconds = 10 if bench.quick else 60
    for name, (argv, most) in DRAINS.items():
        bench.say(f"{PER_SECOND:,} heartbeats/s for {seconds} s, {name}")
        yield from _run(bench, name, argv, seconds, most)


def _run(bench: Bench, name: str, argv: list[str], seconds: float, most: float) -> Iterator[Row]:
    home = bench.fresh("whole")
    with (
        servers.buffer(home) as buffer,
        servers.gateway(home, buffer) as served,
    ):
        settings = settings_in(home, redis_url=SecretStr(buffer.url))
        if argv[-1] == "bench.ticks":
            argv = [*argv, str(home), buffer.url]
        with _member(argv, home, buffer.url) as drain, _watched(settings) as depths:
            sent = _load(served, seconds)
            ended = time.monotonic()
            _await_empty(depths, ended)
            if drain.poll() is not None:
                raise FailedMeasurementError(f"{name} ended with {drain.returncode}")
        empty = next(
            at
            for at, heartbeats in zip(depths.seconds, depths.heartbeats, strict=True)
            if at > ended and heartbeats == 0
        )
        lake = Lake.open(settings)
        found = audit.audit(connection.connect(settings), lake, settings)
        latencies = _latencies(lake)
    lost = sent.accepted - found.rows - found.quarantined
    if not found.adds_up:
        raise FailedMeasurementError(f"hb audit: {found.differences[0]}")
    what = f"{PER_SECOND // 1000} k/s for {seconds:g} s, {name}"
    yield Row(
        f"{what}: heartbeats accepted",
        "heartbeats/s",
        [sent.accepted / max(seconds, sent.seconds)],
        target=0.95 * PER_SECOND,
    )
    yield Row(f"{what}: lost", "heartbeats", [abs(lost)], target=0, at_most=True)
    yield Row(
        f"{what}: deepest buffer",
        "heartbeats",
        [max(depths.heartbeats)],
        target=_HIGH_WATER,
        at_most=True,
    )
    yield Row(f"{what}: empty again after", "s", [empty - ended], target=10, at_most=True)
    yield Row(
        f"{what}: accepted to queryable, p99",
        "s",
        [float(np.percentile(latencies, 99))],
        target=most,
        at_most=True,
    )
    yield Row(f"{what}: the same, p50", "s", [float(np.percentile(latencies, 50))])
    answers = sorted(sent.answers_ms)
    yield Row(f"{what}: to the answer, p99", "ms", [answers[int(0.99 * len(answers))]])
    yield Row(f"{what}: rows of a fragment", "rows", [_fragment_rows(lake)])


def _load(served: servers.Served, seconds: float) -> pace.Paced:
    assert served.api_key is not None
    argv = [sys.executable, "-m", "bench.pace", str(served.port), served.api_key]
    done = subprocess.run(
        [*argv, str(PER_SECOND), str(seconds)],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    try:
        sent = pace.Paced(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        raise FailedMeasurementError(f"the load: {done.stderr.strip()[-300:]}") from None
    if sent.failed:
        raise FailedMeasurementError(
            f"the load: {len(sent.failed)} batches were refused: {sent.failed[0]}"
        )
    return sent


@contextlib.contextmanager
def _member(argv: Sequence[str], home: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the installation for the time of the block."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("HB_")}
    environment = {**inherited, "HB_HOME": str(home), "HB_REDIS_URL": url, **servers.AMPLE}
    with (home / "drain.log").open("wb") as out:
        child = subprocess.Popen(
            argv,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        yield child
    finally:
        child.send_signal(signal.SIGTERM)
        try:
            child.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


@contextlib.contextmanager
def _watched(settings: Settings) -> Iterator[_Depths]:
    """The buffer's depth, looked at in a thread for the time of the block."""
    found, done = _Depths(), threading.Event()
    client = connection.connect(settings)

    def watch() -> None:
        while not done.wait(_LOOK_SECONDS):
            heartbeats = sum(shard.heartbeats for shard in depth.depths(client, settings).states)
            found.seconds.append(time.monotonic())
            found.heartbeats.append(heartbeats)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _await_empty(depths: _Depths, ended: float) -> None:
    while not (depths.seconds and depths.seconds[-1] > ended and depths.heartbeats[-1] == 0):
        if time.monotonic() > ended + _PATIENCE_SECONDS:
            raise FailedMeasurementError(
                f"{depths.heartbeats[-1]:,} heartbeats are still in the buffer"
            )
        time.sleep(_LOOK_SECONDS)


def _latencies(lake: Lake) -> npt.NDArray[np.float64]:
    """Seconds from each row's arrival to its fragment's publication."""
    found = []
    for fragment in _fragments(lake):
        arrivals = pq.read_table(fragment.path, columns=["arrival_ms"], partitioning=None)
        published = fragment.path.stat().st_ctime_ns / 1e6
        found.append((published - arrivals["arrival_ms"].to_numpy().astype(np.float64)) / 1000)
    return np.concatenate(found)


def _fragment_rows(lake: Lake) -> float:
    """Rows of a fragment, the median."""
    return float(np.median([fragment.rows for fragment in _fragments(lake)]))


def _fragments(lake: Lake) -> list[fragments.Fragment]:
    return [one for day in inventory.days(lake) for one in fragments.all_listed(lake, day)]
