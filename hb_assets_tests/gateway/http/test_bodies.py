from __future__ import annotations

import asyncio
import gzip
import json
import socket
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import bodies as costly
from hb_assets.core.settings import Settings
from hb_assets.gateway.http import bodies
from hb_assets.gateway.http.bodies import BATCH_TYPES, JSON_TYPES, read_body
from hb_assets.gateway.http.problems import ProblemError
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat
from hb_assets_tests.servers import wait_for

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

redis_url = on_valkey

MOST = 1_000_000
COMPRESS: dict[str, Callable[[bytes], bytes]] = {"gzip": gzip.compress, "zstd": zstd.compress}


def reading(
    body: bytes,
    *headers: tuple[str, str],
    most: int = MOST,
    size: int = 65_536,
    types: frozenset[bytes] = BATCH_TYPES,
) -> bytes:
    """What `read_body` makes of a body that comes in pieces of `size` bytes."""
    pieces = [body[start : start + size] for start in range(0, len(body), size)] or [b""]

    async def receive() -> dict[str, Any]:
        piece = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

    scope = {"headers": [(name.encode(), value.encode()) for name, value in headers]}
    return asyncio.run(read_body(scope, receive, most, types))


def refused(status: int, kind: str, body: bytes, *headers: tuple[str, str]) -> ProblemError:
    with pytest.raises(ProblemError) as caught:
        reading(body, *headers, types=JSON_TYPES)
    assert (caught.value.status, caught.value.kind) == (status, kind)
    return caught.value


def encoded(coding: str) -> tuple[str, str]:
    return "content-encoding", coding


# -- content codings


@given(st.lists(st.binary(max_size=2000), max_size=4), st.integers(1, 3000), st.data())
def test_any_members_in_any_pieces(parts: list[bytes], size: int, data: st.DataObject) -> None:
    coding = data.draw(st.sampled_from(["gzip", "x-gzip", "zstd", "GZIP"]))
    compress = COMPRESS[coding.lower().removeprefix("x-")]
    whole = b"".join(compress(part) for part in parts or [b""])
    assert reading(whole, encoded(coding), size=size) == b"".join(parts)


@pytest.mark.parametrize("coding", COMPRESS)
@pytest.mark.parametrize("length", [MOST, bodies.STEP_BYTES, 2 * bodies.STEP_BYTES, 0])
def test_up_to_the_bound(coding: str, length: int) -> None:
    text = bytes(length)
    assert reading(COMPRESS[coding](text), encoded(coding)) == text
    problem = refused(413, "body-too-large", COMPRESS[coding](bytes(MOST + 1)), encoded(coding))
    assert "expanded" in problem.detail


@pytest.mark.parametrize("coding", COMPRESS)
def test_a_bomb_costs_no_more_than_the_bound(coding: str) -> None:
    bomb = COMPRESS[coding](bytes(300 * MOST))
    tracemalloc.start()
    try:
        refused(413, "body-too-large", bomb, encoded(coding))
        assert tracemalloc.get_traced_memory()[1] < 3 * MOST + 2**20
    finally:
        tracemalloc.stop()


