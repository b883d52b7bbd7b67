"""Documentation: the handlers of /openapi.json and /docs, the same document for two readers.

Belongs here: making a page out of the document, which needs neither scripts nor anything from
elsewhere. Doesn't belong here: what the document says (`openapi`), and how the page looks
(documentation.html).
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jinja2
import msgspec
from starlette.requests import Request
from starlette.responses import Response

from hb_assets import __version__
from hb_assets.core.settings import Settings
from hb_assets.gateway.openapi import Json, document

FRESH_SECONDS = 60
"""How long a document is kept: it states the latest timestamp that is taken."""
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
}


class Documentation:
    """GET /openapi.json and GET /docs."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # kept by the number of the minute, so that a reader in a loop costs little
        self._document = lru_cache(maxsize=1)(self._build)
        self._page = lru_cache(maxsize=1)(self._render)

    async def openapi(self, _request: Request) -> Response:
        """The document, as JSON."""
        body = msgspec.json.format(msgspec.json.encode(self._document(_turn())), indent=2)
        return Response(body, media_type="application/json")

    async def docs(self, _request: Request) -> Response:
        """The document, as a page."""
        return Response(self._page(_turn()), headers=PAGE_HEADERS, media_type="text/html")

    def _build(self, turn: int) -> Json:
        now = dt.datetime.fromtimestamp(turn * FRESH_SECONDS, dt.UTC)
        return document(self._settings, now, __version__)

    def _render(self, turn: int) -> str:
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("hb_assets", "gateway"),
            autoescape=True,
            undefined=jinja2.ChainableUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        found = self._document(turn)
        environment.filters |= {
            "resolved": lambda node: _resolved(found, node),
            "name_of": _name_of,
            "shape": _shape,
            "pretty": lambda value: msgspec.json.format(msgspec.json.encode(value)).decode(),
        }
        return environment.get_template("documentation.html").render(api=found)


def _turn() -> int:
    return int(time.time()) // FRESH_SECONDS


def _resolved(found: Json, node: Json) -> Json:
    """What a node of the document means: itself, or where its $ref points to."""
    if "$ref" not in node:
        return node
    target: Any = found
    for part in node["$ref"].removeprefix("#/").split("/"):
        target = target[part]
    assert isinstance(target, dict)
    return target


def _name_of(node: Json) -> str:
    """Name of the schema that a $ref points to, or nothing."""
    return str(node["$ref"]).rpartition("/")[2] if "$ref" in node else ""


def _shape(schema: Json) -> str:
    """A schema in a few words: its type and bounds."""
    if "anyOf" in schema:
        return " or ".join(map(_shape, schema["anyOf"]))
    words = [_name_of(schema), schema.get("type"), *_bounds(schema)]
    for word, part in (("of", "items"), ("with any", "contains")):
        if part in schema:
            words.append(f"{word} {_shape(schema[part])}")
    if "enum" in schema:
        words.append("one of " + ", ".join(map(str, schema["enum"])))
    if "const" in schema:
        words.append(f"always {schema['const']}")
    return " ".join(filter(None, words))


def _bounds(schema: Json) -> Iterator[str]:
    if "format" in schema:
        yield f"({schema['format']})"
    for name, unit in (("imum", ""), ("Length", " characters"), ("Items", " items")):
        least, most = schema.get(f"min{name}"), schema.get(f"max{name}")
        if least is not None and most is not None:
            yield f"{least} to {most}{unit}"
        elif least is not None:
            yield f"at least {least}{unit}"
        elif most is not None:
            yield f"at most {most}{unit}"
