"""Workers: several processes on one port, of which any may die."""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from pydantic import SecretStr

from hb_assets.buffer.server import free_port
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings, environment
from hb_assets.gateway.observability.tallies import Tallies
from hb_assets.gateway.workers import Workers
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.gateway.conftest import PATH, heartbeat, plain_client
from hb_assets_tests.gateway.observability.test_metrics import Found, samples
from hb_assets_tests.gateway.test_server import Redis
from hb_assets_tests.servers import wait_for

pytestmark = [VALKEY, pytest.mark.slow]

ONCE = httpx.Limits(max_keepalive_connections=0)
"""A connection for each request: whichever worker takes it."""
COUNTERS = re.compile("_(total|count|sum|bucket)$")
"""Each worker looks at those of Redis and the spool once a second: true for a scrape a second."""
OWN = re.compile(
    "^(hb_(http|connections|heartbeats|rate|unknown)|process_cpu).*" + COUNTERS.pattern
)


@contextlib.contextmanager
def serving(settings: Settings, count: int = 2) -> Iterator[tuple[psutil.Process, httpx.Client]]:
    """`hb serve` with some workers, and a client that opens a connection for each request."""
    settings = settings.model_copy(update={"gateway_port": free_port()})
    process = subprocess.Popen(
        [sys.executable, "-m", "hb_assets", "serve", "--json", "--workers", str(count)],
        env=environment(settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "}\n")) + "}"
        url = json.loads(told)["gateway"]
        with plain_client(url, limits=ONCE) as http:
            yield psutil.Process(process.pid), http
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)


def workers(parent: psutil.Process) -> list[psutil.Process]:
    """Its workers; multiprocessing has a process of its own beside them."""
    return [one for one in parent.children() if "spawn_main" in " ".join(one.cmdline())]


def ended(processes: list[psutil.Process]) -> bool:
    return not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes)


def test_one_is_killed_and_the_others_go_on(settings: Settings) -> None:
    with serving(settings) as (parent, http):
        first = workers(parent)
        assert len(first) == 2
        first[0].kill()
        answers = 0
        for _ in range(50):
            with contextlib.suppress(httpx.TransportError):  # what the killed one had accepted
                assert http.post(PATH, json=heartbeat()).status_code == 200
                answers += 1
        assert answers >= 40
        wait_for(lambda: len(workers(parent)) == 2 and ended(first[:1]), "another worker")
        assert first[1] in workers(parent)
        wait_for(lambda: samples(http)["hb_gateway_workers", ()] == 2, "both to be seen", 60)
        everybody = [parent, *workers(parent)]
        parent.send_signal(signal.SIGTERM)
        wait_for(lambda: ended(everybody), "all of them to end")


class Traffic:
    """Clients that post without a pause, and two that scrape, each from a thread of its own."""

    CLIENTS = 4

    def __init__(self, url: httpx.URL) -> None:
        self._url = str(url)
        self._ending = threading.Event()
        self.answered = [0] * self.CLIENTS
        self.unanswered = [0] * self.CLIENTS
        self.fallen: list[str] = []
        self.scrapes = Counter[float]()
        """How many there were, by `hb_buffer_up`."""

    @contextlib.contextmanager
    def flowing(self) -> Iterator[None]:
        with ThreadPoolExecutor(self.CLIENTS + 2) as pool:
            running = [pool.submit(self._scrape, *way) for way in ((0, OWN), (1.5, COUNTERS))]
            running += [pool.submit(self._post, number) for number in range(self.CLIENTS)]
            try:
                yield
            finally:
                self._ending.set()
            for one in running:
                one.result()

    def goes_on(self, *, up: bool) -> None:
        """Wait for so many more answers, and scrapes that find Redis up or not."""
        answers, scrapes = sum(self.answered), self.scrapes[up]
        wait_for(lambda: sum(self.answered) > answers + 50, "clients to be answered")
        wait_for(lambda: self.scrapes[up] > scrapes + 3, "metrics to be scraped")

    def _post(self, number: int) -> None:
        with plain_client(self._url, limits=ONCE) as http:
            while not self._ending.is_set():
                try:
                    assert http.post(PATH, json=heartbeat()).status_code == 200
                    self.answered[number] += 1
                except httpx.TransportError:
                    self.unanswered[number] += 1

    def _scrape(self, pause: float, counters: re.Pattern[str]) -> None:
        latest: Found = {}
        with plain_client(self._url, limits=ONCE) as http:
            while not self._ending.wait(pause):
                with contextlib.suppress(httpx.TransportError):
                    found = samples(http)
                    self.scrapes[found["hb_buffer_up", ()]] += 1
                    now = {key: value for key, value in found.items() if counters.search(key[0])}
                    fallen = {key for key in now if now[key] < latest.get(key, 0)}
                    self.fallen += [f"{key}: {latest[key]} to {now[key]}" for key in fallen]
                    latest |= now


@pytest.mark.timeout(300)
def test_no_counter_falls_and_sums_are_exact_whatever_is_killed(
    settings: Settings, tmp_path: Path
) -> None:
    redis = Redis(tmp_path, free_port())
    redis.start()
    changes = {"redis_url": SecretStr(redis.url), "redis_timeout": dt.timedelta(seconds=0.5)}
    with contextlib.ExitStack() as stack:
        stack.callback(redis.kill)
        parent, http = stack.enter_context(serving(settings.model_copy(update=changes), 3))
        traffic = Traffic(http.base_url)
        with traffic.flowing():
            traffic.goes_on(up=True)
            redis.kill()
            traffic.goes_on(up=False)
            victim = workers(parent)[0]
            victim.kill()
            traffic.goes_on(up=False)
            redis.start()
            traffic.goes_on(up=True)
            wait_for(lambda: samples(http)["hb_gateway_workers", ()] == 3, "another worker", 90)
            assert ended([victim])
            traffic.goes_on(up=True)
        assert traffic.fallen == []
        # what was under way in the killed one may have been counted, and lost its answer
        answered, unanswered = sum(traffic.answered), sum(traffic.unanswered)
        assert unanswered <= traffic.CLIENTS
        posted = (("method", "POST"), ("route", PATH), ("status", "200"))
        for _ in range(6):  # whichever is asked
            found = samples(http)
            for name in ("hb_http_requests_total", "hb_heartbeats_accepted_total"):
                count = found[name, posted if "http" in name else ()]
                assert answered <= count <= answered + unanswered
            assert found["hb_http_request_seconds_count", posted[:2]] >= answered


def test_no_worker_outlives_its_parent(settings: Settings) -> None:
    with serving(settings) as (parent, _):
        orphans = workers(parent)
        parent.kill()
        wait_for(lambda: ended(orphans), "the workers to end")


def fail(_socket: socket.socket, _settings: Settings, _ready: object, _tallies: Tallies) -> None:
    raise SettingsError("the keys are damaged")


def test_why_another_one_cannot_start_is_in_the_log(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hb_assets.gateway.workers._PAUSE_SECONDS", 0)
    with socket.socket() as listener:
        few = Workers(settings, listener, fail)
        few._workers = [few._start(0)]

        def told() -> bool:
            few._watch()
            return "the keys are damaged; another worker" in caplog.text

        try:
            wait_for(told, "the log to tell why")
        finally:
            few._end()


def test_what_keeps_a_worker_from_starting_is_one_line(settings: Settings) -> None:
    Lake.open(settings)
    done = subprocess.run(
        [sys.executable, "-m", "hb_assets", "serve", "--workers", "2"],
        env={**environment(settings), "HB_SHARDS": "5", "HB_GATEWAY_PORT": str(free_port())},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "HB_SHARDS" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
