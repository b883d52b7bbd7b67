"""raw_heartbeats, materialized by hand."""

from __future__ import annotations

import dagster as dg

from hb_assets.definitions import of
from hb_assets.defs import outcomes

DAY = "2025-01-15"


def test_by_hand_it_drains_and_reports_its_day(append, run, client, settings) -> None:
    append(DAY, users=4, readings=5)
    append("2025-01-16", users=1, readings=1)
    result = run(DAY, "drain_and_report")
    assert result.success
    [event] = result.get_asset_materialization_events()
    assert event.partition == DAY
    assert event.materialization.metadata["dagster/row_count"].value == 20
    assert not any(client.xlen(key) for key in client.scan_iter("*:stream"))


def test_without_redis_it_fails_with_one_line(settings, instance, monkeypatch) -> None:
    monkeypatch.setattr(outcomes, "RETRIES", dg.RetryPolicy(max_retries=1, delay=0.01))
    away = settings.model_copy(
        update={"redis_url": type(settings.redis_url)("redis://127.0.0.1:1")}
    )
    job = of(away).resolve_job_def("drain_and_report")
    result = job.execute_in_process(partition_key=DAY, instance=instance, raise_on_error=False)
    [failed] = [event for event in result.all_events if event.is_step_failure]
    description = failed.step_failure_data.user_failure_data.description
    assert description.startswith("Redis at redis://127.0.0.1:1 can't be reached")
    assert any(event.is_step_up_for_retry for event in result.all_events)
