"""Limits over HTTP: who is limited, what a client is told, and that a flood is nobody else's."""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import quantiles
from typing import Any

import httpx
import pytest

from hb_assets.core.settings import Quota, Settings
from hb_assets.gateway.auth import keyring
from hb_assets.gateway.auth.rate_limits import _network
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, plain_client
from hb_assets_tests.gateway.ingest.test_heartbeats import problem, stored

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]
HOUR = dt.timedelta(hours=1)
UNSUPPORTED = "unsupported-media-type"


def limited(settings: Settings, **quotas: Any) -> Settings:
    return settings.model_copy(update={f"limit_{name}": quota for name, quota in quotas.items()})


@VALKEY
def test_a_user_over_his_limit(serving: Serving, settings: Settings, client: Any) -> None:
    with serving(limited(settings, user=Quota(2, HOUR))) as http:
        assert "ratelimit" not in http.post(PATH, json=heartbeat()).headers
        second = http.post(PATH, json=heartbeat(heart_rate=76))
        assert '"user";r=0;t=3600' in second.headers["ratelimit"]
        assert '"user";q=2;w=3600' in second.headers["ratelimit-policy"]
        refused = http.post(PATH, json=heartbeat(heart_rate=77))
        body = problem(refused, 429, "rate-limited")
        assert body["policy"] == "user"
        assert 1790 <= int(refused.headers["retry-after"]) <= 1800
        assert refused.headers["ratelimit"].startswith('"user";r=0;t=')
        assert http.post(PATH, json=heartbeat(user_id="u2")).status_code == 200
        assert 'hb_rate_limited_total{policy="user"} 1.0' in http.get("/metrics").text
    assert len(stored(client, settings.shards)) == 3


@VALKEY
def test_a_batch_is_taken_but_for_who_is_over_his_limit(
    serving: Serving, settings: Settings, client: Any
) -> None:
    """What is valid of the others is stored; a user's heartbeats are taken all or none."""
    with serving(limited(settings, user=Quota(2, HOUR))) as http:
        http.post(PATH, json=heartbeat())
        batch = [heartbeat(heart_rate=50), heartbeat(user_id="u2"), heartbeat(heart_rate=51)]
        answer = http.post(BATCH, json=batch)
        assert answer.status_code == 200
        assert answer.json()["accepted"] == 1
        told = [(one["index"], one["reason"], one["retry"]) for one in answer.json()["refused"]]
        assert told == [(0, "rate_limited", True), (2, "rate_limited", True)]
        assert int(answer.headers["retry-after"]) > 1
        nothing = http.post(BATCH, json=[heartbeat(heart_rate=50), heartbeat(heart_rate=51)])
        assert len(problem(nothing, 429, "rate-limited")["refused"]) == 2
    assert len(stored(client, settings.shards)) == 2


@VALKEY
def test_an_address_pays_for_all_that_it_sends(serving: Serving, settings: Settings) -> None:
    """Heartbeats that aren't valid count as well: they cost us as much."""
    with serving(limited(settings, ip=Quota(5, HOUR))) as http:
        batch = [heartbeat(user_id=f"u{n}", heart_rate=n) for n in (1, 60, 61, 62)]
        assert http.post(BATCH, json=batch).json()["accepted"] == 3
        assert http.post(PATH, content=b"{").status_code == 422
        assert problem(http.post(PATH, json=heartbeat()), 429, "rate-limited")["policy"] == "ip"
        whole = http.post(BATCH, json=batch)
        assert "refused" not in problem(whole, 429, "rate-limited")


@VALKEY
def test_a_key_pays_for_all_that_is_sent_with_it(serving: Serving, settings: Settings) -> None:
    tokens = [keyring.create(settings, name, ["ingest"])[1] for name in ("a", "b")]
    with serving(limited(settings, key=Quota(3, HOUR))) as http:

        def post(token: str, user: str = "u1") -> httpx.Response:
            headers = {"Authorization": f"Bearer {token}"}
            return http.post(PATH, json=heartbeat(user_id=user), headers=headers)

        assert [post(tokens[0], f"u{n}").status_code for n in range(3)] == [200] * 3
        assert problem(post(tokens[0], "u9"), 429, "rate-limited")["policy"] == "key"
        assert post(tokens[1]).status_code == 200


@VALKEY
@pytest.mark.parametrize("trusted", [("127.0.0.1",), ("10.0.0.0/8",), ()])
def test_who_is_believed_about_an_address(
    serving: Serving, settings: Settings, trusted: tuple[str, ...]
) -> None:
    """A proxy that is trusted; nobody else buys another quota by a header."""
    behind = limited(settings, ip=Quota(3, HOUR)).model_copy(update={"trusted_proxies": trusted})
    with serving(behind) as http:

        def post(*sent_for: str) -> int:
            headers = {"X-Forwarded-For": ", ".join(sent_for)} if sent_for else {}
            return http.post(PATH, json=heartbeat(), headers=headers).status_code

        assert [post("192.0.2.1") for _ in range(3)] == [200] * 3
        assert post("192.0.2.1") == 429
        others = [post("192.0.2.2"), post("192.0.2.2"), post("2001:db8::1"), post()]
        assert others == ([200] * 4 if trusted == ("127.0.0.1",) else [429] * 4)
        # the last address that isn't a proxy's counts: what a client writes before it doesn't
        assert post("192.0.2.9", "192.0.2.1") == 429


