"""Ways to read NDJSON entries into columns, for docs/decisions/0002-two-readers-of-json.md.

    .venv/bin/python bench/decoding.py

One million lines in entries of 500, in memory; best of three of each way. The last rows are ours,
with all judgements, identities and the sort by day and shard included, which the others lack.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import duckdb
import msgspec
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from hb_assets.lake.decode import decode
from hb_assets.record import Heartbeat, encode
from hb_assets.settings import Settings

ENTRIES, LINES = 2000, 500
START = 1_736_899_200_000  # 2025-01-15
LINE = "(SELECT unnest(string_split(data, chr(10))) AS line FROM entries)"
TYPED = '{"user_id":"VARCHAR","device_id":"VARCHAR","timestamp_ms":"BIGINT","heart_rate":"BIGINT"}'
AS_JSON = '{"user_id":"JSON","device_id":"JSON","timestamp":"JSON","timestamp_ms":"JSON","heart_rate":"JSON"}'
PATHS = "['$.user_id','$.device_id','$.timestamp','$.timestamp_ms','$.heart_rate']"
SHAPE = r"^\{\"user_id\":\"([^\"\\]{1,128})\",\"device_id\":\"([^\"\\]{1,128})\",\"timestamp_ms\":(\d+),\"heart_rate\":(\d+)\}$"
QUERIES = {
    "split alone": f"SELECT line FROM {LINE}",
    'from_json, typed (takes "1" for 1; a bad line fails the batch)': (
        f"SELECT from_json(line, '{TYPED}') FROM {LINE}"
    ),
    "json_extract of a list of paths": f"SELECT json_extract(line, {PATHS}) FROM {LINE}",
    "from_json, JSON-typed": f"SELECT from_json(line, '{AS_JSON}') FROM {LINE}",
    "json_valid, then from_json, JSON-typed": (
        f"SELECT CASE WHEN json_valid(line) THEN from_json(line, '{AS_JSON}') END FROM {LINE}"
    ),
    "TRY(from_json), JSON-typed": f"SELECT TRY(from_json(line, '{AS_JSON}')) FROM {LINE}",
    "a regular expression with groups": (
        f"SELECT regexp_extract(line, '{SHAPE}', ['u', 'd', 't', 'h']) FROM {LINE}"
    ),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as the buffer hands it out."""

    ms: int
    data: bytes
    shard: int = 0
    seq: int = 0
    own: int | None = LINES
    deliveries: int = 1


def entries(*, spoilt: bool) -> list[Entry]:
    """Entries of our own canonical lines; spoilt ones end with a line that isn't JSON."""
    chance = random.Random(1)
    made = []
    for number in range(ENTRIES):
        lines = [
            encode(
                Heartbeat(
                    f"user-{chance.randrange(1000)}",
                    "device_a",
                    START + chance.randrange(86_400_000),
                    chance.randrange(40, 180),
                )
            )
            for _ in range(LINES)
        ]
        made.append(Entry(START + 90_000_000 + number, b"\n".join(lines + [b"no"] * spoilt)))
    return made


def rate(work: Callable[[], object]) -> float:
    """Million lines a second, best of three."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - began)
    return ENTRIES * LINES / best / 1e6


def main() -> None:
    """Measure and print the table."""
    table = Table(title=f"{ENTRIES * LINES:,} lines, entries of {LINES}", title_justify="left")
    table.add_column("way")
    table.add_column("million lines/s", justify="right")
    table.add_column("with a bad line in each entry", justify="right")
    good, bad = entries(spoilt=False), entries(spoilt=True)

    def ask(query: str, content: list[Entry]) -> str:
        connection = duckdb.connect()
        data = pa.array([entry.data.decode() for entry in content])
        connection.register("entries", pa.table({"data": data}))
        try:
            return f"{rate(lambda: connection.sql(query).to_arrow_table()):.1f}"
        except duckdb.Error:
            return "fails"

    for name, query in QUERIES.items():
        table.add_row(name, ask(query, good), ask(query, bad))
    decoder = msgspec.json.Decoder(Heartbeat)

    def by_msgspec() -> object:
        found = [decoder.decode(line) for entry in good for line in entry.data.split(b"\n")]
        names = Heartbeat.__struct_fields__
        return pa.table({name: [getattr(one, name) for one in found] for name in names})

    table.add_row("msgspec, line by line, to Arrow", f"{rate(by_msgspec):.1f}", "")
    settings = Settings()
    for name, own in (("ours: lake.decode", LINES), ("the same, foreign entries", None)):
        rates = []
        for content in (good, bad):
            made = [replace(entry, own=own) for entry in content]
            rates.append(f"{rate(partial(decode, made, settings)):.1f}")
        table.add_row(name, *rates)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
