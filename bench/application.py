"""The gateway as an application for a server that isn't ours.

Belongs here: nothing else. `hb serve` serves it with uvicorn (`hb_assets.gateway.server`), and
without the bounds that connections have there.
"""

from __future__ import annotations

from hb_assets.core.settings import Settings
from hb_assets.gateway.app import Gateway


def gateway() -> Gateway:
    """An application with the settings of the environment."""
    return Gateway(Settings())
