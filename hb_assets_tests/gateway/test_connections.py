"""Connections: clients that are slow, many or large take nothing away from the others."""

from __future__ import annotations

import contextlib
import datetime as dt
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest

from hb_assets.settings import Settings
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat

# which server it is makes no difference here
pytestmark = pytest.mark.parametrize("redis_url", ["valkey"], indirect=True)

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]
SHORTLY = dt.timedelta(milliseconds=300)

HEAD = b"POST /metrics/heart-rate/batch HTTP/1.1\r\nhost: hb\r\ncontent-type: application/json\r\n"


@contextlib.contextmanager
def connected(http: httpx.Client, sent: bytes = b"") -> Iterator[socket.socket]:
    url = http.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=20) as client:
        client.sendall(sent)
        yield client


def answer(client: socket.socket) -> bytes:
    """All that comes until the gateway closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            found += part
    return found


def test_a_head_that_drips(serving: Serving, settings: Settings) -> None:
    with serving(settings.model_copy(update={"head_timeout": SHORTLY})) as http:
        with connected(http, HEAD) as slow, connected(http) as silent:
            assert answer(slow).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
            assert answer(silent) == b""
        assert http.get("/health/live").status_code == 200


def test_a_body_that_drips(serving: Serving, settings: Settings) -> None:
    with serving(settings.model_copy(update={"body_timeout": SHORTLY})) as http:
        with connected(http, HEAD + b"content-length: 100\r\n\r\n[") as slow:
            told = answer(slow)
            assert told.startswith(b"HTTP/1.1 408 ")
            assert b"application/problem+json" in told
            assert b"HB_BODY_TIMEOUT" in told
        assert http.post(PATH, json=heartbeat()).status_code == 200


def test_a_keep_alive_connection_may_rest(serving: Serving, settings: Settings) -> None:
    with serving(settings.model_copy(update={"head_timeout": SHORTLY})) as http:
        line = b"GET /health/live HTTP/1.1\r\nhost: hb\r\n\r\n"
        with connected(http, line) as resting, connected(http, HEAD) as slow:
            assert resting.recv(65536).startswith(b"HTTP/1.1 200 ")
            assert answer(slow).startswith(b"HTTP/1.1 408 ")  # so a sweep has gone by
            resting.sendall(line)
            assert resting.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_what_is_not_http(serving: Serving, settings: Settings) -> None:
    with serving(settings) as http, connected(http, b"hello there\r\n\r\n") as client:
        told = answer(client)
        assert told.startswith(b"HTTP/1.1 400 ")
        assert b"application/problem+json" in told


def test_a_head_without_an_end(serving: Serving, settings: Settings) -> None:
    with serving(settings) as http, connected(http, HEAD) as client:
        with contextlib.suppress(ConnectionError):
            for number in range(3000):
                client.sendall(b"x-%d: %s\r\n" % (number, b"y" * 100))
        assert answer(client)[:13] in (b"HTTP/1.1 431 ", b"")
    with serving(settings) as http, connected(http, HEAD + b"x: " + b"y" * 66_000) as client:
        assert answer(client).startswith(b"HTTP/1.1 431 ")


def test_more_connections_than_allowed(serving: Serving, settings: Settings) -> None:
    with serving(settings.model_copy(update={"max_connections": 3})) as http:
        http.get("/health/live")
        with connected(http), connected(http), connected(http) as one_too_many:
            told = answer(one_too_many)
            assert told.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1\r\n" in told
            assert http.get("/health/live").status_code == 200


def test_unfinished_bodies_take_bounded_memory(serving: Serving, settings: Settings) -> None:
    """Whoever sends what passes the bound is refused; the others' bodies arrive."""
    with serving(settings.model_copy(update={"bodies_max_bytes": 2**20})) as http:
        head = HEAD + b"content-length: 900000\r\n\r\n"
        first = b"[" + b" " * 600_000
        with connected(http, head + first) as one, connected(http) as two:
            two.sendall(head + first)
            assert two.recv(65536).startswith(b"HTTP/1.1 503 ")
            one.sendall(b" " * 299_998 + b"]")
            assert one.recv(65536).startswith(b"HTTP/1.1 422 ")
        batch = [heartbeat(user_id=f"u{n}") for n in range(5000)]
        for _ in range(4):  # what was received counts no longer
            assert http.post(BATCH, json=batch).json()["accepted"] == 5000
