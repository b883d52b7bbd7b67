"""HTTP/1.1 on a raw socket: what RFC 9112 refuses, and requests that are sent ahead of answers."""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import pytest
import redis
import trustme

from hb_assets.buffer import depth
from hb_assets.buffer.connection import connect
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring
from hb_assets_tests.conftest import emptied
from hb_assets_tests.gateway.conftest import next_answer, running
from hb_assets_tests.servers import wait_for

BODY = b'{"user_id":"u1","device_id":"device_a","timestamp":"2025-01-15T10:00:00Z","heart_rate":75}'
HOST = b"host: localhost\r\n"
JSON = b"content-type: application/json\r\n"
UPGRADE = b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n"


def get(
    target: bytes = b"/health/live", headers: bytes = HOST, version: bytes = b" HTTP/1.1"
) -> bytes:
    return b"GET " + target + version + b"\r\n" + headers + b"\r\n"


def post(headers: bytes = b"", length: bytes = b"%d" % len(BODY), host: bytes = HOST) -> bytes:
    head = b"POST /metrics/heart-rate HTTP/1.1\r\n" + host + JSON + headers
    return head + b"content-length: " + length + b"\r\n\r\n" + BODY


def chunked(
    chunk: bytes = b"", trailers: bytes = b"", coding: bytes = b"transfer-encoding: chunked\r\n"
) -> bytes:
    head = b"POST /metrics/heart-rate HTTP/1.1\r\n" + HOST + JSON + coding
    return head + b"\r\n%x%s\r\n%s\r\n0\r\n%s\r\n" % (len(BODY), chunk, BODY, trailers)


@dataclass(frozen=True)
class Gateway:
    settings: Settings
    address: tuple[str, int]
    client: redis.Redis
    tls: ssl.SSLContext | None = None

    @contextlib.contextmanager
    def connected(self, *, used: bool = False) -> Iterator[socket.socket]:
        """A connection; one that was `used` has had two single heartbeats accepted."""
        with contextlib.ExitStack() as stack:
            plain = stack.enter_context(socket.create_connection(self.address, timeout=20))
            made: socket.socket = plain
            if self.tls is not None:
                made = stack.enter_context(self.tls.wrap_socket(plain, server_hostname="localhost"))
            for _ in range(2 if used else 0):
                assert next_answer(made, post()).startswith(b"HTTP/1.1 200 ")
            yield made

    def stored(self) -> int:
        return sum(one.heartbeats for one in depth.depths(self.client, self.settings).states)


@contextlib.contextmanager
def gateway(settings: Settings, tls: ssl.SSLContext | None = None) -> Iterator[Gateway]:
    with running(settings) as http, contextlib.closing(connect(settings)) as client:
        yield Gateway(settings, (http.base_url.host, http.base_url.port or 0), client, tls)


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, server_urls: Callable[[str], str]
) -> Callable[[], Settings]:
    def made() -> Settings:
        url = emptied(server_urls("valkey"))
        return Settings(home=tmp_path_factory.mktemp("home"), redis_url=url, shards=4)  # type: ignore[arg-type]  # pydantic makes a secret of it

    return made


@pytest.fixture(scope="module", params=["plain", "tls"])
def served(
    request: pytest.FixtureRequest,
    home: Callable[[], Settings],
) -> Iterator[Gateway]:
    settings, context = home(), None
    if request.param == "tls":
        authority = trustme.CA()
        made = authority.issue_cert("localhost")
        cert, key = settings.home / "cert.pem", settings.home / "key.pem"
        made.cert_chain_pems[0].write_to_path(cert)
        made.private_key_pem.write_to_path(key)
        settings = settings.model_copy(update={"gateway_cert": cert, "gateway_key": key})
        context = ssl.create_default_context()
        authority.configure_trust(context)
    with gateway(settings, context) as found:
        yield found


@pytest.fixture(scope="module")
def plain(home: Callable[[], Settings]) -> Iterator[Gateway]:
    with gateway(home()) as found:
        yield found


Answers: TypeAlias = list[tuple[int, str]]


