"""Erasure: forgets a user, so that no byte of their heartbeats is left.

The order of steps through spool, buffer and lake, and the proof at the end; the steps themselves
are in `lake.files.tombstones`, `lake.erasure` and `buffer.append_only_file`.

The tombstone comes first: from then on every drain withholds, every consolidation drops and every
reader skips what arrived up to its cutoffs, so that a crash at any later step only means that
bytes are left, and that asking again goes on where it stopped. Heartbeats that arrive after the
cutoffs are accepted as usual. The ledger counts what was removed as erased.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hb_assets.buffer import append_only_file
from hb_assets.buffer.connection import Client
from hb_assets.buffer.consumer import Consumer
from hb_assets.buffer.watermark import latest, passed, watermarks
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.lake import erasure, ledger
from hb_assets.lake.erasure import Gone, Whose
from hb_assets.lake.files import tombstones
from hb_assets.lake.files.tombstones import Cutoffs, Tombstone
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.coordination import Coordination
from hb_assets.pipeline.drain import drain

ClearSpool = Callable[[Callable[[bytes], bool]], int]
"""Deletes the spool's lines that the given predicate doesn't keep; returns how many."""

_ROUNDS = 20
_PART, _OVERLAP = 4 * 2**20, 4096
_PATIENCE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Forgotten:
    """The result of forgetting a user: what was removed, and what is left.

    Attributes:
        rows: heartbeats removed from consolidated files and pending fragments, those that were
            superseded not counted.
        buffered: heartbeats removed from the buffer.
        fragments: raw fragments that were deleted.
        days: days that were written anew.
        quarantined: records removed from quarantine.
        spooled: lines removed from the gateway's spool.
        log_rewritten: whether the server has written its append-only file anew.
        resumed_ms: when it had been asked for, if this only went on with it (epoch ms): what has
            arrived since is still there.
        left: one line for each place where bytes of the user are, or may be, left.
        unscanned: one line for each place that couldn't be scanned, for a reason that isn't wrong.
        seconds: how long it took.
    """

    rows: int
    buffered: int
    fragments: int
    days: int
    quarantined: int
    spooled: int
    log_rewritten: bool
    resumed_ms: int | None = None
    left: list[str] = field(default_factory=list)
    unscanned: list[str] = field(default_factory=list)
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
    standing = tombstones.of_user(lake, user_id)
    spooled, resumed_ms = 0, None
    if standing is not None and standing.spool_cleared and not standing.finished:
        tombstone, resumed_ms = standing, standing.asked_ms
    else:
        tombstone, spooled = _tombstone(user_id, client, lake, settings, clear_spool, standing)
    whose = Whose(user_id, tombstone.cutoffs)
    gone = Gone()
    erased_before = ledger.of_erased(lake, settings)
    for _ in range(_ROUNDS):
        on_step("buffer")
        _drain_past(tombstone.cutoffs, client, consumer, lake, settings)
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
    erasure.fence(lake, tombstone.shard)
    erasure.sweep_temp(lake, tombstone.asked_ms)
    left, rewritten = [], False
    try:
        rewritten = append_only_file.rewrite(client)
    except BufferUnavailableError as error:
        left.append(f"the server's append-only file may hold heartbeats of the user: {error}")
    on_step("scan of all bytes")
    newer = append_only_file.mentions(client, settings, whose.needles)
    left += _left(whose, lake, settings, newer=newer)
    tombstones.put(lake, _changed(tombstone, finished=True))
    return Forgotten(
        rows=gone.rows,
        buffered=max(0, ledger.of_erased(lake, settings) - erased_before - gone.quarantined),
        fragments=gone.fragments,
        days=gone.days,
        quarantined=gone.quarantined,
        spooled=spooled,
        log_rewritten=rewritten,
        resumed_ms=resumed_ms,
        left=left,
        unscanned=[_NEWER] if newer else [],
        seconds=time.monotonic() - began,
    )


_NEWER = (
    "newer heartbeats of the user wait in the buffer, so that the server's append-only file wasn't "
    "scanned: it was written anew after the older ones were gone from the buffer"
)


def _tombstone(
    user_id: str,
    client: Client,
    lake: Lake,
    settings: Settings,
    clear_spool: ClearSpool,
    standing: Tombstone | None,
) -> tuple[Tombstone, int]:
    """Write the tombstone, with cutoffs above all that the spool might have brought later.

    A cutoff never goes back, and isn't below what the lake has of the user: the present Redis may
    not be the one that all of it came by.
    """

    def cutoffs() -> dict[int, tuple[int, int]]:
        known = [latest(client, settings), erasure.latest(lake, user_id, settings)]
        known += [dict(standing.cutoffs)] if standing else []
        return {
            source: max(one.get(source, (0, 0)) for one in known) for source in range(lake.shards)
        }

    tombstone = Tombstone(
        user=tombstones.hashed(lake, user_id),
        shard=shard_of(user_id, lake.shards),
        cutoffs=cutoffs(),
        asked_ms=int(time.time() * 1000),
    )
    tombstones.put(lake, tombstone)
    whose = Whose(user_id, tombstone.cutoffs)
    spooled = clear_spool(lambda line: not whose.said_in(line))
    tombstone = _changed(tombstone, cutoffs=cutoffs(), spool_cleared=True)
    tombstones.put(lake, tombstone)
    return tombstone, spooled


def _changed(tombstone: Tombstone, **changes: object) -> Tombstone:
    fields = {name: getattr(tombstone, name) for name in Tombstone.__struct_fields__}
    return Tombstone(**{**fields, **changes})


def _drain_past(
    cutoffs: Cutoffs, client: Client, consumer: Consumer, lake: Lake, settings: Settings
) -> None:
    """Drain until nothing up to the cutoffs is left, whichever drainer has it."""
    deadline = time.monotonic() + _PATIENCE_SECONDS + settings.claim_min_idle.total_seconds()

    def over() -> bool:
        return passed(client, settings, cutoffs) or time.monotonic() > deadline

    while not over():
        if not drain(consumer, lake, settings, stop=over).entries:
            time.sleep(settings.drain_poll.total_seconds())
    if not passed(client, settings, cutoffs):
        raise BufferUnavailableError(
            "entries from before the request stay with another drainer; the user's tombstone "
            "stands: end that drainer, or wait for it, and ask again"
        )


def _left(whose: Whose, lake: Lake, settings: Settings, *, newer: bool) -> list[str]:
    """Where bytes of the user are, or may be, left.

    Args:
        whose: the user.
        lake: which lake.
        settings: HB_HOME.
        newer: whether newer heartbeats wait in the buffer, so that the server's log has those.
    """
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
        f"{path} is damaged, nobody can tell what it holds: hb damaged restore puts a whole copy back, "
        "hb damaged accept FILE --delete deletes it; then ask again"
        for path in erasure.unreadable(lake)
    ]
    for path in _files(settings, lake):
        if newer and path.is_relative_to(settings.redis_dir):
            continue
        try:
            if _contains(path, whose.named):
                lines.append(f"{path} still names the user")
        except FileNotFoundError:
            continue
        except OSError as error:
            lines.append(f"{path} can't be read ({error.strerror}): look into it, and ask again")
    return lines


def _files(settings: Settings, lake: Lake) -> list[Path]:
    """All files under HB_HOME but the lake's, which are looked into by their columns."""
    return [
        path
        for path in sorted(settings.home_dir.rglob("*"))
        if path.is_file() and not path.is_relative_to(lake.root)
    ]


def _contains(path: Path, named: re.Pattern[bytes]) -> bool:
    """Whether the file holds a match, read in parts that overlap by more than a match is long."""
    with path.open("rb") as file:
        tail = b""
        while part := file.read(_PART):
            if named.search(tail + part):
                return True
            tail = part[-_OVERLAP:]
    return False
