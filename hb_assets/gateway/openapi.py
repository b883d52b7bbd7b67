"""GET /openapi.json and GET /docs: the interface's document for machines, and shown for people.

The document is openapi.yaml; what depends on settings, the record and the time is filled in here.
Swagger UI makes the page, out of files of its package: the
browser needs nothing from elsewhere, and no script or style stands in the page itself.
"""

from __future__ import annotations

import datetime as dt
import importlib.util
import re
import time
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from hb_assets import __version__
from hb_assets.core import record
from hb_assets.core.days import EPOCH
from hb_assets.core.settings import Settings

FRESH_SECONDS = 60
"""How long a document is kept: it states the latest timestamp that is taken."""
PAGE_HEADERS = {
    # Swagger UI shows what requests are answered with, and its style sheet holds its icons.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}
_OURS = Path(__file__).parent
ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "docs.js": "text/javascript",
}
"""What the page loads, and its media types; the last one is ours."""
_HOLE = re.compile(r"\{([a-z_]+)\}")


def document(settings: Settings, now: dt.datetime, version: str) -> Any:
    """The whole document.

    Args:
        settings: whose limits it states.
        now: when it is asked for; the latest timestamp that is taken depends on it.
        version: of hb.
    """
    bounds = settings.time_bounds
    now_ms = (now - EPOCH) // dt.timedelta(milliseconds=1)
    values = {
        "version": version,
        "id_least": record.ID_LENGTH[0],
        "id_most": record.ID_LENGTH[1],
        "bpm_least": record.BPM_RANGE[0],
        "bpm_most": record.BPM_RANGE[1],
        "start_date": settings.start_date,
        "max_future": settings.max_future,
        "earliest_ms": bounds.start_ms,
        "latest_ms": now_ms + bounds.future_ms,
        "ignored_most": record.Ignored.MOST,
        "ignored_length": record.Ignored.LENGTH,
        "ignored_others": record.Ignored.OTHERS,
        "batch_most": settings.batch_max_heartbeats,
        "range_most": settings.query_max_range,
        "points_most": settings.query_max_points,
    }
    return _filled(_unfilled(), values)


@cache
def _unfilled() -> Any:
    return msgspec.yaml.decode((_OURS / "openapi.yaml").read_bytes())


def _filled(node: Any, values: Mapping[str, object]) -> Any:
    """The same with `{name}` replaced: alone by the value itself, inside a text by its text."""
    if isinstance(node, dict):
        return {key: _filled(value, values) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled(item, values) for item in node]
    if not isinstance(node, str):
        return node
    if alone := _HOLE.fullmatch(node):
        return values[alone[1]]
    return _HOLE.sub(lambda hole: str(values[hole[1]]), node)


class Documentation:
    """GET /openapi.json, GET /docs and the files of that page."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # kept by the number of the minute, so that a reader in a loop costs little
        self._document = lru_cache(maxsize=1)(self._build)

    async def openapi(self, _request: Request) -> Response:
        """The document, as JSON."""
        turn = int(time.time()) // FRESH_SECONDS
        return Response(self._document(turn), media_type="application/json")

    def _build(self, turn: int) -> bytes:
        now = dt.datetime.fromtimestamp(turn * FRESH_SECONDS, dt.UTC)
        found = document(self._settings, now, __version__)
        return msgspec.json.format(msgspec.json.encode(found), indent=2)

    async def docs(self, _request: Request) -> Response:
        """The document, as a page."""
        return FileResponse(_OURS / "docs.html", headers=PAGE_HEADERS, media_type="text/html")

    async def asset(self, request: Request) -> Response:
        """What the page loads."""
        name = request.url.path.rpartition("/")[2]
        folder = _OURS if name == "docs.js" else _swagger_ui()
        return FileResponse(folder / name, media_type=ASSETS[name])


@cache
def _swagger_ui() -> Path:
    """The folder of Swagger UI's files: its package is found, and not imported."""
    found = importlib.util.find_spec("swagger_ui")
    assert found is not None
    assert found.submodule_search_locations
    return Path(found.submodule_search_locations[0]) / "static"
