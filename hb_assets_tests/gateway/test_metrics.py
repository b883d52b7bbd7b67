from __future__ import annotations

import httpx
from prometheus_client.parser import text_string_to_metric_families

from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat


def samples(http: httpx.Client) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    response = http.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def test_counts(http: httpx.Client) -> None:
    http.post(PATH, json=heartbeat(extra=1))
    http.post(PATH, json=heartbeat(heart_rate=1))
    http.post(BATCH, json=[heartbeat(), heartbeat(), {}])
    http.get("/no/such/path?user_id=secret")
    found = samples(http)
    posts = (("method", "POST"), ("route", PATH))
    assert found["hb_http_requests_total", (*posts, ("status", "200"))] == 1
    assert found["hb_http_requests_total", (*posts, ("status", "422"))] == 1
    assert found["hb_http_request_seconds_count", posts] == 2
    other = (("method", "GET"), ("route", "other"), ("status", "404"))
    assert found["hb_http_requests_total", other] == 1
    assert found["hb_heartbeats_accepted_total", ()] == 3
    assert found["hb_heartbeats_refused_total", (("reason", "heart_rate_out_of_range"),)] == 1
    assert found["hb_heartbeats_refused_total", (("reason", "user_id_missing"),)] == 1
    assert found["hb_unknown_fields_total", ()] == 1
    assert found["hb_buffer_up", ()] == 1
    depth = {k: v for (name, k), v in found.items() if name == "hb_buffer_heartbeats"}
    assert sum(depth.values()) == 3
