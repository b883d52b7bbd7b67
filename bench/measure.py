"""Measures a function in a process of its own: seconds, CPU time and memory of nothing else."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from typing import TypeAlias

ROOT = Path(__file__).resolve().parent.parent
PATIENCE_SECONDS = 3600.0

Found: TypeAlias = Mapping[str, float | list[float]]
"""What a measured function says of what it did."""


class FailedMeasurementError(Exception):
    """The function failed at what was to be measured, so that its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a function: wall-clock, user and system time, peak resident memory.

    Where it started processes, their CPU time counts too, and the largest one's memory. `found` is
    what it returned.
    """

    seconds: float
    cpu: float
    peak_mb: float
    found: Found

    def number(self, name: str) -> float:
        """A figure: one of the cost's own, or of what it returned."""
        value = {"seconds": self.seconds, "cpu": self.cpu, "peak_mb": self.peak_mb, **self.found}[
            name
        ]
        assert not isinstance(value, list)
        return value


def needs(*modules: str) -> Callable[[Callable[..., Found]], Callable[..., Found]]:
    """Import these before the clock runs: an import is no part of the work."""

    def mark(function: Callable[..., Found]) -> Callable[..., Found]:
        function.modules = modules  # type: ignore[attr-defined]  # read below, in the new process
        return function

    return mark


def measured(function: Callable[..., Found], *arguments: str | int | Path) -> Cost:
    """Call a function of a module of this package, in a process of its own.

    Settings of the environment don't reach it: it has the ones that it makes.

    Raises:
        FailedMeasurementError: it failed.
    """
    name = f"{function.__module__}:{function.__name__}"
    given = [str(one) if isinstance(one, Path) else one for one in arguments]
    argv = [sys.executable, "-m", "bench.measure", name, json.dumps(given)]
    environment = {name: text for name, text in os.environ.items() if not name.startswith("HB_")}
    try:
        done = subprocess.run(
            argv,
            check=False,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=environment,
            timeout=PATIENCE_SECONDS,
        )
        return Cost(**json.loads(done.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        raise FailedMeasurementError(f"{name}: not done in {PATIENCE_SECONDS:g} s") from None
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        ended = f" (ended with {done.returncode})" if done.returncode else ""
        raise FailedMeasurementError(f"{name}{ended}: {last}") from None


def _peak_mb() -> float:
    """Peak memory of this process since it was exec'ed; getrusage counts its parent's as well."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return (int(own.split()[1]) + getrusage(RUSAGE_CHILDREN).ru_maxrss) / 1024


def _cpu() -> float:
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def _main(name: str, given: str) -> None:
    module, _, function = name.partition(":")
    work: Callable[..., Found] = getattr(importlib.import_module(module), function)
    for needed in getattr(work, "modules", ()):
        importlib.import_module(needed)
    cpu, began = _cpu(), time.perf_counter()
    found = work(*json.loads(given))
    seconds, cpu = time.perf_counter() - began, _cpu() - cpu
    print(json.dumps({"seconds": seconds, "cpu": cpu, "peak_mb": _peak_mb(), "found": dict(found)}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
