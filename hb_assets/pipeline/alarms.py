"""Alarms: when one is raised, repeated or resolved, and sending it.

The decision is a pure function; sending means one log line and HB_ALERT_WEBHOOK. What is wrong is
known to whoever looked, and gauges are in `gateway.observability.metrics`. Messages hold no heart
rate and no clear user_id: they leave the machine.
"""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from hb_assets.core.settings import Settings
from hb_assets.lake.integrity.known_faults import Fault

_log = logging.getLogger(__name__)

REPEAT_MS = 3_600_000


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """One notice; its JSON is what the webhook gets. `resolved`: what was wrong is over."""

    alarm: str
    severity: Literal["error", "resolved"] = "error"
    message: str
    at: str
    details: dict[str, str] = {}


class Raised(msgspec.Struct, frozen=True):
    """An alarm that stands: its message, and when it was told last (epoch milliseconds)."""

    message: str
    told_ms: int


def load(text: str | None) -> dict[str, Raised]:
    """Parse what `dump` wrote: the alarms that stood; none of another text."""
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Raised])
    except msgspec.MsgspecError:
        return {}


def dump(raised: Mapping[str, Raised]) -> str:
    """Serialize the alarms that stand, for a sensor's cursor."""
    return msgspec.json.encode(raised).decode()


def alarm(name: str, message: str, now_ms: int, **details: str) -> Alarm:
    """Make a notice that something is wrong."""
    return Alarm(alarm=name, message=message, at=_instant(now_ms), details=details)


def changes(
    raised: Mapping[str, Raised], found: Mapping[str, str], now_ms: int
) -> tuple[list[Alarm], dict[str, Raised]]:
    """Notices to send: alarms that are new, repeated after an hour, or resolved.

    Args:
        raised: alarms that stood before, by name.
        found: messages of those that stand now, by name.
        now_ms: the clock, epoch milliseconds.

    Returns:
        The notices, and the alarms that stand.
    """
    notices, standing = [], {}
    for name, message in found.items():
        before = raised.get(name)
        if before is not None and now_ms - before.told_ms < REPEAT_MS:
            standing[name] = Raised(message, before.told_ms)
            continue
        notices.append(alarm(name, message, now_ms))
        standing[name] = Raised(message, now_ms)
    for name, before in raised.items():
        if name not in found:
            text = f"over: {before.message}"
            notices.append(
                Alarm(alarm=name, severity="resolved", message=text, at=_instant(now_ms))
            )
    return notices, standing


def of_lake(faults: Iterable[Fault]) -> dict[str, str]:
    """Alarm messages of the lake's known faults, by name: one for each kind and day."""
    lines: dict[str, list[str]] = {}
    for fault in faults:
        day = "" if fault.day is None else f":{fault.day}"
        lines.setdefault(f"lake_{fault.kind}{day}", []).append(fault.message)
    return {
        name: found[0] + (f"; {len(found) - 1} more of this day" if len(found) > 1 else "")
        for name, found in lines.items()
    }


def tell(notices: Sequence[Alarm], settings: Settings) -> None:
    """Send notices: one log line for each, and a POST to HB_ALERT_WEBHOOK.

    Never raises: an alarm that can't be told must not stop what noticed it.
    """
    for notice in notices:
        level = logging.ERROR if notice.severity == "error" else logging.INFO
        _log.log(level, "alarm %s (%s): %s", notice.alarm, notice.severity, notice.message)
    if settings.alert_webhook is None or not notices:
        return
    import httpx  # a tenth of what it takes to load all of us, and mostly for nothing

    try:
        with httpx.Client(timeout=httpx.Timeout(5, connect=2)) as http:
            for notice in notices:
                http.post(
                    settings.alert_webhook,
                    content=msgspec.json.encode(notice),
                    headers={"Content-Type": "application/json"},
                ).raise_for_status()
    # httpx.InvalidURL is no HTTPError; the URL may hold a token, so that no text of it is logged
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        _log.error("HB_ALERT_WEBHOOK can't be told: %s", type(error).__name__)


def _instant(epoch_ms: int) -> str:
    moment = dt.datetime.fromtimestamp(epoch_ms / 1000, dt.UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
