"""The lake itself: opening its root folder, and its identity file `lake.json`.

`lake.json` records how the lake was made. Masked ids for people's eyes are made here as well.
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from hb_assets.core.errors import DamagedFileError, LakeMismatchError, SettingsError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import checksummed_json, permissions
from hb_assets.lake.storage.durable_files import TempFile, make_folder
from hb_assets.lake.storage.layout import HEARTBEATS, RAW

FORMAT = 1
"""Version of the layout and of the metadata in the files."""


class _Identity(msgspec.Struct, frozen=True):
    format: int
    shards: int
    mask_key: str


@dataclass(frozen=True, slots=True)
class Lake:
    """An open lake. `root` is its folder, `shards` the number it was made with."""

    root: Path
    shards: int
    mask_key: bytes

    @classmethod
    def open(cls, settings: Settings, *, create: bool = True) -> Lake:
        """Open the lake that the settings name; make it when it isn't there.

        Args:
            settings: for HB_LAKE and HB_SHARDS.
            create: False: make nothing.

        Raises:
            LakeMismatchError: made with another shard count or format.
            SettingsError: the folder can't be made or written, or there is no lake in it.
            DamagedFileError: lake.json can't be read, or is gone from a lake that holds data.
        """
        root = settings.lake_dir
        path = root / "lake.json"
        try:
            if not path.exists():
                _require_new(root, path)
                if not create:
                    raise SettingsError(
                        f"there is no lake at {root}: check HB_HOME and HB_LAKE; `hb up`, "
                        "`hb serve`, `hb import` and `hb drain` make one"
                    )
                _create(path, settings)
            identity = checksummed_json.read(path, _Identity)
        except OSError as error:
            raise SettingsError(
                f"the lake {root} can't be used: {error.strerror}; mend it or set HB_LAKE"
            ) from None
        except DamagedFileError:
            raise DamagedFileError(
                f"{path} can't be read; restore it from a copy, or write it anew as "
                f'{{"format": {FORMAT}, "shards": <as before>, "mask_key": "<as before>"}}: without '
                "the mask_key nobody who was forgotten is known any more"
            ) from None
        if identity.format != FORMAT:
            raise LakeMismatchError(
                f"the lake {root} has format {identity.format}, this version reads {FORMAT}"
            )
        if identity.shards != settings.shards:
            raise LakeMismatchError(
                f"the lake {root} has {identity.shards} shards, HB_SHARDS says {settings.shards}; "
                f"set HB_SHARDS={identity.shards}, or use a new lake (HB_LAKE)"
            )
        return cls(root, identity.shards, identity.mask_key.encode())

    def mask(self, identifier: str) -> str:
        """An id for people's eyes that doesn't give away the user; the same within this lake."""
        digest = hashlib.blake2b(identifier.encode(), key=self.mask_key[:64], digest_size=4)
        return "~" + digest.hexdigest()


def holds_data(root: Path) -> bool:
    """Whether anything was ever stored under this folder. Raises OSError."""
    return any((root / kind).exists() for kind in (RAW, HEARTBEATS))


def _require_new(root: Path, path: Path) -> None:
    # an identity that somebody has made meanwhile is no lost one
    if holds_data(root) and not path.exists():
        raise DamagedFileError(f"{path} is gone")


def _create(path: Path, settings: Settings) -> None:
    make_folder(path.parent)
    permissions.share(path.parent, settings)
    identity = _Identity(FORMAT, settings.shards, secrets.token_hex(16))
    with TempFile(path.parent, path.parent) as temp:
        checksummed_json.write(temp.path, identity)
        try:
            temp.publish_new(path)
        except FileExistsError:
            return  # another process made the lake meanwhile; its word counts
