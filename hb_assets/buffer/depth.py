"""How full the buffer is: the state of streams and ledgers, for status, metrics, alarms and audit.

Nothing is changed here. `pipeline.audit` reconciles these figures with the lake.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from hb_assets.buffer import keys
from hb_assets.buffer.connection import Client
from hb_assets.buffer.producer import Bound
from hb_assets.buffer.roundtrip import exchange_by_shard, script
from hb_assets.core.settings import Settings

_PAGE = 200


@dataclass(frozen=True, slots=True)
class ShardDepth:
    """State of one shard at one instant.

    `entries` lie in the stream, `pending` of them (and such as were deleted by hand) are claimed,
    `undelivered` are not; `heartbeats` and `bytes` are what the ledger says is buffered (external
    entries enter it when they are acknowledged); `oldest_ms` is when the oldest entry arrived;
    `external` entries, of external producers, aren't in the ledger, `external_bytes` is about the
    memory that they take; at least `lost` entries were deleted before they were drained. `idle_ms`
    has, for each consumer that has entries claimed, how long it wasn't heard of.
    """

    shard: int
    entries: int
    heartbeats: int
    bytes: int
    pending: int
    undelivered: int
    oldest_ms: int | None
    appended: int
    acknowledged: int
    consumers: int
    external: int
    external_bytes: int
    lost: int
    idle_ms: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Depths:
    """The state of the shards; `faults` says, in a line each, why that of others isn't known."""

    states: list[ShardDepth]
    faults: dict[int, str] = field(default_factory=dict)


def depths(client: Client, settings: Settings) -> Depths:
    """The state of every shard, in one round trip; each shard's figures are of one instant.

    Raises:
        BufferUnavailableError: Redis doesn't answer.
    """
    shards = range(settings.shards)
    commands = [
        script("depth", (keys.stream(shard), keys.ledger(shard)), (keys.GROUP,)) for shard in shards
    ]
    replies = exchange_by_shard(client, shards, commands)
    return Depths(
        [_depth(shard, *reply) for shard, reply in replies.by_shard.items()],
        {shard: f"buffer: shard {shard:02d}: {why}" for shard, why in replies.faults.items()},
    )


def scanned(client: Client, settings: Settings) -> dict[int, int]:
    """Heartbeats in each stream, counted from the entries themselves (sum of their field `n`).

    Entries that come or go meanwhile may be counted or not; external entries never are. A shard
    whose stream can't be read is left out.

    Raises:
        BufferUnavailableError: as `depths`.
    """
    return {shard: own for shard, (own, _) in _scan(client, settings).items()}


def external_lines(client: Client, settings: Settings) -> int:
    """Lines of external entries (without `n`) that lie in the streams: no ledger has them yet.

    A stream that can't be read has none.

    Raises:
        BufferUnavailableError: as `depths`.
    """
    return sum(lines for _, lines in _scan(client, settings).values())


def _scan(client: Client, settings: Settings) -> dict[int, tuple[int, int]]:
    found = dict.fromkeys(range(settings.shards), (0, 0))
    starts = dict.fromkeys(found, "-")
    while starts:
        shards = list(starts)
        commands = [script("scan", (keys.stream(s),), (starts[s], _PAGE)) for s in shards]
        replies = exchange_by_shard(client, shards, commands)
        for shard in replies.faults:
            del found[shard]
        starts = {}
        for shard, (heartbeats, lines, following) in replies.by_shard.items():
            own, external = found[shard]
            found[shard] = (own + heartbeats, external + lines)
            if following:
                starts[shard] = following.decode()
    return found


def high_water(states: Iterable[ShardDepth], settings: Settings) -> list[str]:
    """One line for each shard that is fuller than HB_BUFFER_HIGH_WATER allows.

    The ledger doesn't know external entries before they are acknowledged, and nothing refuses them:
    each counts as one heartbeat at least, and with the memory that it takes.
    """
    bound = Bound.of(settings)
    lines = []
    for state in states:
        share = max(
            (state.heartbeats + state.external) / bound.heartbeats,
            (state.bytes + state.external_bytes) / bound.size,
        )
        if share > settings.buffer_high_water:
            lines.append(
                f"buffer: shard {state.shard:02d} is {share:.0%} full ({state.heartbeats:,} of "
                f"{bound.heartbeats:,} heartbeats, {state.bytes:,} of {bound.size:,} bytes"
                f"{_of_others(state)}), above {settings.buffer_high_water:.0%} (HB_BUFFER_HIGH_WATER): is the drain running?"
            )
    return lines


def _of_others(state: ShardDepth) -> str:
    if not state.external:
        return ""
    return (
        f", and {state.external:,} entries of other producers with about {state.external_bytes:,} "
        "bytes, which nothing refuses"
    )


def losses(states: Iterable[ShardDepth]) -> list[str]:
    """One line for each shard that lost entries: somebody deleted them before they were drained."""
    return [
        f"buffer: data loss: {state.lost:,} entries of shard {state.shard:02d} were deleted before "
        "they were drained"
        + (f", with {state.heartbeats:,} heartbeats" if not state.entries else "")
        + ": who uses MAXLEN, XTRIM, XDEL or DEL there? See `hb audit`"
        for state in states
        if state.lost
    ]


def _depth(
    shard: int,
    entries: int,
    oldest: bytes,
    pending: int,
    consumers: int,
    undelivered: int,
    memory: int,
    idle: list[int],
    appended: int,
    acknowledged: int,
    appended_bytes: int,
    acknowledged_bytes: int,
    appended_entries: int,
    acknowledged_entries: int,
    lost: int,
) -> ShardDepth:
    own = appended_entries - acknowledged_entries
    return ShardDepth(
        shard=shard,
        entries=entries,
        heartbeats=appended - acknowledged,
        bytes=appended_bytes - acknowledged_bytes,
        pending=pending,
        undelivered=max(0, entries - pending) if undelivered < 0 else undelivered,
        oldest_ms=int(oldest.partition(b"-")[0]) if oldest else None,
        appended=appended,
        acknowledged=acknowledged,
        consumers=consumers,
        external=max(0, entries - own),
        external_bytes=max(0, memory - (appended_bytes - acknowledged_bytes)),
        # Those that were pending were counted one by one; the others are missed in the stream.
        lost=max(lost, own - entries),
        idle_ms=tuple(idle),
    )
