"""An ASGI middleware that keeps pages of other sites from using Dagster's webserver.

Dagster's webserver asks nobody who they are, and takes whatever any web page has the browser of its
user send: mutations by GET too, as an `<img>` sends it. What is refused here are requests to a name
that isn't the webserver's (DNS rebinding), and requests that a browser sends for another site.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from typing import Any, TypeAlias

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

Message: TypeAlias = MutableMapping[str, Any]
App: TypeAlias = Callable[
    [Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]],
    Awaitable[None],
]


class SameOrigin:
    """Refuses what doesn't come from the webserver's own pages, or from no page at all.

    Args:
        app: the webserver.
        names: host names it may be asked by, besides localhost, 127.0.0.1 and [::1].
    """

    def __init__(self, app: App, names: Collection[str] = ()) -> None:
        self._app = app
        self._names = _LOOPBACK | {name.lower() for name in names}

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Pass a request on, or answer it."""
        refused = None
        if scope["type"] in ("http", "websocket"):
            refused = refusal(scope, self._names)
        if refused is None:
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": refused[1]})
        else:
            status, text = refused
            headers = [(b"content-type", b"text/plain; charset=utf-8")]
            if status == 405:
                headers.append((b"allow", b"POST"))
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": f"{text}\n".encode()})


def refusal(scope: Mapping[str, Any], names: Collection[str]) -> tuple[int, str] | None:
    """Status and text with which a request is refused; None where it may pass.

    Args:
        scope: ASGI's, of a request or a websocket.
        names: host names that may be asked for, in small letters.
    """
    hosts = _values(scope, b"host")
    if len(hosts) != 1 or _name(hosts[0]) not in names:
        return 421, (
            "Dagster answers to localhost, 127.0.0.1, [::1] and the names in HB_DAGSTER_NAMES alone; "
            "add this host's name there and start `hb up` again"
        )
    if any(origin.partition("://")[2] != hosts[0] for origin in _values(scope, b"origin")):
        return 403, "Dagster takes no requests from pages of another origin"
    if "cross-site" in _values(scope, b"sec-fetch-site"):
        return 403, "Dagster takes no requests from other sites; open it by its address"
    if scope["type"] == "websocket":
        return None
    method = scope["method"]
    if scope["path"].rstrip("/") == "/graphql" and method != "POST":
        return 405, "GraphQL is asked by POST alone"
    if method not in ("GET", "HEAD") and not _is_json(_values(scope, b"content-type")):
        return 415, "this takes Content-Type: application/json alone"
    return None


def _values(scope: Mapping[str, Any], name: bytes) -> list[str]:
    found = (value for key, value in scope["headers"] if key == name)
    return [value.decode("latin-1").strip().lower() for value in found]


def _name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return name if colon and (port.isdecimal() or not port) else host


def _is_json(types: list[str]) -> bool:
    return [one.partition(";")[0].strip() for one in types] == ["application/json"]
