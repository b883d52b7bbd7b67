from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from hb_assets.buffer.server import free_port
from hb_assets.core.errors import (
    AlreadyRunningError,
    BufferUnavailableError,
    LakeMismatchError,
    SettingsError,
)
from hb_assets.core.settings import Settings
from hb_assets.gateway.server import bound, serve
from hb_assets.lake.storage.store import Lake
from hb_assets_tests import victims
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, plain_client, running
from hb_assets_tests.gateway.ingest.test_heartbeats import stored
from hb_assets_tests.servers import accepts, server_program, wait_for
from hb_assets_tests.victims import Victim

redis_url = on_valkey


@pytest.fixture
def port() -> int:
    return free_port()


@contextlib.contextmanager
def process(settings: Settings) -> Iterator[Victim]:
    """`hb serve` in a process of its own, which listens; killed at the end if it still runs."""
    with victims.running(settings, "serve") as child:
        wait_for(lambda: child.poll() is not None or accepts(settings.gateway_port), "the gateway")
        assert child.poll() is None, victims.said(settings)
        yield child


def complaints(settings: Settings) -> list[str]:
    """What gateways of this home wrote, but for where they serve and that workers come and go."""
    told = victims.said(settings).splitlines()
    return [text for text in told if "until Ctrl-C" not in text and " INFO " not in text]


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 1), (signal.SIGINT, 1), (signal.SIGTERM, 2)]
)
def test_stopping_loses_nothing_that_was_accepted(
    settings: Settings, client: Any, port: int, number: signal.Signals, workers: int
) -> None:
    served = settings.model_copy(update={"gateway_port": port, "gateway_workers": workers})
    accepted: set[tuple[str, int]] = set()
    busy = threading.Barrier(5)

    def post(worker: int) -> None:
        with (
            contextlib.suppress(httpx.TransportError),
            plain_client(f"http://127.0.0.1:{port}") as http,
        ):
            for n in range(100_000):
                moment = 1_736_935_200_000 + n
                body = heartbeat(user_id=f"u{worker}", timestamp_ms=moment)
                if http.post(PATH, json=body).status_code == 200:
                    accepted.add((f"u{worker}", moment))
                if n == 20:
                    busy.wait(timeout=30)

    with process(served) as child:
        threads = [threading.Thread(target=post, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        busy.wait(timeout=30)
        child.send_signal(number)
        code = child.wait(timeout=30)
        for thread in threads:
            thread.join(timeout=30)
    assert (code, complaints(settings)) == (0, [])
    assert len(accepted) > 80
    found = {(row["user_id"], row["timestamp_ms"]) for row in stored(client, settings.shards)}
    assert accepted <= found


def test_an_end_waits_for_all_that_has_come(settings: Settings, client: Any, port: int) -> None:
    """For requests ahead of their answers, and for one whose client has gone meanwhile."""

    def request(user: str) -> bytes:
        body = json.dumps(heartbeat(user_id=user)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body

    address = ("127.0.0.1", port)
    with process(settings.model_copy(update={"gateway_port": port})) as child:
        client.client_pause(60_000, all=False)
        try:
            with socket.create_connection(address, timeout=20) as ahead:
                ahead.sendall(request("ahead-1") + request("ahead-2"))
                with socket.create_connection(address, timeout=20) as gone:
                    gone.sendall(request("gone"))
                # on a connection that came later, so that the others were read
                assert httpx.get(f"http://127.0.0.1:{port}/health/live").status_code == 200
                child.send_signal(signal.SIGTERM)
                wait_for(lambda: not accepts(port), "the end to begin")
                client.client_unpause()
                told = b""
                while part := ahead.recv(65536):
                    told += part
        finally:
            client.client_unpause()
        assert (child.wait(timeout=30), complaints(settings)) == (0, [])
    first, second = told.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert (b"connection: close" in first, b"connection: close" in second) == (False, True)
    found = {row["user_id"] for row in stored(client, settings.shards)}
    assert found == {"ahead-1", "ahead-2", "gone"}


def test_a_second_one_on_the_same_port_says_so(settings: Settings, port: int) -> None:
    served = settings.model_copy(update={"gateway_port": port})
    with process(served) as child:
        with victims.running(served, "serve") as second:
            assert second.wait(timeout=60) == 2
        assert child.poll() is None
        assert httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
    [line] = complaints(settings)
    assert line.startswith(f"hb: port {port} on 127.0.0.1 is taken")


def test_a_port_that_only_listens_is_taken_too(port: int) -> None:
    with (
        bound("127.0.0.1", port),
        pytest.raises(AlreadyRunningError, match=str(port)),
        bound("127.0.0.1", port),
    ):
        pass


@pytest.mark.parametrize("host", ["203.0.113.7", "no-such-host.invalid"])
def test_an_address_that_is_not_ours(settings: Settings, port: int, host: str) -> None:
    wrong = settings.model_copy(update={"gateway_host": host, "gateway_port": port})
    with pytest.raises(SettingsError, match="HB_GATEWAY_HOST"):
        serve(wrong)


def test_redis_that_does_not_answer(settings: Settings, port: int) -> None:
    nobody = SecretStr(f"redis://:secret@127.0.0.1:{port}")
    with pytest.raises(BufferUnavailableError, match=str(port)) as caught:
        serve(settings.model_copy(update={"redis_url": nobody, "gateway_port": free_port()}))
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_lake_of_another_shard_count(settings: Settings, port: int) -> None:
    Lake.open(settings)
    other = settings.model_copy(update={"shards": settings.shards + 1, "gateway_port": port})
    with pytest.raises(LakeMismatchError):
        serve(other)


def test_redis_that_goes_away_and_comes_back_without_a_spool(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    redis = Redis(tmp_path, free_port())
    away = settings.model_copy(update={"redis_url": SecretStr(redis.url), "spool_max_bytes": 0})
    with contextlib.ExitStack() as stack:
        stack.callback(redis.kill)
        redis.start()
        http = stack.enter_context(running(away))
        assert http.post(PATH, json=heartbeat()).status_code == 200
        redis.kill()
        for _ in range(2):
            single = http.post(PATH, json=heartbeat())
            assert single.status_code == 503
            assert single.json()["type"].endswith(":buffer-unavailable")
            assert int(single.headers["retry-after"]) >= 1
            assert str(redis.port) not in single.text
        batch = http.post(BATCH, json=[heartbeat(), heartbeat(heart_rate=0)])
        assert batch.status_code == 503
        assert [row["retry"] for row in batch.json()["refused"]] == [True, False]
        health = http.get("/health")
        assert health.status_code == 503
        assert str(redis.port) in health.json()["parts"]["redis"]
        assert health.json()["parts"]["lake"] == "ok"
        assert health.json()["parts"]["spool"] == "off"
        metrics = http.get("/metrics")
        assert metrics.status_code == 200
        assert "hb_buffer_up 0.0" in metrics.text
        redis.start()
        assert http.post(PATH, json=heartbeat()).status_code == 200
        wait_for(lambda: http.get("/health").status_code == 200, "health")
    warnings = [r for r in caplog.records if r.levelname == "WARNING" and "Redis at" in r.message]
    assert len(warnings) == 1
    assert not away.spool_dir.exists()


class Redis:
    """A Redis of a test's own, that it may kill."""

    def __init__(self, folder: Path, port: int, kind: str = "valkey") -> None:
        self.kind = kind
        self.appendfsync = "always"
        self.port = port
        self.url = f"redis://127.0.0.1:{port}"
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [
                *(server_program(self.kind), "--port", str(self.port), "--bind", "127.0.0.1"),
                *("--dir", str(self._folder), "--save", ""),
                *("--appendonly", "yes", "--appendfsync", self.appendfsync),
            ],
            stdout=subprocess.DEVNULL,
        )
        wait_for(lambda: accepts(self.port), "the server to listen")

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