NOTHING = {
    "gzip": gzip.compress(b""),
    "zstd": zstd.compress(b""),
    "zstd, skippable": b"\x50\x2a\x4d\x18" + bytes(4),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_members_of_nothing_are_bounded_too(kind: str) -> None:
    """However small a body of them is: to begin one costs more than to read some bytes."""
    coding, nothing = encoded(kind.partition(",")[0]), NOTHING[kind]
    for many in (10, 1000, 100_000):
        problem = refused(413, "body-too-costly", nothing * many, coding)
        assert "one more for each 256 bytes" in problem.detail


@pytest.mark.parametrize("coding", COMPRESS)
@pytest.mark.parametrize("size", [1, 77, 65_536])
def test_members_are_bounded_by_what_stands_before_them(coding: str, size: int) -> None:
    """In whatever pieces a body comes; and one that was compressed bit by bit is taken."""
    compress = COMPRESS[coding]
    line = json.dumps(heartbeat()).encode() + b"\n"
    parts = [line * 3] * 100
    assert len(line * 3) > bodies.MEMBER_BYTES
    whole = b"".join(compress(part) for part in parts)
    assert reading(whole, encoded(coding), size=size) == line * 300
    first = compress(bytes(2 * bodies.MEMBER_BYTES))
    most = bodies.FREE_MEMBERS + 2
    few = first + compress(b"") * (most - 1)
    assert reading(few, encoded(coding), size=size) == bytes(2 * bodies.MEMBER_BYTES)
    with pytest.raises(ProblemError):
        reading(few + compress(b""), encoded(coding), size=size)


def test_blocks_of_nothing_are_bounded_too() -> None:
    """By the time that they take: ten times as long as what a compressor makes."""
    (found,) = [one for one in costly.bodies(1_000_000) if one.name == "Huffman tables for nothing"]
    problem = refused(413, "body-too-costly", found.sent[:MOST], encoded("gzip"))
    assert "too long" in problem.detail


def test_a_body_costs_what_an_uncompressed_one_does(http: httpx.Client) -> None:
    """Three times as much at most (`python -m bench.bodies` has the figures); here, with noise."""
    headers = {"content-type": "application/x-ndjson"}

    def cost(content: bytes, coding: str = "") -> float:
        coded = {**headers, "content-encoding": coding} if coding else headers
        began = time.process_time()
        http.post(BATCH, content=content, headers=coded)
        return time.process_time() - began

    ratios = {}
    for body in costly.bodies(200_000):
        plain = costly.heartbeats(body.longer)
        taken = min(cost(body.sent, body.coding) for _ in range(3))
        ratios[body.name, body.coding] = taken / (0.002 + min(cost(plain) for _ in range(3)))
    assert len(ratios) > 20
    assert {name: ratio for name, ratio in ratios.items() if ratio > 3} == {}


@pytest.mark.parametrize("coding", COMPRESS)
def test_expanding_leaves_others_their_turn(coding: str) -> None:
    whole = COMPRESS[coding](bytes(64 * MOST))

    async def turns() -> int:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": whole, "more_body": False}

        scope = {"headers": [(b"content-encoding", coding.encode())]}
        task = asyncio.create_task(read_body(scope, receive, 64 * MOST, JSON_TYPES))
        taken = 0
        while not task.done():
            await asyncio.sleep(0)
            taken += 1
        await task
        return taken

    assert asyncio.run(turns()) > 3


@pytest.mark.parametrize("coding", COMPRESS)
def test_many_bodies_leave_others_their_turn_as_one_does(coding: str) -> None:
    """By CPU time of this thread: whatever else the machine does."""
    whole = COMPRESS[coding](bytes(8 * MOST))

    async def longest() -> float:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": whole, "more_body": False}

        scope = {"headers": [(b"content-encoding", coding.encode())]}
        room = bodies.Room(2**40)
        tasks = [
            asyncio.create_task(read_body(scope, receive, 8 * MOST, JSON_TYPES, room))
            for _ in range(20)
        ]
        gaps = []
        while not all(task.done() for task in tasks):
            began = time.thread_time()
            await asyncio.sleep(0)
            gaps.append(time.thread_time() - began)
        await asyncio.gather(*tasks)
        return max(gaps)

    assert asyncio.run(longest()) < 8 * bodies.TURN_SECONDS


def test_expanding_ends_when_its_client_has_gone(
    serving: Callable[[Settings], AbstractContextManager[httpx.Client]], settings: Settings
) -> None:
    settings = settings.model_copy(update={"body_max_bytes": 2**29, "bodies_max_bytes": 2**29})
    body = gzip.compress(bytes(2**20)) * 50  # one message of the server
    head = (
        f"POST {BATCH} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        f"content-encoding: gzip\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode()
    with serving(settings) as http:
        address = http.base_url.host, http.base_url.port or 0
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(head + body)
        gone = f'hb_http_requests_total{{method="POST",route="{BATCH}",status="499"}} 1.0'
        wait_for(lambda: gone in http.get("/metrics").text, "it to end")
        assert 'status="422"' not in http.get("/metrics").text


@pytest.mark.parametrize("coding", COMPRESS)
@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole[:0],
        lambda whole: whole[:-1],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole + b"{}",
        lambda whole: whole + whole[:-1],
        lambda whole: b"{" + whole,
        lambda whole: whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:],
    ],
)
def test_damaged(coding: str, spoil: Callable[[bytes], bytes]) -> None:
    options = {zstd.CompressionParameter.checksum_flag: 1}
    text = json.dumps(heartbeat()).encode()
    whole = gzip.compress(text) if coding == "gzip" else zstd.compress(text, options=options)
    refused(400, "damaged-body", spoil(whole), encoded(coding))


