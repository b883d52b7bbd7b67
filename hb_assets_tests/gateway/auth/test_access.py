"""Who may do what: every route, every way to have no right to it, and keys that change."""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings
from hb_assets.gateway.app import Gateway
from hb_assets.gateway.auth import keyring
from hb_assets.gateway.auth.access import ANYBODY, PRINCIPAL, Access
from hb_assets.gateway.http.problems import ProblemError
from hb_assets_tests.conftest import emptied
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, running
from hb_assets_tests.servers import wait_for

READINGS = f"{PATH}?user_id=u1&start=2025-01-15T10:00Z&end=2025-01-15T11:00Z"
OTHERS = READINGS.replace("u1", "u2")


@pytest.fixture(scope="module")
def keyed(
    tmp_path_factory: pytest.TempPathFactory, server_urls: Callable[[str], str]
) -> Iterator[tuple[httpx.Client, dict[str, str]]]:
    """A gateway with keys, and their tokens by name."""
    url = emptied(server_urls("valkey"))  # what is old there is a fault to /health
    settings = Settings(home=tmp_path_factory.mktemp("access") / "home", redis_url=url, shards=4)
    tokens = {
        "ingest": keyring.create(settings, "a", ["ingest"])[1],
        "read": keyring.create(settings, "b", ["read"])[1],
        "read_u1": keyring.create(settings, "c", ["read"], user_id="u1")[1],
        "admin": keyring.create(settings, "d", ["admin"])[1],
    }
    with running(settings) as http:
        yield http, tokens


@pytest.mark.parametrize(
    ("method", "url", "allowed"),
    [
        ("POST", PATH, {"ingest", "admin"}),
        ("POST", BATCH, {"ingest", "admin"}),
        ("GET", READINGS, {"read", "read_u1", "admin"}),
        ("HEAD", READINGS, {"read", "read_u1", "admin"}),
        ("GET", OTHERS, {"read", "admin"}),
        ("GET", "/metrics", {"admin"}),
    ],
)
def test_every_route_wants_its_scope(
    keyed: tuple[httpx.Client, dict[str, str]], method: str, url: str, allowed: set[str]
) -> None:
    http, tokens = keyed
    for name, token in tokens.items():
        answer = http.request(method, url, json=heartbeat(), headers=bearer(token))
        assert answer.status_code == (200 if name in allowed else 403), name
        by_name = http.request(method, url, json=heartbeat(), headers={"X-API-Key": token})
        assert by_name.status_code == answer.status_code
    refused = http.request(method, url, json=heartbeat())
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == 'Bearer realm="hb"'
    assert refused.headers["content-type"] == "application/problem+json"


def test_no_route_is_left_out() -> None:
    """A new route has to say what it needs, and to be looked at above."""
    every = Gateway(Settings())._edge._app._routes  # type: ignore[attr-defined]
    routes = {path: methods for path, methods in every.items() if methods}  # `*` has no handler
    keyless = {
        path for path, methods in routes.items() if None in {r.needed for r in methods.values()}
    }
    known = {PATH, BATCH, "/metrics"}
    assert {path for path in routes if path not in keyless} == known
    assert all(path.startswith(("/health", "/openapi.json", "/docs")) for path in keyless)


def test_health_asks_for_nothing(keyed: tuple[httpx.Client, dict[str, str]]) -> None:
    assert keyed[0].get("/health").status_code == 200


def test_another_users_readings_are_refused_alike_whether_they_exist(
    keyed: tuple[httpx.Client, dict[str, str]],
) -> None:
    http, tokens = keyed
    http.post(PATH, json=heartbeat(user_id="u2"), headers=bearer(tokens["ingest"]))
    there, nowhere = (
        http.get(READINGS.replace("u1", user), headers=bearer(tokens["read_u1"]))
        for user in ("u2", "nobody")
    )
    same = {"request_id": ""}
    assert (there.status_code, nowhere.status_code) == (403, 403)
    assert there.json() | same == nowhere.json() | same
    assert "u2" not in there.text


