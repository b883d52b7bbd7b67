"""heartbeats and minute_heart_rate: materialized for a day, with check results."""

from __future__ import annotations

import re

import dagster as dg
import pyarrow.parquet as pq
import pytest

from hb_assets.core.days import parse_day
from hb_assets.defs.assets import HEARTBEATS, MINUTE_HEART_RATE, heartbeats
from hb_assets.lake import inventory
from hb_assets.lake.compaction import consolidation
from hb_assets.lake.integrity import checks
from hb_assets.lake.integrity.checks import Figure
from hb_assets.lake.storage import layout
from hb_assets.pipeline import alarms
from hb_assets_tests.lake.deliveries import spoil_for_good

DAY = "2025-01-15"


@pytest.fixture
def drained(append, ticks):
    """Brings what was appended into the lake."""

    def drained(day: str = DAY, **heartbeats: int) -> None:
        append(day, **heartbeats)
        ticks("drain").tick()

    return drained


def materialization(result: dg.ExecuteInProcessResult, asset: dg.AssetKey):
    [found] = [
        event.materialization
        for event in result.get_asset_materialization_events()
        if event.asset_key == asset
    ]
    return found


def evaluations(result: dg.ExecuteInProcessResult) -> dict[str, bool]:
    return {one.check_name: one.passed for one in result.get_asset_check_evaluations()}


def failure(result: dg.ExecuteInProcessResult) -> str:
    [event] = [event for event in result.all_events if event.is_step_failure]
    return event.step_failure_data.user_failure_data.description


def rows(installation) -> list[dict[str, object]]:
    lake = installation.lake()
    files = sorted((lake.root / layout.HEARTBEATS).rglob("*.parquet"))
    names = ["user_id", "device_id", "timestamp", "heart_rate"]
    return [row for path in files for row in pq.read_table(path, columns=names).to_pylist()]


def test_a_day_is_consolidated_and_checked(drained, run) -> None:
    drained(users=4, readings=5)
    drained(users=4, readings=2)
    drained(users=2, readings=1, bpm=90)
    result = run(DAY)
    assert result.success
    assert evaluations(result) == dict.fromkeys(
        (*checks.HEARTBEAT_CHECKS, *checks.MINUTE_CHECKS, "complete"), True
    )
    assert {one.partition for one in result.get_asset_check_evaluations()} == {DAY}
    figures = materialization(result, HEARTBEATS).metadata
    counts = {name: value.value for name, value in figures.items() if hasattr(value, "value")}
    expected = {
        "dagster/row_count": 20,
        "rows": 30,
        "unique": 20,
        "superseded": 10,
        "repeats": 8,
        "corrections": 2,
        "replayed": 0,
        "written_rows": 20,
    }
    assert {name: counts[name] for name in expected} == expected
    minutes = materialization(result, MINUTE_HEART_RATE).metadata
    assert minutes["dagster/row_count"].value == 4
    assert minutes["readings"].value == 20


def test_figures_of_checks_are_their_metadata(drained, run) -> None:
    drained(users=3, readings=4)
    found = {one.check_name: one for one in run(DAY).get_asset_check_evaluations()}
    figures = found[checks.COUNTS_ADD_UP].metadata
    assert (figures["rows_in"].value, figures["unique"].value) == (12, 12)


def test_nothing_about_users_reaches_the_event_log(drained, run, instance) -> None:
    drained(users=4, readings=5, bpm=217)
    result = run(DAY)
    told = "\n".join(str(entry) for entry in instance.all_logs(result.run_id))
    assert "user-" not in told
    figures = [
        event.materialization.metadata for event in result.get_asset_materialization_events()
    ]
    figures += [one.metadata for one in result.get_asset_check_evaluations()]
    assert not re.search(r"\b217\b", str(figures))
    preview = materialization(result, HEARTBEATS).metadata["preview"]
    assert "~" in preview.records[0].data["user_id"]
    assert "heart_rate" not in preview.records[0].data


@pytest.mark.parametrize("job", ["consolidate_day", "drain_and_report"])
def test_a_day_without_data_is_not_materialized(job, run, instance) -> None:
    result = run("2025-01-20", job)
    assert result.success
    assert not result.get_asset_materialization_events()
    assert not evaluations(result)
    said = [entry.user_message for entry in instance.all_logs(result.run_id)]
    assert "the lake holds nothing of 2025-01-20: nothing was materialized" in said


def test_a_range_gives_the_same_rows_when_it_runs_again(drained, run, installation) -> None:
    days = ("2025-01-14", DAY, "2025-01-16")
    for day in days[1:]:
        drained(day, users=4, readings=5)
    assert all(run(day).success for day in days)
    first = rows(installation)
    assert len(first) == 40
    assert all(run(day).success for day in days)
    assert rows(installation) == first
    assert all(run(day, rebuild=True).success for day in days)
    assert rows(installation) == first


