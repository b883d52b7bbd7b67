"""The floor of a request: a bare ASGI app that reads nothing and answers as the gateway does.

No application on this server can be faster.
"""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

BODY = b'{"status":"accepted"}'
_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(BODY)).encode()),
    ],
}
_END = {"type": "http.response.body", "body": BODY}


async def app(scope: Scope, _receive: Receive, send: Send) -> None:
    """200 to every request."""
    if scope["type"] == "http":
        await send(_START)
        await send(_END)
