"""Durable files: temp file, fsync, atomic publication, fsync of the folder.

This order of system calls makes a file survive a crash whole or not at all.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from hb_assets.core import private_files
from hb_assets.core.errors import FencedError
from hb_assets.lake.storage import layout, permissions


class Fingerprint(NamedTuple):
    """Identity and version of a file, as far as a stat tells: inode, size and times."""

    inode: int
    mtime_ns: int
    ctime_ns: int
    size: int

    @classmethod
    def of(cls, found: os.stat_result) -> Fingerprint:
        """By a stat's result."""
        return cls(found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size)

    def has_bytes_of(self, before: Fingerprint) -> bool:
        """Whether it is the same file with the same bytes; links to it may have come or gone."""
        return (self.inode, self.mtime_ns, self.size) == (
            before.inode,
            before.mtime_ns,
            before.size,
        )


def fingerprint(path: Path) -> Fingerprint:
    """The file's fingerprint now: the key of what is remembered of it. Raises OSError."""
    return Fingerprint.of(path.stat())


def barred(path: Path) -> Path:
    """The topmost folder above `path` that we may not enter; `path` itself where there is none."""
    for one in reversed(path.parents):
        if os.access(one, os.F_OK, effective_ids=True) and not os.access(
            one, os.X_OK, effective_ids=True
        ):
            return one
    return path


def sync_folder(folder: Path) -> None:
    """Make the folder's entries durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def sync_file(path: Path) -> None:
    """Make the file's bytes durable."""
    _sync(path, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_durable: set[Path] = set()
"""Folders that this process knows to be durable in their parents."""


def make_folder(folder: Path, root: Path | None = None) -> None:
    """Make a folder and its missing parents, each one durable in its own parent.

    They are as open as the lake at `root` is (`permissions`); without one, for their owner alone.
    Below `root`, a folder that somebody else made isn't taken for durable before this process has
    synced its parent: its maker may not have got so far.
    """
    doubtful = []
    while folder != root and not (folder.is_dir() and (root is None or folder in _durable)):
        doubtful.append(folder)
        folder = folder.parent
    for one in reversed(doubtful):
        _make(one, root)
        sync_folder(one.parent)
        _durable.add(one)


def _make(folder: Path, root: Path | None) -> None:
    try:
        folder.mkdir(private_files.FOLDER)
    except FileExistsError:
        return
    if root is not None and (mode := permissions.of_folders(root)) != private_files.FOLDER:
        folder.chmod(mode)


class TempFile:
    """A file that readers can't see until it is published; unlinked when it never was.

    Created at once, empty, so that a pruner can see (and fence) whoever is about to publish.
    Whoever writes it must not create it again: write to the file that is there (`r+b`).

    Args:
        root: the lake's folder.
        folder: where the file will be published; made when it isn't there.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        make_folder(folder, root)
        self.path = layout.temp_file(root, folder)
        _make(self.path.parent, root)
        self._named = False
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, private_files.FILE)
        try:
            os.fchmod(handle, permissions.of_files(root))  # whatever the umask
        finally:
            os.close(handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not self._named and not self.path.exists():
            # whatever failed after that: the file's being gone is the reason, or the greater news
            raise self._fenced() from None
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(self.path)  # failed writes and fsyncs don't say where
        self.path.unlink(missing_ok=True)

    def _sync(self) -> None:
        try:
            sync_file(self.path)
        except FileNotFoundError:
            raise self._fenced() from None

    def _fenced(self) -> FencedError:
        return FencedError(f"{self.path}: the temp file is gone, a pruner was here; start again")

    def publish_new(self, final: Path) -> None:
        """Give the file its name, which must not be taken. Durable when this returns.

        Raises:
            FileExistsError: the name is taken; nothing was changed.
            FencedError: the temp file is gone.
        """
        self._sync()
        try:
            os.link(self.path, final)
        except FileNotFoundError:
            raise self._fenced() from None
        except OSError as error:
            # Some network file systems have no hard links; the random part of our names makes the
            # rename's overwriting impossible in practice.
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS) or final.exists():
                raise
            self.path.rename(final)
        self._named = True
        self.path.unlink(missing_ok=True)
        sync_folder(final.parent)

    def publish_replacing(self, final: Path) -> None:
        """Give the file its name, in the place of what had it. Durable when this returns.

        Raises:
            FencedError: the temp file is gone: a pruner was here; nothing was changed.
        """
        self._sync()
        try:
            self.path.replace(final)
        except FileNotFoundError:
            raise self._fenced() from None
        self._named = True
        sync_folder(final.parent)
