"""Dagster's code server as `hb up` runs it, which reloads its definitions for earlier days.

`python -m hb_assets.defs.code_server` takes the options of `dagster code-server start`, of which
`--socket` or `--port` says where it listens. That is a proxy before a server of its own, which it
replaces at a reload; runs of the old one go on. It reloads when the lake holds a day before the
first partition. Nobody starts that server again when it is killed, so that the proxy then ends, and
is started again by its supervisor.
"""

from __future__ import annotations

import datetime as dt
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence

from dagster._cli.code_server import start_command  # no public name
from dagster._core.errors import DagsterUserCodeUnreachableError  # no public name
from dagster._grpc.client import DagsterGrpcClient  # no public name

from hb_assets.core import settings as configuration
from hb_assets.core.settings import Settings
from hb_assets.defs import partitions

_log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_PATIENCE = 5
_ANSWER_SECONDS = 10
_RELOAD_SECONDS = 120


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT. Raises SettingsError."""
    settings = configuration.load()
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    port = options.get("--port")
    client = DagsterGrpcClient(
        port=int(port) if port else None, socket=options.get("--socket"), host="127.0.0.1"
    )
    loaded = partitions.first_day(settings, _now_ms())  # or an earlier one, by then
    watched = (client, settings, loaded)
    threading.Thread(target=_watch, args=watched, name="reload", daemon=True).start()
    start_command.main(["--module-name", "hb_assets.definitions", *arguments])


def _watch(client: DagsterGrpcClient, settings: Settings, loaded: dt.date) -> None:
    answered, missed = False, 0
    while missed < _PATIENCE:
        time.sleep(_POLL_SECONDS)
        try:
            client.get_server_id(timeout=_ANSWER_SECONDS)
            answered, missed = True, 0
            first = partitions.first_day(settings, _now_ms())
            if first < loaded:
                client.reload_code(timeout=_RELOAD_SECONDS)
                _log.info("loaded the definitions again: partitions begin at %s", first)
                loaded = first
        except DagsterUserCodeUnreachableError:
            missed += answered  # before the first answer the definitions may still be loading
    _log.error("the server of the definitions is gone; ending, to be started again")
    os.kill(os.getpid(), signal.SIGTERM)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    main(sys.argv[1:])
