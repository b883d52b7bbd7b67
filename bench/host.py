"""Serves a bench app as the gateway is served: `python -m bench.host MODULE PORT [proxied]`.

uvicorn's settings are the same as in hb_assets/gateway/server.py.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import uvicorn

from hb_assets.gateway.server import BACKLOG, GRACE_SECONDS, KEEP_ALIVE_SECONDS

OPTIONS: dict[str, Any] = {
    "ws": "none",
    "log_config": None,
    "access_log": False,
    "server_header": False,
}
"""What a request costs uvicorn, whichever way it comes in."""


def main() -> None:
    """Serve `bench.MODULE`'s app on 127.0.0.1, in one process, until SIGTERM.

    With `proxied` it takes the word of a proxy on this machine for who its clients are.
    """
    module, port, *proxied = sys.argv[1:]
    uvicorn.run(
        importlib.import_module(f"bench.{module}").app,
        host="127.0.0.1",
        port=int(port),
        loop="uvloop",
        http="httptools",
        proxy_headers=bool(proxied),
        forwarded_allow_ips="127.0.0.1",
        **OPTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        backlog=BACKLOG,
    )


if __name__ == "__main__":
    main()
