"""The express way answers, stores, counts and refuses as the ordinary way does."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import gzip
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import trustme
import uvicorn
from hypothesis import given
from hypothesis import settings as example_settings
from hypothesis import strategies as st
from uvicorn.server import ServerState

from hb_assets.buffer.producer import AsyncProducer, Lines, Outcomes
from hb_assets.gateway import express, keyring
from hb_assets.gateway.app import Gateway
from hb_assets.gateway.connections import Guard, GuardedProtocol
from hb_assets.gateway.express import ExpressProtocol
from hb_assets.gateway.heartbeats import InFlight, One
from hb_assets.gateway.intake import Intake
from hb_assets.settings import Quota, Settings
from hb_assets_tests.conftest import VALKEY
from hb_assets_tests.examples import examples
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat
from hb_assets_tests.gateway.test_heartbeats import stored
from hb_assets_tests.gateway.test_metrics import samples, total
from hb_assets_tests.gateway.test_tls import with_cert
from hb_assets_tests.servers import wait_for

# which server it is makes no difference here
pytestmark = VALKEY

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]
Send = Callable[..., "Answer"]


def request(body: bytes, *headers: str, path: str = PATH, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


def body(**changes: Any) -> bytes:
    return json.dumps(heartbeat(**changes)).encode()


GENERATED = re.compile(r"[0-9a-f]{16}-[0-9a-f]+").fullmatch
"""Request ids of the gateway's own."""


class Answer:
    """One HTTP answer, and what it says whoever gave it."""

    def __init__(self, head: bytes, content: bytes) -> None:
        first, *lines = head.decode().split("\r\n")
        self.status = int(first.split()[1])
        self.headers = dict(line.split(": ", 1) for line in lines)
        self.content = content
        ours = {n: v for n, v in self.headers.items() if n != "date"}
        if GENERATED(ours.get("x-request-id", "")):
            del ours["x-request-id"]
        self.said = (first, [*ours.items()], content)


def answers(sent: bytes) -> list[Answer]:
    """The whole answers that were sent."""
    found = []
    while (end := sent.find(b"\r\n\r\n")) >= 0:
        length = re.search(rb"content-length: (\d+)", sent[:end])
        size = int(length[1]) if length else 0
        if len(sent) < end + 4 + size:
            break
        found.append(Answer(sent[:end], sent[end + 4 : end + 4 + size]))
        sent = sent[end + 4 + size :]
    return found


@contextlib.contextmanager
def connected(http: httpx.Client) -> Iterator[socket.socket]:
    url = http.base_url
    with socket.create_connection((url.host, url.port or 80), timeout=20) as client:
        yield client


def ask(client: socket.socket, sent: bytes) -> Answer:
    client.sendall(sent)
    return receive(client, 1)[0]


