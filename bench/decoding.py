"""CPU cost of decoding NDJSON entries into columns, for docs/decisions/0002-two-readers-of-json.md.

    .venv/bin/python bench/decoding.py

100,000 lines in entries of 500, in memory; CPU seconds a million lines, best of three, with all
validation, identities and the sort by day and shard.
"""

from __future__ import annotations

import datetime as dt
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from hb_assets.core.record import Heartbeat, encode
from hb_assets.core.settings import Settings
from hb_assets.lake.ingest.decode import pieces

ENTRIES, LINES = 200, 500
START = 1_736_899_200_000  # 2025-01-15


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as the buffer hands it out."""

    ms: int
    data: bytes
    shard: int = 0
    seq: int = 0
    own: int | None = None
    deliveries: int = 1


def spelt(form: str) -> Callable[[Heartbeat], bytes]:
    """How another producer writes a heartbeat, with `timestamp` in this form."""

    def line(beat: Heartbeat) -> bytes:
        moment = dt.datetime.fromtimestamp(beat.timestamp_ms / 1000, dt.UTC)
        time = {
            "Z": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "offset": moment.astimezone(dt.timezone(dt.timedelta(hours=2))).isoformat(),
            "none": moment.replace(tzinfo=None).isoformat(),
        }.get(form)
        fields = {"timestamp": time} if time else {"timestamp_ms": beat.timestamp_ms}
        others = {"heart_rate": beat.heart_rate, "device_id": beat.device_id}
        return json.dumps({**fields, **others, "user_id": beat.user_id}).encode()

    return line


def entries(
    line: Callable[[Heartbeat], bytes], *, own: bool = False, bad: bool = False, lines: int = LINES
) -> list[Entry]:
    """The same heartbeats in a spelling; a bad line may end each entry."""
    chance = random.Random(1)
    made = []
    for number in range(ENTRIES * LINES // lines):
        beats = [
            Heartbeat(
                f"user-{chance.randrange(1000)}",
                "device_a",
                START + chance.randrange(86_400_000),
                chance.randrange(40, 180),
            )
            for _ in range(lines)
        ]
        data = b"\n".join([*map(line, beats), *[b"no"] * bad])
        made.append(
            Entry(START + 90_000_000 + number, data, number % 16, own=lines if own else None)
        )
    return made


def cost(content: list[Entry]) -> float:
    """CPU seconds a million lines."""
    settings, best = Settings(), float("inf")
    for _ in range(3):
        began = time.process_time()
        for _ in pieces(content, settings):
            pass
        best = min(best, time.process_time() - began)
    return best / (ENTRIES * LINES) * 1e6


def main() -> None:
    """Measure and print the table."""
    table = Table(title=f"{ENTRIES * LINES:,} lines", title_justify="left")
    table.add_column("entries")
    table.add_column("CPU s a million lines", justify="right")
    for name, content in {
        "our own appends": entries(encode, own=True),
        "timestamp with Z": entries(spelt("Z")),
        "timestamp with an offset": entries(spelt("offset")),
        "timestamp without an offset": entries(spelt("none")),
        "timestamp_ms": entries(spelt("ms")),
        "timestamp with Z, and a bad line in each entry": entries(spelt("Z"), bad=True),
        "timestamp with Z, one heartbeat per entry": entries(spelt("Z"), lines=1),
    }.items():
        table.add_row(name, f"{cost(content):.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
