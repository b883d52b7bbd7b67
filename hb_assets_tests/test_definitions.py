"""The definitions as Dagster loads them."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import yaml

from hb_assets.core.settings import PACKAGE, Settings
from hb_assets.definitions import of
from hb_assets.defs import partitions

ROOT = Path(__file__).parents[1]


def test_they_load_within_five_seconds_and_nothing_happens_before_that(tmp_path: Path) -> None:
    program = (
        "import hb_assets.definitions as module, pathlib, time\n"
        "assert not list(pathlib.Path('.').iterdir())\n"
        "module.definitions().get_repository_def().load_all_definitions()\n"
        "print(time.process_time())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "HB_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 5  # CPU time: other tests run beside this one


def test_dagster_says_they_are_valid(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("dagster")
    done = subprocess.run(
        [command, "definitions", "validate"],
        cwd=ROOT,
        env={**os.environ, "DAGSTER_HOME": str(tmp_path), "HB_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_asset_says_what_it_is() -> None:
    specs = {spec.key.to_user_string(): spec for spec in of(Settings()).resolve_all_asset_specs()}
    assert specs.keys() == {"raw_heartbeats", "heartbeats", "minute_heart_rate"}
    for spec in specs.values():
        assert spec.description
        assert spec.owners
        assert spec.kinds
        assert spec.group_name
        assert spec.metadata["dagster/column_schema"].columns
        assert spec.partitions_def == specs["heartbeats"].partitions_def


def test_today_and_what_is_accepted_of_the_future_have_partitions(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    partitions.keep_first_day(settings, dt.date(2024, 3, 1))
    [spec, *_] = of(settings).resolve_all_asset_specs()
    keys = spec.partitions_def.get_partition_keys()
    today = time.strftime("%Y-%m-%d", time.gmtime())
    assert keys[0] == "2024-03-01"
    assert today in keys
    assert keys.index(today) == len(keys) - 2


def test_sensors_run_by_default() -> None:
    sensors = list(of(Settings()).get_repository_def().sensor_defs)
    assert {sensor.name for sensor in sensors} == {
        "drain",
        "consolidation",
        "buffer",
        "damage",
        "failed_runs",
    }
    assert all(one.default_status == dg.DefaultSensorStatus.RUNNING for one in sensors)


def test_the_instance_is_configured_as_the_file_says(tmp_path: Path) -> None:
    text = (ROOT / "dagster.yaml").read_text()
    assert (PACKAGE / "dagster.yaml").read_text() == text  # it ships with the package
    (tmp_path / "dagster.yaml").write_text(text)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert instance.run_retries_enabled
        assert instance.run_monitoring_enabled
        assert not instance.telemetry_enabled
        assert instance.run_launcher.supports_check_run_worker_health
    limits = yaml.safe_load(text)["concurrency"]["runs"]["tag_concurrency_limits"]
    assert limits[0]["key"] == "dagster/partition"
