"""Media types: which one a client gets, and that all of them say the same."""

from __future__ import annotations

import csv
import datetime as dt
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hb_assets.gateway.http.problems import ProblemError
from hb_assets.gateway.reads import formats
from hb_assets.gateway.reads.formats import (
    ARROW,
    CSV,
    ENCODERS,
    JSON,
    NDJSON,
    PARQUET,
    Body,
    chosen,
)
from hb_assets.lake.query.aggregate import POINTS

ROWS: list[dict[str, Any]] = [
    {"timestamp": dt.datetime(1969, 12, 31, 23, 59, tzinfo=dt.UTC), "heart_rate": 60},
    {"timestamp": dt.datetime(2025, 1, 15, 10, tzinfo=dt.UTC), "heart_rate": 75},
    {"timestamp": dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC), "heart_rate": 220},
]
DEVICES = ['a,"b"\n', "=1+1", "Zoë \x00 \\ 😀"]


def _plain(rows: list[dict[str, Any]]) -> list[tuple[dt.datetime, int, str]]:
    return [
        (
            dt.datetime.fromisoformat(row["timestamp"])
            if isinstance(row["timestamp"], str)
            else row["timestamp"],
            int(row["heart_rate"]),
            row["device_id"],
        )
        for row in rows
    ]


READERS = {
    JSON: lambda body: json.loads(body)["data"],
    NDJSON: lambda body: [json.loads(line) for line in body.split(b"\n")[:-1]],
    CSV: lambda body: list(csv.DictReader(io.StringIO(body.decode(), newline=""))),
    ARROW: lambda body: pa.ipc.open_stream(body).read_all().to_pylist(),
    PARQUET: lambda body: pq.read_table(io.BytesIO(body)).to_pylist(),
}


@pytest.mark.parametrize("media_type", ENCODERS)
def test_every_format_says_the_same(media_type: str) -> None:
    rows = [row | {"device_id": device} for row, device in zip(ROWS, DEVICES, strict=True)]
    table = pa.Table.from_pylist(rows, schema=POINTS)
    body = ENCODERS[media_type](Body("u1", table, None))
    assert _plain(READERS[media_type](body)) == _plain(rows)
    nothing = ENCODERS[media_type](Body("u1", POINTS.empty_table(), None))
    if nothing:
        assert READERS[media_type](nothing) == []


def test_json_keeps_the_shape_that_old_clients_know() -> None:
    body = Body("u1", POINTS.empty_table(), None)
    assert formats.ENCODERS[JSON](body) == b'{"user_id":"u1","data":[],"count":0}'
    more = json.loads(formats.ENCODERS[JSON](Body("u1", POINTS.empty_table(), "/next")))
    assert more == {"user_id": "u1", "data": [], "count": 0, "next": "/next"}


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ([], JSON),
        ([""], JSON),
        (["*/*"], JSON),
        (["text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"], JSON),
        (["text/*"], CSV),
        (["TEXT/CSV; charset=utf-8"], CSV),
        (["application/json;q=0.2, text/csv;q=0.8"], CSV),
        (["application/json;q=0.2", "text/csv;q=0.1"], JSON),
        (["application/json;q=0, */*"], NDJSON),
        (["application/*;q=0.1, text/csv;q=0"], JSON),
        (["application/jsonl"], NDJSON),
        (["application/ndjson"], NDJSON),
        (["application/x-ndjson"], NDJSON),
        ([ARROW], ARROW),
        ([PARQUET + ";q=0.9", ARROW + ";q=0.8", "*/*;q=0.1"], PARQUET),
        (["text/html"], None),
        (["application/json;q=0"], None),
        (["json"], None),
        (["*/*;q=0"], None),
    ],
)
def test_what_a_client_accepts(accept: list[str], media_type: str | None) -> None:
    if media_type is not None:
        assert chosen(accept) == media_type
        return
    with pytest.raises(ProblemError) as raised:
        chosen(accept)
    assert raised.value.status == 406
    assert raised.value.members == {"offered": list(ENCODERS)}