def receive(client: socket.socket, count: int) -> list[Answer]:
    got = b""
    while len(found := answers(got)) < count:
        part = client.recv(65536)
        assert part, f"the connection ended after {got!r}"
        got += part
    return found


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which way each heartbeat took: "ordinary", "express", or "declined" and then "ordinary"."""
    found: list[str] = []
    call, begin = One.__call__, One.begin

    async def called(self: One, *arguments: Any) -> None:
        found.append("ordinary")
        await call(self, *arguments)

    def begun(self: One, *arguments: Any) -> InFlight | None:
        taken = begin(self, *arguments)
        found.append("declined" if taken is None else "express")
        return taken

    monkeypatch.setattr(One, "__call__", called)
    monkeypatch.setattr(One, "begin", begun)
    return found


def test_a_known_head_is_answered_as_an_unknown_one(
    http: httpx.Client, client: redis.Redis, settings: Settings, ways: list[str]
) -> None:
    named = "X-Request-Id: of-the-client"
    with connected(http) as one, connected(http) as other:
        told = [ask(one, request(body(heart_rate=70 + n))) for n in range(3)]
        told += [ask(other, request(body(heart_rate=73)))]
        theirs = [ask(one, request(body(heart_rate=80 + n), named)) for n in range(2)]
    assert ways == ["ordinary", "express", "express", "ordinary", "ordinary", "express"]
    assert [one.said for one in told[1:]] == [told[0].said] * 3
    assert told[0].headers.keys() == told[1].headers.keys() >= {"date", "x-request-id"}
    assert len({one.headers["x-request-id"] for one in told}) == 4
    assert [one.headers["x-request-id"] for one in theirs] == ["of-the-client"] * 2
    rates = [row["heart_rate"] for row in stored(client, settings.shards)]
    assert rates == [70, 71, 72, 73, 80, 81]
    found = samples(http)
    counted = ("method", "POST"), ("route", PATH), ("status", "200")
    assert found["hb_http_requests_total", counted] == 6
    assert found["hb_heartbeats_accepted_total", ()] == 6


@pytest.mark.parametrize(
    "content",
    [
        body(heart_rate=29),
        body(heart_rate="75"),
        body(timestamp="2025-01-15"),
        body(timestamp="1999-01-15T10:00:00Z"),
        body(user_id=""),
        b"{",
        b"",
        b"[]",
        b"\xff",
    ],
)
def test_what_is_not_valid_is_refused_by_the_ordinary_way(
    http: httpx.Client, ways: list[str], content: bytes
) -> None:
    padded = request(content.ljust(200), "X-Request-Id: a")
    with connected(http) as client:
        unknown = ask(client, padded)
        assert ask(client, request(body().ljust(200), "X-Request-Id: a")).status == 200
        known = ask(client, padded)
        after = ask(client, request(body().ljust(200), "X-Request-Id: a"))
    assert ways == ["ordinary", "ordinary", "declined", "ordinary", "express"]
    assert known.said == unknown.said
    assert (known.status, after.status) == (unknown.status, 200)
    assert known.status in (400, 422)
    assert total(samples(http), "hb_heartbeats_refused_total") == 2


def test_unknown_fields_are_counted(http: httpx.Client, ways: list[str]) -> None:
    with connected(http) as client:
        for _ in range(2):
            answer = ask(client, request(body(steps=5)))
            assert answer.status == 200
            assert answer.headers["hb-ignored"] == "steps"
    assert ways == ["ordinary", "declined", "ordinary"]
    assert total(samples(http), "hb_unknown_fields_total") == 2


@pytest.mark.parametrize(
    "sent",
    [
        request(gzip.compress(body()), "Content-Encoding: gzip"),
        request(body(), "Content-Encoding: identity"),
        request(body(), "Expect: 100-continue"),
        request(b"")[:-2]
        + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body()), body()),
        request(body().ljust(express._REQUEST_BYTES)),
    ],
)
def test_an_unusual_head_is_not_remembered(
    http: httpx.Client, ways: list[str], sent: bytes
) -> None:
    with connected(http) as client:
        for _ in range(2):
            client.sendall(sent)
            told = receive(client, 1)
            if told[-1].status == 100:
                told = receive(client, 1)
            assert told[-1].status == 200
    assert ways == ["ordinary", "ordinary"]


def test_a_connection_that_the_client_ends(http: httpx.Client, ways: list[str]) -> None:
    for _ in range(2):
        with connected(http) as client:
            told = ask(client, request(body(), "Connection: close"))
            assert (told.status, told.headers["connection"]) == (200, "close")
            assert client.recv(1) == b""
    assert ways == ["ordinary", "ordinary"]


def test_a_connection_remembers_the_last_few_heads(settings: Settings, ways: list[str]) -> None:
    async def told() -> None:
        async with opened(settings) as connect:
            line = connect()
            for number in [*range(6), *range(5, 1, -1), 1]:
                await line.ask(request(body(), f"User-Agent: {number}"))
            assert len(line.protocol._heads) == express._HEADS  # type: ignore[attr-defined]  # ours

    asyncio.run(told())
    assert ways == ["ordinary"] * 6 + ["express"] * 4 + ["ordinary"]


# -- what may end a right


def test_a_revoked_key(serving: Serving, settings: Settings, ways: list[str]) -> None:
    key, token = keyring.create(settings, "device", ["ingest"])
    keyring.create(settings, "other", ["ingest"])
    sent = request(body(), f"Authorization: Bearer {token}")
    with serving(settings) as http, connected(http) as client:
        assert [ask(client, sent).status for _ in range(2)] == [200, 200]
        assert ways == ["ordinary", "express"]
        keyring.revoke(settings, key.id)
        wait_for(lambda: ask(client, sent).status == 401, "the key to count no more")
        assert ask(client, sent).headers["www-authenticate"].endswith('error="invalid_token"')


def test_a_key_that_expires(
    serving: Serving, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, token = keyring.create(settings, "device", ["ingest"], lifetime=dt.timedelta(hours=1))
    assert key.expires is not None
    sent = request(body(), f"Authorization: Bearer {token}")
    with serving(settings) as http, connected(http) as client:
        assert [ask(client, sent).status for _ in range(2)] == [200, 200]
        monkeypatch.setattr("hb_assets.gateway.access.time.time", key.expires.timestamp)
        assert ask(client, sent).status == 401


def test_a_limit(serving: Serving, settings: Settings, ways: list[str]) -> None:
    """Charged once for each that was taken; told when half of it is gone, refused at its end."""
    quota = Quota(5, dt.timedelta(hours=1))
    limited = settings.model_copy(update={"limit_user": quota})
    with serving(limited) as http, connected(http) as client:
        told = [ask(client, request(body())) for _ in range(6)]
        assert [one.status for one in told] == [200] * 5 + [429]
        assert "ratelimit" not in told[1].headers
        left = [re.findall(r'"user";r=(\d+)', one.headers["ratelimit"]) for one in told[2:]]
        assert left == [["2"], ["1"], ["0"], ["0"]]
        assert '"user";q=5;w=3600' in told[4].headers["ratelimit-policy"]
        assert ask(client, request(body(user_id="u2"))).status == 200
        assert total(samples(http), "hb_rate_limited_total") == 1
    assert ways[-4:] == ["express", "declined", "ordinary", "express"]


# -- when it isn't stored


def test_a_full_buffer(serving: Serving, settings: Settings, ways: list[str]) -> None:
    full = settings.model_copy(update={"buffer_max_heartbeats": 8, "shards": 4})
    named = "X-Request-Id: a"
    with serving(full) as http, connected(http) as client:
        told = [ask(client, request(body(), named)) for _ in range(4)]
        with connected(http) as other:
            told += [ask(other, request(body(), named, "User-Agent: another"))]
        assert total(samples(http), "hb_heartbeats_refused_total") == 3
    assert ways == ["ordinary", "express", "express", "express", "ordinary"]
    assert [one.status for one in told] == [200, 200, 503, 503, 503]
    assert told[3].said == told[4].said
    assert int(told[3].headers["retry-after"]) > 0
    assert told[3].headers["x-request-id"] == json.loads(told[3].content)["request_id"] == "a"


@pytest.mark.parametrize("spool", [True, False])
def test_an_append_that_fails(
    serving: Serving,
    settings: Settings,
    client: redis.Redis,
    monkeypatch: pytest.MonkeyPatch,
    ways: list[str],
    caplog: pytest.LogCaptureFixture,
    spool: bool,
) -> None:
    """An outage that an append meets first: it goes to the spool, and is refused without one."""
    if not spool:
        settings = settings.model_copy(update={"spool_max_bytes": 0})
    real = AsyncProducer.append_soon
    away = False

    def append_soon(self: AsyncProducer, lines: Lines) -> asyncio.Future[Outcomes]:
        if away:
            self._client.connection_pool.connection_kwargs["port"] = 1
            return asyncio.ensure_future(_refused(self, lines))
        return real(self, lines)

    async def _refused(self: AsyncProducer, lines: Lines) -> Outcomes:
        for connection in self._client.connection_pool._available_connections:
            connection.port = 1
            await connection.disconnect()
        return await real(self, lines)

    monkeypatch.setattr(AsyncProducer, "append_soon", append_soon)
    with serving(settings) as http, connected(http) as line:
        assert [ask(line, request(body())).status for _ in range(2)] == [200, 200]
        away = True
        told = ask(line, request(body(heart_rate=99)))
        assert ways[:3] == ["ordinary", "express", "express"]
        if spool:
            wait_for(lambda: len(stored(client, settings.shards)) == 3, "the replay")
    assert told.status == (200 if spool else 503)
    if not spool:
        assert json.loads(told.content)["type"].endswith(":buffer-unavailable")
        assert sum("can't reach Redis" in line for line in caplog.messages) <= 1


def test_what_has_to_queue_up_behind_the_spool(
    http: httpx.Client, ways: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(http) as client:
        assert ask(client, request(body())).status == 200
        monkeypatch.setattr(Intake, "direct", False)
        assert ask(client, request(body())).status == 200
    assert ways == ["ordinary", "declined", "ordinary"]


def test_an_error_of_ours(
    serving: Serving,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    secret = "a heart rate of 77"
    with serving(settings) as http, connected(http) as client:
        assert ask(client, request(body())).status == 200

        async def broken(*_: object) -> None:
            raise ZeroDivisionError(secret)

        with monkeypatch.context() as patch:
            patch.setattr(AsyncProducer, "_flush", broken)
            told = ask(client, request(body()))
        assert (told.status, json.loads(told.content)["status"]) == (500, 500)
        assert ask(client, request(body())).status == 200
    assert "ZeroDivisionError" in caplog.text
    assert secret not in caplog.text


# -- connections


class Wire(asyncio.Transport):
    """A connection in memory: what was sent, and whether it was closed."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.sent = b""
        self.closed = False
        self.reading = True
        self._address = address

    def write(self, data: Any) -> None:
        assert not self.closed
        self.sent += data

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return (self._address, 8000) if name in ("peername", "sockname") else default


