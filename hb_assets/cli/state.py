"""The state file of a running `hb up`, by which other processes find it.

One JSON file under HB_HOME with the processes of `hb up`, by which leftovers are recognised too.
"""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
import psutil

from hb_assets.core import private_files
from hb_assets.core.processes import Identity
from hb_assets.core.settings import Settings


class MemberState(msgspec.Struct, frozen=True):
    """One supervised member: `state` in supervisor's words; `since` is its start, epoch seconds."""

    name: str
    state: str
    pid: int | None
    since: float | None
    restarts: int


class UpState(msgspec.Struct, frozen=True):
    """The state that a running `hb up` publishes."""

    identity: Identity
    start_date: dt.date
    shards: int
    gateway: str
    dagster: str
    phase: str
    lake: str = ""
    redis: str = ""
    """A digest of its HB_REDIS_URL, which may hold a password; empty: the embedded server."""
    members: tuple[MemberState, ...] = ()
    processes: tuple[Identity, ...] = ()
    """Every process below `hb up` that still lived when this was written."""

    @property
    def pid(self) -> int:
        """Pid of `hb up`."""
        return self.identity.pid


def redis_digest(settings: Settings) -> str:
    """Digest that tells one Redis from another without revealing its password."""
    url = settings.redis_url
    return (
        hashlib.blake2b(url.get_secret_value().encode(), digest_size=8).hexdigest() if url else ""
    )


def path(settings: Settings) -> Path:
    """The state file."""
    return settings.run_dir / "up.json"


def read(settings: Settings) -> UpState | None:
    """The state that the latest `hb up` left, whether it still runs or not."""
    try:
        return msgspec.json.decode(path(settings).read_bytes(), type=UpState)
    except (OSError, msgspec.DecodeError):
        return None


def running(settings: Settings) -> UpState | None:
    """The state of the running `hb up`, or None."""
    up = read(settings)
    return up if up is not None and up.identity.lives() else None


def write(settings: Settings, up: UpState) -> None:
    """Replace the state file; readers see the old one or the new one."""
    private_files.replace(path(settings), msgspec.json.encode(up))


def identify(processes: Iterable[psutil.Process]) -> tuple[Identity, ...]:
    """Identities of the processes that still live."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            found.append(Identity.of(process.pid))
    return tuple(found)
