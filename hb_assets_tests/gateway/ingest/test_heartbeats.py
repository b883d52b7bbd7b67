from __future__ import annotations

import contextlib
import datetime as dt
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as example_settings
from hypothesis import strategies as st

from hb_assets.buffer import keys
from hb_assets.buffer.producer import AsyncProducer
from hb_assets.core.record import shard_of
from hb_assets.core.settings import Settings
from hb_assets.gateway.http.bodies import split
from hb_assets.gateway.http.problems import MEDIA_TYPE, ProblemError
from hb_assets.gateway.ingest.heartbeats import SLICE
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.gateway.conftest import BATCH, PATH, heartbeat, plain_client

redis_url = on_valkey

Serving = Callable[[Settings], AbstractContextManager[httpx.Client]]


def stored(client: Any, shards: int) -> list[dict[str, Any]]:
    """All heartbeats in the streams; each must lie in its user's shard."""
    found = []
    for shard in range(shards):
        for _, fields in client.xrange(keys.stream(shard)):
            lines = fields[b"data"].split(b"\n")
            assert int(fields[b"n"]) == len(lines)
            for line in lines:
                found.append(json.loads(line))
                assert shard_of(found[-1]["user_id"], shards) == shard
    return found


def problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == MEDIA_TYPE
    body: dict[str, Any] = response.json()
    assert body["status"] == status
    assert body["type"].endswith(":" + kind)
    assert body["title"]
    assert body["detail"]
    return body


# -- one heartbeat


def test_accepted_means_stored(http: httpx.Client, client: Any, settings: Settings) -> None:
    response = http.post(PATH, json=heartbeat(timestamp="2025-01-15T15:30:00.1239+05:30", extra=1))
    assert (response.status_code, response.json()) == (200, {"status": "accepted"})
    assert stored(client, settings.shards) == [
        {
            "user_id": "u1",
            "device_id": "device_a",
            "timestamp_ms": 1736935200123,
            "heart_rate": 75,
        }
    ]


@pytest.mark.parametrize(
    ("body", "field", "reason"),
    [
        (b"", "record", "record_not_json"),
        (b"{", "record", "record_not_json"),
        (b"\xff", "record", "record_not_json"),
        (b"[" * 100_000, "record", "record_not_json"),
        (b"[]", "record", "record_not_an_object"),
        (heartbeat(user_id=""), "user_id", "user_id_wrong_length"),
        (heartbeat(device_id=7), "device_id", "device_id_wrong_type"),
        (heartbeat(timestamp="yesterday"), "timestamp", "timestamp_not_a_time"),
        (heartbeat(timestamp="1999-01-01T00:00:00Z"), "timestamp", "timestamp_too_old"),
        (heartbeat(timestamp="2999-01-01T00:00:00Z"), "timestamp", "timestamp_in_the_future"),
        (heartbeat(heart_rate=29), "heart_rate", "heart_rate_out_of_range"),
        (heartbeat(heart_rate="75"), "heart_rate", "heart_rate_wrong_type"),
        (heartbeat(heart_rate=None), "heart_rate", "heart_rate_missing"),
    ],
)
def test_refused_names_the_field(
    http: httpx.Client,
    client: Any,
    settings: Settings,
    body: bytes | dict[str, Any],
    field: str,
    reason: str,
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    # what isn't a time at all is a 400, as in the system before this one
    status = 400 if reason == "timestamp_not_a_time" else 422
    answer = problem(http.post(PATH, content=content), status, "invalid-heartbeat")
    (error,) = answer["errors"]
    assert (error["field"], error["reason"]) == (field, reason)
    assert stored(client, settings.shards) == []


@pytest.mark.parametrize("path", [PATH, BATCH])
def test_body_limit_holds_with_and_without_a_length(
    serving: Serving, settings: Settings, client: Any, path: str
) -> None:
    small = settings.model_copy(update={"body_max_bytes": 1024})
    fitting = json.dumps(heartbeat()).encode().ljust(1024)

    def chunks(body: bytes) -> Iterator[bytes]:
        for start in range(0, len(body), 100):
            yield body[start : start + 100]

    with serving(small) as http:
        problem(http.post(path, content=fitting + b" "), 413, "body-too-large")
        problem(http.post(path, content=chunks(fitting + b" ")), 413, "body-too-large")
        problem(http.post(path, content=b"x" * 1_000_000), 413, "body-too-large")
        problem(http.post(path, content=chunks(b"x" * 1_000_000)), 413, "body-too-large")
        assert stored(client, settings.shards) == []
        assert http.post(path, content=fitting).status_code == 200
        assert http.post(path, content=chunks(fitting)).status_code == 200
    assert len(stored(client, settings.shards)) == 2


def test_full_buffer_is_503_with_retry_after(
    serving: Serving, settings: Settings, client: Any
) -> None:
    bounded = settings.model_copy(update={"buffer_max_heartbeats": settings.shards})
    with serving(bounded) as http:
        assert http.post(PATH, json=heartbeat()).status_code == 200
        response = http.post(PATH, json=heartbeat())
    problem(response, 503, "buffer-full")
    assert int(response.headers["retry-after"]) >= 1
    assert len(stored(client, settings.shards)) == 1


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, None),
        ({"spo2": 98, "steps": 1}, "spo2, steps"),
        ({"a, b": 1, "é\r\nX-Evil: 1": 2, "": 3}, 'a%2C%20b, %C3%A9%0D%0AX-Evil%3A%201, ""'),
        ({"x" * 40: 1}, "x" * 32),
        ({f"n{number}": 1 for number in range(20)}, ", ".join(f"n{n}" for n in range(16)) + ", *"),
        ({"\U0001f600" * 32 + "x": 1, "\U0001f601" * 32: 1, "\U0001f602" * 32: 1}, ...),
    ],
)
def test_ignored_fields_are_named_in_a_header(
    http: httpx.Client, fields: dict[str, int], named: Any
) -> None:
    response = http.post(PATH, json=heartbeat() | fields)
    assert response.status_code == 200
    assert "x-evil" not in response.headers
    found = response.headers.get("hb-ignored")
    if named is ...:
        assert found.endswith(", *")
        assert len(found) < 1010
    else:
        assert found == named