class Line:
    """A gateway's end of a connection in memory, fed by hand."""

    def __init__(self, protocol: GuardedProtocol, wire: Wire) -> None:
        self.protocol = protocol
        self.wire = wire
        protocol.connection_made(wire)

    async def answered(self, count: int) -> list[Answer]:
        async with asyncio.timeout(30):
            while len(found := answers(self.wire.sent)) < count:  # noqa: ASYNC110  # no event of ours
                await asyncio.sleep(0.0005)
        return found

    async def ask(self, sent: bytes) -> Answer:
        before = len(answers(self.wire.sent))
        self.protocol.data_received(sent)
        return (await self.answered(before + 1))[-1]


class Connect:
    """Makes connections to a gateway that is open."""

    def __init__(self, settings: Settings, app: Gateway) -> None:
        self.app = app
        self.state = ServerState()
        self.guard = Guard(settings, app.metrics.connection_refused)

    def __call__(
        self, address: str = "127.0.0.1", *, ordinary: bool = False, keep_alive: float = 30
    ) -> Line:
        way = GuardedProtocol if ordinary else partial(ExpressProtocol, self.app.express)
        config = uvicorn.Config(
            self.app,
            http=partial(way, self.guard),  # type: ignore[arg-type]  # whatever makes protocols
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=keep_alive,  # type: ignore[arg-type]  # less than a second, for once
        )
        config.load()
        return Line(config.http_protocol_class(config, self.state, {}), Wire(address))  # type: ignore[call-arg, arg-type]  # as uvicorn calls it


