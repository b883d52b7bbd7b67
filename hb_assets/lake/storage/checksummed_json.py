"""Small JSON files of the lake, each with a checksum of its own bytes.

The last member is `crc32`: the CRC-32 of the whole file with zeros in its place, 8 hex digits. A
file without one was written by an older release, or by hand, and is read as it is.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TypeVar

import msgspec

from hb_assets.lake.storage.parquet import damaged

_MEMBER = b'"crc32":"'
_ZEROS = b"0" * 8

Struct = TypeVar("Struct", bound=msgspec.Struct)


def write(path: Path, content: msgspec.Struct) -> None:
    """Write a struct of at least one field, with its checksum, into a file (a temp file's path)."""
    start = msgspec.json.encode(content)[:-1] + b"," + _MEMBER
    crc32 = zlib.crc32(start + _ZEROS + b'"}')
    path.write_bytes(start + f"{crc32:08x}".encode() + b'"}')


def read(path: Path, kind: type[Struct]) -> Struct:
    """Read a struct that `write` has written.

    Raises:
        DamagedFileError: the file isn't what was written, or no such struct.
        FileNotFoundError: it isn't there.
        OSError: the disk can't be read.
    """
    content = path.read_bytes()
    start, member, rest = content.rpartition(_MEMBER)
    if member:
        crc32 = zlib.crc32(start + member + _ZEROS + rest[8:])
        if rest[:8] != f"{crc32:08x}".encode():
            raise damaged(path, "its bytes aren't those that were written")
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise damaged(path, str(error)) from None
