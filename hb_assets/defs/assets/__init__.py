"""The three assets, one partition a UTC day: raw fragments, consolidated files, minutes.

Only the steps are here. `pipeline` and `lake` do the work, `sensors` decide when.
"""

from __future__ import annotations

import dagster as dg

RAW_HEARTBEATS = dg.AssetKey("raw_heartbeats")
HEARTBEATS = dg.AssetKey("heartbeats")
MINUTE_HEART_RATE = dg.AssetKey("minute_heart_rate")

OWNERS = ["team:heartbeats"]
TAGS = {"domain": "wearables", "sensitivity": "health"}
