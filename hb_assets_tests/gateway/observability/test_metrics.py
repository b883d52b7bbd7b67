"""Metrics: true for all workers of a gateway, and for what other processes do."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
import redis
from prometheus_client.parser import text_string_to_metric_families

from hb_assets.buffer.consumer import Consumer
from hb_assets.core.settings import Settings
from hb_assets.gateway.observability.metrics import KNOWN, TABLE, Families, Metrics
from hb_assets.gateway.observability.tallies import Tallies
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.drain import drain
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, running
from hb_assets_tests.lake.deliveries import DAY

redis_url = on_valkey

Found = dict[tuple[str, tuple[tuple[str, str], ...]], float]
DOCS = Path(__file__).parents[3] / "docs" / "http.md"
VERSION = re.search(r"text format, version ([\d.]+\d)", DOCS.read_text(encoding="utf-8"))


def samples(http: httpx.Client) -> Found:
    response = http.get("/metrics")
    assert response.status_code == 200
    assert VERSION
    assert response.headers["content-type"] == f"text/plain; version={VERSION[1]}; charset=utf-8"
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def total(found: Found, name: str) -> float:
    """Over all labels."""
    return sum(value for (found_name, _), value in found.items() if found_name == name)


def accepted(http: httpx.Client) -> float:
    return samples(http)["hb_heartbeats_accepted_total", ()]


def checked(http: httpx.Client) -> None:
    """What Prometheus' own linter says: nothing."""
    program = shutil.which("promtool")
    if program is None:
        missing = "promtool is not installed (apt-get install prometheus)"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    done = subprocess.run(
        [program, "check", "metrics"],
        input=http.get("/metrics").content,
        capture_output=True,
        check=False,
        timeout=30,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")


@pytest.fixture
def work(http: httpx.Client, client: redis.Redis, lake: Lake, settings: Settings) -> httpx.Client:
    """A gateway behind which something of everything was done."""
    batch = [heartbeat(), heartbeat(), heartbeat(heart_rate=80), {}, heartbeat(user_id="u2")]
    assert http.post(BATCH, json=batch).json()["accepted"] == 4
    client.xadd("hb:{00}:stream", {"data": b"not json"})
    consumer = Consumer(client, settings)
    consumer.open()
    drain(consumer, lake, settings, until_empty=True)
    consumer.close()
    with coordinated(lake, settings, start_server=False) as known:
        known.consolidate(lake, DAY, settings)
        known.consolidate(lake, DAY, settings, rewrite=True)
    return http


def test_requests(http: httpx.Client) -> None:
    http.post(PATH, json=heartbeat(extra=1))
    http.post(PATH, json=heartbeat(heart_rate=1))
    http.post(BATCH, json=[heartbeat(), heartbeat(), {}])
    http.get("/no/such/path?user_id=secret")
    found = samples(http)
    posts = (("method", "POST"), ("route", PATH))
    assert found["hb_http_requests_total", (*posts, ("status", "200"))] == 1
    assert found["hb_http_requests_total", (*posts, ("status", "422"))] == 1
    assert found["hb_http_request_seconds_count", posts] == 2
    le = (("le", "+Inf"), *posts)
    assert found["hb_http_request_seconds_bucket", le] == 2
    assert 0 < found["hb_http_request_seconds_sum", posts] < 10
    other = (("method", "GET"), ("route", "other"), ("status", "404"))
    assert found["hb_http_requests_total", other] == 1
    assert found["hb_heartbeats_accepted_total", ()] == 3
    assert found["hb_heartbeats_refused_total", (("reason", "heart_rate_out_of_range"),)] == 1
    assert found["hb_heartbeats_refused_total", (("reason", "user_id_missing"),)] == 1
    assert found["hb_unknown_fields_total", ()] == 1
    assert found["hb_buffer_up", ()] == 1
    assert total(found, "hb_buffer_heartbeats") == 3
    assert found["process_resident_memory_bytes", ()] > 10**7


def test_work_of_other_processes(work: httpx.Client) -> None:
    found = samples(work)
    assert total(found, "hb_buffer_appended_total") == total(found, "hb_drained_total") == 5
    assert found["hb_drain_rows_total", ()] == 4
    assert found["hb_drain_entries_total", ()] == 2
    assert found["hb_drain_flushes_total", (("reason", "all"),)] == 1
    assert found["hb_drain_seconds_count", ()] == 1
    assert found["hb_drain_seconds_sum", ()] > 0
    assert found["hb_drain_fragments_total", ()] == found["hb_lake_fragments", ()] == 1
    assert found["hb_quarantined_total", (("reason", "record_not_json"),)] == 1
    assert found["hb_consolidations_total", (("outcome", "done"),)] == 2
    assert found["hb_consolidation_seconds_count", ()] == 2
    assert found["hb_consolidation_rows_total", ()] == 4
    assert found["hb_lake_unique_rows", ()] == 2
    assert found["hb_lake_duplicate_rows", (("kind", "repeat"),)] == 1
    assert found["hb_lake_duplicate_rows", (("kind", "correction"),)] == 1
    assert found["hb_lake_write_amplification_ratio", ()] == 1
    assert found["hb_lake_pending_fragments", ()] == 0
    assert found["hb_lake_free_bytes", ()] > 0
    assert found["hb_healthy", (("part", "drain"),)] == 1
    assert total(found, "hb_drain_age_seconds") < 60


def test_all_workers_together(settings: Settings) -> None:
    tallies = Tallies(2)
    with running(settings, tallies) as one, running(settings, tallies.of(1)) as other:
        assert one.post(BATCH, json=[heartbeat()] * 3).status_code == 200
        assert other.post(BATCH, json=[heartbeat()] * 2).status_code == 200
        assert one.post(PATH, json={}).status_code == 422
        assert one.get("/nowhere").status_code == 404
        for http in (one, other):
            found = samples(http)
            assert accepted(http) == 5
            assert found["hb_gateway_workers", ()] == 2
            posted = (("method", "POST"), ("route", BATCH), ("status", "200"))
            assert found["hb_http_requests_total", posted] == 2
            assert total(found, "hb_heartbeats_refused_total") == 1
            lost = (("method", "GET"), ("route", "other"), ("status", "404"))
            assert found["hb_http_requests_total", lost] == 1


def test_what_is_not_known_beforehand_is_counted_as_other() -> None:
    metrics = Metrics()
    metrics.expect({PATH: ["POST"]})
    metrics.request("/\0", "BREW", 418, 0.1)
    metrics.request(PATH, "POST", 999, 0.1)
    metrics.refused("of a new kind", 2)
    families = Families()
    metrics.show(families)
    text = families.text().decode()
    for line in (
        'hb_http_requests_total{method="other",route="other",status="418"} 1.0',
        f'hb_http_requests_total{{method="POST",route="{PATH}",status="other"}} 1.0',
        'hb_heartbeats_refused_total{reason="other"} 2.0',
    ):
        assert line in text.splitlines()


def documented(heading: str) -> list[list[str]]:
    """The rows of a table of docs/http.md, the first one under this heading."""
    section = DOCS.read_text(encoding="utf-8").partition(f"{heading}\n")[2].partition("\n#")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [line.strip("| ").split(" | ") for line in lines[2:]]


def values(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def labels() -> dict[str, tuple[str, list[str]]]:
    """The documented label of a metric, and its values."""
    return {
        values(name)[0]: (label, values(known))
        for name, label, known in documented("### Label values")
    }


def test_every_metric_is_documented() -> None:
    rows = re.findall(
        r"^\| `(hb_\w+|process_\w+)` \| (\w*) \| ([\w, ]*) \| (.*) \|$",
        DOCS.read_text(encoding="utf-8").partition("### Label values")[0],
        re.MULTILINE,
    )
    assert [tuple(row) for row in rows] == [
        (one.name, one.kind, ", ".join(one.labels), one.text) for one in TABLE.values()
    ]
    known = {name: list(found) for name, (_, found) in labels().items()}
    assert known == {name: list(found) for name, found in KNOWN.items()}


def test_every_documented_metric_is_there_from_the_start(http: httpx.Client) -> None:
    """As the docs list them, and not as the code does."""
    text = http.get("/metrics").text
    found = {
        (sample.name, tuple(sorted(sample.labels.items())))
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    names = re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE)
    assert names == [values(name)[0] for name, *_ in documented("## GET /metrics")]
    for name, (label, known) in labels().items():
        assert {(name, ((label, value),)) for value in known} <= found
    for route in (PATH, BATCH):
        posted = (("method", "POST"), ("route", route), ("status", "200"))
        assert ("hb_http_requests_total", posted) in found


def test_reasons_of_refused_records_are_documented(http: httpx.Client) -> None:
    """Whatever can be wrong with a record: one of each, and no reason that isn't known before."""
    ids: list[dict[str, object]] = [
        {name: value} for name in ("user_id", "device_id") for value in (None, 5, "")
    ]
    clocks = (None, True, "noon", "2001-01-01T00:00:00Z", "2999-01-01T00:00:00Z")
    rates = (None, "75", 999)
    wrong = [*ids, *({"timestamp": one} for one in clocks), *({"heart_rate": one} for one in rates)]
    lines = [json.dumps(heartbeat(**changes)) for changes in wrong]
    twice = lines[0].replace("{", '{"heart_rate": 75, ')
    batch = "\n".join(["{", "[]", twice, *lines])
    sent = http.post(BATCH, content=batch, headers={"content-type": "application/x-ndjson"})
    given = {one["reason"] for one in sent.json()["refused"]}
    assert len(given) == len(wrong) + 3
    for name in ("hb_heartbeats_refused_total", "hb_quarantined_total"):
        assert given <= set(labels()[name][1])


def test_work_is_shown_and_promtool_is_content(work: httpx.Client) -> None:
    shown = re.findall(r"^# TYPE (\w+) (\w+)$", work.get("/metrics").text, re.MULTILINE)
    assert shown == [(one.name, one.kind) for one in TABLE.values()]
    checked(work)