@contextlib.asynccontextmanager
async def opened(settings: Settings) -> AsyncIterator[Connect]:
    app = Gateway(settings)
    connect = Connect(settings, app)
    async with app.opened(), connect.guard.sweeping():
        yield connect


SENT = [
    request(body(user_id="u1")),
    request(body(user_id="u2", heart_rate=100)),
    request(body(), "x-request-id: a"),
    request(body(), "x-request-id: b"),
    request(body(heart_rate=20), "x-request-id: a"),
    request(body()[:-1] + b" ", "x-request-id: a"),
    request(body(steps=1)),
    b"\r\n" + request(body()),
    request(body(), "Expect: 100-continue"),
    request(b"[" + body() + b"]", path=BATCH),
    request(b"", "x-request-id: a", path="/nowhere", method="GET"),
    # answered by its head; what follows is its body, whatever it looks like
    request(request(body(user_id="u1")), "x-request-id: a", path="/nowhere"),
    request(b"", path="/health/live", method="GET"),
]
"""Requests, first those that the express way takes; errors repeat an id in their bodies."""


def test_answers_in_any_pieces_are_those_of_the_ordinary_way(settings: Settings) -> None:
    """However requests are cut, and whether they wait for each other's answers or not."""

    async def compare(requests: Sequence[bytes], cuts: Sequence[int], waits: list[bool]) -> None:
        whole = b"".join(requests)
        ends = [len(b"".join(requests[: n + 1])) for n in range(len(requests))]
        extra = [sent.count(b"100-continue") for sent in requests]
        accepted = connect.app.metrics.accepted
        before = accepted.count
        ordinary = connect(ordinary=True)
        expected = []
        for sent, more in zip(requests, extra, strict=True):
            ordinary.protocol.data_received(sent)
            expected = await ordinary.answered(len(expected) + 1 + more)
        once, before = accepted.count - before, accepted.count
        line = connect()
        for (start, end), wait in zip(pairwise([0, *cuts, len(whole)]), waits, strict=False):
            line.protocol.data_received(whole[start:end])
            if wait:
                whole_ones = sum(at <= end for at in ends)
                await line.answered(whole_ones + sum(extra[:whole_ones]))
        found = await line.answered(len(expected))
        assert [one.said for one in found] == [one.said for one in expected]
        assert accepted.count - before == once
        for one in (ordinary, line):
            one.protocol.connection_lost(None)

    with asyncio.Runner() as runner:
        gateway = opened(settings)
        connect = runner.run(gateway.__aenter__())
        rides = 0
        take = ExpressProtocol._take

        def counted(self: ExpressProtocol, data: bytes) -> bool:
            nonlocal rides
            taken = take(self, data)
            rides += taken
            return taken

        @given(
            requests=st.lists(st.sampled_from([*SENT[:4] * 2, *SENT]), min_size=2, max_size=8),
            data=st.data(),
        )
        @example_settings(max_examples=examples(60), deadline=None)
        def in_any_pieces(requests: list[bytes], data: st.DataObject) -> None:
            whole = b"".join(requests)
            at_ends = [len(b"".join(requests[:n])) for n in range(1, len(requests))]
            heads = [found.end() for found in re.finditer(rb"\r\n\r\n(?=.)", whole)]
            places = st.one_of(
                st.sampled_from(at_ends), st.sampled_from(heads), st.integers(1, len(whole) - 1)
            )
            few = st.lists(places, max_size=8, unique=True)
            cuts = sorted(
                data.draw(st.one_of(few, st.just(at_ends), st.just(sorted({*at_ends, *heads}))))
            )
            count = len(cuts) + 1
            waits = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
            runner.run(compare(requests, cuts, waits))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ExpressProtocol, "_take", counted)
            in_any_pieces()
        runner.run(gateway.__aexit__(None, None, None))
    assert rides > 0


