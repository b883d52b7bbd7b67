"""Connections: clients that are slow, many or large take nothing away from the others."""

from __future__ import annotations

import contextlib
import datetime as dt
import gzip
import json
import logging
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import pairwise
from typing import Any

import httpx
import pytest
import redis
from hypothesis import HealthCheck, example, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.core.settings import Settings
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.examples import examples
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, next_answer
from hb_assets_tests.gateway.ingest.test_heartbeats import stored
from hb_assets_tests.servers import wait_for

# which server it is makes no difference here
pytestmark = VALKEY

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]
SHORTLY = dt.timedelta(milliseconds=300)

HEAD = (
    b"POST /metrics/heart-rate/batch HTTP/1.1\r\nhost: localhost\r\n"
    b"content-type: application/json\r\n"
)


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
            assert next_answer(resting).startswith(b"HTTP/1.1 200 ")
            assert answer(slow).startswith(b"HTTP/1.1 408 ")  # so a sweep has gone by
            assert next_answer(resting, line).startswith(b"HTTP/1.1 200 ")


def test_what_is_not_http(
    serving: Serving, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(settings) as http, connected(http, b"hello there\r\n\r\n") as client:
        told = answer(client)
        assert told.startswith(b"HTTP/1.1 400 ")
        assert b"application/problem+json" in told
        assert b"x-request-id: " in told
        counted = 'hb_connections_refused_total{reason="malformed_request"} 1.0'
        assert counted in http.get("/metrics").text
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


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


LIVE = b"GET /health/live HTTP/1.1\r\nhost: hb\r\n\r\n"
LAST = LIVE.replace(b"host", b"connection: close\r\nhost")


def test_blank_lines_do_not_keep_a_connection(serving: Serving, settings: Settings) -> None:
    shortly = settings.model_copy(update={"body_timeout": SHORTLY})
    with serving(shortly) as http, connected(http, LIVE) as client:
        assert next_answer(client).startswith(b"HTTP/1.1 200 ")
        client.sendall(b"\r\n")
        assert answer(client) == b""
        refused = b"POST /nothing HTTP/1.1\r\nhost: hb\r\ncontent-length: 100\r\n\r\n"
        with connected(http, refused) as dripping:
            assert dripping.recv(65536).startswith(b"HTTP/1.1 404 ")
            dripping.sendall(b" ")
            assert b"HTTP/" not in answer(dripping), "no more than the rest of that answer"


def test_what_comes_after_the_answer_takes_no_room(serving: Serving, settings: Settings) -> None:
    """Who is refused by his head alone may go on sending; it is dropped, and counts nowhere."""
    with serving(settings.model_copy(update={"bodies_max_bytes": 2**20})) as http:
        head = b"POST /nothing HTTP/1.1\r\nhost: hb\r\ncontent-length: 9000000\r\n\r\n"
        with connected(http, head) as client:
            assert client.recv(65536).startswith(b"HTTP/1.1 404 ")
            client.sendall(b" " * 900_000)
            batch = [heartbeat(user_id=f"u{n}") for n in range(5000)]
            assert http.post(BATCH, json=batch).json()["accepted"] == 5000


def test_requests_ahead_of_their_answers(serving: Serving, settings: Settings) -> None:
    padded = LIVE.replace(b"\r\n\r\n", b"\r\nx-pad: " + b"y" * 2500 + b"\r\n\r\n")
    with serving(settings) as http:
        with connected(http, padded * 60 + padded[:1000]) as client:
            client.sendall(padded[1000:] + LAST)
            assert answer(client).count(b"HTTP/1.1 200 ") == 62
        with connected(http, LIVE * 3000) as client:
            assert b"too-many-requests-ahead" in answer(client)


def single(**changes: Any) -> bytes:
    body = json.dumps(heartbeat(**changes)).encode()
    head = HEAD.replace(BATCH.encode(), PATH.encode())
    return head + b"content-length: %d\r\n\r\n%b" % (len(body), body)


def test_heartbeats_ahead_of_their_answers_are_stored_in_order(
    http: httpx.Client, client: redis.Redis, settings: Settings
) -> None:
    with connected(http) as ahead:
        for rate in range(60, 90):
            ahead.sendall(single(heart_rate=rate))
        ahead.sendall(LAST)
        assert answer(ahead).count(b"HTTP/1.1 200 ") == 31
    assert [row["heart_rate"] for row in stored(client, settings.shards)] == list(range(60, 90))


@given(
    cuts=st.lists(st.integers(1, 2 * len(single()) - 1), max_size=6, unique=True).map(sorted),
)
@example(cuts=[single().index(b"{")])
@example(cuts=[len(single()), len(single()) + 1])
@example_settings(
    max_examples=examples(20),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_requests_may_come_in_any_segments(http: httpx.Client, cuts: list[int]) -> None:
    sent = single() * 2 + LAST
    with connected(http) as line:
        line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for start, end in pairwise([0, *cuts, len(sent)]):
            line.sendall(sent[start:end])
        assert answer(line).count(b"HTTP/1.1 200 ") == 3


def test_a_connection_that_rests_for_long_is_closed(
    serving: Serving, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not one that is used, for however long."""
    monkeypatch.setattr("hb_assets.gateway.server.KEEP_ALIVE_SECONDS", 0.5)
    with serving(settings) as http, connected(http) as busy, connected(http, LIVE) as resting:
        closed = threading.Event()
        watch = threading.Thread(target=lambda: (answer(resting), closed.set()))
        watch.start()
        while not closed.is_set():
            assert next_answer(busy, single()).startswith(b"HTTP/1.1 200 ")
        watch.join()
        busy.sendall(LAST)
        assert answer(busy).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_reads_no_answer(serving: Serving, settings: Settings) -> None:
    """It is gone after a while, although what it was told can't be sent."""
    shortly = {"head_timeout": SHORTLY, "body_timeout": SHORTLY, "max_connections": 2}
    with serving(settings.model_copy(update=shortly)) as http, socket.socket() as deaf:
        assert http.get("/health/live").status_code == 200
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect((http.base_url.host, http.base_url.port or 80))
        body = b"[%s1]" % (b"1," * 5000)  # each is refused, with a reason
        deaf.sendall((HEAD + b"content-length: %d\r\n\r\n%s" % (len(body), body)) * 10 + HEAD)

        def let_in() -> bool:
            with connected(http, LIVE) as another:
                return another.recv(65536).startswith(b"HTTP/1.1 200 ")

        wait_for(lambda: not let_in(), "the gateway to know of the client that doesn't read")
        wait_for(let_in, "that client to be gone")


@pytest.mark.parametrize("end", [b"", b"content-length: 2\r\n\r\n[]"])
def test_very_many_headers(serving: Serving, settings: Settings, end: bytes) -> None:
    with serving(settings) as http, connected(http, HEAD + b"a:b\r\n" * 300 + end) as client:
        told = answer(client)
        assert told.startswith(b"HTTP/1.1 431 ")
        assert told.count(b"HTTP/1.1 ") == 1


def test_a_request_in_front_of_one_with_very_many_headers_is_answered(
    serving: Serving, settings: Settings
) -> None:
    with serving(settings) as http, connected(http, LIVE) as client:
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        client.sendall(HEAD + b"a:b\r\n" * 300 + b"content-length: 2\r\n\r\n[]" + LIVE)
        told = answer(client)
        assert told.startswith(b"HTTP/1.1 431 ")
        assert told.count(b"HTTP/1.1 ") == 1


def test_a_body_behind_an_upgrade_is_not_lost_silently(
    serving: Serving, settings: Settings
) -> None:
    """Java's HttpClient asks for HTTP/2 that way; without a body it is answered as usual."""
    upgrade = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
    with serving(settings) as http:
        with connected(http, HEAD + upgrade + b"content-length: 2\r\n\r\n[]") as client:
            told = answer(client)
            assert told.startswith(b"HTTP/1.1 400 ")
            assert b"upgrade-with-a-body" in told
        with connected(http, LIVE[:-2] + upgrade + b"\r\n") as client:
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


def test_expanded_bodies_take_bounded_memory(serving: Serving, settings: Settings) -> None:
    """A few bytes that become megabytes count as what they become, until they are answered."""
    body = gzip.compress(b"[" + b" " * 700_000)[:-8]  # its end is yet to come
    head = HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % (len(body) + 8)
    with serving(settings.model_copy(update={"bodies_max_bytes": 2**20})) as http:
        with connected(http, head + body), connected(http, head + body) as two:
            assert two.recv(65536).startswith(b"HTTP/1.1 503 ")
        batch = gzip.compress(json.dumps([heartbeat()] * 5000).encode())
        for _ in range(4):  # what was answered, or whose client has gone, counts no longer
            sent = http.post(BATCH, content=batch, headers={"content-encoding": "gzip"})
            assert sent.json()["accepted"] == 5000


def test_batches_in_work_take_bounded_memory(
    serving: Serving, settings: Settings, client: redis.Redis
) -> None:
    """What is made of a batch is larger than its body: it counts until it is stored."""
    batch = json.dumps([heartbeat(user_id=f"u{n}") for n in range(7000)]).encode()
    sent = HEAD + b"content-length: %d\r\n\r\n%s" % (len(batch), batch)
    with serving(settings.model_copy(update={"bodies_max_bytes": 2**20})) as http:
        client.client_pause(60_000, all=False)
        try:
            with connected(http, sent) as first, connected(http, sent) as second:
                first.setblocking(False)
                second.setblocking(False)
                found, _, _ = select.select([first, second], [], [], 20)
                assert found[0].recv(65536).startswith(b"HTTP/1.1 503 ")
                client.client_unpause()
                (other,) = {first, second} - set(found)
                select.select([other], [], [], 20)
                assert other.recv(65536).startswith(b"HTTP/1.1 200 ")
        finally:
            client.client_unpause()
        assert http.post(BATCH, content=batch).json()["accepted"] == 7000
