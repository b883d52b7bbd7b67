"""The launcher of victims: `python -m chaos.victim <hb arguments>` is an `hb` that dies at a point.

It wraps the function of a point, or makes the clock jump. What is to happen is in the environment,
so that a process has the very command line that it has in production:

    CHAOS_POINT    key of a point, such as `drain/before acknowledge`; none: nothing is wrapped
    CHAOS_HIT      at its how many-th hit (default 1)
    CHAOS_SIGNAL   KILL (default), or STOP: the process is paused until somebody sends SIGCONT
    CHAOS_CLOCK    seconds that its clock goes wrong by; `jumping`: another error at every look, of
                   up to two days
"""

from __future__ import annotations

import functools
import importlib
import inspect
import itertools
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from chaos import points
from chaos.points import Point

_JUMP_SECONDS = 2 * 86_400


def arm(point: Point, hit: int, sign: signal.Signals) -> None:
    """Wrap the point's function: at its `hit`-th call this process sends itself `sign`."""
    module, _, path = point.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    calls = itertools.count(1)

    def fate() -> None:
        if next(calls) == hit:
            # to this thread, which goes no further; to the process, it would for a while
            signal.pthread_kill(threading.get_ident(), sign)

    setattr(owner, name, _wrapped(getattr(owner, name), point, fate))


def _wrapped(original: Callable[..., Any], point: Point, fate: Callable[[], None]) -> Any:
    before, after = point.when == "before", point.when == "after"
    if inspect.iscoroutinefunction(original):

        @functools.wraps(original)
        async def waiting(*args: Any, **kwargs: Any) -> Any:
            if before:
                fate()
            result = await original(*args, **kwargs)
            if after:
                fate()
            return result

        return waiting

    @functools.wraps(original)
    def calling(*args: Any, **kwargs: Any) -> Any:
        if before:
            fate()
        result = original(*args, **kwargs)
        if after:
            fate()
        return result

    return calling


def falsify_clock(how: str) -> None:
    """Make the wall clock of this process worthless; the monotonic clock stays right."""
    true_ns = time.time_ns

    def error() -> int:
        return random.randint(-_JUMP_SECONDS, _JUMP_SECONDS) if how == "jumping" else int(how)

    def false_ns() -> int:
        return true_ns() + error() * 1_000_000_000

    time.time_ns = false_ns
    time.time = lambda: false_ns() / 1e9


def main() -> None:
    """Be `hb`, or the operator of `chaos.damaging`, with what the environment asks for."""
    clock = os.environ.get("CHAOS_CLOCK")
    if clock:
        falsify_clock(clock)
    key = os.environ.get("CHAOS_POINT")
    if key:
        sign = signal.Signals[f"SIG{os.environ.get('CHAOS_SIGNAL', 'KILL')}"]
        arm(points.named(key), int(os.environ.get("CHAOS_HIT", "1")), sign)
    if sys.argv[1:] == ["damaging"]:
        from chaos.damaging import main as damage

        damage()
        return
    from hb_assets.__main__ import main as hb

    sys.argv[0] = "hb"
    hb()


if __name__ == "__main__":
    main()