def told(client: socket.socket, sent: bytes) -> Answers:
    """Status and kind of problem of each answer, until the gateway closes the connection."""
    with contextlib.suppress(ConnectionError):
        client.sendall(sent)
    found = b""
    with contextlib.suppress(ConnectionError, ssl.SSLError):
        while part := client.recv(65536):
            found += part
    answers = re.split(rb"(?=HTTP/1\.1 \d{3} )", found)[1:]
    kinds = [re.search(rb"urn:problem-type:hb:([\w-]+)", one) for one in answers]
    return [
        (int(one[9:12]), kind[1].decode() if kind else "")
        for one, kind in zip(answers, kinds, strict=True)
    ]


CLOSE = b"connection: close\r\n"
LAST = get(headers=HOST + CLOSE)
"""Whoever gets an answer to this was left connected."""
FINE: Answers = [(200, "")]


def refused(status: int, kind: str) -> Answers:
    return [(status, kind)]


MALFORMED = refused(400, "malformed-request")
LONG = b"y" * 70_000
FRAMING = refused(400, "framing-too-large")
CODING = refused(501, "transfer-coding-not-implemented")

REFUSED: dict[str, tuple[bytes, Answers]] = {
    "no Host": (get(headers=b""), MALFORMED),
    "no Host, a heartbeat": (post(host=b""), MALFORMED),
    "two Hosts": (get(headers=HOST * 2), MALFORMED),
    "two Hosts in HTTP/1.0": (get(headers=HOST * 2, version=b" HTTP/1.0"), MALFORMED),
    "a Host with a blank": (get(headers=b"host: local host\r\n"), MALFORMED),
    "a Host with a user": (get(headers=b"host: me@localhost\r\n"), MALFORMED),
    "a Host with a path": (get(headers=b"host: localhost/x\r\n"), MALFORMED),
    "HTTP/0.9 without a version": (get(version=b""), MALFORMED),
    "HTTP/0.9": (get(version=b" HTTP/0.9"), MALFORMED),
    "HTTP/2.0": (get(version=b" HTTP/2.0"), refused(505, "unsupported-version")),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", MALFORMED),
    "a head over the limit in one piece": (
        get(headers=HOST + b"x: " + LONG + b"\r\n"),
        refused(431, "head-too-large"),
    ),
    "such a head of small headers": (
        get(headers=HOST + b"x: %s\r\n" % (b"y" * 700) * 95),
        refused(431, "head-too-large"),
    ),
    "a target over the limit": (get(b"/" + LONG), refused(414, "target-too-long")),
    "a header's name with a blank": (get(headers=HOST + b"x y: 1\r\n"), MALFORMED),
    "a blank before the colon": (get(headers=HOST + b"x : 1\r\n"), MALFORMED),
    "a header without a name": (get(headers=HOST + b": 1\r\n"), MALFORMED),
    "a NUL in a header": (get(headers=HOST + b"x: a\0b\r\n"), MALFORMED),
    "a CR in a header": (get(headers=HOST + b"x: a\rb\r\n"), MALFORMED),
    "a folded header": (get(headers=HOST + b"x: a\r\n b\r\n"), MALFORMED),
    "a blank before the first header": (get(headers=b" x: a\r\n" + HOST), MALFORMED),
    "lines that end with LF": (get().replace(b"\r\n", b"\n"), MALFORMED),
    "Content-Length with Transfer-Encoding": (post(b"transfer-encoding: chunked\r\n"), MALFORMED),
    "Transfer-Encoding with Content-Length": (
        chunked(coding=b"content-length: 5\r\ntransfer-encoding: chunked\r\n"),
        MALFORMED,
    ),
    "two Content-Lengths": (post(b"content-length: 5\r\n"), MALFORMED),
    "a list of Content-Lengths": (post(length=b"90, 90"), MALFORMED),
    "a Content-Length of +90": (post(length=b"+90"), MALFORMED),
    "a Content-Length of -1": (post(length=b"-1"), MALFORMED),
    "a Content-Length of 0x5a": (post(length=b"0x5a"), MALFORMED),
    "a Content-Length of nothing": (post(length=b""), MALFORMED),
    "a Content-Length without end": (post(length=b"9" * 30), MALFORMED),
    "a chunk's size of 0x5a": (chunked().replace(b"\r\n5a\r\n", b"\r\n0x5a\r\n"), MALFORMED),
    "chunks that end with LF": (chunked().replace(b"0\r\n\r\n", b"0\n\n"), MALFORMED),
    "chunk extensions without end": (chunked(chunk=b";a=" + LONG * 2), FRAMING),
    "a trailer without end": (chunked(trailers=b"x: " + LONG * 2 + b"\r\n"), FRAMING),
    "trailers without end": (chunked(trailers=b"x: y\r\n" * 20_000), FRAMING),
    "another transfer coding": (chunked(coding=b"transfer-encoding: gzip, chunked\r\n"), CODING),
    "two transfer codings": (
        chunked(coding=b"transfer-encoding: gzip\r\ntransfer-encoding: chunked\r\n"),
        CODING,
    ),
    "no transfer coding at all": (chunked(coding=b"transfer-encoding: identity\r\n"), CODING),
    "chunked, and then something else": (
        chunked(coding=b"transfer-encoding: chunked, gzip\r\n"),
        MALFORMED,
    ),
    "CONNECT": (
        b"CONNECT hb.example:80 HTTP/1.1\r\n" + HOST + b"\r\n" + post(),
        refused(501, "method-not-implemented"),
    ),
    "* for another method than OPTIONS": (get(b"*"), MALFORMED),
    "a target with a fragment": (get(b"/health/live#x"), MALFORMED),
    "a target without a slash": (get(b"health/live"), MALFORMED),
    "a target that isn't ASCII": (get(b"/health/\xfc"), MALFORMED),
    "a whole URL with a user": (get(b"http://me@localhost/health/live"), MALFORMED),
    "a whole URL without a host": (get(b"http:///health/live"), MALFORMED),
    "a method in small letters": (get().replace(b"GET", b"get"), MALFORMED),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50), MALFORMED),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(plain: Gateway, name: str) -> None:
    """With the connection closed, and nothing behind it taken: it may be anything."""
    sent, answers = REFUSED[name]
    before = plain.stored()
    with plain.connected() as client:
        assert told(client, sent + LAST) == answers
    assert plain.stored() == before


