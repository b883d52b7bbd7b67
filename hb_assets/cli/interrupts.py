"""Handling of the signals that ask a foreground command to end.

SIGINT, SIGTERM and SIGHUP become one KeyboardInterrupt, which is held back while a step runs that
must not be torn.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """While entered, the first signal raises KeyboardInterrupt in the main thread.

    Further ones only make `urgent` True. It works in a background job too, where a shell ignores
    SIGINT.
    """

    def __init__(self) -> None:
        self._received = 0
        self._held = False
        self._before: dict[int, Any] = {}

    @property
    def urgent(self) -> bool:
        """Whether somebody asked a second time."""
        return self._received > 1

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held_back(self) -> Iterator[None]:
        """Within it nothing is raised; a first signal that came meanwhile is raised at its end."""
        before = self._received
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self._received and not before:
            raise KeyboardInterrupt

    def _receive(self, _number: int, _frame: FrameType | None) -> None:
        self._received += 1
        if self._received == 1 and not self._held:
            raise KeyboardInterrupt
