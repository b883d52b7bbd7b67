"""A gateway on a real socket, inside the test's own process."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from hb_assets.core.settings import Settings
from hb_assets.gateway.observability.tallies import Tallies
from hb_assets.gateway.server import Server, bound
from hb_assets_tests.servers import wait_for

PATH = "/metrics/heart-rate"
BATCH = "/metrics/heart-rate/batch"


def heartbeat(**changes: Any) -> dict[str, Any]:
    """A valid heartbeat as JSON has it, but for `changes`."""
    valid = {
        "user_id": "u1",
        "device_id": "device_a",
        "timestamp": "2025-01-15T10:00:00Z",
        "heart_rate": 75,
    }
    return valid | changes


def plain_client(url: str, **options: Any) -> httpx.Client:
    """A client for plain HTTP: it reads no certificates, which takes a tenth of a second."""
    return httpx.Client(base_url=url, timeout=30, verify=False, **options)


def next_answer(client: socket.socket, sent: bytes = b"") -> bytes:
    """The next answer on a connection that stays open: head and body."""
    client.sendall(sent)
    found = b""
    while b"\r\n\r\n" not in found:
        part = client.recv(65536)
        assert part
        found += part
    head, _, body = found.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body


@contextlib.contextmanager
def running(settings: Settings, tallies: Tallies | None = None) -> Iterator[httpx.Client]:
    """A client of a gateway that serves these settings."""
    with bound("127.0.0.1", 0) as listener:
        server = Server(settings, tallies=tallies)
        thread = threading.Thread(target=server.serve_on, args=(listener,))
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive(), "the gateway to start")
            assert server.started
            host, port = listener.getsockname()
            with plain_client(f"http://{host}:{port}") as client:
                yield client
        finally:
            server.should_exit = True
            thread.join(timeout=30)


@pytest.fixture
def serving() -> Callable[[Settings], contextlib.AbstractContextManager[httpx.Client]]:
    """For tests that need other settings, or several gateways."""
    return running


@pytest.fixture
def http(settings: Settings) -> Iterator[httpx.Client]:
    """A client of a gateway with the test's settings."""
    with running(settings) as client:
        yield client