def test_ignored_fields_of_a_batch_are_counted_by_name(http: httpx.Client) -> None:
    sent = [heartbeat() | {"spo2": 98, f"once{n}": 1} for n in range(20)]
    sent.append(heartbeat(heart_rate=0) | {"spo2": 97, "y\n" * 40: 1})
    for response in (
        http.post(BATCH, json=sent),
        http.post(BATCH, content="\n".join(map(json.dumps, sent))),
    ):
        answer = response.json()
        assert (answer["accepted"], answer["unknown_fields"]) == (20, 42)
        assert answer["ignored"] == {"spo2": 21, **{f"once{n}": 1 for n in range(15)}, "*": 6}
        assert "hb-ignored" not in response.headers
    none = problem(http.post(BATCH, json=[{"spo2": 1}]), 422, "no-valid-heartbeat")
    assert none["ignored"] == {"spo2": 1}


def test_a_byte_order_mark_is_skipped(http: httpx.Client) -> None:
    mark = b"\xef\xbb\xbf"
    one = json.dumps(heartbeat()).encode()
    assert http.post(PATH, content=mark + one).status_code == 200
    for batch in (
        mark + b"[" + one + b"," + one + b"]",
        mark + b" [" + one + b"," + one + b"]",
        mark + one + b"\n" + one,
        mark + one[:-1] + b', "extra": 1}\n' + one,
        mark + b"\r\n" + one + b"\n" + mark + one,
    ):
        answer = http.post(BATCH, content=batch).json()
        assert (answer["accepted"], answer["refused"]) == (2, [])


def test_two_media_types_are_none(http: httpx.Client) -> None:
    one = json.dumps(heartbeat())
    for kinds in (["application/json", "application/x-ndjson"], ["application/json"] * 2):
        headers = [("content-type", kind) for kind in kinds]
        problem(http.post(BATCH, content=one, headers=headers), 415, "unsupported-media-type")


def test_a_batch_means_one_thing_or_is_refused(http: httpx.Client) -> None:
    one = json.dumps(heartbeat()).encode()
    twice = one[:-1] + b', "heart_rate": 171}'
    for batch in (b"[" + one + b"," + twice + b"]", one + b"\n" + twice):
        answer = http.post(BATCH, content=batch).json()
        assert answer["accepted"] == 1
        assert [(one["index"], one["reason"]) for one in answer["refused"]] == [
            (1, "record_duplicate_field")
        ]
    first, second = one.split(b", ", 1)
    answer = http.post(BATCH, content=one + one + b"\n" + first + b",\n" + second).json()
    assert [line["reason"] for line in answer["refused"]] == ["record_not_json"] * 3


