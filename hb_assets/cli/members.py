"""The members of `hb up`: which processes run, in which order, and when each is ready.

Their argv, environment and configuration files; `supervision` keeps them alive.
"""

from __future__ import annotations

import shutil
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import msgspec

from hb_assets.buffer import connection, server
from hb_assets.cli.dagster_api import ControlRoom
from hb_assets.core.errors import HbError
from hb_assets.core.settings import PACKAGE, SOCKET_PATH_BYTES, Settings, environment
from hb_assets.gateway.http import tls


@dataclass(frozen=True, slots=True)
class Member:
    """One supervised process. `ready` says whether it does its work already."""

    name: str
    argv: tuple[str, ...]
    ready: Callable[[], bool]


def stages(settings: Settings, room: ControlRoom) -> list[list[Member]]:
    """The members in stages: those of a stage start together, once the stage before is ready.

    Writes the configuration of the embedded server and of Dagster.
    """
    code_server, workspace = _code_server(settings)
    started = time.time()
    first = []
    if settings.embedded:
        redis = tuple(server.prepare(settings).argv)
        first = [[Member("redis", redis, lambda: _redis_answers(settings))]]
    return [
        *first,
        [
            Member(
                "gateway",
                _module("hb_assets", "serve"),
                lambda: _healthy(settings),
            ),
            code_server,
        ],
        [
            Member(
                "webserver",
                _module("hb_assets.defs.webserver", str(workspace)),
                lambda: room.answers() and room.loaded(),
            ),
            Member(
                "daemon",
                _module("dagster._daemon", "run", "--workspace", str(workspace)),
                lambda: room.daemons_alive(started),
            ),
        ],
    ]


def members_environment(settings: Settings) -> dict[str, str]:
    """Environment of all members: our settings, spelled out, and Dagster's home."""
    return {
        **environment(settings),
        "DAGSTER_HOME": str(settings.dagster_home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }


def gateway_url(settings: Settings) -> str:
    """Where a client on this machine reaches the gateway."""
    host = settings.gateway_host
    everywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # compared, not bound to
    host = everywhere.get(host, host)
    host = f"[{host}]" if ":" in host else host
    scheme = "https" if settings.gateway_cert else "http"
    return f"{scheme}://{host}:{settings.gateway_port}"


def _code_server(settings: Settings) -> tuple[Member, Path]:
    """Dagster's code server, and the workspace.yaml that leads webserver and daemon to it.

    One server for both, and one that is supervised: those that Dagster starts by itself aren't
    started again when they are killed.
    """
    shutil.copyfile(PACKAGE / "dagster.yaml", settings.dagster_home / "dagster.yaml")
    path = str(settings.run_dir / "code.sock")
    if len(path.encode()) <= SOCKET_PATH_BYTES:
        where: dict[str, object] = {"socket": path}
        option = ("--socket", path)
        ready = partial(_listens, socket.AF_UNIX, path)
    else:
        port = server.free_port()
        where = {"host": "127.0.0.1", "port": port}
        option = ("--port", str(port))
        ready = partial(_listens, socket.AF_INET, ("127.0.0.1", port))
    workspace = settings.dagster_home / "workspace.yaml"
    entry = {"grpc_server": {**where, "location_name": "hb_assets"}}
    workspace.write_bytes(msgspec.json.encode({"load_from": [entry]}))  # JSON is YAML
    argv = _module("hb_assets.defs.code_server", *option)
    return Member("code", argv, ready), workspace


def _module(name: str, *arguments: str) -> tuple[str, ...]:
    """argv that runs a module; unlike a console script it finds a checkout that isn't installed."""
    return (sys.executable, "-m", name, *arguments)


def _redis_answers(settings: Settings) -> bool:
    try:
        with closing(connection.connect(settings)) as client:
            connection.ping(client)
    except HbError:
        return False
    return True


def _healthy(settings: Settings) -> bool:
    """Whether the gateway reaches Redis and the lake; a full spool may be waiting for the drain."""
    try:
        url, verify = f"{gateway_url(settings)}/health", tls.client_context(settings)
        parts = httpx.get(url, timeout=2, trust_env=False, verify=verify).json()["parts"]
        return bool(parts["redis"] == parts["lake"] == "ok")
    except (httpx.HTTPError, ValueError, LookupError, TypeError):
        return False


def _listens(family: socket.AddressFamily, address: str | tuple[str, int]) -> bool:
    with closing(socket.socket(family)) as probe:
        probe.settimeout(1)
        return probe.connect_ex(address) == 0
