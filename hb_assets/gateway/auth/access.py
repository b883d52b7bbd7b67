"""Access control by API key: who sends a request, and whether they may.

It finds a request's key, knows what the key may do, and follows changes of the file of keys
(`keyring`). Which route needs which scope is in `app`. No key, and no part of a secret, ever gets
into a log, an error or a repr.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import ipaddress
import logging
import math
import os
import re
import socket
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from functools import lru_cache
from hashlib import sha256
from hmac import compare_digest

import msgspec
from starlette.types import Scope

from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring
from hb_assets.gateway.auth.keyring import ADMIN, ID_BYTES, INGEST, READ, SECRET_BYTES, Key
from hb_assets.gateway.http import background
from hb_assets.gateway.http.problems import ProblemError

PRINCIPAL = "hb.principal"
"""Where the ASGI scope holds the Principal, on every route that needs a scope."""
REREAD_SECONDS = 1.0

_ID = slice(3, 3 + 2 * ID_BYTES)
_TOKEN_LENGTH = 3 + 2 * ID_BYTES + 1 + 2 * SECRET_BYTES

_log = logging.getLogger(__name__)


class Principal(msgspec.Struct, frozen=True, gc=False):
    """Who sends a request: what a handler and a limit may know of a key.

    Attributes:
        key_id: public id of the key; None where no key is asked for.
        scopes: what it may do; admin stands with all others.
        user: only the readings of this user: `keyring.user_digest`; None: everybody's.
        salt: what that digest is keyed by.
    """

    key_id: str | None
    scopes: frozenset[str]
    user: bytes | None = None
    salt: bytes = b""

    def may_read(self, user_id: str) -> bool:
        """Whether it may see readings of this user."""
        return self.user is None or compare_digest(
            self.user, keyring.user_digest(user_id, self.salt)
        )


ANYBODY = Principal(None, frozenset({INGEST, READ, ADMIN}))
"""Who asks a gateway without keys, which only this machine reaches."""


class _Known(msgspec.Struct, frozen=True, gc=False):
    digest: bytes
    expires: float
    principal: Principal


class _Keys:
    """The keys of one reading of the file, by id; `keyless` where there is no file.

    Another thread puts new ones in their place: whoever decides looks at one object only.
    """

    def __init__(self, keys: Iterable[Key] | None) -> None:
        self.keyless = keys is None
        self.known = _table(keys or ())


class Access:
    """The keys of one gateway process.

    Without a file of keys everybody may do everything, on a loopback address only. Once there is
    one, a key is needed for as long as the process lives, whatever becomes of the file.
    """

    def __init__(self, settings: Settings) -> None:
        self._path = keyring.path(settings)
        self._host = settings.gateway_host
        names = {"localhost", "127.0.0.1", "::1", self._host, *settings.gateway_names}
        self._names = frozenset(name.lower().strip("[]").encode() for name in names)
        self._keys = _Keys(())
        self._seen: tuple[int, ...] | None = None
        self._fault: str | None = None

    def load(self) -> None:
        """Read the keys for the first time; nobody gets in before that.

        Raises:
            SettingsError: the file is damaged or unreadable, or there is no key that can be used
                while the address isn't loopback.
        """
        self._seen = self._signature()
        keys = keyring.read(self._path)
        usable = [key for key in keys or () if not key.expired(dt.datetime.now(dt.UTC))]
        if not usable and not _is_loopback(self._host):
            raise SettingsError(
                f"without an API key the gateway serves this machine only, not {self._host}: make "
                "one with `hb keys create`, or set HB_GATEWAY_HOST to 127.0.0.1"
            )
        self._keys = _Keys(keys)

    @contextlib.asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Follow the file for the time of the block: what changes counts within two seconds.

        Raises:
            SettingsError: as `load` does.
        """
        await asyncio.to_thread(self.load)
        async with background.running(self._watch()):
            yield

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(REREAD_SECONDS)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception as error:  # noqa: BLE001  # whatever it is, later changes must count
                _log.error("alarm keys (error): can't follow them: %s", type(error).__name__)

    def refresh(self) -> None:
        """Read the file again if it changed. Where that fails the last good keys stay."""
        seen = self._signature()
        if seen == self._seen:
            return
        try:
            keys = keyring.read(self._path)
        except SettingsError as error:
            self._fail(str(error))
            return
        if keys is None and not self._keys.keyless:
            self._fail(f"the file of API keys {self._path} is gone: put it back, or make new keys")
            return
        self._seen = seen
        self._fault = None
        if keys is not None:
            self._keys = _Keys(keys)
            _log.info("the API keys have changed: there are %d now", len(keys))

    def _fail(self, fault: str) -> None:
        if fault != self._fault:
            _log.error("alarm keys (error): %s; the last good keys stay in force", fault)
        self._fault = fault

    def alarms(self) -> list[str]:
        """What is wrong with the file of keys, in a line each."""
        return [] if self._fault is None else [f"{self._fault}; the last good keys stay in force"]

    def _signature(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self._path)  # noqa: PTH116  # every second, and pathlib is slower
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size

    def check(self, scope: Scope, needed: str) -> None:
        """Let a request through that has a key with the scope `needed`, as its PRINCIPAL.

        The key comes as `Authorization: Bearer …` or as `X-API-Key`.

        Raises:
            ProblemError: 401 without a valid key, 403 without that scope; 421 where no key is asked
                for, and the request was sent to a name that isn't ours.
        """
        keys = self._keys
        if keys.keyless:
            self._check_name(scope)
            scope[PRINCIPAL] = ANYBODY
            return
        token = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                if value[:7].lower() == b"bearer ":
                    token = value[7:].lstrip()
                    break
            elif name == b"x-api-key":
                token = value
        known = keys.known.get(token[_ID])
        if (
            known is None
            or len(token) != _TOKEN_LENGTH
            or not compare_digest(sha256(token).digest(), known.digest)
        ):
            raise _unknown(given=bool(token))
        if known.expires <= time.time():
            raise _refused(f"the API key {known.principal.key_id} has expired")
        if needed not in known.principal.scopes:
            raise forbidden(f"this needs an API key with the scope {needed}")
        scope[PRINCIPAL] = known.principal

    def _check_name(self, scope: Scope) -> None:
        """Refuse requests of web pages whose own name points here (DNS rebinding).

        To the browser we are then that page's origin, and it may read our answers.
        """
        for name, value in scope["headers"]:
            if name == b"host" and _host_of(value) not in self._names:
                raise ProblemError(
                    421,
                    "misdirected-request",
                    "Not a name of this gateway",
                    "without API keys it may be asked by localhost, 127.0.0.1, [::1] and "
                    "HB_GATEWAY_HOST alone: use one of these, name yours in HB_GATEWAY_NAMES, or "
                    "make a key (`hb keys create`)",
                )


