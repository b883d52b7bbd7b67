"""The run launcher notices that a run's process is gone."""

from __future__ import annotations

import subprocess
import sys

import dagster as dg
import pytest
from dagster._core.events import EngineEventData
from dagster._core.launcher.base import WorkerStatus

from hb_assets.defs.launcher import MonitoredRunLauncher


@pytest.fixture
def launcher(instance: dg.DagsterInstance) -> MonitoredRunLauncher:
    made = MonitoredRunLauncher()
    made.register_instance(instance)
    return made


@pytest.fixture
def a_run(instance: dg.DagsterInstance, definitions: dg.Definitions):
    """A run that says it is executed by this process."""

    def a_run(pid: int | None) -> dg.DagsterRun:
        run = instance.create_run_for_job(definitions.resolve_job_def("consolidate_day"))
        if pid is not None:
            told = EngineEventData.in_process(pid)
            instance.report_engine_event("Started process for run", run, told)
        return run

    return a_run


def test_a_process_that_lives_is_well(launcher, a_run) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        health = launcher.check_run_worker_health(a_run(process.pid))
        process.communicate(b"\n")
    assert health.status == WorkerStatus.RUNNING


def test_a_process_that_is_gone_is_found(launcher, a_run) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        run = a_run(process.pid)
        process.kill()
    assert launcher.check_run_worker_health(run).status == WorkerStatus.NOT_FOUND


def test_a_run_that_named_no_process_yet_is_left_alone(launcher, a_run) -> None:
    assert launcher.check_run_worker_health(a_run(None)).status == WorkerStatus.RUNNING
