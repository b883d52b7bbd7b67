"""`hb backfill` as its user sees it; what Dagster does with it is shown in `defs`."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from hb_assets.cli import backfill, state
from hb_assets.cli.app import INTERRUPTED
from hb_assets.cli.control_room import ControlRoom
from hb_assets.cli.state import UpState
from hb_assets.settings import Settings
from hb_assets_tests.cli.commands import hb

ROOM = "http://127.0.0.1:3999"
BACKFILL = ("backfill", "2025-01-15", "2025-01-16", "--empty")


@pytest.fixture(autouse=True)
def running_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    settings.run_dir.mkdir()
    (own,) = state.identify([psutil.Process()])
    lake = str(settings.lake_dir)
    state.write(settings, UpState(own, settings.start_date, 16, "g", ROOM, "running", lake))
    monkeypatch.setenv("HB_HOME", str(tmp_path))


def test_ctrl_c_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> bool:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the signal raises")

    monkeypatch.setattr(ControlRoom, "backfill", lambda *_, **__: "abcdef")
    monkeypatch.setattr(ControlRoom, "backfill_over", interrupt)
    stderr = " ".join(hb(*BACKFILL, code=INTERRUPTED).stderr.split())
    assert "backfill abcdef goes on" in stderr
    assert f"to cancel it, open {ROOM}/runs/b/abcdef" in stderr


def test_ctrl_c_while_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal is held back until the id is known."""

    def launch(*_: object, **__: object) -> str:
        signal.raise_signal(signal.SIGINT)
        return "abcdef"

    monkeypatch.setattr(ControlRoom, "backfill", launch)
    monkeypatch.setattr(backfill, "follow", lambda *_, **__: [])
    assert "backfill abcdef goes on" in hb(*BACKFILL, code=INTERRUPTED).stderr
