"""TLS by certificate files, and `serve` with both TLS and keys, as a process of its own."""

from __future__ import annotations

import datetime as dt
import json
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import trustme

from hb_assets.buffer.server import free_port
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring
from hb_assets.gateway.http import tls
from hb_assets.gateway.server import serve
from hb_assets_tests.gateway.conftest import PATH, heartbeat, next_answer, running
from hb_assets_tests.gateway.test_server import process

ENCRYPTED = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIGbMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAi5Z5wRW85M2wICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEI87HT0Pk7uOSkHAdfvAgeEEQEJV
HNnXNDrEJLeA4qVsfEMyi0Gmi2du72usX7Bh+DEABj7aF9cFA0ZvbJA3risNmHKL
ZCSBDXC0hWl9KEvxtU8=
-----END ENCRYPTED PRIVATE KEY-----
"""


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def settings(tmp_path: Path, authority: trustme.CA) -> Settings:
    return with_cert(Settings(home=tmp_path / "home"), authority, tmp_path, "cert")


def with_cert(settings: Settings, authority: trustme.CA, folder: Path, name: str) -> Settings:
    made = authority.issue_cert("heartbeats.example")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    for blob in made.cert_chain_pems:
        blob.write_to_path(cert, append=True)
    made.private_key_pem.write_to_path(key)
    return settings.model_copy(update={"gateway_cert": cert, "gateway_key": key})


def test_it_serves_tls_and_our_own_client_trusts_that_certificate_alone(
    settings: Settings,
    authority: trustme.CA,
    tmp_path: Path,
    server_urls: Callable[[str], str],
) -> None:
    url = Settings(redis_url=server_urls("valkey")).redis_url
    served = settings.model_copy(
        update={
            "redis_url": url,
            "shards": 4,
            "gateway_host": "0.0.0.0",
            "gateway_port": free_port(),
            "log_level": "debug",
        }
    )
    _, token = keyring.create(served, "a", ["ingest"])
    address = f"https://127.0.0.1:{served.gateway_port}{PATH}"
    with process(served):
        headers = {"Authorization": f"Bearer {token}"}
        ours = tls.client_context(served)
        answer = httpx.post(address, json=heartbeat(), headers=headers, verify=ours)
        assert answer.status_code == 200
        assert httpx.post(address, json=heartbeat(), verify=ours).status_code == 401

        strangers = ssl.create_default_context()
        authority.configure_trust(strangers)
        with httpx.Client(verify=strangers) as http:
            named = {**headers, "Host": "heartbeats.example"}
            sni = {"sni_hostname": "heartbeats.example"}
            answer = http.post(address, json=heartbeat(), headers=named, extensions=sni)
            assert answer.status_code == 200

        # one connection for several, the last ones sent ahead
        body = json.dumps(heartbeat()).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: hb\r\nauthorization: Bearer {token}\r\n"
        post = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        last = post.replace(b"host:", b"connection: close\r\nhost:", 1)
        with (
            socket.create_connection(("127.0.0.1", served.gateway_port), 20) as plain,
            strangers.wrap_socket(plain, server_hostname="heartbeats.example") as client,
        ):
            assert next_answer(client, post).startswith(b"HTTP/1.1 200 ")
            client.sendall(post + last)
            assert b"".join(iter(lambda: client.recv(65536), b"")).count(b"HTTP/1.1 200 ") == 2

        twin = with_cert(served, authority, tmp_path, "twin")
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.post(address, verify=tls.client_context(twin))
        with pytest.raises(httpx.TransportError):
            httpx.post(address.replace("https", "http"), json=heartbeat(), headers=headers)


def test_nothing_older_than_tls_1_2(settings: Settings) -> None:
    context = tls.server_context(settings)
    assert context is not None
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("which", "content", "told"),
    [
        ("cert", None, r"HB_GATEWAY_CERT .* can't be read \(No such file"),
        ("key", None, r"HB_GATEWAY_KEY .* can't be read \(No such file"),
        ("cert", "x", "name a PEM certificate"),
        ("key", "x", "name a PEM certificate"),
        ("key", "another's", "isn't the key of"),
        ("key", ENCRYPTED, "encrypted"),
    ],
)
def test_files_that_can_not_be_used_are_named_before_anything_is_bound(
    settings: Settings,
    authority: trustme.CA,
    tmp_path: Path,
    which: str,
    content: str | None,
    told: str,
) -> None:
    file = tmp_path / ("cert.pem" if which == "cert" else "cert.key")
    if content == "another's":
        with_cert(settings, authority, tmp_path, "other")
        content = (tmp_path / "other.key").read_text()
    file.unlink()
    if content is not None:
        file.write_text(content)
    nowhere = settings.model_copy(update={"gateway_host": "203.0.113.7"})
    keyring.create(nowhere, "a", ["ingest"])
    with pytest.raises(SettingsError, match=told) as caught:
        serve(nowhere)
    assert "\n" not in str(caught.value)


def test_an_address_for_all_needs_a_key_before_anything_is_bound(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="hb keys create"):
        serve(Settings(home=tmp_path / "home", gateway_host="0.0.0.0", gateway_port=free_port()))


def test_a_handshake_that_does_not_come(
    settings: Settings, server_urls: Callable[[str], str]
) -> None:
    url = Settings(redis_url=server_urls("valkey")).redis_url
    shortly = {"redis_url": url, "shards": 4, "head_timeout": dt.timedelta(milliseconds=300)}
    with running(settings.model_copy(update=shortly)) as http:
        where = (http.base_url.host, http.base_url.port or 80)
        with socket.create_connection(where, timeout=20) as silent:
            assert silent.recv(1) == b""
