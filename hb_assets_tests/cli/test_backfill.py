"""`hb backfill` as its user sees it; what Dagster does with it is shown in `defs`."""

from __future__ import annotations

import datetime as dt
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from hb_assets.cli import backfill, state
from hb_assets.cli.app import INTERRUPTED
from hb_assets.cli.dagster_api import ControlRoom
from hb_assets.cli.state import UpState
from hb_assets.core.processes import Identity
from hb_assets.core.settings import Settings
from hb_assets.lake import minutes
from hb_assets.lake.compaction import consolidation
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.cli.commands import hb
from hb_assets_tests.lake.deliveries import deliver, entry, line

LATER = 1_740_000_000_000
ROOM = "http://127.0.0.1:3999"
BACKFILL = ("backfill", "2025-01-15", "2025-01-16")


@pytest.fixture(autouse=True)
def running_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(home=tmp_path)
    settings.run_dir.mkdir()
    own = Identity.of(os.getpid())
    lake = str(settings.lake_dir)
    state.write(settings, UpState(own, settings.start_date, 16, "g", ROOM, "running", lake))
    monkeypatch.setenv("HB_HOME", str(tmp_path))
    monkeypatch.setattr(ControlRoom, "wait_for_partition", lambda *_: None)
    lake = Lake.open(settings)
    for day in ("2025-01-15", "2025-01-16"):
        deliver(lake, settings, entry([line(at=f"{day}T12:00:00Z")], ms=LATER))


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


def test_missing_takes_days_with_something_to_do_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(home=tmp_path)
    lake = Lake.open(settings)
    done, damaged, pending = (dt.date(2025, 1, day) for day in (15, 16, 17))
    deliver(lake, settings, entry([line(at=f"{pending}T12:00:00Z")], 1, ms=LATER))
    for day in (done, damaged):
        consolidation.consolidate(lake, day, settings)
        minutes.build(lake, day, settings)
    [path] = layout.day_folder(lake.root, layout.HEARTBEATS, damaged).rglob("*.parquet")
    path.write_bytes(b"PAR1 no more")
    asked: list[Sequence[dt.date]] = []
    monkeypatch.setattr(
        ControlRoom, "backfill", lambda _self, days, **_: asked.append(list(days)) or "abcdef"
    )
    monkeypatch.setattr(backfill, "follow", lambda *_, **__: [])
    hb("backfill", "--missing", code=1)
    assert asked == [[damaged, pending]]
    assert "nothing is pending" in hb("backfill", str(done), str(done), "--missing").stdout


def test_without_a_range_it_says_what_to_name() -> None:
    assert "--missing" in hb("backfill", code=2).stderr