def test_tokens_that_are_nearly_right(keyed: tuple[httpx.Client, dict[str, str]]) -> None:
    http, tokens = keyed
    token = tokens["ingest"]
    flipped = token[:-1] + ("0" if token[-1] != "0" else "1")
    borrowed = token[:16] + tokens["admin"][16:]
    for wrong in (flipped, borrowed, token[:-1], token + "0", token.upper(), "hb_", "x" * 9000):
        answer = http.post(PATH, json=heartbeat(), headers=bearer(wrong))
        assert answer.status_code == 401, wrong
        assert not wrong[16:] or wrong[16:] not in answer.text
    for header in (f"Basic {token}", token, "Bearer"):
        assert (
            http.post(PATH, json=heartbeat(), headers={"Authorization": header}).status_code == 401
        )
    assert http.post(PATH, json=heartbeat(), headers=bearer(token, "bearer")).status_code == 200


def test_every_byte_of_a_digest_counts(settings_alone: Settings) -> None:
    _, token = keyring.create(settings_alone, "a", ["ingest"])
    [key] = keyring.read(keyring.path(settings_alone)) or ()
    check(opened(settings_alone), token)
    digest = bytes.fromhex(key.digest)
    for place in range(len(digest)):
        other = digest[:place] + bytes([digest[place] ^ 1]) + digest[place + 1 :]
        stored = msgspec.structs.replace(key, digest=other.hex())
        keyring._write(keyring.path(settings_alone), (stored,))
        with pytest.raises(ProblemError) as caught:
            check(opened(settings_alone), token)
        assert caught.value.status == 401


