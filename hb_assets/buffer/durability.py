"""Durability modes: checks that the server keeps what HB_DURABILITY promises.

    fsync        the server's append-only file was fsynced before it answered
    replicated   the same, and WAITAOF says so of HB_REPLICAS replicas, for every append
    memory       the server has it in memory

The mode is compared with the server's configuration, and replicas are asked for confirmation. The
embedded server's own configuration is in `server`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import redis
import redis.asyncio
import redis.exceptions as failures

from hb_assets.buffer import keys
from hb_assets.buffer.connection import AsyncClient, Client, UnfitError, address, unavailable
from hb_assets.buffer.roundtrip import Command, exchange_confirmed, script
from hb_assets.core.errors import BufferUnavailableError, UnconfirmedError
from hb_assets.core.settings import Settings

_FSYNC = {"appendonly": "yes", "appendfsync": "always", "no-appendfsync-on-rewrite": "no"}
_POLICY = "maxmemory-policy"
_NUDGE_MS = 100
"""A replica that is further away than this confirms at its next tick, within a second."""


def require(client: Client, settings: Settings) -> None:
    """Verify that "stored" means what HB_DURABILITY says; call it before accepting anything.

    Mode `fsync` needs appendonly=yes, appendfsync=always and no-appendfsync-on-rewrite=no: Redis
    then answers an append only after its append-only file is on the disk. Mode `replicated` needs
    the same, and that replicas confirm a write here and now. Any mode needs a maxmemory-policy
    that doesn't evict keys at will: streams and ledgers never expire, and an evicted one is lost.

    Raises:
        BufferUnavailableError: the server doesn't answer, is set up otherwise, doesn't tell (where
            CONFIG is forbidden, HB_ASSUME_FSYNC=1 takes its word for granted), has no WAITAOF, or
            fewer replicas than HB_REPLICAS confirm a write.
    """
    if not settings.assume_fsync:
        _require_configuration(client, settings.durability)
    confirmation = Confirmation.of(settings)
    if confirmation is not None:
        _require_confirmed(client, confirmation)


def _require_configuration(client: Client, mode: str) -> None:
    try:
        found = client.config_get(*_FSYNC, _POLICY)
    except failures.ResponseError:
        found = None
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    fault = _fault(found, mode, address(client))
    if fault is not None:
        raise BufferUnavailableError(fault)


def _fault(found: Mapping[Any, Any] | None, mode: str, where: str) -> str | None:
    """How the server's configuration breaks the mode; a value is None where it doesn't tell."""
    if found is None:
        if mode == "memory":
            return None
        return (
            f"Redis at {where} doesn't tell its configuration, so that HB_DURABILITY="
            f"{mode} can't be verified: set HB_ASSUME_FSYNC=1 if it has appendonly=yes and "
            "appendfsync=always, or HB_DURABILITY=memory"
        )
    told = {_text(name): _text(value) for name, value in found.items()}
    values = {name: told.get(name, "") for name in _FSYNC}
    policy = told.get(_POLICY, "")
    if policy.startswith("allkeys"):
        return (
            f"Redis at {where} has {_POLICY}={policy}: when it is full it evicts "
            "heartbeats that it has accepted; set it to noeviction"
        )
    if mode != "memory" and values != _FSYNC:
        has = ", ".join(f"{name}={value or '?'}" for name, value in values.items())
        needs = ", ".join(f"{name}={value}" for name, value in _FSYNC.items())
        return (
            f"Redis at {where} has {has}, but HB_DURABILITY={mode} needs {needs}: set "
            "them there, or HB_DURABILITY=memory if a crash of Redis may lose what it has accepted"
        )
    return None


def verified(client: Client, settings: Settings) -> Client:
    """A client to the same server, each of whose connections is verified before its first use.

    redis-py silently reconnects when a connection breaks: to a server that was restarted with
    another configuration, or to another one. What `require` found out about the one before means
    nothing then. A connection that isn't as `require` wants it fails with UnfitError.
    """
    where = address(client)

    def on_connect(connection: Any) -> None:
        connection.on_connect()
        if settings.assume_fsync:
            return
        connection.send_command("CONFIG", "GET", *_FSYNC, _POLICY)
        try:
            reply = connection.read_response()
        except failures.ResponseError:
            reply = None
        _require_fit(reply, settings, where)

    pool = client.connection_pool
    options = pool.connection_kwargs | {"redis_connect_func": on_connect}
    return redis.Redis.from_pool(
        redis.ConnectionPool(connection_class=pool.connection_class, **options)
    )


def verified_async(client: AsyncClient, settings: Settings) -> AsyncClient:
    """As `verified`, for the event loop of `client`; its caller closes it."""
    where = address(client)

    async def on_connect(connection: Any) -> None:
        await connection.on_connect()
        if settings.assume_fsync:
            return
        await connection.send_command("CONFIG", "GET", *_FSYNC, _POLICY)
        try:
            reply = await connection.read_response()
        except failures.ResponseError:
            reply = None
        _require_fit(reply, settings, where)

    pool = client.connection_pool
    options = pool.connection_kwargs | {"redis_connect_func": on_connect}
    return redis.asyncio.Redis.from_pool(
        redis.asyncio.ConnectionPool(connection_class=pool.connection_class, **options)
    )


def _require_fit(reply: Any, settings: Settings, where: str) -> None:
    found = None if reply is None else dict(zip(reply[::2], reply[1::2], strict=True))
    fault = _fault(found, settings.durability, where)
    if fault is not None:
        raise UnfitError(fault)


def _require_confirmed(client: Client, confirmation: Confirmation) -> None:
    where = f"Redis at {address(client)}"
    write = script("probe", (keys.ledger(0),), ())
    try:
        [(reply, confirmed)] = exchange_confirmed(client, [write], confirmation.commands)
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    if isinstance(reply, failures.RedisError):
        raise unavailable(reply, client, 0)
    if isinstance(confirmed, Exception) and "unknown command" in str(confirmed).lower():
        raise BufferUnavailableError(
            f"{where} has no WAITAOF, which HB_DURABILITY=replicated needs: use Redis 7.2 or later "
            "or Valkey there, or set HB_DURABILITY=fsync"
        )
    fault = confirmation.fault(confirmed)
    if fault is not None:
        raise BufferUnavailableError(
            f"{where}: {fault}: start {confirmation.replicas} replicas (HB_REPLICAS) with "
            "appendonly=yes, or set HB_REPLICAS or HB_DURABILITY to what is there"
        )


@dataclass(frozen=True, slots=True)
class Confirmation:
    """What must confirm an append: the server's disk and the disks of `replicas`, within `ms`.

    The primary's own count is asked for, but isn't all there is: Valkey 9.1 with appendfsync
    everysec was seen to count itself before its fdatasync, which is why `require` wants `always`.

    WAITAOF covers the writes of its own connection, and doesn't wait inside a script or MULTI:
    send `commands` after the appends, in the same pipeline; the last one's reply counts.
    """

    replicas: int
    ms: int

    @classmethod
    def of(cls, settings: Settings) -> Confirmation | None:
        """The confirmation that the mode needs; None when the server's own answer is enough."""
        if settings.durability != "replicated":
            return None
        # Half of the time that the client waits: the server's word has to come first.
        # Never 0, which would be for ever.
        return cls(settings.replicas, max(1, int(settings.redis_timeout.total_seconds() * 500)))

    @property
    def commands(self) -> tuple[Command, ...]:
        """The commands to send.

        A replica answers the request that a wait makes the primary send before it has fsynced what
        it just got, and says more only at its next tick, up to a second later. When WAIT is over,
        it has got it; the request that WAITAOF then makes the primary send meets a synced file.
        """
        return (
            ("WAIT", self.replicas, min(_NUDGE_MS, self.ms)),
            ("WAITAOF", 1, self.replicas, self.ms),
        )

    def fault(self, reply: Any) -> str | None:
        """What the reply of WAITAOF lacks, or None when all have confirmed."""
        if isinstance(reply, Exception):
            return f"not confirmed: WAITAOF was refused ({str(reply).splitlines()[0]})"
        local, replicas = reply
        if local >= 1 and replicas >= self.replicas:
            return None
        missing = [] if local else ["the server's disk"]
        if replicas < self.replicas:
            missing.append(f"{self.replicas - replicas} of {self.replicas} replicas")
        return f"not confirmed within {self.ms / 1000:g} s by {' and '.join(missing)}"

    def outcome(
        self, shard: int, reply: Any, client: Client | AsyncClient
    ) -> UnconfirmedError | None:
        """The error of an append that Redis took and that wasn't confirmed."""
        fault = self.fault(reply)
        if fault is None:
            return None
        return UnconfirmedError(f"Redis at {address(client)}, shard {shard:02d}: {fault}")


