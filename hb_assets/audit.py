"""The audit: does every heartbeat that was appended lie in exactly one place?

Belongs here: holding the buffer's ledger against the lake's, and the verdict. Doesn't belong here:
how either side counts (`buffer.depth`, `lake.ledger`).

    Redis, per shard:  appended = acknowledged + buffered
    lake:              distinct rows in raw + quarantined + erased = acknowledged
    per day:           rows = unique + superseded + erased + pending
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hb_assets.buffer import depth
from hb_assets.buffer.connection import Client
from hb_assets.buffer.receipts import Receipts
from hb_assets.lake import damage, ledger
from hb_assets.lake.ledger import DayLedger
from hb_assets.lake.store import Lake
from hb_assets.settings import Settings

_ATTEMPTS = 5


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
    by their day.
    """

    buffer: BufferLedger
    days: list[DayLedger]
    rows: int
    quarantined: int
    released: int
    erased: int = 0
    differences: list[str] = field(default_factory=list)

    @property
    def adds_up(self) -> bool:
        """Whether nothing is missing and nothing too much."""
        return not self.differences


def audit(client: Client, lake: Lake, settings: Settings, *, deep: bool = False) -> Audit:
    """Reconcile the buffer and every day of the lake.

    While drains go on, the lake may only be known to lie between what was acknowledged before it
    was counted and what was acknowledged or in flight after; a still moment is waited for a while.

    Args:
        client: of the buffer.
        lake: which lake.
        settings: shards, memory, threads.
        deep: verify every file, bit for bit, and count distinct keys from raw (reads it all).

    Raises:
        BufferUnavailableError: Redis doesn't answer.
    """
    confirmed = dict(enumerate(Receipts(settings).known()))
    for attempt in range(_ATTEMPTS):
        before = depth.depths(client, settings)
        days = ledger.of_days(lake, settings, deep=deep)
        quarantine = ledger.of_quarantine(lake, settings)
        erased = ledger.of_erased(lake, settings)
        buffered, buffer_faults = _buffered(client, settings)
        # before `after`: what is acknowledged meanwhile may count on both sides, never on neither
        foreign = depth.foreign_lines(client, settings)
        after = depth.depths(client, settings)
        set_back = sum(max(0, confirmed[shard.shard] - shard.appended) for shard in before.states)
        low = sum(shard.acknowledged for shard in before.states) + set_back
        high = sum(shard.acknowledged for shard in after.states) + set_back
        pending = sum(shard.pending for shard in after.states)
        if (low == high and not pending) or attempt == _ATTEMPTS - 1:
            break
    in_flight = sum(buffered.values()) + foreign if pending else 0
    rows = sum(day.rows for day in days)
    in_lake = rows + quarantine.records - quarantine.in_fragments + erased
    unknown = {**before.faults, **after.faults}
    differences = [*unknown.values(), *depth.losses(after.states), *buffer_faults]
    differences += [fault for day in days for fault in day.faults]
    differences += damage.listed(lake)
    differences += quarantine.faults
    if deep:
        known = set(differences)
        differences += [one for one in ledger.damage_beside_days(lake) if one not in known]
    if in_lake < low:
        differences.append(
            f"{low - in_lake:,} heartbeats are missing: {low:,} were acknowledged, the lake holds "
            f"{in_lake:,} ({rows:,} rows in raw, {quarantine.records:,} quarantined, {erased:,} "
            "erased before)"
            + (f"; Redis was set back by {set_back:,} that it had confirmed" if set_back else "")
        )
    elif in_lake > high + in_flight and not unknown:
        differences.append(
            f"the lake holds {in_lake - high - in_flight:,} heartbeats more than this buffer ever "
            f"acknowledged ({rows:,} rows in raw, {quarantine.records:,} quarantined, {high:,} "
            "acknowledged): the buffer's ledger was lost or set back, or the lake has another source"
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
