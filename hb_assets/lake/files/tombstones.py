"""Tombstones: which users were forgotten, and up to which arrival.

The files under `tombstones/`, and the rows that they concern; `erasure` removes the bytes.

A tombstone doesn't hold the user_id, but a keyed hash of it (BLAKE2b under the lake's key), so that
it may stay for ever: a drain that was stopped for a year and wakes up brings nothing back. What
arrives after the cutoff is accepted as usual.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.core.schema import ARRIVAL
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import checksummed_json, verified
from hb_assets.lake.storage.catalog import remembered
from hb_assets.lake.storage.durable_files import Fingerprint, TempFile, fingerprint
from hb_assets.lake.storage.engine import engine
from hb_assets.lake.storage.layout import TOMBSTONES
from hb_assets.lake.storage.store import FORMAT, Lake

Cutoffs: TypeAlias = Mapping[int, tuple[int, int]]
"""Per source shard the last entry id that is forgotten."""


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """One forgotten user.

    `user` is the keyed hash (hex), `shard` the user's, `cutoffs` the last arrival that is forgotten
    by source shard; `asked_ms` when that was asked for (epoch ms); `spool_cleared` once nothing
    older could come out of the gateway's spool any more; `finished` once every step was taken.
    """

    format: int = FORMAT
    user: str
    shard: int
    cutoffs: dict[int, tuple[int, int]]
    asked_ms: int
    spool_cleared: bool = False
    finished: bool = False


def hashed(lake: Lake, user_id: str) -> str:
    """The keyed hash of a user_id, 32 hex digits; nobody without `lake.json` can reckon it."""
    return hashlib.blake2b(user_id.encode(), key=lake.mask_key[:64], digest_size=16).hexdigest()


def put(lake: Lake, tombstone: Tombstone) -> None:
    """Write a tombstone, in the place of an older one of the same user; durable on return."""
    folder = lake.root / TOMBSTONES
    with TempFile(lake.root, folder) as temp:
        checksummed_json.write(temp.path, tombstone)
        temp.publish_replacing(folder / f"{tombstone.user}.json")


def of_user(lake: Lake, user_id: str) -> Tombstone | None:
    """The user's tombstone, if there is one. Raises DamagedFileError."""
    try:
        return checksummed_json.read(
            lake.root / TOMBSTONES / f"{hashed(lake, user_id)}.json", Tombstone
        )
    except FileNotFoundError:
        return None


def listed(lake: Lake) -> list[Tombstone]:
    """All tombstones. Raises DamagedFileError."""
    return [
        _known(path, fingerprint(path)) for path in sorted((lake.root / TOMBSTONES).glob("*.json"))
    ]


@remembered(100_000)
def _known(path: Path, _seen: Fingerprint) -> Tombstone:
    return checksummed_json.read(path, Tombstone)


def cutoffs(lake: Lake, user_ids: Iterable[str]) -> dict[str, Cutoffs]:
    """The forgotten ones of these users, each with its cutoffs."""
    by_hash = {tombstone.user: tombstone.cutoffs for tombstone in listed(lake)}
    if not by_hash:
        return {}
    hashes = ((user, hashed(lake, user)) for user in user_ids)
    return {user: by_hash[key] for user, key in hashes if key in by_hash}


def withheld(lake: Lake, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split rows into those that a drain may publish, and identities of what was forgotten.

    Args:
        lake: whose tombstones.
        rows: heartbeats, or records for the quarantine, whose user is told from their bytes
            as far as they name a user_id.
    """
    nobody = rows, rows.slice(0, 0).select(ARRIVAL)
    if not listed(lake):
        return nobody
    if "user_id" in rows.schema.names:
        users = rows["user_id"]
    else:
        users = pa.array(map(_user_in, rows["raw"].to_pylist()), pa.string())
    # each user is hashed once, not each row: most drains hold nobody who was forgotten
    forgotten = cutoffs(lake, pc.unique(users.drop_null()).to_pylist())
    if not forgotten:
        return nobody
    gone = pa.array(reached(rows, [forgotten.get(user, _NEVER) for user in users.to_pylist()]))
    return rows.filter(pc.invert(gone)), rows.filter(gone).select(ARRIVAL)


def reached(rows: pa.Table, cutoffs_of_rows: Sequence[Cutoffs]) -> list[bool]:
    """Of each row (with its identity) whether it arrived at its cutoff or before."""
    columns = (rows[name].to_pylist() for name in ("arrival_shard", "arrival_ms", "arrival_seq"))
    return [
        (ms, seq) <= cutoffs.get(source, BEFORE_ALL)
        for source, ms, seq, cutoffs in zip(*columns, cutoffs_of_rows, strict=True)
    ]


def reached_by(
    arrival: Sequence[npt.NDArray[np.integer]], cutoffs: Cutoffs
) -> npt.NDArray[np.bool_]:
    """Of each of one user's rows (columns in the order of ARRIVAL) whether a cutoff reaches it."""
    ms, seq, source, _ = arrival
    gone = np.zeros(len(ms), bool)
    for shard, (last_ms, last_seq) in cutoffs.items():
        gone |= (source == shard) & ((ms < last_ms) | ((ms == last_ms) & (seq <= last_seq)))
    return gone


def _user_in(raw: bytes) -> str | None:
    found = _USER_ID.search(raw)
    try:
        return None if found is None else msgspec.json.decode(found[1], type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def table(of_one: Cutoffs) -> pa.Table:
    """Cutoffs as the table `cutoffs` that REACHED and NOT_REACHED join."""
    rows = [{"source": source, "ms": ms, "seq": seq} for source, (ms, seq) in of_one.items()]
    return pa.Table.from_pylist(rows, schema=_CUTOFFS)


def of_files(
    lake: Lake, shard: int, paths: Sequence[Path], settings: Settings
) -> dict[str, Cutoffs]:
    """Forgotten users of one shard that these files hold, each with its cutoffs."""
    if not paths or all(tombstone.shard != shard for tombstone in listed(lake)):
        return {}
    with engine(settings) as connection, verified.relations(connection, {"rows": paths}):
        users = connection.sql(_USERS).fetchall()
    return cutoffs(lake, (user for (user,) in users))


_REACHED = (
    "JOIN cutoffs ON delivered.arrival_shard = cutoffs.source AND (delivered.arrival_ms < cutoffs.ms "
    "OR (delivered.arrival_ms = cutoffs.ms AND delivered.arrival_seq <= cutoffs.seq))"
)
REACHED, NOT_REACHED = f"SEMI {_REACHED}", f"ANTI {_REACHED}"
"""Joins of a relation `delivered`: rows that arrived at their cutoff or before, and all others."""
_CUTOFFS = pa.schema([("source", pa.int16()), ("ms", pa.uint64()), ("seq", pa.uint64())])
BEFORE_ALL = (-1, 0)
"""Below any entry id."""
_NEVER: Cutoffs = {}
_USER_ID = re.compile(rb'"user_id"\s*:\s*("(?:[^"\\]|\\.)*")')
_USERS = "SELECT DISTINCT user_id FROM rows"
