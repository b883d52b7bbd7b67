"""A drain that dies of an entry with the word `poison` in it, as soon as it decodes it.

Deaths at named points are chaos.victim's; this one depends on what is in an entry.
"""

from __future__ import annotations

import os
import signal
from typing import Any

from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.settings import load
from hb_assets.lake.ingest.decode import pieces
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import drain


def pieces_or_death(entries: Any, *arguments: Any) -> Any:
    if any(b"poison" in (entry.data or b"") for entry in entries):
        os.kill(os.getpid(), signal.SIGKILL)
    return pieces(entries, *arguments)


def main() -> None:
    setattr(drain, "pieces", pieces_or_death)  # noqa: B010  # mypy: another kind of function
    settings = load()
    consumer = Consumer(connect(settings), settings)
    consumer.open()
    drain.drain(consumer, Lake.open(settings), settings)


if __name__ == "__main__":
    main()
