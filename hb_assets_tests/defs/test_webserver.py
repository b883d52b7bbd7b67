"""Dagster's webserver as `hb up` runs it: its own pages may use it, other sites' pages may not."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from hb_assets.buffer.server import free_port
from hb_assets.core.settings import Settings, environment
from hb_assets.defs.same_origin import refusal
from hb_assets_tests.servers import wait_for

ROOT = Path(__file__).parents[2]
OWN = {"host": "localhost:3000"}
JSON = {"content-type": "application/json"}


def scope(headers: dict[str, str], method: str = "GET", path: str = "/", kind: str = "http"):
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": kind, "method": method, "path": path, "headers": raw}


@pytest.mark.parametrize(
    ("headers", "method", "path", "status"),
    [
        ({}, "GET", "/", 421),
        ({"host": "evil.example"}, "GET", "/", 421),
        ({"host": "localhost.evil.example"}, "GET", "/", 421),
        ({"host": "evil.example:3000", "origin": "http://evil.example:3000"}, "GET", "/", 421),
        ({**OWN, "origin": "http://evil.example"}, "GET", "/", 403),
        ({**OWN, "origin": "null"}, "GET", "/", 403),
        ({**OWN, "origin": "http://localhost:8080"}, "POST", "/graphql", 403),
        ({**OWN, "sec-fetch-site": "cross-site"}, "GET", "/", 403),
        (OWN, "GET", "/graphql", 405),
        (OWN, "HEAD", "/graphql/", 405),
        (OWN, "POST", "/graphql", 415),
        ({**OWN, "content-type": "text/plain"}, "POST", "/graphql", 415),
        ({**OWN, "content-type": "text/plain;application/json"}, "POST", "/graphql", 415),
        (OWN, "POST", "/report_asset_materialization/heartbeats", 415),
        (OWN, "GET", "/", None),
        ({"host": "127.0.0.1"}, "GET", "/runs", None),
        ({"host": "[::1]:3000"}, "GET", "/", None),
        ({"host": "HB.test:3000"}, "GET", "/", None),
        ({**OWN, **JSON}, "POST", "/graphql", None),
        ({**OWN, "content-type": "application/json; charset=utf-8"}, "POST", "/graphql", None),
        ({**OWN, **JSON, "origin": "http://localhost:3000"}, "POST", "/graphql", None),
        ({**OWN, "sec-fetch-site": "same-origin"}, "GET", "/", None),
        ({**OWN, "sec-fetch-site": "none"}, "GET", "/", None),
    ],
)
def test_what_is_refused(headers, method, path, status) -> None:
    names = {"localhost", "127.0.0.1", "[::1]", "hb.test"}
    refused = refusal(scope(headers, method, path), names)
    assert (refused and refused[0]) == status
    if status == 421:
        assert "HB_DAGSTER_NAMES" in refused[1]


def test_two_hosts_are_none() -> None:
    twice = scope(OWN)
    twice["headers"] *= 2
    refused = refusal(twice, {"localhost"})
    assert refused is not None
    assert refused[0] == 421


@pytest.fixture(scope="module")
def webserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A webserver of a Dagster that has no code location; its URL."""
    home = tmp_path_factory.mktemp("dagster")
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    workspace = home / "workspace.yaml"
    workspace.write_text("load_from: []\n")
    settings = Settings(home=home, dagster_port=free_port(), dagster_names="hb.test")
    process = subprocess.Popen(
        [sys.executable, "-m", "hb_assets.defs.webserver", str(workspace)],
        env={**environment(settings), "DAGSTER_HOME": str(home), "PYTHONPATH": str(ROOT)},
        cwd=home,
    )
    url = f"http://127.0.0.1:{settings.dagster_port}"
    try:
        wait_for(lambda: process.poll() is not None or answers(url), "the webserver", 60)
        yield url
    finally:
        process.terminate()
        process.wait(20)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/server_info", trust_env=False, verify=False).is_success
    except httpx.HTTPError:
        return False


MUTATION = """mutation { stopSensor(id: "drain") { __typename } }"""


def test_a_mutation_that_another_site_sends_isnt_run(webserver: str) -> None:
    with httpx.Client(base_url=webserver, trust_env=False, verify=False) as http:
        image = http.get("/graphql", params={"query": MUTATION}, headers={"Host": "evil.example"})
        assert image.status_code == 421
        assert "HB_DAGSTER_NAMES" in image.text
        assert http.get("/graphql", params={"query": MUTATION}).status_code == 405
        form = http.post(
            "/graphql", params={"query": MUTATION}, headers={"Content-Type": "text/plain"}
        )
        assert form.status_code == 415
        page = http.post("/graphql", json={"query": MUTATION}, headers={"Origin": "http://a.test"})
        assert page.status_code == 403


def test_its_own_page_and_a_named_host_are_served(webserver: str) -> None:
    with httpx.Client(base_url=webserver, trust_env=False, verify=False) as http:
        own = http.post("/graphql", json={"query": "{ version }"}, headers={"Origin": webserver})
        assert own.json()["data"]["version"]
        named = http.get("/", headers={"Host": "hb.test"})
        assert "<html" in named.text


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "evil.example"}],
)
def test_a_websocket_of_another_site_is_refused(webserver: str, headers: dict[str, str]) -> None:
    headers = dict(headers)
    port = int(webserver.rpartition(":")[2])
    host = headers.pop("Host", f"127.0.0.1:{port}")
    with (
        socket.create_connection(("127.0.0.1", port)) as raw,
        pytest.raises(InvalidStatus) as refused,
    ):
        connect(f"ws://{host}/graphql", sock=raw, additional_headers=headers, proxy=None)
    assert refused.value.response.status_code == 403


def test_a_websocket_of_its_own_page_is_served(webserver: str) -> None:
    url = webserver.replace("http", "ws") + "/graphql"
    with connect(url, origin=webserver, subprotocols=["graphql-ws"], proxy=None) as opened:
        opened.send(json.dumps({"type": "connection_init"}))
        assert json.loads(opened.recv())["type"] == "connection_ack"
