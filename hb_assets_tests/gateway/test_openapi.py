from __future__ import annotations

import datetime as dt
import html.parser

import httpx

from hb_assets.core.settings import Settings
from hb_assets.gateway.app import _routes
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.observability.metrics import Metrics
from hb_assets.gateway.openapi import document
from hb_assets_tests.conftest import VALKEY

NOW = dt.datetime.now(dt.UTC)


@VALKEY
def test_names_every_route(settings: Settings) -> None:
    found = document(settings, NOW, "1")["paths"]
    documented = {path: {method.upper() for method in methods} for path, methods in found.items()}
    routes = _routes(settings, Backend(settings), Metrics(settings))
    assert documented == {path: set(methods) - {"HEAD"} for path, methods in routes.items()}
    for path, methods in routes.items():
        for method, route in methods.items():
            if method != "HEAD":
                operation = found[path][method.lower()]
                scopes = {
                    scope for way in operation.get("security", []) for [scope] in way.values()
                }
                assert scopes == ({route.needed} if route.needed else set())


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe"}
        given = dict(attrs)
        self.links.add(given.get("href") or "#")
        self.ids.add(given.get("id") or "")
        assert not any(name.startswith("on") or name == "src" for name in given)


@VALKEY
def test_page_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    answer = http.get("/docs")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    page = _Page()
    page.feed(answer.text)
    for link in page.links - {"#", "/openapi.json"}:
        assert link[0] == "#"
        assert link[1:] in page.ids
    operations = [
        one["operationId"]
        for path in http.get("/openapi.json").json()["paths"].values()
        for one in path.values()
    ]
    assert page.ids.issuperset(operations)