@pytest.mark.parametrize(
    ("shards", "sizes"), [(1, {1}), (2, {2}), (9, {4, 5}), (16, {4}), (100, {6, 7})]
)
def test_shards_are_dealt_out_to_a_few_steps(shards, sizes) -> None:
    groups = heartbeats.dealt(shards)
    assert [shard for group in groups for shard in group] == list(range(shards))
    assert {len(group) for group in groups} == sizes
    assert len(groups) <= heartbeats.MOST_STEPS


@pytest.fixture
def a_step_a_shard(monkeypatch) -> None:
    monkeypatch.setattr(heartbeats, "SHARDS_A_STEP", 1)


@pytest.mark.usefixtures("a_step_a_shard")
def test_each_step_does_its_shards_and_the_last_tells_of_all(drained, run) -> None:
    drained(users=4, readings=5)
    result = run(DAY)
    written = {
        event.step_key: event.step_output_data.metadata["written_rows"].value
        for event in result.all_events
        if event.is_successful_output and "consolidate_shards" in event.step_key
    }
    assert written.keys() == {
        f"heartbeats.consolidate_shards[shards_{shard}_{shard}]" for shard in ("00", "01")
    }
    assert min(written.values()) > 0
    assert materialization(result, HEARTBEATS).metadata["written_rows"].value == 20
    figures = {one.check_name: one.metadata for one in result.get_asset_check_evaluations()}
    assert figures[checks.COUNTS_ADD_UP]["rows_in"].value == 20


@pytest.mark.usefixtures("a_step_a_shard")
def test_a_shard_that_fails_keeps_no_other_from_being_done(drained, run, installation) -> None:
    drained(users=4, readings=5)
    run(DAY)
    drained(users=4, readings=9)
    lake = installation.lake()
    bad = layout.consolidated_file(lake.root, parse_day(DAY), 0)
    kept = bad.read_bytes()
    spoil_for_good(lake, bad)
    result = run(DAY)
    assert not result.success
    assert failure(result).startswith(f"{bad} is damaged")
    assert evaluations(result) == {"complete": False}
    bad.write_bytes(kept)
    state = inventory.day_state(lake, parse_day(DAY), installation.settings)
    assert state.pending_fragments == 1
    assert run(DAY).success


@pytest.mark.parametrize("name", checks.HEARTBEAT_CHECKS)
def test_a_failed_check_fails_the_run_and_publishes_nothing(
    name, drained, run, installation, monkeypatch
) -> None:
    drained(users=4, readings=5)
    assert run(DAY).success
    before = rows(installation)
    drained(users=4, readings=9)
    with monkeypatch.context() as patch:
        spoil(patch, name)
        result = run(DAY)
    assert not result.success
    expected = dict.fromkeys((*checks.HEARTBEAT_CHECKS, "complete"), True)
    assert evaluations(result) == {**expected, name: False, "complete": False}
    found = {one.check_name: one for one in result.get_asset_check_evaluations()}
    assert found[name].description.startswith("expected: ")
    assert "spoilt by a test" in found[name].description
    assert found[name].metadata["bad_rows"].value == 6  # three a shard
    assert "2025-01-15, shard" in failure(result)
    assert "spoilt by a test" in failure(result)
    assert MINUTE_HEART_RATE not in {
        event.asset_key for event in result.get_asset_materialization_events()
    }
    assert rows(installation) == before


@pytest.mark.usefixtures("a_step_a_shard")
def test_groups_that_fail_different_checks_make_both_red(
    drained, run, installation, monkeypatch
) -> None:
    """Of one check the last evaluation of a run counts: a group that passes must not follow."""
    drained(users=4, readings=5)
    with monkeypatch.context() as patch:
        spoil(patch, checks.SORTED, shard=0)
        spoil(patch, checks.COUNTS_ADD_UP, shard=1)
        result = run(DAY)
    assert not result.success
    red = {checks.SORTED, checks.COUNTS_ADD_UP, "complete"}
    assert evaluations(result) == {
        name: name not in red for name in (*checks.HEARTBEAT_CHECKS, "complete")
    }
    assert len(result.get_asset_check_evaluations()) == len(checks.HEARTBEAT_CHECKS) + 1
    assert "shard 00" in failure(result)
    assert "shard 01" in failure(result)


