from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from hb_assets.errors import CheckFailedError, DamagedFileError, HbError
from hb_assets.gateway.edge import Edge
from hb_assets.gateway.metrics import Metrics
from hb_assets.gateway.problems import MEDIA_TYPE
from hb_assets.settings import Settings
from hb_assets_tests.gateway.conftest import BATCH, PATH


def answered(error: Exception) -> httpx.Response:
    async def app(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise error

    async def ask() -> httpx.Response:
        transport: Any = httpx.ASGITransport(app=Edge(app, Metrics(Settings()), frozenset({"/x"})))
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
    assert response.headers["content-type"] == MEDIA_TYPE
    assert str(error) not in response.text
    assert "Traceback" not in response.text
    assert (str(error) in caplog.text) == logged
    assert not any("secret" in r.getMessage() for r in caplog.records if r.name != "httpx")
    if not isinstance(error, HbError):
        assert type(error).__name__ in caplog.text
        assert "in app" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("DELETE", PATH, {"GET", "HEAD", "POST"}),
        ("GET", BATCH, {"POST"}),
        ("POST", "/health", {"GET", "HEAD"}),
        ("TRACE", "/metrics", {"GET", "HEAD"}),
    ],
)
def test_wrong_method_names_the_right_ones(
    http: httpx.Client, method: str, path: str, allow: set[str]
) -> None:
    response = http.request(method, path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == allow
    assert response.headers["content-type"] == MEDIA_TYPE


def test_no_such_path(http: httpx.Client) -> None:
    response = http.get("/nowhere")
    assert response.status_code == 404
    assert response.headers["content-type"] == MEDIA_TYPE