def test_concurrent_posts_are_all_stored(
    http: httpx.Client, client: Any, settings: Settings
) -> None:
    def post(worker: int) -> None:
        with plain_client(str(http.base_url)) as own:
            for n in range(20):
                body = heartbeat(user_id=f"u{worker}", heart_rate=50 + n)
                assert own.post(PATH, json=body).status_code == 200

    threads = [threading.Thread(target=post, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = {(row["user_id"], row["heart_rate"]) for row in stored(client, settings.shards)}
    assert found == {(f"u{worker}", 50 + n) for worker in range(8) for n in range(20)}


# -- batches


def test_batch_lists_what_it_refused(http: httpx.Client, client: Any, settings: Settings) -> None:
    sent = [heartbeat(), heartbeat(heart_rate=0), 3, heartbeat(user_id="u2", extra=True)]
    lines = [json.dumps(sent[0]), "", "{", " ", json.dumps(sent[1]), json.dumps(sent[3])]
    array = http.post(BATCH, json=sent)
    ndjson = http.post(BATCH, content="\r\n".join(lines) + "\n")
    for response, bad in (
        (array, [(1, "heart_rate_out_of_range"), (2, "record_not_an_object")]),
        (ndjson, [(2, "record_not_json"), (4, "heart_rate_out_of_range")]),
    ):
        assert response.status_code == 200
        answer = response.json()
        assert answer["accepted"] == 2
        assert (answer["unknown_fields"], answer["ignored"]) == (1, {"extra": 1})
        assert [(row["index"], row["reason"]) for row in answer["refused"]] == bad
        assert not any(row["retry"] for row in answer["refused"])
        assert "retry-after" not in response.headers
    assert len(stored(client, settings.shards)) == 4


def test_indexes_hold_beyond_the_first_slice(http: httpx.Client) -> None:
    old = {0: "2001-01-01T00:00:00Z", SLICE - 1: "2001-01-01T00:00:00", SLICE: "1999-12-31T23:59Z"}
    sent = [heartbeat() | {"timestamp": old.get(n, "2025-01-15T10:00Z")} for n in range(3 * SLICE)]
    sent[-1]["timestamp"] = "yesterday"
    for answer in (
        http.post(BATCH, json=sent).json(),
        http.post(BATCH, content="\n".join(map(json.dumps, sent))).json(),
    ):
        assert answer["accepted"] == 3 * SLICE - 4
        assert [(row["index"], row["reason"]) for row in answer["refused"]] == [
            (0, "timestamp_too_old"),
            (SLICE - 1, "timestamp_too_old"),
            (SLICE, "timestamp_too_old"),
            (3 * SLICE - 1, "timestamp_not_a_time"),
        ]


@pytest.mark.parametrize("content", [b"", b"[]", b" \n \n", b"[ ]"])
def test_empty_batch_says_so(http: httpx.Client, content: bytes) -> None:
    answer = problem(http.post(BATCH, content=content), 422, "empty-batch")
    assert (answer["accepted"], answer["refused"]) == (0, [])


def test_batch_without_a_valid_heartbeat(http: httpx.Client) -> None:
    answer = problem(http.post(BATCH, json=[1, {}]), 422, "no-valid-heartbeat")
    assert answer["accepted"] == 0
    assert [row["index"] for row in answer["refused"]] == [0, 1]


@pytest.mark.parametrize(
    ("content", "position"),
    [(b'[{"a":1},{"a":}]', "byte 14"), (b"[1,2", "byte 4"), (b"[1] 2", "byte 5")],
)
def test_broken_array_is_refused_as_a_whole(
    http: httpx.Client, content: bytes, position: str
) -> None:
    answer = problem(http.post(BATCH, content=content), 422, "not-json")
    assert position in answer["detail"]


def test_array_that_is_nested_too_deeply(http: httpx.Client) -> None:
    problem(http.post(BATCH, content=b"[" * 1_000_000), 422, "not-json")


def test_bad_utf8_in_an_element_does_not_sink_the_others(http: httpx.Client) -> None:
    good = json.dumps(heartbeat()).encode()
    bad = good.replace(b"u1", b"\xff\xfe")
    response = http.post(BATCH, content=b"[" + bad + b"," + good + b"]")
    assert response.json()["accepted"] == 1
    assert [row["index"] for row in response.json()["refused"]] == [0]


def test_batch_limit(serving: Serving, settings: Settings) -> None:
    with serving(settings.model_copy(update={"batch_max_heartbeats": 3})) as http:
        assert http.post(BATCH, json=[heartbeat()] * 3).json()["accepted"] == 3
        ndjson = (json.dumps(heartbeat()) + "\n") * 3
        assert http.post(BATCH, content=ndjson).json()["accepted"] == 3
        problem(http.post(BATCH, json=[heartbeat()] * 4), 413, "batch-too-large")
        problem(http.post(BATCH, content=ndjson + "{}"), 413, "batch-too-large")
        problem(http.post(BATCH, content=b"[" + b"1," * 1000 + b"1]"), 413, "batch-too-large")


def test_batch_into_a_partly_full_buffer(serving: Serving, settings: Settings, client: Any) -> None:
    shards = settings.shards
    assert shards > 1
    full = heartbeat(user_id="u1")
    other = next(u for n in range(999) if shard_of(u := f"v{n}", shards) != shard_of("u1", shards))
    bounded = settings.model_copy(update={"buffer_max_heartbeats": shards})
    with serving(bounded) as http:
        assert http.post(PATH, json=full).status_code == 200
        batch = [full, heartbeat(heart_rate=0), heartbeat(user_id=other)]
        some = http.post(BATCH, json=batch)
        none = http.post(BATCH, json=batch)
    assert some.status_code == 200
    assert some.json()["accepted"] == 1
    assert [(r["index"], r["field"], r["reason"], r["retry"]) for r in some.json()["refused"]] == [
        (0, None, "buffer_full", True),
        (1, "heart_rate", "heart_rate_out_of_range", False),
    ]
    assert int(some.headers["retry-after"]) >= 1
    answer = problem(none, 503, "buffer-full")
    assert [(row["index"], row["retry"]) for row in answer["refused"]] == [
        (0, True),
        (1, False),
        (2, True),
    ]
    assert int(none.headers["retry-after"]) >= 1
    assert len(stored(client, shards)) == 2


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
valid = st.builds(
    heartbeat,
    user_id=texts,
    device_id=texts,
    timestamp=st.datetimes(dt.datetime(2020, 1, 1), dt.datetime(2025, 12, 31)).map(str),
    heart_rate=st.integers(30, 220),
)
invalid: st.SearchStrategy[Any] = st.one_of(
    valid.map(lambda row: row | {"heart_rate": 0}),
    valid.map(lambda row: {name: row[name] for name in row if name != "user_id"}),
    st.none(),
    st.integers(),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3), st.integers(), max_size=2),
)
rows = st.one_of(st.tuples(st.just(True), valid), st.tuples(st.just(False), invalid))