def test_a_body_that_looks_like_a_request(settings: Settings, ways: list[str]) -> None:
    """It belongs to a request that was answered before it came."""
    known = request(body())
    sent = request(known, path="/nowhere")

    async def smuggled() -> list[Answer]:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(known)
            assert (await line.ask(sent[: -len(known)])).status == 404
            line.protocol.data_received(known)
            assert (await line.ask(known)).status == 200
            return answers(line.wire.sent)

    assert [one.status for one in asyncio.run(smuggled())] == [200, 404, 200]
    assert ways == ["ordinary", "ordinary"]


def test_a_head_that_began_behind_the_last_request(settings: Settings, ways: list[str]) -> None:
    """What looks like a request then is the rest of that head, to both ways."""
    known = request(body())
    begun = b"GET /nowhere HTTP/1.1\r\nX-Request-Id: a\r\nX: "

    async def shifted(*, ordinary: bool) -> list[Answer]:
        async with opened(settings) as connect:
            line = connect(ordinary=ordinary)
            await line.ask(known)
            await line.ask(known + begun)
            line.protocol.data_received(known)
            await line.answered(3)
            await line.ask(request(b"", "x-request-id: b", path="/elsewhere", method="GET"))
            return answers(line.wire.sent)

    found = asyncio.run(shifted(ordinary=False))
    assert [one.status for one in found] == [200, 200, 404, 404]
    assert [one.said for one in found] == [one.said for one in asyncio.run(shifted(ordinary=True))]
    assert "express" not in ways


