"""Tallies: counts of workers that live, of those that ended, and of those that were killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from hb_assets.core.settings import Settings
from hb_assets.gateway.observability.tallies import Counts, Tallies
from hb_assets_tests.servers import wait_for

WORKER = """
import sys, threading
from pathlib import Path
from hb_assets.gateway.observability.tallies import Counts, Tallies
from hb_assets.core.settings import Settings
with Tallies(Settings(home=Path(sys.argv[1])), lambda: Counts({"n": 2.0}, {"r": [0.5, 1.0]}, {"fds": 7.0})).kept():
    threading.Event().wait(60)
"""


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def reader(settings: Settings) -> Tallies:
    return Tallies(settings, Counts)


def files(settings: Settings) -> list[Path]:
    return list((settings.run_dir / "metrics" / str(settings.gateway_port)).glob("*.tally"))


def test_nobody_else(reader: Tallies) -> None:
    assert reader.others() == (Counts(), 0)


def test_a_killed_worker_keeps_its_counts_and_leaves_no_file(
    settings: Settings, reader: Tallies
) -> None:
    counted = Counts({"n": 2.0}, {"r": [0.5, 1.0]}, {"fds": 7.0})
    with subprocess.Popen([sys.executable, "-c", WORKER, str(settings.home)]) as worker:
        try:
            wait_for(lambda: reader.others() == (counted, 1), "the worker's counts")
        finally:
            worker.send_signal(signal.SIGKILL)
    for _ in range(2):  # added once, however often one looks
        assert reader.others() == (Counts(counted.totals, counted.requests), 0)
    assert files(settings) == []


def test_whoever_dies_between_keeping_and_removing_counts_nothing_twice(
    settings: Settings, reader: Tallies, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tallies(settings, lambda: Counts({"n": 2.0})).kept():
        wait_for(lambda: reader.others()[0].totals == {"n": 2.0}, "its counts")

    def die(_: Path) -> None:
        raise OSError(5, "the end")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        assert reader.others() == (Counts(), 0)  # this look fails
    assert len(files(settings)) == 1
    for _ in range(2):
        assert reader.others() == (Counts({"n": 2.0}), 0)
    assert files(settings) == []


@pytest.mark.parametrize("text", [b"", b"\x01", b"\xff" * 100])
def test_a_torn_file_counts_nothing(settings: Settings, reader: Tallies, text: bytes) -> None:
    reader.others()
    folder = settings.run_dir / "metrics" / str(settings.gateway_port)
    (folder / "1-torn.tally").write_bytes(text)
    assert reader.others() == (Counts(), 0)
    assert files(settings) == []
    (folder / "kept").write_bytes(text)
    assert reader.others() == (Counts(), 0)


def test_a_disk_that_fails_is_no_fault(settings: Settings) -> None:
    settings.run_dir.mkdir()
    (settings.run_dir / "metrics").touch()
    tallies = Tallies(settings, Counts)
    with tallies.kept():
        assert tallies.others() == (Counts(), 0)


def test_another_port_is_another_gateway(settings: Settings, reader: Tallies) -> None:
    other = settings.model_copy(update={"gateway_port": settings.gateway_port + 1})
    with Tallies(other, lambda: Counts({"n": 2.0})).kept():
        wait_for(lambda: len(files(other)) == 1, "its file")
        assert reader.others() == (Counts(), 0)
    assert len(files(other)) == 1
