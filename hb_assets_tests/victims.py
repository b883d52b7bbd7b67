"""Real `hb` processes that meet their fate at a named point (chaos.points), for tests."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from chaos import points
from hb_assets.settings import Settings, environment
from hb_assets_tests.servers import wait_for

ROOT = Path(__file__).parents[1]


@contextmanager
def running(settings: Settings, *arguments: str, **told: object) -> Iterator[psutil.Popen]:
    """`hb <arguments>` under the launcher, its CHAOS_ variables in `told`; ended with the block."""
    log = settings.home_dir / "victim.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    fates = {f"CHAOS_{name.upper()}": str(value) for name, value in told.items()}
    with log.open("ab") as output:
        process = psutil.Popen(
            [sys.executable, "-m", "chaos.victim", *arguments],
            env={**environment(settings), **fates},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def said(settings: Settings) -> str:
    """What all victims of this home wrote."""
    return (settings.home_dir / "victim.log").read_text(errors="replace")


def kill_at(settings: Settings, key: str, *arguments: str) -> None:
    """Run `hb <arguments>` until it is killed at the point."""
    with running(settings, *arguments, point=key, hit=points.named(key).hit) as process:
        code = process.wait(timeout=60)
    assert code == -signal.SIGKILL, said(settings)


@contextmanager
def paused_at(settings: Settings, key: str, *arguments: str) -> Iterator[psutil.Popen]:
    """`hb <arguments>`, paused at the point; whoever wants it to go on resumes it."""
    with running(
        settings, *arguments, point=key, hit=points.named(key).hit, signal="STOP"
    ) as process:
        wait_for(
            lambda: process.poll() is not None or process.status() == psutil.STATUS_STOPPED,
            f"the process to reach {key}",
        )
        assert process.poll() is None, said(settings)
        yield process


def resume(process: psutil.Popen, settings: Settings) -> None:
    """Let a paused process go on until it ends, which it has to do well."""
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0, said(settings)
