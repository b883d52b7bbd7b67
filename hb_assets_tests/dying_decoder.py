"""A decoder of suspects that fails as an entry says: `python -m hb_assets_tests.dying_decoder`.

It is what `lake.ingest.isolation` starts, but for the decoding of entries with one of these words
in them.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from hb_assets.lake.ingest import decode, isolation


def spin() -> None:
    while True:
        pass


def fail() -> None:
    raise RuntimeError("secret 177")


def disk() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def allocate() -> None:
    bytearray(2**31)


ACTS: dict[bytes, Callable[[], object]] = {
    b"segfault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    b"bus error": lambda: os.kill(os.getpid(), signal.SIGBUS),
    b"killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    b"terminated": lambda: os.kill(os.getpid(), signal.SIGTERM),
    b"poison": lambda: os.kill(os.getpid(), signal.SIGSEGV),
    b"spin": spin,
    b"sleep": lambda: time.sleep(600),
    b"fail": fail,
    b"full disk": disk,
    b"allocate": allocate,
}

BUSY = b"busy"
"""A word that makes each piece take a while of CPU time."""
BUSY_SECONDS = 0.4

pieces = decode.pieces


def act(entries: Any, settings: Any, **options: Any) -> Iterator[decode.Decoded]:
    for word, do in ACTS.items():
        if word in (entries[0].data or b""):
            do()
    for piece in pieces(entries, settings, **options):
        end = time.process_time() + (BUSY_SECONDS if BUSY in (entries[0].data or b"") else 0)
        while time.process_time() < end:
            pass
        yield piece


if __name__ == "__main__":
    setattr(decode, "pieces", act)  # noqa: B010  # mypy: another kind of function
    isolation.main()