@lru_cache(maxsize=256)
def _host_of(header: bytes) -> bytes:
    """The host in a Host header: no port, no brackets, small letters."""
    found = re.fullmatch(rb"(?:\[([^\[\]]*)\]|([^:]*))(?::\d*)?", header.strip().lower())
    return (found[1] or found[2] or b"") if found else header


def check_user(scope: Scope, user_id: str) -> None:
    """Refuse a request that may not see this user's readings.

    Raises:
        ProblemError: 403, the same whether there is such a user or not.
    """
    if not scope[PRINCIPAL].may_read(user_id):
        raise forbidden("this API key may read one user only, and this isn't it")


def forbidden(detail: str) -> ProblemError:
    """The 403 for a client with a valid key that lacks a permission."""
    return ProblemError(403, "forbidden", "Not allowed", detail)


def _unknown(*, given: bool) -> ProblemError:
    if given:
        return _refused("this API key isn't known here, or was revoked")
    return ProblemError(
        401,
        "unauthenticated",
        "An API key is needed",
        "send an API key as `Authorization: Bearer hb_…`",
        headers={"www-authenticate": 'Bearer realm="hb"'},
    )


def _refused(detail: str) -> ProblemError:
    """The 401; by RFC 6750 its challenge says so when a key was sent that can't be used."""
    return ProblemError(
        401,
        "unauthenticated",
        "The API key can't be used",
        detail,
        headers={"www-authenticate": 'Bearer realm="hb", error="invalid_token"'},
    )


def _table(keys: Iterable[Key]) -> dict[bytes, _Known]:
    return {
        key.id.encode(): _Known(
            bytes.fromhex(key.digest),
            math.inf if key.expires is None else key.expires.timestamp(),
            Principal(
                key.id,
                ANYBODY.scopes if ADMIN in key.scopes else frozenset(key.scopes),
                bytes.fromhex(key.user) if key.user else None,
                bytes.fromhex(key.digest),
            ),
        )
        for key in keys
    }


def _is_loopback(host: str) -> bool:
    """Whether a host is this machine alone; a name, by all the addresses it has."""
    try:
        addresses: Sequence[str] = [
            str(info[4][0]) for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        ]
    except OSError:
        return False
    return all(ipaddress.ip_address(one.partition("%")[0]).is_loopback for one in addresses)