@given(batch=st.lists(rows, max_size=30), ndjson=st.booleans(), pretty=st.booleans())
@example_settings(
    max_examples=60,
    deadline=None,
    # One server and one gateway for all examples: each example empties the streams first.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_exactly_the_valid_ones_are_stored(
    http: httpx.Client,
    client: Any,
    settings: Settings,
    batch: list[tuple[bool, Any]],
    ndjson: bool,
    pretty: bool,
) -> None:
    client.flushdb()
    if ndjson:
        content = "\n".join(json.dumps(row, ensure_ascii=pretty) for _, row in batch)
        headers = {"content-type": "application/x-ndjson"}
    else:
        content = json.dumps([row for _, row in batch], indent=1 if pretty else None)
        headers = {"content-type": "application/json"}
    answer = http.post(BATCH, content=content.encode(), headers=headers).json()
    good = [row for is_valid, row in batch if is_valid]
    assert answer["accepted"] == len(good)
    assert [row["index"] for row in answer["refused"]] == [
        index for index, (is_valid, _) in enumerate(batch) if not is_valid
    ]

    def key(row: dict[str, Any]) -> tuple[str, str, int]:
        return row["user_id"], row["device_id"], row["heart_rate"]

    assert sorted(map(key, stored(client, settings.shards))) == sorted(map(key, good))


# -- telling records apart


def test_media_type_decides_before_the_first_character() -> None:
    body = b"[1]\n[2]"
    assert split(body, b"application/x-ndjson", 9).texts == [(0, b"[1]"), (1, b"[2]")]
    with pytest.raises(ProblemError, match="byte 5"):
        split(body, b"application/json", 9)


@given(st.binary(max_size=200))
def test_split_takes_any_bytes(body: bytes) -> None:
    with contextlib.suppress(ProblemError):
        assert all(text.strip() for _, text in split(body, b"", 50).texts)


def test_an_error_of_ours_is_a_problem_and_not_the_end(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "a heart rate of 77"

    async def broken(*_: object) -> None:
        raise ZeroDivisionError(secret)

    with monkeypatch.context() as patch:
        patch.setattr(AsyncProducer, "_flush", broken)
        assert http.post(PATH, json=heartbeat()).json()["status"] == 500
    assert http.post(PATH, json=heartbeat()).status_code == 200
    assert "ZeroDivisionError" in caplog.text
    assert secret not in caplog.text