@VALKEY
def test_what_cannot_be_read_costs_as_well(serving: Serving, settings: Settings) -> None:
    """Or else whoever sends nothing but rubbish is never told to wait."""
    with serving(limited(settings, ip=Quota(4, HOUR))) as http:
        problem(http.post(BATCH, content=b"[1,"), 422, "not-json")
        problem(http.post(BATCH, content=b""), 422, "empty-batch")
        problem(http.post(BATCH, content=b"x", headers={"content-type": "x/y"}), 415, UNSUPPORTED)
        problem(http.post(PATH, content=b"x", headers={"content-type": "x/y"}), 415, UNSUPPORTED)
        problem(http.post(BATCH, content=b"[1,"), 429, "rate-limited")
        problem(http.post(PATH, json=heartbeat()), 429, "rate-limited")


@VALKEY
def test_more_at_once_than_the_quota_has_to_be_worked_off(
    serving: Serving, settings: Settings
) -> None:
    with serving(limited(settings, ip=Quota(10, HOUR))) as http:
        batch = [heartbeat(user_id=f"u{n}") for n in range(30)]
        assert http.post(BATCH, json=batch).json()["accepted"] == 30
        waiting = http.post(PATH, json=heartbeat())
        assert 2 * 3600 < int(waiting.headers["retry-after"]) <= 2.1 * 3600


@VALKEY
def test_questions_have_a_limit_of_their_own(serving: Serving, settings: Settings) -> None:
    query = {"user_id": "u1", "start": "2025-01-15T10:00:00Z", "end": "2025-01-15T11:00:00Z"}
    with serving(limited(settings, queries=Quota(1, HOUR))) as http:
        assert http.get(PATH, params=query).headers["ratelimit"].startswith('"ip-queries";r=0')
        problem(http.get(PATH, params=query), 429, "rate-limited")
        assert http.post(PATH, json=heartbeat()).status_code == 200
        assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("host", "meant"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("nonsense", "nonsense"),
    ],
)
def test_what_counts_as_one_address(host: str, meant: str) -> None:
    assert _network(host) == meant


@VALKEY
def test_no_limit_no_header(serving: Serving, settings: Settings) -> None:
    with serving(limited(settings, user=None, ip=None, key=None)) as http:
        assert "ratelimit" not in http.post(PATH, json=heartbeat()).headers


@VALKEY
def test_a_flood_of_one_user_does_not_slow_another(serving: Serving, settings: Settings) -> None:
    """A quiet client's p99 beside a flood that is refused, against one that asks for nothing."""

    def beside(http: httpx.Client, noise: Callable[[httpx.Client], object]) -> float:
        over = threading.Event()

        def flood() -> None:
            with plain_client(str(http.base_url)) as noisy:
                while not over.is_set():
                    noise(noisy)

        threads = [threading.Thread(target=flood) for _ in range(4)]
        for thread in threads:
            thread.start()
        times = []
        try:
            for number in range(200):
                began = time.perf_counter()
                response = http.post(PATH, json=heartbeat(user_id=f"quiet {number % 10}"))
                assert response.status_code == 200
                times.append(time.perf_counter() - began)
        finally:
            over.set()
            for thread in threads:
                thread.join()
        return quantiles(times, n=100)[98]

    with serving(limited(settings, user=Quota(100, HOUR))) as http:
        empty = beside(http, lambda noisy: noisy.get("/health/live"))
        refused = beside(http, lambda noisy: noisy.post(PATH, json=heartbeat(user_id="noisy")))
        assert 'hb_rate_limited_total{policy="user"}' in http.get("/metrics").text
    # clients share this process with the gateway, so that the tails are rough
    assert refused < 10 * empty


@VALKEY
def test_a_batch_of_very_many_users_over_their_limits(serving: Serving, settings: Settings) -> None:
    """It is refused in a second, not in the square of its users."""
    batch = [heartbeat(user_id=f"u{number}") for number in range(20_000)]
    with serving(limited(settings, user=Quota(1, HOUR))) as http:
        assert http.post(BATCH, json=batch).json()["accepted"] == 20_000
        began = time.monotonic()
        body = problem(http.post(BATCH, json=batch), 429, "rate-limited")
        assert len(body["refused"]) == 20_000
        assert time.monotonic() - began < 5
