"""The run launcher: Dagster's own, which also notices that a run's process is gone.

Dagster's code server notices when a run's process dies, but when the machine or all of `hb up`
went down nobody does: the run would look started for ever, and keep every other run of its day
waiting. The monitoring daemon asks us, and fails such a run; run_retries (dagster.yaml) then
tries it again. Runs and daemon share one machine here.
"""

from __future__ import annotations

import dagster as dg
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus  # no public name

from hb_assets.core.processes import lives_since


class MonitoredRunLauncher(dg.DefaultRunLauncher):
    """DefaultRunLauncher with a health check, for `run_launcher` in dagster.yaml."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Yes."""
        return True

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Whether the process that announced itself as this run's is still there."""
        events = self._instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        for entry in events:
            event = entry.dagster_event
            pid = event.engine_event_data.metadata.get("pid") if event else None
            if pid is not None:
                if lives_since(int(str(pid.value)), entry.timestamp):
                    break
                return CheckRunHealthResult(WorkerStatus.NOT_FOUND, f"process {pid.value} is gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)
