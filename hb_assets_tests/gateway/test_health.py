from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import httpx
import pytest
import redis

from hb_assets.settings import Settings
from hb_assets_tests.gateway.conftest import PATH, heartbeat

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]


def test_healthy(http: httpx.Client) -> None:
    response = http.get("/health")
    assert response.status_code == 200
    assert response.json() == {
        "status": "ok",
        "parts": {"redis": "ok", "lake": "ok", "spool": "ok"},
        "durability": "fsync",
        "alarms": [],
    }


def test_a_lake_that_is_gone_is_named(http: httpx.Client, settings: Settings) -> None:
    settings.lake_dir.rename(settings.lake_dir.with_name("elsewhere"))
    response = http.get("/health")
    assert response.status_code == 503
    assert response.json()["status"] == "failing"
    assert "can't be written" in response.json()["parts"]["lake"]
    assert response.json()["parts"]["redis"] == "ok"


def test_a_buffer_above_its_mark_is_an_alarm(serving: Serving, settings: Settings) -> None:
    bounded = settings.model_copy(update={"buffer_max_heartbeats": settings.shards})
    with serving(bounded) as http:
        assert http.get("/health").json()["alarms"] == []
        assert http.post(PATH, json=heartbeat()).status_code == 200
        response = http.get("/health")
    assert response.status_code == 200
    (alarm,) = response.json()["alarms"]
    assert "HB_BUFFER_HIGH_WATER" in alarm


@pytest.mark.parametrize("mode", ["fsync", "memory"])
def test_the_mode_is_named_and_held_against_the_server(
    serving: Serving, settings: Settings, client: redis.Redis, mode: str
) -> None:
    with serving(settings.model_copy(update={"durability": mode})) as http:
        assert http.get("/health").json()["durability"] == mode
        client.config_set("appendonly", "no")
        try:
            response = http.get("/health")
        finally:
            client.config_set("appendonly", "yes")
    if mode == "memory":
        assert response.status_code == 200
        (alarm,) = response.json()["alarms"]
        assert "append-only file off: when it ends, what isn't drained is lost" in alarm
    else:
        assert response.status_code == 503
        assert "has appendonly=no" in response.json()["parts"]["redis"]
