"""Real `hb` processes that are killed or paused at a named point (chaos.points), for tests.

A forkserver imports the libraries that `hb` needs once, which takes most of the time of a short
command. Our own modules are imported by each process, so that a point is armed before that.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil

from chaos import points, victim
from hb_assets.core.settings import Settings, environment
from hb_assets_tests.servers import wait_for

ROOT = Path(__file__).parents[1]
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["chaos.preloaded", "chaos.victim"])


class Victim:
    """A process of the launcher, `chaos.victim`; its exit code is as subprocess has it."""

    def __init__(self, process: BaseProcess) -> None:
        assert process.pid is not None
        self._process, self.pid = process, process.pid

    def poll(self) -> int | None:
        """Its exit code; None while it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended. Raises TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError(f"process {self.pid} still runs")
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def is_stopped(self) -> bool:
        """Whether it is paused."""
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED


@contextmanager
def running(settings: Settings, *arguments: str, **told: object) -> Iterator[Victim]:
    """`hb <arguments>` under the launcher, its CHAOS_ variables in `told`; ended with the block."""
    log = settings.home_dir / "victim.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    fates = {f"CHAOS_{name.upper()}": str(value) for name, value in told.items()}
    variables = {**environment(settings), **fates}
    process = _forks.Process(target=_live, args=(log, variables, arguments))
    process.start()
    made = Victim(process)
    try:
        yield made
    finally:
        if made.poll() is None:
            process.kill()
        made.wait()


def _live(log: Path, variables: Mapping[str, str], arguments: tuple[str, ...]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv = ["chaos.victim", *arguments]
    victim.main()


def said(settings: Settings) -> str:
    """What all victims of this home wrote."""
    return (settings.home_dir / "victim.log").read_text(errors="replace")


def kill_at(settings: Settings, key: str, *arguments: str) -> None:
    """Run `hb <arguments>` until it is killed at the point."""
    with running(settings, *arguments, point=key, hit=points.named(key).hit) as process:
        code = process.wait(timeout=60)
    assert code == -signal.SIGKILL, said(settings)


@contextmanager
def paused_at(settings: Settings, key: str, *arguments: str) -> Iterator[Victim]:
    """`hb <arguments>`, paused at the point; whoever wants it to go on resumes it."""
    with running(
        settings, *arguments, point=key, hit=points.named(key).hit, signal="STOP"
    ) as process:
        wait_for(
            lambda: process.poll() is not None or process.is_stopped(),
            f"the process to reach {key}",
        )
        assert process.poll() is None, said(settings)
        yield process


def resume(process: Victim, settings: Settings) -> None:
    """Let a paused process go on until it ends, which it has to do well."""
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=60) == 0, said(settings)
