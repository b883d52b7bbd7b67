"""Dagster's webserver as `hb up` runs it: on 127.0.0.1, for its own pages alone.

`python -m hb_assets.defs.webserver WORKSPACE`, with DAGSTER_HOME and the HB_ settings in the
environment. `dagster-webserver` and `dagster dev` have no such guard (docs/security.md).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import dagster as dg
import uvicorn
from dagster._core.workspace.context import WorkspaceProcessContext  # no public name
from dagster._core.workspace.load_target import WorkspaceFileTarget  # no public name
from dagster_webserver.version import __version__
from dagster_webserver.webserver import DagsterWebserver

from hb_assets.core import settings as configuration
from hb_assets.core.settings import Settings
from hb_assets.defs.same_origin import App, SameOrigin

_POLL_MS = 2000
"""How often the UI asks for news of assets; as `dagster-webserver` has it."""


def guarded(context: WorkspaceProcessContext, settings: Settings) -> App:
    """The webserver's app, behind the guard."""
    webserver: DagsterWebserver[Any, Any] = DagsterWebserver(context, live_data_poll_rate=_POLL_MS)
    return SameOrigin(webserver.create_asgi_app(), settings.dagster_names)


def main(arguments: Sequence[str]) -> None:
    """Serve until SIGTERM or SIGINT. Raises SettingsError."""
    [workspace] = arguments
    settings = configuration.load()
    with (
        dg.DagsterInstance.get() as instance,
        WorkspaceProcessContext(
            instance, WorkspaceFileTarget([workspace]), version=__version__
        ) as context,
    ):
        uvicorn.run(
            guarded(context, settings),
            host="127.0.0.1",
            port=settings.dagster_port,
            log_level="warning",
        )


if __name__ == "__main__":
    main(sys.argv[1:])
