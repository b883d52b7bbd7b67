"""`hb` processes of the bare phase, which are started again whenever they end.

Each counts what happened to it and how it ended. `director` chooses its faults.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from chaos.points import Point
from chaos.surprises import EXIT_CODES

ROOT = Path(__file__).parents[1]
RANDOM = "at a random moment"
_REST_SECONDS = 0.3
_DONE_SECONDS = 2.0
"""Rest of a process that ended by itself, having done all there was: it starts over."""
_END_SECONDS = 20

Faults = Counter[tuple[str, str]]
"""Faults by process and by what was done to it."""


@dataclass(frozen=True, slots=True)
class Fate:
    """The fault to inject into a process at a point, at its `hit`-th call there."""

    point: Point
    hit: int
    sign: signal.Signals

    def environment(self) -> dict[str, str]:
        """How `victim` is told."""
        return {
            "CHAOS_POINT": self.point.key,
            "CHAOS_HIT": str(self.hit),
            "CHAOS_SIGNAL": self.sign.name.removeprefix("SIG"),
        }


class Member:
    """One `hb` process, started again when it ends.

    Args:
        name: of its log.
        process: its kind.
        arguments: of `hb`.
        environment: of the process.
        log: where its output goes.
        fate: asked before each start what is to happen this time; None: nothing.
        faults: what happened is counted here.
        pause: seconds that a process stays stopped.

    `surprises` are ends that nobody brought about and no `hb` should come to.
    """

    def __init__(
        self,
        process: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        fate: Callable[[str], Fate | None],
        faults: Faults,
        pause: float,
    ) -> None:
        self.process = process
        self._arguments = arguments
        self._environment = environment
        self._log = log
        self._draw_fate = fate
        self._faults = faults
        self._pause = pause
        self.surprises: list[str] = []
        self._child: psutil.Popen | None = None
        self._fate: Fate | None = None
        self._killed = False
        self._stopped: float | None = None
        self._rest_until = 0.0

    def look(self) -> None:
        """Start it if it has ended, wake it if it has been stopped long enough; count why."""
        now = time.monotonic()
        if self._child is None:
            if now >= self._rest_until:
                self._start()
        elif self._child.poll() is not None:
            self._ended(self._child.returncode)
            rest = _REST_SECONDS if self._child.returncode else _DONE_SECONDS
            self._child, self._rest_until = None, now + rest
        elif self._stopped is not None:
            if now >= self._stopped + self._pause:
                self._stopped = None
                self._child.send_signal(signal.SIGCONT)
        elif (
            self._fate is not None
            and self._fate.sign == signal.SIGSTOP
            and self._child.status() == psutil.STATUS_STOPPED
        ):
            self._stopped = now
            self._faults[self.process, f"paused {self._fate.point.name}"] += 1
            self._fate = None

    def harm(self, sign: signal.Signals) -> bool:
        """Kill or stop it now; whether it lived and wasn't stopped already."""
        if self._child is None or self._child.poll() is not None or self._stopped is not None:
            return False
        self._child.send_signal(sign)
        if sign == signal.SIGSTOP:
            self._stopped = time.monotonic()
            self._faults[self.process, f"paused {RANDOM}"] += 1
        else:
            self._killed = True
        return True

    def end(self) -> None:
        """End it in good order; killed when it takes too long."""
        if self._child is None:
            return
        self._child.send_signal(signal.SIGCONT)
        self._child.terminate()
        try:
            self._child.wait(timeout=_END_SECONDS)
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            self._child.kill()
            self._child.wait()
        else:
            self._judge(self._child.returncode, asked={-signal.SIGKILL, -signal.SIGTERM})
        self._child = None

    def _start(self) -> None:
        self._fate = self._draw_fate(self.process)
        self._killed = False
        told = self._fate.environment() if self._fate else {}
        with self._log.open("ab") as log:
            self._child = psutil.Popen(
                [sys.executable, "-m", "chaos.victim", *self._arguments],
                env={**self._environment, **told},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def _ended(self, code: int) -> None:
        if code == -signal.SIGKILL and self._killed:
            self._faults[self.process, f"killed {RANDOM}"] += 1
        elif code == -signal.SIGKILL and self._fate is not None:
            self._faults[self.process, f"killed {self._fate.point.name}"] += 1
        elif code == -signal.SIGKILL:
            self._faults[self.process, "killed by somebody else"] += 1
        else:
            self._judge(code, asked=set())

    def _judge(self, code: int, asked: set[int]) -> None:
        if code not in EXIT_CODES | asked:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            self.surprises.append(f"hb {' '.join(self._arguments)} ended {how}")


def environment(**settings: object) -> dict[str, str]:
    """This process's environment with these HB_ settings and no others."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HB_")}
    stated = {f"HB_{name.upper()}": str(value) for name, value in settings.items()}
    return {**inherited, **stated, "PYTHONUNBUFFERED": "1"}
