"""How a running `hb up` is known, and told from what took its pid."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from hb_assets.cli import state
from hb_assets.cli.state import UpState
from hb_assets.core.processes import Identity
from hb_assets.core.settings import Settings


def up_state(identity: Identity) -> UpState:
    return UpState(identity, dt.date(2020, 1, 1), 16, "http://g", "http://d", "running")


def test_own_process_is_running(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.run_dir.mkdir()
    own = Identity.of(os.getpid())
    state.write(settings, up_state(own))
    assert state.running(settings) == up_state(own)


def test_reused_pid_is_another_process(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.run_dir.mkdir()
    own = Identity.of(os.getpid())
    state.write(settings, up_state(msgspec.structs.replace(own, started=f"{own.started}0")))
    assert state.running(settings) is None
    assert state.read(settings) is not None


def test_process_that_ended() -> None:
    program = [sys.executable, "-c", "input()"]
    with subprocess.Popen(program, stdin=subprocess.PIPE) as child:
        identity = Identity.of(child.pid)
        assert identity.lives()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert identity.lives() is False  # a zombie still has its pid
        child.wait()
    assert identity.lives() is False


def test_state_that_is_missing_or_torn(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.run_dir.mkdir()
    assert state.read(settings) is None
    state.path(settings).write_text('{"identity": {"pid"')
    assert state.read(settings) is None
