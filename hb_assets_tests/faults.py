"""Storage faults: system calls on chosen files that fail, as they do on a full or broken disk.

They fail inside this process; the lake's writers use the system through `os` and `io.open` alone.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

Call = Literal["create", "write", "short write", "fsync", "name", "fsync folder"]
"""Moments of a durable file's life that may fail, in their order."""
_SHORT = 10
"""Bytes that a short write gets onto the disk."""


@dataclass
class Fault:
    """A call that fails with an errno wherever a path's text has `where` in it."""

    call: Call
    number: int
    where: str
    hits: list[str] = field(default_factory=list)
    """Paths that it failed on."""
    synced: list[str] = field(default_factory=list)
    """Paths that were fsynced, or given their name, with success."""

    def strike(self, call: str, path: object) -> None:
        text = os.fsdecode(path)  # type: ignore[arg-type]  # what the calls take
        if call == self.call and self.where in text:
            self.hits.append(text)
            raise OSError(self.number, os.strerror(self.number), text)
        if call in ("fsync", "name"):
            self.synced.append(text)


@contextlib.contextmanager
def failing(call: Call, number: int, where: str) -> Iterator[Fault]:
    """Have `call` fail for files with `where` in their path, for the time of the block."""
    fault = Fault(call, number, where)
    real = {name: getattr(os, name) for name in ("open", "fsync", "link", "replace")}
    real_open = io.open

    def opened(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE:
            fault.strike("create", path)
        return int(real["open"](path, flags, *more, **named))

    def fsync(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        fault.strike("fsync folder" if path.is_dir() else "fsync", path)
        real["fsync"](handle)

    def naming(name: str) -> Any:
        def call(source: Any, target: Any, **named: Any) -> None:
            fault.strike("name", source)
            real[name](source, target, **named)

        return call

    def file(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        writing = "b" in mode and ("w" in mode or "+" in mode)
        if writing and fault.call in ("write", "short write") and where in str(path):
            return io.BufferedRandom(_Failing(fault, str(path), mode.replace("b", "")))  # type: ignore[arg-type]  # a FileIO is one
        return real_open(path, mode, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "link", naming("link"))
        patch.setattr(os, "replace", naming("replace"))
        patch.setattr(io, "open", file)
        yield fault


class _Failing(io.FileIO):
    """A file that takes no byte more, or (a short write) only the first few."""

    def __init__(self, fault: Fault, path: str, mode: str) -> None:
        super().__init__(path, mode if "+" in mode else f"{mode}+")
        self._fault = fault
        self._left = _SHORT if fault.call == "short write" else 0

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        if self._left:
            written = super().write(view[: self._left])
            self._left -= written
            return written
        self._fault.strike(self._fault.call, self.name)
        raise AssertionError("unreachable")