@dataclass(frozen=True, slots=True)
class Standing:
    """Whether the mode in force holds now: `fault` says in one line what breaks it, if anything."""

    mode: str
    fault: str | None = None
    warnings: tuple[str, ...] = ()


def standing(client: Client, settings: Settings) -> Standing:
    """Look at the server again: its set-up may have changed since `require`.

    Raises:
        BufferUnavailableError: it doesn't answer.
    """
    mode = settings.durability
    try:
        persistence: Mapping[str, Any] = client.info("persistence")
        replication: Mapping[str, Any] = client.info("replication")
    except failures.ResponseError:
        return Standing(mode, warnings=("Redis doesn't tell about itself: its INFO is forbidden",))
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    if not settings.assume_fsync:
        try:
            _require_configuration(client, mode)
        except BufferUnavailableError as error:
            return Standing(mode, fault=str(error))
    where = f"Redis at {address(client)}"
    if persistence.get("aof_enabled") == 0:
        off = f"{where} has its append-only file off: when it ends, what isn't drained is lost"
        return Standing(mode, warnings=(off,))
    if persistence.get("aof_last_write_status", "ok") != "ok":
        return Standing(mode, fault=f"{where} can't write its append-only file: is its disk full?")
    replicas = replication.get("connected_slaves", 0)
    if mode == "replicated" and replicas < settings.replicas:
        return Standing(
            mode, fault=f"{where} has {replicas} replicas, HB_REPLICAS asks for {settings.replicas}"
        )
    return Standing(mode)


def _text(value: object) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
