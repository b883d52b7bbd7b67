"""The file of API keys under HB_HOME, which `hb keys` changes and gateways reread.

A token is `hb_<id>_<secret>`, both in hex: the id, 6 bytes, names the key in lists and logs; the
secret, 32 random bytes, is shown once and never stored. docs/decisions/0014-access.md says why
it is hashed as it is.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import hmac
import re
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from filelock import FileLock, Timeout
from msgspec import Meta

from hb_assets.core import private_files
from hb_assets.core.errors import HbError, SettingsError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.durable_files import make_folder, sync_folder

FORMAT: Literal[1] = 1
ScopeName = Literal["ingest", "read", "admin"]
INGEST: ScopeName = "ingest"
"""May send heartbeats."""
READ: ScopeName = "read"
"""May read readings: everybody's, or those of the one user that the key is for."""
ADMIN: ScopeName = "admin"
"""May do everything, and see the metrics."""
SCOPES = (INGEST, READ, ADMIN)

ID_BYTES, SECRET_BYTES = 6, 32
TOKEN = re.compile(rf"hb_[0-9a-f]{{{2 * ID_BYTES}}}_[0-9a-f]{{{2 * SECRET_BYTES}}}")
"""What scanners for leaked secrets can look for."""
NAME_MAX = 100
_LOCK_SECONDS = 10.0

_Instant = Annotated[dt.datetime, Meta(tz=True)]


class Key(msgspec.Struct, frozen=True, omit_defaults=True):
    """One key as the file has it.

    Attributes:
        id: 12 hex digits, also a part of the token.
        name: what people call it.
        scopes: what it may do.
        created: when it was made.
        digest: SHA-256 of the token, hex.
        expires: when it ends by itself.
        user: only this user's readings: a keyed hash of the user_id (`user_digest`), hex.
    """

    id: Annotated[str, Meta(pattern=f"^[0-9a-f]{{{2 * ID_BYTES}}}$")]
    name: str
    scopes: tuple[ScopeName, ...]
    created: _Instant
    digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
    expires: _Instant | None = None
    user: Annotated[str, Meta(pattern="^[0-9a-f]{32}$")] | None = None

    def is_for(self, user_id: str) -> bool:
        """Whether the key was made for this user's readings alone."""
        given = user_digest(user_id, bytes.fromhex(self.digest)).hex()
        return self.user is not None and hmac.compare_digest(self.user, given)

    def expired(self, now: dt.datetime) -> bool:
        """Whether the key has expired."""
        return self.expires is not None and self.expires <= now


class _File(msgspec.Struct, frozen=True):
    format: Literal[1]
    keys: tuple[Key, ...]


def user_digest(user_id: str, digest: bytes) -> bytes:
    """Hash of a user_id, keyed by the digest of the key that is made for it."""
    # surrogates come out of a terminal's bytes that aren't UTF-8
    return hashlib.blake2b(
        user_id.encode(errors="surrogatepass"), key=digest, digest_size=16
    ).digest()


def path(settings: Settings) -> Path:
    """Path of the file of keys. Where it exists, a gateway requires a key."""
    return settings.home_dir / "keys.json"


def read(file: Path) -> tuple[Key, ...] | None:
    """All keys of a file; None when there is no such file.

    Raises:
        SettingsError: it can't be read, or isn't a file of keys as this version writes it.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(
            f"the file of API keys {file} can't be read ({error.strerror}): make it readable for "
            "the user that the gateway runs as"
        ) from None
    try:
        return msgspec.json.decode(raw, type=_File).keys
    except (ValueError, RecursionError):  # DecodeError is one; its text may quote the file
        raise SettingsError(
            f"the file of API keys {file} is damaged, or of another version: put a copy back, or "
            "move it away and make new keys with `hb keys create`"
        ) from None


def create(
    settings: Settings,
    name: str,
    scopes: Sequence[ScopeName],
    *,
    user_id: str | None = None,
    lifetime: dt.timedelta | None = None,
) -> tuple[Key, str]:
    """Make a key; durable when this returns. Its token is only returned here, and not stored.

    Args:
        settings: for HB_HOME.
        name: what people call it; several may have one name.
        scopes: at least one.
        user_id: limits `read` to one user's readings.
        lifetime: until it expires; None: never.

    Raises:
        SettingsError: the file can't be read or written, or is damaged.
        HbError: another process holds its lock.
    """
    identifier = secrets.token_hex(ID_BYTES)
    token = f"hb_{identifier}_{secrets.token_hex(SECRET_BYTES)}"
    digest = hashlib.sha256(token.encode()).digest()
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    key = Key(
        id=identifier,
        name=name,
        scopes=tuple(dict.fromkeys(scopes)),
        created=now,
        digest=digest.hex(),
        expires=None if lifetime is None else now + lifetime,
        user=None if user_id is None else user_digest(user_id, digest).hex(),
    )
    with _locked(settings) as file:
        _write(file, (*(read(file) or ()), key))
    return key, token


def revoke(settings: Settings, identifier: str) -> Key:
    """Take a key out of the file; running gateways refuse it about a second later.

    Raises:
        SettingsError: the file can't be read or written, or is damaged.
        HbError: there is no such key, or another process holds the file's lock.
    """
    with _locked(settings) as file:
        keys = read(file) or ()
        found = next((key for key in keys if key.id == identifier), None)
        if found is None:
            raise HbError("there is no key with this id: `hb keys list` shows all")
        _write(file, tuple(key for key in keys if key is not found))
    return found


@contextlib.contextmanager
def borrowed(settings: Settings, name: str, scopes: Sequence[ScopeName]) -> Iterator[str | None]:
    """Context with the token of a temporary key; None where no key is asked for.

    The key of a killed process expires within the hour. Raises as `create` does.
    """
    if read(path(settings)) is None:
        yield None
        return
    key, token = create(settings, name, scopes, lifetime=dt.timedelta(hours=1))
    try:
        yield token
    finally:
        revoke(settings, key.id)


@contextlib.contextmanager
def _locked(settings: Settings) -> Iterator[Path]:
    file = path(settings)
    try:
        make_folder(file.parent)
        with FileLock(file.with_suffix(".lock"), timeout=_LOCK_SECONDS, mode=0o600):
            yield file
    except Timeout:
        raise HbError(
            f"another process has been changing {file} for {_LOCK_SECONDS:g} s: try again"
        ) from None
    except OSError as error:
        raise SettingsError(
            f"the file of API keys {file} can't be written ({error.strerror}): see to that folder "
            "and its permissions"
        ) from None


def _write(file: Path, keys: tuple[Key, ...]) -> None:
    """Replace the file; a reader sees the old one or the new one, after a power cut too."""
    text = msgspec.json.format(msgspec.json.encode(_File(FORMAT, keys)), indent=2)
    private_files.replace(file, text + b"\n")
    sync_folder(file.parent)
