"""Erasure: forgetting a user, so that no byte of their heartbeats is left.

Belongs here: the order of steps through spool, buffer and lake, and the proof at the end. Doesn't
belong here: how each step works (`lake.tombstones`, `lake.erasure`, `buffer.log`).

The tombstone comes first: from then on every drain withholds, every consolidation drops and every
reader passes over what arrived up to its cutoff, so that a crash at any later step only means that
bytes are left, and that asking again goes on where it stopped. Heartbeats that arrive after the
cutoff are welcome. The ledger has what went as erased.
"""

from __future__ import annotations

import mmap
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hb_assets.buffer import log
from hb_assets.buffer.connection import Client
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.watermark import latest, passed, watermarks
from hb_assets.coordination import Coordination
from hb_assets.drain import drain
from hb_assets.errors import BufferUnavailableError
from hb_assets.lake import erasure, ledger, tombstones
from hb_assets.lake.erasure import Gone, Whose
from hb_assets.lake.store import Lake
from hb_assets.lake.tombstones import Tombstone
from hb_assets.record import shard_of
from hb_assets.settings import Settings

ClearSpool = Callable[[Callable[[bytes], bool]], int]
"""Deletes the spool's lines that the given predicate doesn't keep; returns how many."""

_ROUNDS = 20
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What went, and what is left.

    Attributes:
        rows: heartbeats that went from consolidated files and pending fragments, those that were
            superseded not counted.
        buffered: heartbeats that went from the buffer.
        fragments: raw fragments that were deleted.
        days: days that were written anew.
        quarantined: records that went from quarantine.
        spooled: lines that went from the gateway's spool.
        log_rewritten: whether the server has written its append-only file anew.
        left: one line for each place where bytes of the user are, or may be, left.
        seconds: how long it took.
    """

    rows: int
    buffered: int
    fragments: int
    days: int
    quarantined: int
    spooled: int
    log_rewritten: bool
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        """Whether a scan of all bytes found nothing."""
        return not self.left


def forget(
    user_id: str,
    client: Client,
    consumer: Consumer,
    lake: Lake,
    settings: Settings,
    known: Coordination,
    clear_spool: ClearSpool,
    on_step: Callable[[str], None] = lambda _: None,
) -> Forgotten:
    """Forget all heartbeats of a user that have arrived by now; go on where a crash stopped it.

    Args:
        user_id: whose.
        client: of the buffer.
        consumer: opened, of the same buffer.
        lake: which lake.
        settings: shards, memory, places.
        known: the locks.
        clear_spool: deletes from the gateway's spool.
        on_step: told what is done next.

    Raises:
        BufferUnavailableError: Redis doesn't answer; or entries from before the cutoff stay with
            another drainer. The tombstone stands; ask again.
        DamagedFileError, CheckFailedError, OSError: as a consolidation; likewise.
    """
    began = time.monotonic()
    on_step("tombstone and spool")
    tombstone, spooled = _tombstone(user_id, client, lake, settings, clear_spool)
    whose = Whose(user_id, tombstone.cutoff_ms)
    gone = Gone()
    erased_before = ledger.of_erased(lake, settings)
    for _ in range(_ROUNDS):
        on_step("buffer")
        _drain_past(tombstone.cutoff_ms, client, consumer, lake, settings)
        on_step("quarantine")
        gone = gone.plus(erasure.forget_quarantine(lake, whose, settings))
        held = erasure.holding(lake, whose, settings)
        if not held:
            break
        time.sleep(settings.drain_poll.total_seconds() if gone.days else 0)
        marks = watermarks(client, settings)
        for day in held:
            on_step(f"day {day}")
            gone = gone.plus(
                erasure.forget_day(lake, day, whose, settings, watermarks=marks, lock=known.lock)
            )
    on_step("leftovers and the server's log")
    erasure.sweep_temp(lake, tombstone.asked_ms)
    rewritten = log.rewrite(client)
    on_step("scan of all bytes")
    left = _left(whose, client, lake, settings)
    if not left:
        tombstones.put(lake, _changed(tombstone, done=True))
    return Forgotten(
        rows=gone.rows,
        buffered=max(0, ledger.of_erased(lake, settings) - erased_before - gone.quarantined),
        fragments=gone.fragments,
        days=gone.days,
        quarantined=gone.quarantined,
        spooled=spooled,
        log_rewritten=rewritten,
        left=left,
        seconds=time.monotonic() - began,
    )


def _tombstone(
    user_id: str, client: Client, lake: Lake, settings: Settings, clear_spool: ClearSpool
) -> tuple[Tombstone, int]:
    """The tombstone, with a cutoff above all that the spool might have brought later."""
    standing = tombstones.of_user(lake, user_id)
    if standing is not None and not standing.done and standing.spool_cleared:
        return standing, 0  # asked again: what came since the first time is welcome
    now = int(time.time() * 1000)
    tombstone = Tombstone(
        user=tombstones.hashed(lake, user_id),
        shard=shard_of(user_id, lake.shards),
        cutoff_ms=latest(client, settings),
        asked_ms=now,
    )
    tombstones.put(lake, tombstone)
    whose = Whose(user_id, tombstone.cutoff_ms)
    spooled = clear_spool(lambda line: not whose.said_in(line))
    tombstone = _changed(tombstone, cutoff_ms=latest(client, settings), spool_cleared=True)
    tombstones.put(lake, tombstone)
    return tombstone, spooled


def _changed(tombstone: Tombstone, **changes: object) -> Tombstone:
    fields = {name: getattr(tombstone, name) for name in Tombstone.__struct_fields__}
    return Tombstone(**{**fields, **changes})


def _drain_past(
    cutoff_ms: int, client: Client, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    """Drain until nothing from before the cutoff is left, with whatever drainer it lies."""
    deadline = time.monotonic() + _PATIENCE_SECONDS + settings.claim_min_idle.total_seconds()
    while not passed(client, settings, cutoff_ms):
        if time.monotonic() > deadline:
            raise BufferUnavailableError(
                "entries from before the request stay with another drainer; the user's tombstone "
                "stands: end that drainer, or wait for it, and ask again"
            )
        if not drain(consumer, lake, settings).entries:
            time.sleep(settings.drain_poll.total_seconds())


def _left(whose: Whose, client: Client, lake: Lake, settings: Settings) -> list[str]:
    """Where bytes of the user are, or may be, left."""
    lines = [
        f"{path} still holds heartbeats of the user"
        for paths in erasure.holding(lake, whose, settings).values()
        for path in paths
    ]
    lines += [
        f"{path} still holds records that name the user"
        for path in erasure.quarantined(lake, whose)
    ]
    lines += [
        f"{path} is damaged, nobody can tell what it holds: remove it and ask again"
        for path in erasure.unreadable(lake)
    ]
    if not log.mentions(client, settings, whose.needles):
        # where newer heartbeats of the user wait, the server's log holds those
        lines += [
            f"{path} still names the user"
            for path in _files(settings, lake)
            if _contains(path, whose.named)
        ]
    return lines


def _files(settings: Settings, lake: Lake) -> list[Path]:
    """All files under HB_HOME but the lake's, which are looked into by their columns."""
    return [
        path
        for path in sorted(settings.home_dir.rglob("*"))
        if path.is_file() and not path.is_relative_to(lake.root)
    ]


def _contains(path: Path, named: re.Pattern[bytes]) -> bool:
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
            return named.search(content) is not None
    except (OSError, ValueError):
        return False  # it went meanwhile, is empty, or is no plain file
