from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

import httpx
import pytest
from starlette.types import Message, Receive, Scope, Send

from hb_assets.core.errors import CheckFailedError, DamagedFileError, HbError
from hb_assets.gateway.http.problems import MEDIA_TYPE
from hb_assets.gateway.middleware import Edge
from hb_assets.gateway.observability.metrics import Families, Metrics
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.gateway.conftest import BATCH, PATH

redis_url = on_valkey


def answered(error: Exception) -> httpx.Response:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise error

    async def ask() -> httpx.Response:
        metrics = Metrics()
        metrics.expect({"/x": ()})
        transport: Any = httpx.ASGITransport(app=Edge(app, metrics))
        async with httpx.AsyncClient(transport=transport, base_url="http://hb") as client:
            return await client.get("/x", params={"user_id": "secret"})

    return asyncio.run(ask())


@pytest.mark.parametrize(
    ("error", "logged"),
    [
        (ValueError("user secret had 75 bpm"), False),
        (DamagedFileError("/lake/x.parquet can't be read; consolidate the day anew"), True),
        (CheckFailedError("rows: 3 is not 4"), True),
    ],
)
def test_what_is_raised_stays_inside(
    error: Exception, logged: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "hb_assets"):
        response = answered(error)
    assert response.status_code == 500
    assert f"(request {response.headers['x-request-id']})" in caplog.text
    assert response.headers["content-type"] == MEDIA_TYPE
    assert str(error) not in response.text
    assert "Traceback" not in response.text
    assert (str(error) in caplog.text) == logged
    assert not any("secret" in r.getMessage() for r in caplog.records if r.name != "httpx")
    if not isinstance(error, HbError):
        assert type(error).__name__ in caplog.text
        assert "in app" in caplog.text


def test_a_request_is_counted_once_and_before_the_last_of_its_answer_is_sent() -> None:
    """A worker may be killed at any moment: what a client has must be in the sums."""
    metrics = Metrics()
    metrics.expect({"/x": ()})
    counted = []

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"1", "more_body": True})
        await send({"type": "http.response.body", "body": b"2"})

    def look() -> bool:
        families = Families()
        metrics.show(families)
        return b'{method="GET",route="/x",status="200"} 1.0' in families.text()

    async def sent(message: Message) -> None:
        counted.append((message["type"], message.get("more_body", False), look()))

    async def received() -> Message:
        return {"type": "http.disconnect"}

    scope = {"type": "http", "path": "/x", "method": "GET", "headers": []}
    asyncio.run(Edge(app, metrics)(scope, received, sent))
    assert counted == [
        ("http.response.start", False, False),
        ("http.response.body", True, False),
        ("http.response.body", False, True),
    ]
    assert look()


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", PATH, {"GET", "HEAD", "OPTIONS", "POST"}),
        ("GET", BATCH, {"OPTIONS", "POST"}),
        ("POST", "/health", {"GET", "HEAD", "OPTIONS"}),
        ("TRACE", "/metrics", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_wrong_method_names_the_right_ones(
    http: httpx.Client, method: str, path: str, allow: set[str]
) -> None:
    response = http.request(method, path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == allow
    assert response.headers["content-type"] == MEDIA_TYPE


def test_options_names_the_methods(http: httpx.Client) -> None:
    response = http.options(BATCH)
    assert (response.status_code, response.headers["allow"]) == (204, "OPTIONS, POST")


@pytest.mark.parametrize("path", [PATH, "/health", "/nowhere"])
def test_every_answer_has_an_id(http: httpx.Client, path: str) -> None:
    given = http.get(path, headers={"x-request-id": "7d4f:a/b+c=@~._-"})
    assert given.headers["x-request-id"] == "7d4f:a/b+c=@~._-"
    if given.is_error and path != "/health":
        assert given.json()["request_id"] == "7d4f:a/b+c=@~._-"
    made = {http.get(path).headers["x-request-id"] for _ in range(3)}
    assert len(made) == 3
    assert given.headers["x-content-type-options"] == "nosniff"
    assert "no-store" in given.headers["cache-control"]


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "\xe9", "<script>", '"'])
def test_ids_that_could_do_harm_are_not_taken_over(http: httpx.Client, bad: str) -> None:
    headers = [(b"x-request-id", bad.encode("latin-1"))]
    assert re.fullmatch(
        "[0-9a-f]{16}-[0-9a-f]+", http.get("/nowhere", headers=headers).json()["request_id"]
    )


def test_no_such_path(http: httpx.Client) -> None:
    response = http.get("/nowhere")
    assert response.status_code == 404
    assert response.headers["content-type"] == MEDIA_TYPE
