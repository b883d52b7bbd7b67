"""What a stored heartbeat is worth: whether the server keeps it through a crash.

Belongs here: the mode that HB_DURABILITY names, held against what the server is set up to do.
Doesn't belong here: the embedded server's own configuration (`server`).
"""

from __future__ import annotations

import redis.exceptions as failures

from hb_assets.buffer.connection import Client, address, unavailable
from hb_assets.errors import BufferUnavailableError
from hb_assets.settings import Settings

_FSYNC = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
_POLICY = "maxmemory-policy"


def require(client: Client, settings: Settings) -> None:
    """Make sure that "stored" means what HB_DURABILITY says; call it before accepting anything.

    Mode `fsync` needs appendonly=yes, appendfsync=always and no-appendfsync-on-rewrite=no: Redis
    then answers an append only after its append-only file is on the disk. Any mode needs a
    maxmemory-policy that doesn't evict keys at will: streams and ledgers have no expiry, and an
    evicted one is lost whole.

    Raises:
        BufferUnavailableError: the server doesn't answer, is set up otherwise, or doesn't tell
            (where CONFIG is forbidden, HB_ASSUME_FSYNC=1 takes its word for granted).
    """
    if settings.assume_fsync:
        return
    try:
        found = {name: client.config_get(name).get(name, "") for name in (*_FSYNC, _POLICY)}
    except failures.ResponseError:
        if settings.durability == "memory":
            return
        raise BufferUnavailableError(
            f"Redis at {address(client)} doesn't tell its configuration, so that HB_DURABILITY="
            "fsync can't be verified: set HB_ASSUME_FSYNC=1 if it has appendonly=yes and "
            "appendfsync=always, or HB_DURABILITY=memory"
        ) from None
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    values = {name: _text(value) for name, value in found.items()}
    policy = values.pop(_POLICY)
    if policy.startswith("allkeys"):
        raise BufferUnavailableError(
            f"Redis at {address(client)} has {_POLICY}={policy}: when it is full it evicts "
            "heartbeats that it has accepted; set it to noeviction"
        )
    if settings.durability == "fsync" and values != _FSYNC:
        has = ", ".join(f"{name}={value or '?'}" for name, value in values.items())
        needs = ", ".join(f"{name}={value}" for name, value in _FSYNC.items())
        raise BufferUnavailableError(
            f"Redis at {address(client)} has {has}, but HB_DURABILITY=fsync needs {needs}: set "
            "them there, or HB_DURABILITY=memory if a crash of Redis may lose what it has accepted"
        )


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