def test_a_head_is_remembered_with_its_own_rights(settings: Settings, ways: list[str]) -> None:
    """Not with those of one that began before it came."""
    _, token = keyring.create(settings, "device", ["ingest"])
    begun = (f"POST {PATH} HTTP/1.1\r\nAuthorization: Bearer {token}\r\nX: ").encode()
    keyless = request(body(heart_rate=99))

    async def borrowed() -> list[Answer]:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body(), f"Authorization: Bearer {token}"))
            await line.ask(request(body(), f"Authorization: Bearer {token}", "X: 1") + begun)
            await line.ask(keyless)  # the rest of a request that may be sent
            await line.ask(keyless)
            return answers(line.wire.sent)

    assert [one.status for one in asyncio.run(borrowed())] == [200, 200, 200, 401]
    assert ways == ["ordinary"] * 3


@pytest.mark.parametrize("first", [request(body()), request(b"[" + body() + b"]", path=BATCH)])
def test_an_answer_is_waited_for_whichever_way_it_comes(settings: Settings, first: bytes) -> None:
    async def in_turn() -> list[Answer]:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body(), "X-Request-Id: known"))
            for sent in (
                first,
                request(body(), "X-Request-Id: known"),
                request(b"", "X-Request-Id: live", path="/health/live", method="GET"),
                request(body(), "X-Request-Id: known"),
            ):
                line.protocol.data_received(sent)
            return (await line.answered(5))[1:]

    told = [one.headers["x-request-id"] for one in asyncio.run(in_turn())]
    assert GENERATED(told[0])
    assert told[1:] == ["known", "live", "known"]


def test_requests_that_do_not_wait_for_answers(
    http: httpx.Client, client: redis.Redis, settings: Settings, ways: list[str]
) -> None:
    """They are answered in their order, and each user's are stored in it."""
    with connected(http) as line:
        assert ask(line, request(body(heart_rate=60))).status == 200
        assert ways == ["ordinary"]
        for rate in range(61, 90):
            line.sendall(request(body(heart_rate=rate)))
        assert [one.status for one in receive(line, 29)] == [200] * 29
    assert "express" in ways
    rates = [row["heart_rate"] for row in stored(client, settings.shards)]
    assert rates == list(range(60, 90))


def test_over_tls(serving: Serving, settings: Settings, tmp_path: Path, ways: list[str]) -> None:
    authority = trustme.CA()
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    secure = with_cert(settings, authority, tmp_path, "cert")
    with (
        serving(secure) as http,
        connected(http) as plain,
        trusting.wrap_socket(plain, server_hostname="heartbeats.example") as client,
    ):
        assert [ask(client, request(body())).status for _ in range(3)] == [200] * 3
        client.sendall(request(body()) * 3)
        assert [one.status for one in receive(client, 3)] == [200] * 3
    assert ways == ["ordinary", "express", "express", *["ordinary"] * 3]


def test_a_client_that_goes_meanwhile(
    settings: Settings, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    async def gone() -> None:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body()))
            line.protocol.data_received(request(body(heart_rate=99)))
            line.wire.close()
            line.protocol.connection_lost(None)

    asyncio.run(gone())
    assert [row["heart_rate"] for row in stored(client, settings.shards)] == [75, 99]
    assert caplog.records == []


@pytest.mark.parametrize("ahead", [1, 3])
def test_an_end_waits_for_the_answers(settings: Settings, ahead: int) -> None:
    """To all requests that have come, and to none that come later."""

    async def ending() -> Line:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body()))
            for _ in range(ahead):
                line.protocol.data_received(request(body()))
            assert line.wire.reading == (ahead == 1)
            line.protocol.shutdown()
            assert not line.wire.reading
            assert not line.wire.closed
            await line.answered(1 + ahead)
            return line

    line = asyncio.run(ending())
    closing = ["connection" in one.headers for one in answers(line.wire.sent)]
    assert closing == [False] * ahead + [True]
    assert line.wire.closed


