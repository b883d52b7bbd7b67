"""Tombstones: users whose heartbeats were forgotten, and up to which arrival.

Belongs here: the files under `tombstones/`, and which rows they are about. Doesn't belong here: the
work that makes the bytes go (`erasure`).

A tombstone doesn't hold the user_id, but a keyed hash of it (BLAKE2b under the lake's key), so that
it may stay for ever: a drain that was stopped for a year and wakes up brings nothing back. What
arrives after the cutoff is welcome.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import duckdb
import msgspec

from hb_assets.lake import parquet
from hb_assets.lake.files import TempFile
from hb_assets.lake.layout import TOMBSTONES
from hb_assets.lake.store import FORMAT, Lake


class Tombstone(msgspec.Struct, frozen=True, kw_only=True):
    """One forgotten user.

    `user` is the keyed hash (hex), `shard` the user's, `cutoff_ms` the last arrival (epoch ms) that
    is forgotten; `asked_ms` when that was asked for; `done` once no byte of it was left.
    """

    format: int = FORMAT
    user: str
    shard: int
    cutoff_ms: int
    asked_ms: int
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
    return [_read(path) for path in sorted((lake.root / TOMBSTONES).glob("*.json"))]


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


def of_files(
    lake: Lake, shard: int, paths: Sequence[Path], connection: duckdb.DuckDBPyConnection
) -> dict[str, int]:
    """Forgotten users of one shard that these files hold, each with its cutoff (epoch ms)."""
    if not paths or all(tombstone.shard != shard for tombstone in listed(lake)):
        return {}
    users = connection.sql(_USERS, params={"paths": [str(path) for path in paths]}).fetchall()
    return cutoffs(lake, (user for (user,) in users))


_USERS = "SELECT DISTINCT user_id FROM read_parquet($paths, hive_partitioning = false)"
