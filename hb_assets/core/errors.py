"""Exceptions that a user can act on.

They cross layers, and end as one clear line in a terminal, a log or an HTTP answer. Refusals of
single heartbeats are results, not exceptions (`record.Refusal`). Messages never hold a heart rate
or a clear user_id (health data).
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class HbError(Exception):
    """Something a user can mend. `str(error)` is one line: what was wrong, where, what to do."""


class SettingsError(HbError):
    """A setting can't be used: its value, or two settings that contradict each other."""


class BufferUnavailableError(HbError):
    """Redis doesn't answer, refuses us, or lacks what a durability mode needs."""


class UnconfirmedError(BufferUnavailableError):
    """Redis has it, but the replicas that mode `replicated` asks for haven't confirmed it."""


class BufferFullError(HbError):
    """The buffer is at its bound: nothing was stored; try again after `retry_after` seconds."""

    def __init__(self, message: str, *, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class BufferTooLargeError(HbError):
    """The buffer holds more than a query with fresh=true may read."""


class SpoolFullError(HbError):
    """The gateway's spool is at its bound: nothing was stored; try again after `retry_after`."""

    def __init__(self, message: str, *, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SpoolUnavailableError(HbError):
    """The gateway's spool can't be written or read; the message names its folder and why."""


class LakeMismatchError(HbError):
    """The lake was made with another shard count or format than the one we run with."""


class WorkerError(HbError):
    """A process that we started to share work ended at once; the message says how."""


class DamagedFileError(HbError):
    """A file of the lake can't be read; the message names its path and the way out.

    `path` is the file, where it is one that may be moved away; `day` and `shard` say what can't be
    answered without it, where a query met it.
    """

    def __init__(self, message: str, *, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.day: dt.date | None = None
        self.shard: int | None = None


class CheckFailedError(HbError):
    """A consolidated file failed a check before it was published; the old one is still in place.

    `figures` are the results of all checks of that file (`lake.integrity.checks.Figure`).
    """

    def __init__(self, message: str, *, figures: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.figures = tuple(figures)


class ImportFileError(HbError):
    """A file to import can't be read, or isn't what it should be."""


class FencedError(HbError):
    """A publisher's temp file is gone: the pruner was here, the publisher must start again."""


class AlreadyRunningError(HbError):
    """Another process holds what this command needs (a running `hb up`, a taken port)."""
