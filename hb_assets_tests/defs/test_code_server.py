"""The code server loads its definitions again for earlier days, and ends where it can't."""

from __future__ import annotations

import datetime as dt
import os
import signal
from pathlib import Path

import pytest
from dagster._core.errors import DagsterUserCodeUnreachableError

from hb_assets.core.settings import Settings
from hb_assets.defs import code_server

TODAY = dt.date(2025, 3, 1)


class Server:
    """Answers so often, then is gone; meanwhile days come into the lake."""

    def __init__(self, lake: Path, come: dict[int, str], answers: int) -> None:
        self.lake, self.come, self.answers = lake, come, answers
        self.asked = self.reloads = 0

    def get_server_id(self, **_: int) -> str:
        self.asked += 1
        if self.asked in self.come:
            (self.lake / "raw" / f"day={self.come[self.asked]}").mkdir(parents=True)
        if self.asked > self.answers:
            raise DagsterUserCodeUnreachableError("gone")
        return "id"

    def reload_code(self, **_: int) -> None:
        self.reloads += 1


def test_it_reloads_for_earlier_days_and_ends_when_the_server_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(code_server, "_POLL_SECONDS", 0)
    monkeypatch.setattr(code_server, "_now_ms", lambda: 1_740_830_400_000)
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda *told: ended.append(told))
    settings = Settings(home=tmp_path)
    days = {2: "2025-03-02", 3: "2025-02-01", 5: "2025-02-03", 7: "2025-01-31"}
    server = Server(settings.lake_dir, days, answers=9)
    code_server._watch(server, settings, TODAY)
    assert server.reloads == 2
    assert server.asked == 9 + code_server._PATIENCE
    assert ended == [(os.getpid(), signal.SIGTERM)]
