"""Clients of the system before this one: their paths, fields, times and status codes hold."""

from __future__ import annotations

import json
import socket
from typing import Any

import httpx
import pytest

from hb_assets.core.settings import Settings
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat
from hb_assets_tests.gateway.ingest.test_heartbeats import stored

pytestmark = VALKEY

TEN = 1736935200_000


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        ("2025-01-15T10:00:00", TEN),
        ("2025-01-15 10:00:00", TEN),
        ("2025-01-15T10:00:00Z", TEN),
        ("2025-01-15T10:00:00z", TEN),
        ("2025-01-15T10:00:00+00:00", TEN),
        ("2025-01-15T15:30:00+05:30", TEN),
        ("2025-01-15T02:00:00-0800", TEN),
        ("2025-01-15T10:00:00.5", TEN + 500),
        ("2025-01-15T10:00:00.12Z", TEN + 120),
        ("2025-01-15T10:00:00.123456", TEN + 123),
        ("2025-01-15T10:00:00.123456789123Z", TEN + 123),
        ("2025-01-15T10:00", TEN),
    ],
)
def test_times(
    http: httpx.Client, client: Any, settings: Settings, timestamp: str, expected: int
) -> None:
    assert http.post(PATH, json=heartbeat(timestamp=timestamp)).status_code == 200
    assert stored(client, settings.shards)[0]["timestamp_ms"] == expected


def test_status_codes(http: httpx.Client) -> None:
    """200; 422 for range and type; 400 for what is no time."""
    posted = {
        200: [heartbeat(), heartbeat(heart_rate=30), heartbeat(heart_rate=220)],
        400: [heartbeat(timestamp="yesterday"), heartbeat(timestamp="2025-13-01T00:00:00Z")],
        422: [
            heartbeat(heart_rate=29),
            heartbeat(heart_rate=221),
            heartbeat(heart_rate="fast"),
            heartbeat(user_id=None),
            heartbeat(timestamp=None),
            heartbeat(timestamp="1999-01-01T00:00:00Z"),
            {},
        ],
    }
    for status, bodies in posted.items():
        assert [http.post(PATH, json=body).status_code for body in bodies] == [status] * len(bodies)
    asked = {"user_id": "u1", "start": "2025-01-15T10:00:00", "end": "2025-01-15T11:00:00Z"}
    assert http.get(PATH, params=asked).json() == {"user_id": "u1", "data": [], "count": 0}
    for changes in ({"start": "yesterday"}, {"start": asked["end"], "end": asked["start"]}):
        assert http.get(PATH, params=asked | changes).status_code == 400


def test_without_a_content_type(http: httpx.Client) -> None:
    content = json.dumps(heartbeat()).encode()
    request = http.build_request("POST", PATH, content=content)
    assert "content-type" not in request.headers
    assert http.send(request).json() == {"status": "accepted"}


def test_one_connection_for_many_requests(http: httpx.Client) -> None:
    """Pipelined: sent without waiting, and answered in order, whatever becomes of each."""
    good, bad = (json.dumps(heartbeat(heart_rate=bpm)).encode() for bpm in (75, 0))
    sent = [(PATH, good, 200), (PATH, bad, 422), ("/nowhere", good, 404), (BATCH, good, 200)] * 5
    requests = b"".join(
        b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"X-Request-ID: n%d\r\nContent-Length: %d\r\n\r\n%s" % (path.encode(), n, len(body), body)
        for n, (path, body, _) in enumerate(sent)
    )
    with socket.create_connection((http.base_url.host, http.base_url.port or 0), 30) as raw:
        raw.sendall(requests)
        answers = raw.makefile("rb")
        for n, (_, _, status) in enumerate(sent):
            assert answers.readline().startswith(b"HTTP/1.1 %d " % status)
            headers = dict(line.strip().split(b": ", 1) for line in iter(answers.readline, b"\r\n"))
            assert headers[b"x-request-id"] == b"n%d" % n
            answers.read(int(headers[b"content-length"]))