def test_an_expired_key_says_so(settings_alone: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    key, token = keyring.create(settings_alone, "a", ["ingest"], lifetime=dt.timedelta(hours=1))
    access = opened(settings_alone)
    check(access, token)
    assert key.expires is not None
    late = key.expires.timestamp()
    monkeypatch.setattr(time, "time", lambda: late)
    with pytest.raises(ProblemError, match=f"{key.id} has expired") as caught:
        check(access, token)
    assert caught.value.status == 401


def test_without_keys_everybody_may_on_loopback_only(settings_alone: Settings) -> None:
    scope = check(opened(settings_alone), "")
    assert scope[PRINCIPAL] is ANYBODY
    assert scope[PRINCIPAL].key_id is None
    for host in ("0.0.0.0", "::", "203.0.113.7", "no-such-host.invalid", ""):
        with pytest.raises(SettingsError, match="hb keys create"):
            opened(settings_alone.model_copy(update={"gateway_host": host}))
    key, _ = keyring.create(settings_alone, "a", ["read"])
    abroad = settings_alone.model_copy(update={"gateway_host": "0.0.0.0"})
    opened(abroad)
    keyring.revoke(settings_alone, key.id)
    with pytest.raises(SettingsError, match="hb keys create"):
        opened(abroad)
    assert refused(opened(settings_alone), ""), "a file without keys opens nothing at home either"


@pytest.mark.parametrize(
    ("host", "ours"),
    [
        ("localhost", True),
        ("LocalHost:8000", True),
        ("127.0.0.1:1", True),
        ("[::1]:8000", True),
        ("hb.test:8000", True),
        ("evil.example:8000", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example:8000", False),
        ("evil.example:80:localhost", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_without_keys_a_gateway_answers_to_its_own_names_alone(
    settings_alone: Settings, host: str, ours: bool
) -> None:
    """A page whose name was made to point to this machine (DNS rebinding) reads nothing."""
    named = settings_alone.model_copy(update={"gateway_names": ("HB.test",)})
    scope: dict[str, Any] = {"headers": [(b"host", host.encode())]}
    access = opened(named)
    if ours:
        access.check(scope, "read")
        assert scope[PRINCIPAL] is ANYBODY
    else:
        with pytest.raises(ProblemError, match="HB_GATEWAY_NAMES") as caught:
            access.check(scope, "read")
        assert caught.value.status == 421
    _, token = keyring.create(named, "a", ["read"])
    scope["headers"].append((b"x-api-key", token.encode()))
    opened(named).check(scope, "read")


def test_a_running_gateway_follows_the_file(settings_alone: Settings) -> None:
    access = opened(settings_alone)
    key, token = keyring.create(settings_alone, "a", ["ingest"])
    check(access, "")  # not looked at yet
    access.refresh()
    assert check(access, token)[PRINCIPAL].key_id == key.id
    assert refused(access, "")
    keyring.revoke(settings_alone, key.id)
    access.refresh()
    assert refused(access, token)
    assert refused(access, ""), "the last key is gone: closed, not open"


def test_the_last_good_keys_stay_when_the_file_is_damaged(
    settings_alone: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    _, token = keyring.create(settings_alone, "a", ["ingest"])
    access = opened(settings_alone)
    file = keyring.path(settings_alone)
    good = file.read_bytes()
    for harm in (lambda: file.write_bytes(good[:-9]), file.unlink):
        harm()
        access.refresh()
        access.refresh()
        check(access, token)
        assert refused(access, "")
        (alarm,) = access.alarms()
        assert str(file) in alarm
    assert len(caplog.records) == 2, "one line for each, however often it is looked at"
    file.write_bytes(good[:-9])
    with pytest.raises(SettingsError, match="damaged"):
        opened(settings_alone)
    file.write_bytes(good)
    access.refresh()
    assert not access.alarms()
    check(access, token)


def test_a_gateway_that_serves_takes_new_keys_and_drops_revoked_ones(
    settings_valkey: Settings,
) -> None:
    with running(settings_valkey) as http:
        assert http.post(PATH, json=heartbeat()).status_code == 200
        key, token = keyring.create(settings_valkey, "a", ["ingest"])

        def status(headers: dict[str, str]) -> int:
            return http.post(PATH, json=heartbeat(), headers=headers).status_code

        began = time.monotonic()
        wait_for(lambda: status({}) == 401, "the gateway to ask for keys")
        assert status(bearer(token)) == 200
        keyring.revoke(settings_valkey, key.id)
        wait_for(lambda: status(bearer(token)) == 401, "the key to stop working")
        assert time.monotonic() - began < 8
        keyring.path(settings_valkey).write_text("{")
        wait_for(lambda: bool(http.get("/health").json()["alarms"]), "an alarm in /health")


def test_no_key_gets_into_the_log(
    settings_valkey: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = [
        keyring.create(settings_valkey, "a", ["ingest"])[1],
        keyring.create(settings_valkey, "b", ["read"], user_id="Erika")[1],
        f"hb_{'0' * 12}_{'5ec' * 21}0",
    ]
    said = ""
    with running(settings_valkey) as http:
        for token in tokens:
            for url in (PATH, READINGS):
                for headers in (bearer(token), {"X-API-Key": token}):
                    said += http.get(url, headers=headers).text
                    said += http.post(url, headers=headers, content=b"x").text
    said += caplog.text + repr([vars(record) for record in caplog.records])
    access = opened(settings_valkey)
    principals = [check(access, tokens[0], "ingest"), check(access, tokens[1], "read")]
    said += repr([access, access._keys.known, [scope[PRINCIPAL] for scope in principals]])
    for token in tokens:
        assert token[16:40] not in said
    assert "Erika" not in said


@pytest.fixture
def settings_alone(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def settings_valkey(tmp_path: Path, server_urls: Callable[[str], str]) -> Settings:
    return Settings(home=tmp_path / "home", redis_url=server_urls("valkey"), shards=4)


def bearer(token: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {token}"}


def test_keys_that_appear_while_somebody_is_let_in(
    settings_valkey: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request is judged by the keys that were in force when it came, the next one by the new."""
    access = opened(settings_valkey)
    scope: dict[str, Any] = {"headers": []}

    def appear(*_: object) -> None:
        keyring.create(settings_valkey, "a", ["ingest"])
        access.refresh()

    monkeypatch.setattr(access, "_check_name", appear)
    access.check(scope, "ingest")
    assert scope[PRINCIPAL] is ANYBODY
    with pytest.raises(ProblemError):
        access.check({"headers": []}, "ingest")


def opened(settings: Settings) -> Access:
    access = Access(settings)
    access.load()
    return access


def check(access: Access, token: str, needed: str = "ingest") -> dict[str, Any]:
    scope: dict[str, Any] = {"headers": [(b"authorization", f"Bearer {token}".encode())]}
    access.check(scope, needed)
    return scope


def refused(access: Access, token: str) -> bool:
    try:
        check(access, token)
    except ProblemError as problem:
        return problem.status == 401
    return False
