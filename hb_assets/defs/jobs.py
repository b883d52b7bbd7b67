"""Jobs that the UI, sensors and `hb` launch by name: which assets run together."""

from __future__ import annotations

import dagster as dg

from hb_assets.defs.assets import HEARTBEATS, MINUTE_HEART_RATE, RAW_HEARTBEATS

CONSOLIDATE_DAY = "consolidate_day"
DRAIN_AND_REPORT = "drain_and_report"

consolidate_day = dg.define_asset_job(
    CONSOLIDATE_DAY,
    # their steps evaluate the checks all the same: `outcomes.step_outs`
    selection=dg.AssetSelection.assets(HEARTBEATS, MINUTE_HEART_RATE).without_checks(),
    description="Consolidate one day, check it, and build its minutes. `hb up`, `hb backfill` and "
    "the consolidation sensor launch it.",
)

drain_and_report = dg.define_asset_job(
    DRAIN_AND_REPORT,
    selection=[RAW_HEARTBEATS],
    description="Drain the buffer by hand, and report one day's fragments; the drain sensor does "
    "this all the time.",
)
