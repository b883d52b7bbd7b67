"""Whether a process still lives: by pid and start, since a pid is given to another one later."""

from __future__ import annotations

from pathlib import Path

import msgspec
import psutil

_CLOCK_SECONDS = 5.0
"""By how much the clock may be set between two looks, where starts are reckoned from it."""
_START_FIELD = 19
"""Field 22 of /proc/<pid>/stat (proc(5)): its first two are the pid and the command."""


class Identity(msgspec.Struct, frozen=True, order=True):
    """A process of this machine.

    `started` is `<boot>-<ticks since it>`, which is the same for everybody who looks; where the
    system has no /proc, epoch seconds.
    """

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> Identity:
        """That of a running process.

        Raises:
            psutil.Error: it is gone, or can't be looked at.
        """
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return cls(pid, str(int(psutil.Process(pid).create_time())))
        after_command = stat.rpartition(")")[2].split()
        return cls(pid, f"{boot}-{after_command[_START_FIELD]}")

    def lives(self) -> bool | None:
        """Whether it still runs (a zombie has ended); None where that can't be told."""
        try:
            same = _is_same(self.started, Identity.of(self.pid).started)
            return same and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None


def lives_since(pid: int, seen: float) -> bool:
    """Whether the process that had this pid at the time `seen` (epoch seconds) still runs."""
    try:
        process = psutil.Process(pid)
        same = process.create_time() <= seen + _CLOCK_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.Error:
        return True


def _is_same(one: str, other: str) -> bool | None:
    """Whether two starts are those of one process; None where they can't be compared."""
    if "-" in one and "-" in other:
        return one == other
    if one.isdigit() and other.isdigit():
        return abs(int(one) - int(other)) <= _CLOCK_SECONDS
    return None
