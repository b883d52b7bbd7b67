"""A drain that is killed at a named moment: `python -m hb_assets_tests.dying_drain MOMENT`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from hb_assets import drain
from hb_assets.buffer.connection import connect
from hb_assets.buffer.consumer import Consumer
from hb_assets.lake import fragments, quarantine
from hb_assets.lake.decode import pieces
from hb_assets.lake.store import Lake
from hb_assets.settings import load

MOMENTS: dict[str, tuple[Any, str]] = {
    "decoded": (fragments, "publish"),
    "fragments are durable": (quarantine, "publish"),
    "all is durable": (Consumer, "acknowledge"),
}
"""Moments before a call: whose, and which."""
ACKNOWLEDGED = "acknowledged"
DECODING = "decoding poison"
"""While an entry with the word `poison` in it is decoded, if there is one."""


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(moment: str) -> None:
    if moment == DECODING:

        def pieces_or_death(entries: Any, *arguments: Any) -> Any:
            if any(b"poison" in (entry.data or b"") for entry in entries):
                die()
            return pieces(entries, *arguments)

        setattr(drain, "pieces", pieces_or_death)  # noqa: B010  # mypy: another kind of function
    elif moment == ACKNOWLEDGED:
        original: Callable[..., int] = Consumer.acknowledge

        def acknowledge_and_die(*arguments: Any) -> None:
            original(*arguments)
            die()

        setattr(Consumer, "acknowledge", acknowledge_and_die)  # noqa: B010  # it returns nothing
    else:
        setattr(*MOMENTS[moment], die)
    settings = load()
    consumer = Consumer(connect(settings), settings)
    consumer.open()
    drain.drain(consumer, Lake.open(settings), settings)


if __name__ == "__main__":
    main(sys.argv[1])
