"""Workers: several processes on one port, of which any may die."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from hb_assets.buffer.server import free_port
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings, environment
from hb_assets.gateway.workers import Workers
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.gateway.conftest import PATH, heartbeat, plain_client
from hb_assets_tests.gateway.observability.test_metrics import accepted, samples
from hb_assets_tests.servers import wait_for

pytestmark = [VALKEY, pytest.mark.slow]


@contextlib.contextmanager
def serving(settings: Settings) -> Iterator[tuple[psutil.Process, httpx.Client]]:
    """`hb serve` with two workers, and a client that opens a connection for each request."""
    settings = settings.model_copy(update={"gateway_port": free_port()})
    process = subprocess.Popen(
        [sys.executable, "-m", "hb_assets", "serve", "--json", "--workers", "2"],
        env=environment(settings),
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        told = "".join(iter(process.stdout.readline, "}\n")) + "}"
        url = json.loads(told)["gateway"]
        limits = httpx.Limits(max_keepalive_connections=0)
        with plain_client(url, limits=limits) as http:
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
        # whichever of them is asked
        for _ in range(4):
            wait_for(lambda: accepted(http) >= answers, "the counts of both")
        wait_for(lambda: samples(http)["hb_gateway_workers", ()] == 2, "both to be seen")
        everybody = [parent, *workers(parent)]
        parent.send_signal(signal.SIGTERM)
        wait_for(lambda: ended(everybody), "all of them to end")


def test_no_worker_outlives_its_parent(settings: Settings) -> None:
    with serving(settings) as (parent, _):
        orphans = workers(parent)
        parent.kill()
        wait_for(lambda: ended(orphans), "the workers to end")


def fail(_listener: socket.socket, _settings: Settings, _ready: Callable[[], None]) -> None:
    raise SettingsError("the keys are damaged")


def test_why_another_one_cannot_start_is_in_the_log(
    settings: Settings, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hb_assets.gateway.workers._PAUSE_SECONDS", 0)
    with socket.socket() as listener:
        few = Workers(settings, listener, fail)
        few._workers = [few._start()]

        def told() -> bool:
            few._watch()
            return "died (the keys are damaged)" in caplog.text

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
