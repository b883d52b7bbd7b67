"""Files and folders that other users of the machine can't open, whatever the umask says.

What we keep is health data. A process sets its umask once (`umask`), for what its libraries and
children write; files that may also be made in somebody else's process get their mode explicitly.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

FOLDER, FILE = 0o700, 0o600


def umask() -> None:
    """Set the umask, so that only the owner can read what this process and its children make."""
    os.umask(0o077)


def make_folder(folder: Path) -> None:
    """Make a folder, and its missing parents; one that is there stays as it is.

    Raises:
        OSError: it can't be made.
    """
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for one in reversed(missing):
        one.mkdir(FOLDER, exist_ok=True)


def opener(path: str, flags: int) -> int:
    """Opener that makes private files, for `open(..., opener=private.opener)`."""
    return os.open(path, flags, FILE)


def replace(path: Path, data: bytes) -> None:
    """Replace a file atomically: readers see the old one or the new one, after a crash too.

    Raises:
        OSError: it can't be written; the old one is still there.
    """
    temp = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    try:
        with open(temp, "xb", opener=opener) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except BaseException:
        temp.unlink(missing_ok=True)
        raise
