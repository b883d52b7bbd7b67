"""maintenance: what may go goes, and what can't is told."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import dagster as dg
import pytest

from hb_assets.core.settings import Settings
from hb_assets.definitions import of
from hb_assets.defs.maintenance import MAINTENANCE
from hb_assets.lake.files import fragments
from hb_assets.lake.storage import layout
from hb_assets.lake.storage.store import Lake
from hb_assets_tests.defs.conftest import Append, Ticks
from hb_assets_tests.lake.deliveries import DAY


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"raw_keep": timedelta(0)})


def run_maintenance(settings: Settings, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    job = of(settings).resolve_job_def(MAINTENANCE)
    return job.execute_in_process(instance=instance, raise_on_error=False)


def test_maintenance_prunes(
    settings: Settings,
    instance: dg.DagsterInstance,
    append: Append,
    ticks: Callable[[str], Ticks],
    run: Callable[..., dg.ExecuteInProcessResult],
) -> None:
    append("2025-01-15")
    ticks("drain").tick()
    assert run("2025-01-15").success
    lake = Lake.open(settings)
    before = len(fragments.all_listed(lake, DAY))
    done = run_maintenance(settings, instance)
    assert done.success
    [event] = [one for one in done.all_events if one.is_successful_output]
    said = {name: value.value for name, value in event.step_output_data.metadata.items()}
    assert said["fragments_pruned"] == before > 0
    assert fragments.all_listed(lake, DAY) == []


def test_a_day_that_cant_be_pruned_fails_the_run_with_its_reason(
    settings: Settings,
    instance: dg.DagsterInstance,
    append: Append,
    ticks: Callable[[str], Ticks],
    run: Callable[..., dg.ExecuteInProcessResult],
) -> None:
    append("2025-01-15")
    ticks("drain").tick()
    run("2025-01-15")
    lake = Lake.open(settings)
    path = layout.consolidated_file(lake.root, DAY, 0)
    path.write_bytes(b"not a Parquet file")
    done = run_maintenance(settings, instance)
    [failure] = done.get_step_failure_events()
    assert not done.success
    assert str(path) in failure.step_failure_data.user_failure_data.description
    assert {one.path.parent.name for one in fragments.all_listed(lake, DAY)} == {"shard=00"}


def test_the_schedule_runs_it(settings: Settings) -> None:
    repository = of(settings).get_repository_def()
    schedule = repository.get_schedule_def("hourly_maintenance")
    assert schedule.job_name == MAINTENANCE
    assert schedule.default_status == dg.DefaultScheduleStatus.RUNNING
