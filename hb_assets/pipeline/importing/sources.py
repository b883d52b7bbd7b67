"""Opens what is to be imported: a path, a pipe or standard input, plain or compressed.

Everything is read once, from start to end, so that a pipe will do; only Parquet has to seek, and
what can't is copied to a temporary file for it.
"""

from __future__ import annotations

import gzip
import io
import shutil
import sys
import tempfile
import zlib
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import pyarrow as pa

from hb_assets.core.errors import ImportFileError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from typing_extensions import Buffer

Format = Literal["ndjson", "csv", "parquet"]
FORMATS: dict[str, Format] = {
    "ndjson": "ndjson",
    "jsonl": "ndjson",
    "json": "ndjson",
    "csv": "csv",
    "tsv": "csv",
    "parquet": "parquet",
}
"""Formats by the end of a file's name, and by what `--format` takes."""
MOST = 2**20
"""Bytes of the longest record that is read: memory stays bounded, whatever a file holds."""
UNREADABLE = (
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    zlib.error,
    zstd.ZstdError,
    pa.ArrowException,
)
"""What reading a broken file raises."""

_STDIN = Path("-")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Why a reader made no record of a line or a row. The message never quotes it."""

    reason: str
    message: str


TOO_LONG = Unreadable("record_too_long", f"a record has at most {MOST:,} bytes")
NOT_UTF8 = Unreadable("record_not_utf8", "the text isn't UTF-8")

Content: TypeAlias = io.BufferedReader | gzip.GzipFile | zstd.ZstdFile
"""What a file holds, uncompressed."""
Row: TypeAlias = bytes | dict[str, Any] | Unreadable
"""A record as its file has it: JSON text, or fields, or why it is neither."""


class _Once(io.RawIOBase):
    """A file that is read once; `position` counts the bytes read so far."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.head = b""
        while len(self.head) < len(_ZSTD) and (more := file.read(len(_ZSTD) - len(self.head))):
            self.head += more
        self._ahead = self.head
        self.position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._ahead[: len(view)] or self._file.read(len(view))
        self._ahead = self._ahead[len(data) :]
        view[: len(data)] = data
        self.position += len(data)
        return len(data)


@dataclass(frozen=True, slots=True)
class Source:
    """An open file: its uncompressed `content`, and how much of the file was read so far."""

    name: str
    content: Content
    _once: _Once
    _seekable: IO[bytes] | None

    def position(self) -> int:
        """Bytes of the file that were read so far."""
        return self._once.position

    def text(self) -> Content:
        """The content, where it is text in UTF-8. Raises ImportFileError when it is UTF-16."""
        if self.content.peek(2)[:2] in _UTF_16:
            raise ImportFileError(f"{self.name}: is text in UTF-16: convert it to UTF-8")
        return self.content

    def seekable(self, stack: ExitStack) -> IO[bytes]:
        """The content as a file that can seek: the file itself, or a temporary copy."""
        if self._seekable is not None:
            self._seekable.seek(0)
            return self._seekable
        copy = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # the stack closes it
        shutil.copyfileobj(self.content, copy)
        copy.seek(0)
        return copy


def opened(path: Path, stack: ExitStack) -> Source:
    """Open a file until the stack ends; `-` is standard input.

    Raises:
        OSError: it can't be opened or read.
    """
    piped = path == _STDIN
    file: IO[bytes] = stack.enter_context(
        open(0 if piped else path, "rb", buffering=0, closefd=not piped)  # noqa: SIM115  # 0 has no path, and the stack closes it
    )
    once = _Once(file)
    content: Content
    seekable = None
    if once.head.startswith(_GZIP):
        content = gzip.GzipFile(fileobj=io.BufferedReader(once))
    elif once.head == _ZSTD:
        content = zstd.ZstdFile(io.BufferedReader(once))
    else:
        content = io.BufferedReader(once)
        if not piped and path.is_file():
            seekable = file
    stack.enter_context(content)
    return Source(name_of(path), content, once, seekable)


def name_of(path: Path) -> str:
    """A file's name for reports, which are UTF-8 whatever its name is."""
    return bytes(path).decode("utf-8", "replace")


def format_of(path: Path) -> Format:
    """Format by the file's name, `.gz` and `.zst` aside.

    Raises:
        ImportFileError: the name doesn't say.
    """
    name = path.with_suffix("") if path.suffix.lower() in (".gz", ".zst") else path
    found = FORMATS.get(name.suffix.lower().removeprefix("."))
    if found is None:
        raise ImportFileError(
            f"{name_of(path)}: can't tell the format by the name; pass --format ndjson, csv or parquet"
        )
    return found


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0]
