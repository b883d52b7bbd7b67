"""What schemathesis has to know of our interface, and JSON Schema can't say.

Generators of requests with bodies that aren't JSON, and with times that depend on now or on one
another; no check is turned off here.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import schemathesis
from hypothesis import strategies as st


@schemathesis.serializer("application/x-ndjson")
def lines(_context: Any, value: Any) -> bytes:
    """An item a line."""
    items = value if isinstance(value, list) else [value]
    return "\n".join(map(json.dumps, items)).encode()


NOW = dt.datetime.now(dt.UTC).replace(tzinfo=None)
ZONES = st.sampled_from(["", "Z", "+05:30", "-08:00"])

# Heartbeats have to be from HB_START_DATE on, and at most HB_MAX_FUTURE ahead.
schemathesis.openapi.format(
    "date-time",
    st.builds(
        lambda moment, zone: moment.isoformat() + zone,
        st.datetimes(dt.datetime(2020, 1, 2), NOW),
        ZONES,
    ),
)


@schemathesis.hook
def map_query(_context: Any, query: dict[str, Any] | None) -> dict[str, Any] | None:
    """Let `end` follow `start`, within HB_QUERY_MAX_RANGE, where both are times."""
    if query and {"start", "end"} <= set(query):
        try:
            start = dt.datetime.fromisoformat(query["start"])
            dt.datetime.fromisoformat(query["end"])
        except (TypeError, ValueError):
            return query
        query["end"] = (start + dt.timedelta(days=1)).isoformat()
    return query
