"""The sensors: one that drains and reports, one that asks for consolidation, two that raise alarms.

Belongs here: what they share. Doesn't belong here: the rules that they apply (`lake.policy`,
`alarms`).
"""

from __future__ import annotations

import time


def now_ms() -> int:
    """The clock, epoch milliseconds."""
    return time.time_ns() // 1_000_000
