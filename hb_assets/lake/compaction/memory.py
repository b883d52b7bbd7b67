"""A bound of memory that concurrent pieces of work share, and wait for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Memory:
    """A budget of bytes, lent to one piece of work or to several at once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._changed = threading.Condition()

    @contextmanager
    def lent(self, size: int) -> Iterator[bool]:
        """Borrow bytes, waiting until they are free; False at once for more than there are."""
        if size > self._size:
            yield False
            return
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield True
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
