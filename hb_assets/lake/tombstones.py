"""Tombstones: users whose heartbeats were forgotten, and up to which arrival.

Belongs here: the files under `tombstones/`, and which rows they are about. Doesn't belong here: the
work that makes the bytes go (`erasure`).

A tombstone doesn't hold the user_id, but a keyed hash of it (BLAKE2b under the lake's key), so that
it may stay for ever: a drain that was stopped for a year and wakes up brings nothing back. What
arrives after the cutoff is welcome.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc

from hb_assets.lake import parquet
from hb_assets.lake.files import TempFile
from hb_assets.lake.layout import TOMBSTONES
from hb_assets.lake.store import FORMAT, Lake
from hb_assets.schema import ARRIVAL


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """One forgotten user.

    `user` is the keyed hash (hex), `shard` the user's, `cutoff_ms` the last arrival (epoch ms) that
    is forgotten; `asked_ms` when that was asked for; `spool_cleared` once nothing older could come
    out of the gateway's spool any more; `done` once no byte of it was left.
    """

    format: int = FORMAT
    user: str
    shard: int
    cutoff_ms: int
    asked_ms: int
    spool_cleared: bool = False
    done: bool = False


def hashed(lake: Lake, user_id: str) -> str:
    """The keyed hash of a user_id, 32 hex digits; nobody without `lake.json` can reckon it."""
    return hashlib.blake2b(user_id.encode(), key=lake.mask_key[:64], digest_size=16).hexdigest()


def put(lake: Lake, tombstone: Tombstone) -> None:
    """Write a tombstone, in the place of an older one of the same user; durable on return."""
    folder = lake.root / TOMBSTONES
    with TempFile(lake.root, folder) as temp:
        temp.path.write_bytes(msgspec.json.encode(tombstone))
        temp.publish_replacing(folder / f"{tombstone.user}.json")


def of_user(lake: Lake, user_id: str) -> Tombstone | None:
    """The user's tombstone, if there is one. Raises DamagedFileError."""
    try:
        return _read(lake.root / TOMBSTONES / f"{hashed(lake, user_id)}.json")
    except FileNotFoundError:
        return None


def listed(lake: Lake) -> list[Tombstone]:
    """All tombstones. Raises DamagedFileError."""
    found = []
    for path in sorted((lake.root / TOMBSTONES).glob("*.json")):
        seen = path.stat()
        found.append(_known(path, seen.st_ino, seen.st_mtime_ns))
    return found


@lru_cache(maxsize=100_000)
def _known(path: Path, inode: int, mtime_ns: int) -> Tombstone:  # noqa: ARG001  # the cache's key
    return _read(path)


def _read(path: Path) -> Tombstone:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Tombstone)
    except msgspec.MsgspecError as error:
        raise parquet.damaged(path, str(error)) from None


def cutoffs(lake: Lake, user_ids: Iterable[str]) -> dict[str, int]:
    """Of these users those that were forgotten, each with its cutoff (epoch ms)."""
    by_hash = {tombstone.user: tombstone.cutoff_ms for tombstone in listed(lake)}
    if not by_hash:
        return {}
    hashes = ((user, hashed(lake, user)) for user in user_ids)
    return {user: by_hash[key] for user, key in hashes if key in by_hash}


def withheld(lake: Lake, rows: pa.Table) -> tuple[pa.Table, pa.Table]:
    """What a drain may publish, and the identities of what was forgotten.

    Args:
        lake: whose tombstones.
        rows: heartbeats, or records for the quarantine; whose these are is told from their bytes,
            as far as they name a user_id.
    """
    if not listed(lake):
        return rows, rows.slice(0, 0).select(ARRIVAL)
    if "user_id" in rows.schema.names:
        users = rows["user_id"].to_pylist()
    else:
        users = [_user_in(raw) for raw in rows["raw"].to_pylist()]
    forgotten = cutoffs(lake, {user for user in users if user is not None})
    limits = pa.array([forgotten.get(user, -1) for user in users], pa.int64())
    gone = pc.less_equal(rows["arrival_ms"].cast(pa.int64()), limits)
    return rows.filter(pc.invert(gone)), rows.filter(gone).select(ARRIVAL)


def _user_in(raw: bytes) -> str | None:
    found = _USER_ID.search(raw)
    try:
        return None if found is None else msgspec.json.decode(found[1], type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


def of_files(
    lake: Lake, shard: int, paths: Sequence[Path], connection: duckdb.DuckDBPyConnection
) -> dict[str, int]:
    """Forgotten users of one shard that these files hold, each with its cutoff (epoch ms)."""
    if not paths or all(tombstone.shard != shard for tombstone in listed(lake)):
        return {}
    users = connection.sql(_USERS, params={"paths": [str(path) for path in paths]}).fetchall()
    return cutoffs(lake, (user for (user,) in users))


_USER_ID = re.compile(rb'"user_id"\s*:\s*("(?:[^"\\]|\\.)*")')
_USERS = "SELECT DISTINCT user_id FROM read_parquet($paths, hive_partitioning = false)"