def test_no_window_over_8_mib() -> None:
    options = {zstd.CompressionParameter.window_log: 24}
    compressor = zstd.ZstdCompressor(options=options)
    whole = compressor.compress(b"{}") + compressor.flush()
    refused(400, "damaged-body", whole, encoded("zstd"))


def test_zlib_is_no_gzip() -> None:
    refused(400, "damaged-body", zlib.compress(b"{}"), encoded("gzip"))


@pytest.mark.parametrize(
    "codings",
    [["br"], ["deflate"], ["gzip, gzip"], ["gzip", "zstd"], ["gzip, identity"], ["gz\xfcp"]],
)
def test_other_codings_are_refused_with_ours(codings: list[str]) -> None:
    problem = refused(415, "unsupported-content-encoding", b"{}", *map(encoded, codings))
    assert problem.headers["accept-encoding"] == "gzip, zstd"


@pytest.mark.parametrize("coding", ["identity", "Identity", "", " , "])
def test_identity_is_none(coding: str) -> None:
    assert reading(b"{}", encoded(coding)) == b"{}"


# -- media types


@pytest.mark.parametrize(
    "value",
    [
        "application/json",
        "Application/JSON",
        "application/json; charset=utf-8",
        'application/json;Charset="UTF-8"',
        "application/json; profile=x",
    ],
)
def test_json(value: str) -> None:
    assert reading(b"{}", ("content-type", value), types=JSON_TYPES) == b"{}"


@pytest.mark.parametrize(
    "value",
    ["text/plain", "application/x-www-form-urlencoded", "application/x-ndjson", "json", "*/*"],
)
def test_other_media_types_are_refused_with_ours(value: str) -> None:
    problem = refused(415, "unsupported-media-type", b"{}", ("content-type", value))
    assert problem.headers["accept-post"] == "application/json"
    assert ("curl" in problem.detail) == ("form" in value)


def test_other_charsets_are_refused() -> None:
    header = ("content-type", "application/json; charset=latin-1")
    refused(415, "unsupported-charset", b"{}", header)


def test_a_web_page_has_to_name_the_type() -> None:
    assert reading(b"{}", types=JSON_TYPES) == b"{}"
    refused(415, "unsupported-media-type", b"{}", ("origin", "https://elsewhere.example"))


# -- all together, on a socket


@pytest.mark.parametrize("coding", COMPRESS)
def test_stored(http: httpx.Client, coding: str) -> None:
    headers = {"content-encoding": coding, "content-type": "application/json"}
    one = COMPRESS[coding](json.dumps(heartbeat()).encode())
    assert http.post(PATH, content=one, headers=headers).status_code == 200
    lines = "\n".join(json.dumps(heartbeat(user_id=f"u{n}")) for n in range(20_000)).encode()
    headers["content-type"] = "application/x-ndjson"
    answer = http.post(BATCH, content=COMPRESS[coding](lines), headers=headers)
    assert answer.json()["accepted"] == 20_000
    refused = http.post(BATCH, content=lines, headers={"content-type": "text/csv"})
    assert refused.status_code == 415
    assert refused.headers["accept-post"].startswith("application/json, ")
