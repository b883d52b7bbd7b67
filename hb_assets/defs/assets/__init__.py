"""The three assets, one partition a UTC day: raw fragments, consolidated files, minutes.

Belongs here: their names, and calls of the functions that make them. Doesn't belong here: how
they are made (`drain`, `lake`), and when (`sensors`).
"""

from __future__ import annotations

import dagster as dg

RAW_HEARTBEATS = dg.AssetKey("raw_heartbeats")
HEARTBEATS = dg.AssetKey("heartbeats")
MINUTE_HEART_RATE = dg.AssetKey("minute_heart_rate")

OWNERS = ["team:heartbeats"]
TAGS = {"domain": "wearables", "sensitivity": "health"}
