"""Connections to Redis, made from settings, and readable errors for the ways in which they fail.

Addresses in messages have no passwords. Commands are sent by `roundtrip` and its callers.
"""

from __future__ import annotations

from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import redis
import redis.asyncio
import redis.asyncio.retry
import redis.exceptions as failures
from redis.backoff import ExponentialWithJitterBackoff
from redis.retry import Retry

from hb_assets.buffer import keys, server
from hb_assets.core.errors import BufferUnavailableError, SettingsError
from hb_assets.core.settings import Settings

Client: TypeAlias = redis.Redis
AsyncClient: TypeAlias = redis.asyncio.Redis
_Failure: TypeAlias = failures.RedisError | OSError

_RETRIES = 2
"""A broken connection (a restart, a failover) is tried again this often, a timeout never: whoever
waits gets an answer within HB_REDIS_TIMEOUT and a bit."""


class UnfitError(failures.RedisError):
    """A connection that we refuse to use; the message is one for users."""


def connect(settings: Settings) -> Client:
    """A client with its own pool; it connects with its first command. Replies are bytes.

    Raises:
        BufferUnavailableError: the embedded server isn't running.
        SettingsError: HB_REDIS_URL or a certificate's path can't be used.
    """
    retry = Retry(_backoff(), _RETRIES, supported_errors=(failures.ConnectionError,))
    try:
        return redis.Redis.from_url(_url(settings), retry=retry, **_options(settings))
    except ValueError as error:
        raise _unusable_url(settings, error) from None


def connect_async(settings: Settings) -> AsyncClient:
    """As `connect`, for one event loop."""
    retry = redis.asyncio.retry.Retry(
        _backoff(), _RETRIES, supported_errors=(failures.ConnectionError,)
    )
    try:
        return redis.asyncio.Redis.from_url(_url(settings), retry=retry, **_options(settings))
    except ValueError as error:
        raise _unusable_url(settings, error) from None


def ping(client: Client) -> None:
    """Raises BufferUnavailableError, one line that names the address, when Redis doesn't answer."""
    try:
        client.ping()
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None


def address(client: Client | AsyncClient) -> str:
    """Where the client connects to, as a URL without user and password."""
    pool = client.connection_pool
    where: dict[str, Any] = pool.connection_kwargs
    if "path" in where:
        return f"unix://{where['path']}"
    secure = issubclass(pool.connection_class, (redis.SSLConnection, redis.asyncio.SSLConnection))
    host = where.get("host", "localhost")
    host = f"[{host}]" if ":" in host else host
    return f"{'rediss' if secure else 'redis'}://{host}:{where.get('port', 6379)}"


def unavailable(
    error: _Failure, client: Client | AsyncClient, shard: int | None = None
) -> BufferUnavailableError:
    """The error that a user sees for a failure of redis-py; `shard` is the one it happened at."""
    if isinstance(error, UnfitError):
        return BufferUnavailableError(str(error))
    what = _meaning(error, client, shard)
    return BufferUnavailableError(f"Redis at {address(client)} {what}")


def is_wrong_type(error: _Failure) -> bool:
    """Whether the error says that a key has another type: one shard's fault, not the server's."""
    return _bare(error).startswith("WRONGTYPE")


def _meaning(error: _Failure, client: Client | AsyncClient, shard: int | None) -> str:
    text = _bare(error)
    if is_wrong_type(error) and shard is not None:
        return (
            f"holds something else at {keys.stream(shard)} or {keys.ledger(shard)}, where a stream "
            "and a hash belong: name another database in HB_REDIS_URL, or rename those keys"
        )
    if isinstance(error, failures.BusyLoadingError):
        return "is still loading its data: try again in a moment"
    if isinstance(error, (failures.AuthenticationError, failures.AuthorizationError)):
        return f"refuses our user or password ({text}): check HB_REDIS_URL"
    if isinstance(error, (failures.TimeoutError, TimeoutError)):
        seconds = client.connection_pool.connection_kwargs.get("socket_timeout")
        return f"did not answer within {seconds:g} s (HB_REDIS_TIMEOUT)"
    if isinstance(error, (failures.ConnectionError, OSError)):
        reason = text.partition(" connecting to ")[2].partition(". ")[2].rstrip(".") or text
        return (
            f"can't be reached ({reason}): is it running (`hb up` starts the embedded one), and is "
            "HB_REDIS_URL right?"
        )
    if isinstance(error, failures.ReadOnlyError):
        return "is a read-only replica: name the primary in HB_REDIS_URL"
    if isinstance(error, failures.OutOfMemoryError):
        return "is out of memory (its maxmemory): drain the buffer, or give it more"
    if text.startswith("MISCONF"):
        return "can't write its file (its disk is full?) and takes nothing until it can: make room"
    return f"refused a command: {text}"


def _bare(error: _Failure) -> str:
    """The error's first line without what redis-py or Redis quote of a command's arguments."""
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    for tail in (", with args beginning with", " script: "):
        line = line.partition(tail)[0]
    return line if not line.startswith("Command # ") else type(error).__name__


def _backoff() -> ExponentialWithJitterBackoff:
    return ExponentialWithJitterBackoff(cap=0.5, base=0.05)


def _url(settings: Settings) -> str:
    url = settings.redis_url
    return server.url(settings) if url is None else url.get_secret_value()


def _options(settings: Settings) -> dict[str, Any]:
    seconds = settings.redis_timeout.total_seconds()
    # RESP2: the shapes of raw replies are the same for every server and every version of redis-py.
    options: dict[str, Any] = {"socket_timeout": seconds, "protocol": 2}
    if not _url(settings).startswith("unix:"):
        options["socket_connect_timeout"] = seconds
    certificates = {
        "ssl_ca_certs": ("HB_REDIS_CA", settings.redis_ca),
        "ssl_certfile": ("HB_REDIS_CERT", settings.redis_cert),
        "ssl_keyfile": ("HB_REDIS_KEY", settings.redis_key),
    }
    for option, (variable, path) in certificates.items():
        if path is not None:
            if not path.expanduser().is_file():
                raise SettingsError(f"{variable}: there is no file {path}")
            options[option] = str(path.expanduser())
    return options


def _unusable_url(settings: Settings, error: ValueError) -> SettingsError:
    parts = urlsplit(_url(settings))
    reason = str(error)
    if parts.password and unquote(parts.password) in unquote(reason):
        reason = "it can't be parsed"
    return SettingsError(f"HB_REDIS_URL: {reason}")
