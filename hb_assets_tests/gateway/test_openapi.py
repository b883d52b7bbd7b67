"""The document says what the code does, as far as that can be compared without asking a gateway."""

from __future__ import annotations

import datetime as dt
import html.parser
from typing import Any

import httpx
import msgspec
import pytest

from hb_assets.core import record
from hb_assets.core.settings import Settings
from hb_assets.gateway import middleware
from hb_assets.gateway.app import _routes
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.http import bodies, problems
from hb_assets.gateway.ingest.heartbeats import Refused
from hb_assets.gateway.observability.metrics import Metrics
from hb_assets.gateway.openapi import ASSETS, document
from hb_assets.gateway.reads import formats
from hb_assets.gateway.reads.formats import Answer, Reading
from hb_assets.gateway.reads.readings import NO, YES
from hb_assets.lake.query.aggregate import GRANULARITIES
from hb_assets_tests.conftest import VALKEY

NOW = dt.datetime(2026, 7, 1, tzinfo=dt.UTC)


@pytest.fixture(scope="module")
def found() -> Any:
    return document(Settings(), NOW, "1.2.3")


@VALKEY
def test_names_every_route(settings: Settings, found: Any) -> None:
    routes = _routes(settings, Backend(settings), Metrics())
    of_the_page = {f"/docs/{name}" for name in ASSETS}
    assert of_the_page <= set(routes)
    documented = {path: set(methods) for path, methods in found["paths"].items()}
    assert documented == {
        path: {method.lower() for method in methods} - {"head"}
        for path, methods in routes.items()
        if path not in of_the_page
    }
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            scopes = {scope for way in operation.get("security", []) for [scope] in way.values()}
            needed = routes[path][method.upper()].needed
            assert scopes == ({needed} if needed else set())
            if needed:
                assert f"scope `{needed}`" in operation["description"]
                assert {"401", "403", "421"} <= set(operation["responses"])


def plain(node: Any) -> Any:
    """A schema without its texts."""
    if isinstance(node, dict):
        return {
            key: plain(value)
            for key, value in node.items()
            if not (key in {"title", "description"} and isinstance(value, str))
        }
    return node


def test_shapes_are_those_of_the_classes(found: Any) -> None:
    template = "#/components/schemas/{name}"
    _, shapes = msgspec.json.schema_components(
        [record.Wire, Refused, Answer, Reading], ref_template=template
    )
    shapes = msgspec.json.decode(msgspec.json.encode(shapes))
    schemas = found["components"]["schemas"]
    for name in ("Refused", "Answer", "Reading"):
        assert plain(schemas[name]) == plain(shapes[name])
    heartbeat, wire = schemas["Heartbeat"], shapes["Wire"]
    assert heartbeat["required"] == [
        name for name in record.WIRE_FIELDS if name in wire["required"]
    ]
    for name, shape in heartbeat["properties"].items():
        assert shape == wire["properties"][name]
    times = [name for way in heartbeat["anyOf"] for name in way["required"]]
    assert {*heartbeat["properties"], *times} == set(record.WIRE_FIELDS)


def test_names_are_those_of_the_code(found: Any) -> None:
    components, paths = found["components"], found["paths"]
    assert components["schemas"]["Problem"]["properties"]["type"]["pattern"].startswith(
        f"^{problems.TYPE_PREFIX}"
    )
    assert (
        components["headers"]["X-Request-ID"]["schema"]["pattern"] == f"^{middleware.ID_PATTERN}$"
    )
    assert " or ".join(bodies.CODINGS) in found["info"]["description"]
    assert problems.MEDIA_TYPE in components["responses"]["Failed"]["content"]
    read, sent = paths["/metrics/heart-rate"]["get"], paths["/metrics/heart-rate/batch"]["post"]
    assert set(sent["requestBody"]["content"]) == {bodies.JSON, bodies.NDJSON[0]}
    assert list(read["responses"]["200"]["content"]) == [
        *(formats.JSON, formats.NDJSON, formats.CSV, formats.ARROW, formats.PARQUET)
    ]
    choices = {one["name"]: one["schema"].get("enum") for one in read["parameters"] if "in" in one}
    assert choices["granularity"] == list(GRANULARITIES)
    assert choices["fresh"] == [*YES, *NO]


def test_says_what_the_settings_say() -> None:
    settings = Settings(
        batch_max_heartbeats=77,
        query_max_points=88,
        query_max_range=dt.timedelta(days=9),
        start_date=dt.date(2024, 3, 2),
        max_future=dt.timedelta(hours=1),
    )
    found = document(settings, NOW, "1.2.3")
    assert found["info"]["version"] == "1.2.3"
    paths = found["paths"]
    batch = paths["/metrics/heart-rate/batch"]["post"]["requestBody"]["content"]
    assert [media["schema"]["maxItems"] for media in batch.values()] == [77, 77]
    asked = {one.get("name"): one for one in paths["/metrics/heart-rate"]["get"]["parameters"]}
    assert asked["limit"]["schema"]["maximum"] == asked["limit"]["schema"]["default"] == 88
    assert "at most 9 days" in asked["end"]["description"]
    text, number = found["components"]["schemas"]["Heartbeat"]["anyOf"]
    assert "From 2024-03-02 on" in text["properties"]["timestamp"]["description"]
    assert number["properties"]["timestamp_ms"]["minimum"] == 1_709_337_600_000
    latest = int(NOW.timestamp() * 1000) + 3_600_000
    assert number["properties"]["timestamp_ms"]["maximum"] == latest


class _Page(html.parser.HTMLParser):
    """What a page loads; it holds no script or style of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        self._open = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert tag not in {"style", "img", "iframe"}
        assert not any(name.startswith("on") or name == "style" for name in given)
        if tag in {"script", "link"}:
            self.loaded.add(given.get("src") or given["href"] or "")
        self._open = tag

    def handle_data(self, data: str) -> None:
        assert self._open != "script" or not data.strip()

    def handle_endtag(self, tag: str) -> None:
        self._open = self._open.removesuffix(tag)


@VALKEY
def test_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    answer = http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
    assert "unsafe" not in policy
    page = _Page()
    page.feed(answer.text)
    assert page.loaded == {f"docs/{name}" for name in ASSETS}
    for name, media_type in ASSETS.items():
        loaded = http.get(f"/docs/{name}")
        assert loaded.status_code == 200
        assert loaded.headers["content-type"] == f"{media_type}; charset=utf-8"
        assert http.head(f"/docs/{name}").headers["content-length"] == str(len(loaded.content))
    assert b"SwaggerUIBundle" in http.get("/docs/swagger-ui-bundle.js").content
    assert http.get("/docs/..%2fopenapi.py").status_code == 404
