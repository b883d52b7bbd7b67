"""The whole flow with a real daemon: buffer, drain sensor, fragments, run, checked files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
import pytest

from hb_assets.core.settings import Settings, environment
from hb_assets.defs.assets import HEARTBEATS, MINUTE_HEART_RATE, RAW_HEARTBEATS
from hb_assets.lake.integrity import checks
from hb_assets_tests.servers import wait_for

ROOT = Path(__file__).parents[2]
DAY = "2025-01-15"


@pytest.fixture
def settings(settings: Settings, webhook) -> Settings:
    hasty = {"consolidate_min_rows": 10, "consolidate_ratio": 0, "drain_tick_seconds": 1}
    return settings.model_copy(update={**hasty, **webhook.setting})


@pytest.fixture
def daemon(settings: Settings) -> Iterator[dg.DagsterInstance]:
    """The instance of a running daemon, which starts a code server and runs by itself."""
    home = settings.dagster_home
    home.mkdir(parents=True)
    shutil.copy(ROOT / "dagster.yaml", home)
    command = Path(sys.executable).with_name("dagster-daemon")
    with (home / "daemon.log").open("wb") as log:
        process = subprocess.Popen(
            [command, "run", "-m", "hb_assets.definitions"],
            env={**environment(settings), "DAGSTER_HOME": str(home)},
            stdout=log,
            stderr=log,
        )
    try:
        with dg.DagsterInstance.from_config(str(home)) as instance:
            yield instance
    finally:
        started = [psutil.Process(process.pid), *psutil.Process(process.pid).children(True)]
        process.terminate()
        _, left = psutil.wait_procs(started, timeout=20)
        for one in left:
            one.kill()
        sys.stdout.write((home / "daemon.log").read_text()[-20_000:])


def materialized(instance: dg.DagsterInstance, asset: dg.AssetKey) -> set[str]:
    return set(instance.get_materialized_partitions(asset))


@pytest.mark.long
@pytest.mark.timeout(360)
def test_from_the_buffer_to_a_checked_partition(append, daemon, webhook) -> None:
    append(DAY, users=4, readings=5)
    append("2025-01-16", users=1, readings=1)
    wait_for(
        lambda: materialized(daemon, RAW_HEARTBEATS) == {DAY, "2025-01-16"},
        "the drain sensor to report both days",
        120,
        every=0.3,
    )
    runs = dg.RunsFilter(job_name="consolidate_day")
    wait_for(
        lambda: any(run.is_finished for run in daemon.get_runs(runs)),
        "the sensor's run of the day that is due",
        120,
        every=0.3,
    )
    [run] = daemon.get_runs(runs)
    assert run.is_success
    assert materialized(daemon, HEARTBEATS) == {DAY}
    assert materialized(daemon, MINUTE_HEART_RATE) == {DAY}
    assert run.tags["dagster/partition"] == DAY
    evaluated = {
        event.asset_check_evaluation_data.check_name: event.asset_check_evaluation_data.passed
        for entry in daemon.all_logs(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
        if (event := entry.dagster_event) is not None
    }
    names = (*checks.HEARTBEAT_CHECKS, *checks.MINUTE_CHECKS, "complete")
    assert evaluated == dict.fromkeys(names, True)
    assert webhook.received == []