@pytest.mark.usefixtures("a_step_a_shard")
def test_a_shard_that_fails_a_check_keeps_no_other_from_being_published(
    drained, run, installation, monkeypatch
) -> None:
    drained(users=4, readings=5)
    with monkeypatch.context() as patch:
        spoil(patch, checks.SORTED, shard=1)
        assert not run(DAY).success
    published = (installation.lake().root / layout.HEARTBEATS).rglob("*.parquet")
    assert [path.parent.name for path in published] == ["shard=00"]


def test_a_run_that_dies_before_its_checks_writes_none(drained, run, instance, monkeypatch) -> None:
    drained()
    with monkeypatch.context() as patch:
        patch.setattr(heartbeats, "together", lambda *_: 1 / 0)
        result = run(DAY)
    assert not result.success
    for name in (*checks.HEARTBEAT_CHECKS, "complete"):
        assert history(instance, name) == []


def history(instance: dg.DagsterInstance, name: str) -> list[tuple[str | None, str]]:
    """Partition and status of what was planned or evaluated of a check, the latest first."""
    key = dg.AssetCheckKey(HEARTBEATS, name)
    found = instance.event_log_storage.get_asset_check_execution_history(key, limit=99)
    return [(one.partition, one.status.value) for one in found]


def test_a_known_loss_stays_red_for_its_day_whatever_later_runs_do(
    drained, run, installation, instance
) -> None:
    drained(users=4, readings=5)
    lake = installation.lake()
    lost = next((lake.root / layout.RAW).rglob("*.parquet"))
    whole = lost.read_bytes()
    lost.write_bytes(whole[: len(whole) // 2])
    drained("2025-01-16", users=4, readings=5)
    for day in (DAY, DAY, "2025-01-16"):
        assert run(day).success
    assert history(instance, "complete") == [
        ("2025-01-16", "SUCCEEDED"),
        (DAY, "FAILED"),
        (DAY, "FAILED"),
    ]
    [shown] = [state for state in states(instance) if state.startswith("FAILED")]
    assert shown == f"FAILED {DAY}"
    drained(users=4, readings=9)
    assert run(DAY).success
    assert history(instance, "complete")[0] == (DAY, "FAILED")
    aside = next((lake.root / layout.DAMAGED).rglob("*.parquet"))
    aside.unlink()
    lost.write_bytes(whole)
    assert run(DAY).success
    assert history(instance, "complete")[0] == (DAY, "SUCCEEDED")


def states(instance: dg.DagsterInstance) -> list[str]:
    """The check `complete` as the UI shows it: status and partitions."""
    key = dg.AssetCheckKey(HEARTBEATS, "complete")
    daily = dg.DailyPartitionsDefinition("2025-01-01")
    found = instance.event_log_storage.get_asset_check_state([(key, daily)])[key]
    return [
        f"{status.value} {', '.join(sorted(subset.value.get_partition_keys()))}"
        for status, subset in found.subsets.items()
        if not subset.is_empty
    ]


def spoil(patch: pytest.MonkeyPatch, name: str, shard: int | None = None) -> None:
    """Make one check fail; that bad files make them fail is shown in lake/test_checks.py."""
    original = consolidation._figures

    def figures(task, *arguments: object) -> list[Figure]:
        spoilt = Figure(name, False, {"bad_rows": 3}, "spoilt by a test")
        return [
            spoilt if one.name == name and shard in (None, task.shard) else one
            for one in original(task, *arguments)
        ]

    patch.setattr(consolidation, "_figures", figures)


def test_a_damaged_file_is_one_clear_line(drained, run, installation) -> None:
    drained(users=4, readings=5)
    run(DAY)
    lake = installation.lake()
    path = next((lake.root / layout.HEARTBEATS).rglob("*.parquet"))
    spoil_for_good(lake, path)
    result = run(DAY)
    assert not result.success
    assert failure(result).startswith(f"{path} is damaged")


def test_a_damaged_file_that_raw_still_has_is_made_anew_and_told(
    drained, run, installation, monkeypatch
) -> None:
    drained(users=4, readings=5)
    run(DAY)
    told = []
    monkeypatch.setattr(alarms, "tell", lambda notices, _settings: told.extend(notices))
    path = next((installation.lake().root / layout.HEARTBEATS).rglob("*.parquet"))
    path.write_bytes(b"PAR1 no more")
    assert run(DAY).success
    [notice] = told
    assert notice.alarm == "damaged_file"
    assert notice.message.startswith(f"{path} was damaged")


def test_an_error_is_not_tried_again_unless_that_helps(drained, run, installation) -> None:
    drained(users=4, readings=5)
    run(DAY)
    lake = installation.lake()
    spoil_for_good(lake, next((lake.root / layout.HEARTBEATS).rglob("*.parquet")))
    result = run(DAY)
    assert not result.success
    assert not any(event.is_step_up_for_retry for event in result.all_events)