TAKEN: dict[str, bytes] = {
    "an empty Host": get(headers=b"host:\r\n"),
    "an IPv6 address as Host": get(headers=b"host: [::1]:8000\r\n"),
    "a header beyond ASCII": get(headers=HOST + b"x: \xfc\r\n"),
    "empty lines before a request": b"\r\n\r\n" + get(),
    "a head just under the limit": get(headers=HOST + b"x: " + b"y" * 65_000 + b"\r\n"),
    "zeros before a Content-Length": post(length=b"000%d" % len(BODY)),
    "chunks": chunked(),
    "a chunk extension": chunked(chunk=b";a=b"),
    "an Upgrade": get(headers=HOST + UPGRADE),
    "a whole URL": get(b"http://localhost/health/live"),
    "a whole URL, whatever its Host": get(
        b"http://localhost/metrics", headers=b"host: evil.example\r\n"
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken(plain: Gateway, name: str) -> None:
    with plain.connected() as client:
        assert next_answer(client, TAKEN[name]).startswith(b"HTTP/1.1 200 ")
        assert told(client, LAST)[-1:] == FINE


def test_http_1_0(plain: Gateway) -> None:
    """Without a Host, as old health checks send it; the connection is closed behind the answer."""
    with plain.connected() as client:
        assert told(client, get(headers=b"", version=b" HTTP/1.0")) == FINE
    expecting = post(b"expect: 100-continue\r\n").replace(b"HTTP/1.1", b"HTTP/1.0")
    with plain.connected() as client:
        assert told(client, expecting) == FINE, "no 100, which HTTP/1.0 doesn't know"


def test_the_host_of_a_whole_url_counts(plain: Gateway) -> None:
    """Not the header beside it (RFC 9112, 3.2.2)."""
    with plain.connected() as client:
        sent = get(b"http://evil.example/metrics", headers=HOST + CLOSE)
        assert told(client, sent) == refused(421, "misdirected-request")


def test_options_of_everything(plain: Gateway) -> None:
    with plain.connected() as client:
        found = next_answer(client, b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n")
    assert found.startswith(b"HTTP/1.1 204 ")
    assert b"allow: GET, HEAD, OPTIONS, POST\r\n" in found


def test_trailers_say_nothing(plain: Gateway) -> None:
    """They come behind what they would have to be known before: a coding, a key, a type."""
    with plain.connected() as client:
        sent = chunked(trailers=b"content-encoding: zstd\r\ncontent-type: text/csv\r\n")
        assert told(client, sent + LAST) == FINE * 2


# -- requests that are sent ahead of their answers


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("behind", [post(), chunked(), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"])
def test_bytes_behind_an_upgrade(served: Gateway, behind: bytes, *, used: bool) -> None:
    """A heartbeat among them vanished, and the next one's 200 took its place."""
    with served.connected(used=used) as client:
        before = served.stored()
        sent = get(headers=HOST + UPGRADE) + behind + post()
        assert told(client, sent) == [(200, ""), (400, "bytes-behind-upgrade")]
        assert served.stored() == before


@pytest.mark.parametrize("used", [False, True])
def test_a_body_behind_an_upgrade(served: Gateway, *, used: bool) -> None:
    with served.connected(used=used) as client:
        before = served.stored()
        sent = post() + post(UPGRADE) + post()
        assert told(client, sent) == [(200, ""), (400, "upgrade-with-a-body")]
        assert served.stored() == before + 1


def test_a_connection_goes_on_behind_an_upgrade(served: Gateway) -> None:
    with served.connected() as client:
        assert next_answer(client, get(headers=HOST + UPGRADE)).startswith(b"HTTP/1.1 200 ")
        assert told(client, post() + LAST) == FINE * 2


BROKEN = {
    "malformed-request": (400, b"BROKEN\r\n\r\n"),
    "head-too-large": (431, get(headers=HOST + b"a: b\r\n" * 300)),
    "unsupported-version": (505, get(version=b" HTTP/2.0")),
    "framing-too-large": (400, chunked(chunk=b";a=" + LONG * 2)),
}


@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("valid", [1, 3])
def test_a_broken_request_behind_valid_ones(
    served: Gateway, kind: str, valid: int, *, used: bool
) -> None:
    """Those are answered first, in the same piece or not."""
    status, broken = BROKEN[kind]
    with served.connected(used=used) as client:
        before = served.stored()
        assert told(client, post() * valid + broken + post()) == [*FINE * valid, (status, kind)]
        assert served.stored() == before + valid


def test_a_broken_body_behind_its_answer(plain: Gateway) -> None:
    """Its request was answered already: there is no second answer to it."""
    head = b"POST /nothing HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\n"
    with plain.connected() as client:
        assert next_answer(client, head).startswith(b"HTTP/1.1 404 ")
        assert told(client, b"no chunk\r\n" + post()) == []


def test_a_body_that_looks_like_a_request(plain: Gateway) -> None:
    """It belongs to a request that was answered by its head, before it came."""
    before = plain.stored()
    head = b"POST /nothing HTTP/1.1\r\n" + HOST + b"content-length: %d\r\n\r\n" % len(post())
    with plain.connected() as client:
        assert next_answer(client, head).startswith(b"HTTP/1.1 404 ")
        assert told(client, post() + LAST) == FINE
    assert plain.stored() == before


def test_a_broken_body_that_is_waited_for(plain: Gateway) -> None:
    before = plain.stored()
    with plain.connected() as client:
        assert told(client, post() + chunked()[:-20] + b"xxxxxxx" * 9) == [(200, ""), *MALFORMED]
    assert plain.stored() == before + 1


@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_a_client_that_goes_with_requests_under_way(
    served: Gateway, caplog: pytest.LogCaptureFixture, *, keys: bool, reset: bool
) -> None:
    """It leaves no stack trace, answered or not."""
    bad_key = b"x-api-key: hb_no\r\n" if keys else b""
    with contextlib.ExitStack() as stack:
        if keys:
            other = served.settings.model_copy(update={"home": served.settings.home / "keys"})
            keyring.create(other, "a key", [keyring.ADMIN])
            served = stack.enter_context(gateway(other, served.tls))
        for number in range(10):
            with served.connected(used=not keys and number % 2 == 1) as client:
                client.sendall(post(bad_key) * 8)
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        with served.connected() as client:  # so the others were seen to
            assert told(client, LAST) == FINE
        wait_for(lambda: quiet(served), "what was under way to end")
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


def quiet(served: Gateway) -> bool:
    """Whether nothing is stored any more."""
    first = served.stored()
    with served.connected() as client:
        told(client, LAST)
    return served.stored() == first
