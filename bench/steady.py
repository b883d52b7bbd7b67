"""A simulated day of steady traffic, consolidated whenever it is due, with a clock of its own.

It counts the rows that were written for it. `lake.compaction.policy` decides when it is due; what
the sensor does every few seconds is simulated here.
"""

from __future__ import annotations

import os
from pathlib import Path

from bench.measure import Found
from bench.traffic import DAY, Traffic
from bench.ways import settings_in
from hb_assets.core import days
from hb_assets.core.settings import Settings
from hb_assets.lake import inventory
from hb_assets.lake.compaction import consolidation, policy
from hb_assets.lake.files import fragments
from hb_assets.lake.storage.store import Lake

_STEP_MINUTES = 10


def day(home: str, rows: int, users: int) -> Found:
    """Let a day's rows come in, ten minutes' worth at a time, and the day after begin.

    A fragment's age is that of its file, which gets the simulated time.
    """
    settings = settings_in(Path(home))
    lake = Lake.open(settings)
    steps = 24 * 60 // _STEP_MINUTES
    traffic = Traffic(rows, people=users, flush_rows=rows // steps)
    consolidations, clock = 0, days.start_ms(DAY)
    for table in traffic.tables():
        clock += _STEP_MINUTES * 60_000
        for fragment in fragments.publish(lake, table):
            os.utime(fragment.path, (clock / 1000, clock / 1000))
        consolidations += _consolidate_if_due(lake, clock, settings)
    clock += int(settings.consolidate_max_age.total_seconds() * 1000) + 1
    consolidations += _consolidate_if_due(lake, clock, settings)
    state = inventory.day_state(lake, DAY, settings)
    return {
        "consolidations": consolidations,
        "amplification": state.rows_written / state.fragment_rows,
        "pending": state.pending_rows,
    }


def _consolidate_if_due(lake: Lake, clock: int, settings: Settings) -> bool:
    state = inventory.day_state(lake, DAY, settings)
    if not state.pending_fragments or policy.due(state, clock, settings) is None:
        return False
    consolidation.consolidate(lake, DAY, settings)
    return True
