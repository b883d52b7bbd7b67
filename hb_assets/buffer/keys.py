"""Names of the buffer's Redis keys, and the fields that they hold.

Producers in other languages and operators rely on this layout:

    hb:{07}:stream   stream, one a shard; consumer group `hb`
    hb:{07}:ledger   hash, one a shard
    hb:{07}:lease:2025-01-15   string that expires: who consolidates that day (HB_LOCKS=redis)
    hb:{07}:limit:user:<digest>   string that expires: theoretical arrival time of a rate limit,
                                  epoch microseconds (see `rate_limit`)
    hb:{all}:beats    hash: liveness timestamps
    hb:{all}:counts   hash: counters of work

The braces are part of the name: a cluster hash tag that keeps a shard's keys together, so that one
script may touch both. Two digits, 00 to HB_SHARDS - 1.

Fields of a stream entry:

    data   1 to N heartbeats, one JSON object a line (NDJSON), lines joined by a line feed
    n      reserved: number of lines, written by our own appends only, which the ledger counted

Any producer may append without our library; the drain takes entries of any stream, and its rows go
to the shard that their user hashes to:

    redis-cli XADD 'hb:{00}:stream' '*' data \
        '{"user_id":"u1","device_id":"device_a","timestamp":"2025-01-15T10:00:00Z","heart_rate":75}'

Entries of such external producers aren't held to the buffer's bound, and enter the ledger when they
are acknowledged. Never trim the streams (MAXLEN, XTRIM): that deletes what nobody has read.

Fields of a ledger, all counters that only grow:

    appended            heartbeats appended (external ones: when they were acknowledged)
    acknowledged        heartbeats that the drain has made durable and deleted from the stream
    appended_bytes      bytes of `data` that our own appends wrote
    acknowledged_bytes  the same of our own entries that were acknowledged

    appended_entries    our own entries that were appended
    acknowledged_entries  those of them that were acknowledged
    lost                entries that were found to be deleted while they were pending: data loss

appended - acknowledged is the number of heartbeats (without external ones) that lie in the stream;
the same of entries, compared with XLEN, shows external entries (more) and lost ones (fewer). What
is lost stays an alarm until an operator writes it off, when it has been looked into:

    redis-cli HDEL 'hb:{00}:ledger' lost
    redis-cli HINCRBY 'hb:{00}:ledger' acknowledged_entries <entries>
    redis-cli HINCRBY 'hb:{00}:ledger' acknowledged <heartbeats>

The last line makes room in the buffer's bound again; `hb audit` goes on missing the heartbeats.

Fields of `beats`, epoch milliseconds by Redis' clock, each when something was last alive:

    drain:07   a drain that has looked for entries of the shard, and is done with those it found
    dagster    a tick of the buffer sensor

Fields of `counts`, which only metrics show: rows, entries and fragments of drains, quarantined
records by reason, why drain cycles ended, consolidations by outcome and the rows that they wrote,
and how long each took (`liveness`). Both hashes may be deleted at any time.

An append raises a ledger that was set back (see `receipts`) by what it lacks, in appended and in
acknowledged.
"""

from __future__ import annotations

import datetime as dt
from functools import cache

GROUP = "hb"
"""The consumer group that drains each stream."""
BEATS = "hb:{all}:beats"
"""Key of the liveness timestamps."""
COUNTS = "hb:{all}:counts"
"""Key of the counters of work."""


def lease(shard: int, day: dt.date) -> str:
    """Key of the lease on a (day, shard)."""
    return f"hb:{{{shard:02d}}}:lease:{day.isoformat()}"


def limit(shard: int, policy: str, digest: str) -> str:
    """Key of what a policy knows of one subject; `digest` is hexadecimal, never a clear name."""
    return f"hb:{{{shard:02d}}}:limit:{policy}:{digest}"


def stream(shard: int) -> str:
    """Key of the shard's stream."""
    return f"hb:{{{shard:02d}}}:stream"


def ledger(shard: int) -> str:
    """Key of the shard's ledger."""
    return f"hb:{{{shard:02d}}}:ledger"


@cache
def of_shard(shard: int) -> tuple[str, str]:
    """Keys of the shard's stream and of its ledger."""
    return stream(shard), ledger(shard)
