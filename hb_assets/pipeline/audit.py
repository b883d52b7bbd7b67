"""The audit: checks that every heartbeat that was appended lies in exactly one place.

It compares the buffer's ledger (`buffer.depth`) with the lake's (`lake.ledger`). What can't be read
is one line among the differences, and everything else is counted all the same.

    Redis, per shard:  appended = acknowledged + buffered
    lake:              distinct rows in raw + quarantined + erased + written off = acknowledged
    per day:           rows = unique + superseded + erased + pending
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection
from dataclasses import dataclass, field

from hb_assets.buffer import depth
from hb_assets.buffer.connection import Client
from hb_assets.buffer.receipts import Receipts
from hb_assets.core.settings import Settings
from hb_assets.lake import ledger
from hb_assets.lake.integrity import known_faults
from hb_assets.lake.ledger import DayLedger
from hb_assets.lake.storage.store import Lake

_ATTEMPTS = 5
_OF_THE_LEDGER = ("set_aside", "damaged", "missing", "not_adding_up", "unreadable")
"""Faults by which heartbeats may be missing; a failed consolidation loses nothing."""


@dataclass(frozen=True, slots=True)
class BufferLedger:
    """The buffer's side, over all shards.

    `in_flight` heartbeats are claimed and not acknowledged: they may lie in the lake already.
    `set_back` that Redis had confirmed are no longer known to it: they count as acknowledged, so
    that the lake must have them.
    """

    appended: int
    acknowledged: int
    buffered: int
    in_flight: int
    set_back: int


@dataclass(frozen=True, slots=True)
class Audit:
    """The verdict. `differences` says, in one line each, what doesn't add up.

    `erased` were forgotten before they came into raw; those that were forgotten later are counted
    by their day. `written_off` were lost with files whose loss a person has accepted; of some of
    these nobody can tell how many they held: then it is what is missing, up to a bound. `missing`
    lie in no place, `missing_at_most` so many if what is in flight lies in the lake already.
    """

    buffer: BufferLedger
    days: list[DayLedger]
    rows: int
    quarantined: int
    released: int
    erased: int = 0
    written_off: int = 0
    missing: int = 0
    missing_at_most: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def adds_up(self) -> bool:
        """Whether nothing is missing and nothing too much."""
        return not self.differences


def audit(
    client: Client,
    lake: Lake,
    settings: Settings,
    *,
    deep: bool | Collection[dt.date] = False,
) -> Audit:
    """Reconcile the buffer and every day of the lake.

    While drains go on, the lake may only be known to lie between what was acknowledged before it
    was counted and what was acknowledged or in flight after; a still moment is waited for a while.

    Args:
        client: of the buffer.
        lake: which lake.
        settings: shards, memory, threads.
        deep: verify every file, bit for bit, and count distinct keys from raw (reads it all); of
            these days alone where it names some.

    Raises:
        BufferUnavailableError: Redis doesn't answer.
    """
    confirmed = dict(enumerate(Receipts(settings).known()))
    for attempt in range(_ATTEMPTS):
        before = depth.depths(client, settings)
        unread: list[str] = []
        days = ledger.of_days(lake, settings, deep=deep, faults=unread)
        quarantine = ledger.of_quarantine(lake, settings)
        erased, erased_faults = ledger.of_erased_found(lake, settings)
        accepted = ledger.of_accepted(lake)
        buffered, buffer_faults = _buffered(client, settings)
        # before `after`: what is acknowledged meanwhile may count on both sides, never on neither
        external = depth.external_lines(client, settings)
        after = depth.depths(client, settings)
        set_back = sum(max(0, confirmed[shard.shard] - shard.appended) for shard in before.states)
        low = sum(shard.acknowledged for shard in before.states) + set_back
        high = sum(shard.acknowledged for shard in after.states) + set_back
        pending = sum(shard.pending for shard in after.states)
        if (low == high and not pending) or attempt == _ATTEMPTS - 1:
            break
    in_flight = sum(buffered.values()) + external if pending else 0
    rows = sum(day.rows for day in days)
    in_lake = rows + quarantine.records - quarantine.in_fragments + erased
    unknown = {**before.faults, **after.faults}
    differences = [*unknown.values(), *depth.losses(after.states), *buffer_faults]
    differences += [fault for day in days for fault in day.faults]
    differences += [*unread, *quarantine.faults, *erased_faults, *accepted.faults]
    if deep:
        differences += ledger.damage_beside_days(lake, None if deep is True else deep)
    differences = list(dict.fromkeys(differences))
    differences += [
        fault.message
        for fault in known_faults.faults(lake)
        if fault.kind in _OF_THE_LEDGER and not any(str(fault.path) in line for line in differences)
    ]
    written_off = accepted.rows
    written_off += min(accepted.at_most, max(0, low - in_lake - accepted.rows))
    missing = max(0, low - in_lake - written_off)
    counted = (
        f"{rows:,} rows in raw, {quarantine.records:,} quarantined, {erased:,} erased before, "
        f"{written_off:,} written off"
    )
    if missing:
        differences.append(
            f"{missing:,} heartbeats are missing: {low:,} were acknowledged, the lake holds "
            f"{in_lake:,} ({counted})"
            + (f"; Redis was set back by {set_back:,} that it had confirmed" if set_back else "")
        )
    elif in_lake + accepted.rows > high + in_flight and not unknown:
        differences.append(
            f"the lake holds {in_lake + accepted.rows - high - in_flight:,} heartbeats more than "
            f"this buffer ever acknowledged ({counted}; {high:,} acknowledged): the buffer's "
            "ledger was lost or set back, or the lake has another source"
        )
    return Audit(
        buffer=BufferLedger(
            appended=sum(shard.appended for shard in after.states) + set_back,
            acknowledged=high,
            buffered=sum(buffered.values()),
            in_flight=in_flight,
            set_back=set_back,
        ),
        days=days,
        rows=rows,
        quarantined=quarantine.records - quarantine.in_fragments,
        released=quarantine.released,
        erased=erased,
        written_off=written_off,
        missing=missing,
        missing_at_most=max(0, high + in_flight - in_lake - written_off),
        differences=differences,
    )


def _buffered(client: Client, settings: Settings) -> tuple[dict[int, int], list[str]]:
    """Heartbeats that lie in the streams, and the shards where that isn't what the ledger says.

    While appends and drains go on, the ledger only says between which bounds they must be.
    """
    before = {one.shard: one for one in depth.depths(client, settings).states}
    counted = depth.scanned(client, settings)
    faults = []
    for now in depth.depths(client, settings).states:
        was, found = before.get(now.shard), counted.get(now.shard)
        if was is None or found is None:
            continue  # what lies there can't be read: the caller says so
        if not was.appended - now.acknowledged <= found <= now.appended - was.acknowledged:
            faults.append(
                f"buffer, shard {now.shard:02d}: {now.appended:,} appended, {now.acknowledged:,} "
                f"acknowledged, but {found:,} lie in the stream instead of {now.heartbeats:,}"
            )
    return counted, faults
