"""The gateway as an ASGI application for a server that isn't ours.

`hb serve` serves it with uvicorn (`hb_assets.gateway.server`), with bounds on connections that are
missing here.
"""

from __future__ import annotations

from hb_assets.core.settings import Settings
from hb_assets.gateway.app import Gateway


def gateway() -> Gateway:
    """An application with the settings of the environment."""
    return Gateway(Settings())