def test_an_end_waits_for_what_a_client_that_went_has_sent(
    settings: Settings, client: redis.Redis
) -> None:
    async def idle(state: ServerState) -> None:
        async with asyncio.timeout(30):
            while state.tasks:  # noqa: ASYNC110  # no event of ours
                await asyncio.sleep(0.001)

    async def ending() -> None:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body()))
            await idle(connect.state)
            line.protocol.data_received(request(body()))
            line.protocol.connection_lost(None)
            assert len(connect.state.tasks) == 1
            await idle(connect.state)
            assert len(stored(client, settings.shards)) == 2

    asyncio.run(ending())


def test_an_end_behind_a_part_of_a_request(settings: Settings) -> None:
    async def ending() -> Line:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body()))
            line.protocol.data_received(request(body()))
            line.protocol.data_received(request(body())[:20])
            line.protocol.shutdown()
            await line.answered(2)
            return line

    line = asyncio.run(ending())
    assert answers(line.wire.sent)[1].headers["connection"] == "close"
    assert line.wire.closed


@pytest.mark.parametrize("gone", [True, False])
def test_an_end_that_waits_no_longer(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    gone: bool,
) -> None:
    """uvicorn cancels what it waits for once the grace is over."""

    async def never(*_: object) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(One, "settle", never)
    monkeypatch.setattr(One, "is_settled", lambda *_: False)

    async def ending() -> Line:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body()))
            async with asyncio.timeout(30):
                while connect.state.tasks:  # noqa: ASYNC110  # no event of ours
                    await asyncio.sleep(0.001)
            line.protocol.data_received(request(body()))
            if gone:
                line.protocol.connection_lost(None)
            else:
                line.protocol.shutdown()
            async with asyncio.timeout(30):
                while not connect.state.tasks:  # noqa: ASYNC110  # no event of ours
                    await asyncio.sleep(0.001)
            for task in list(connect.state.tasks):
                task.cancel("the grace is over")
                await asyncio.wait([task])
            await asyncio.sleep(0)
            return line

    line = asyncio.run(ending())
    assert line.wire.closed
    assert len(answers(line.wire.sent)) == 1
    assert caplog.records == []


def test_a_connection_that_is_gone_remembers_nothing(settings: Settings) -> None:
    async def lost() -> None:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body()))
            watch = line.protocol.timeout_keep_alive_task
            assert watch is not None
            assert line.protocol._heads  # type: ignore[attr-defined]  # ours
            line.protocol.connection_lost(ConnectionResetError())
            assert watch.cancelled()
            assert not line.protocol._heads  # type: ignore[attr-defined]  # ours

    asyncio.run(lost())


def test_an_error_while_it_is_answered(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing() -> list[int]:
        async with opened(settings) as connect:
            line = connect()
            await line.ask(request(body()))
            with monkeypatch.context() as patch:
                patch.setattr(One, "accept", lambda *_: 1 // 0)
                await line.ask(request(body()))
            await line.ask(request(body()))
            return [one.status for one in answers(line.wire.sent)]

    assert asyncio.run(failing()) == [200, 500, 200]
    assert "unexpected ZeroDivisionError" in caplog.text


def test_a_connection_that_rests_is_closed_and_a_busy_one_is_not(
    settings: Settings, ways: list[str]
) -> None:
    short = settings.model_copy(update={"head_timeout": dt.timedelta(seconds=0.3)})

    async def closed(line: Line) -> None:
        async with asyncio.timeout(30):
            while not line.wire.closed:  # noqa: ASYNC110  # no event of ours
                await asyncio.sleep(0.01)

    async def resting() -> None:
        async with opened(short) as connect:
            lines = [connect(keep_alive=0.5) for _ in range(4)]
            for line in lines:
                await line.ask(request(body()))
            loop = asyncio.get_running_loop()
            began = loop.time()
            while loop.time() - began < 2:  # longer than any of the times
                for line in lines[:2]:
                    assert (await line.ask(request(body()))).status == 200
                await asyncio.sleep(0.01)
            assert [line.wire.closed for line in lines] == [False, False, True, True]
            assert ways[:4] == ["ordinary"] * 4
            assert {*ways[4:]} == {"express"}
            for line in lines[:2]:
                await closed(line)

    asyncio.run(resting())
