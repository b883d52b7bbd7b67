"""Which files of hb_assets a heartbeat passes, from POST to GET: `python -m bench.files`.

A profile hook notes each file that a function is called in, thread by thread, while one heartbeat
is posted, drained, consolidated and asked for, in one process with a real server and one shard. A
move is a call that leads from one file into another. Both say how much of the code somebody reads
who follows it. Generated code and what happens once, at a start, isn't counted: each step is done a
second time, and that one counts.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import FrameType
from typing import Any

from bench import servers
from hb_assets.buffer import connection
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.settings import PACKAGE, Settings
from hb_assets.gateway.app import HEART_RATE, Gateway
from hb_assets.lake import minutes
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.coordination import coordinated
from hb_assets.pipeline.drain import drain

_PACKAGE = f"{PACKAGE}{os.sep}"


class Trail:
    """Files of the package that were called into, and how often a call led into another file."""

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.moves = 0
        self._last: dict[int, str] = {}

    def add(self, name: str) -> None:
        """Note a call into a file, by the thread at hand."""
        self.files.add(name)
        thread = threading.get_ident()
        self.moves += self._last.get(thread, name) != name
        self._last[thread] = name


class Follower:
    """Follows this thread and every one that begins from here on, into `trail`."""

    def __init__(self) -> None:
        self.trail = Trail()

    def __enter__(self) -> Follower:
        threading.setprofile(self._note)
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)

    def _note(self, frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(_PACKAGE) and code.co_name[0] != "<":
            self.trail.add(code.co_filename.removeprefix(_PACKAGE))


async def _ask(gateway: Gateway, method: str, query: str = "", body: bytes = b"") -> Any:
    """One request, as the server hands it to the application; the JSON that it answers."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": HEART_RATE,
        "raw_path": HEART_RATE.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "server": ("127.0.0.1", 8000),
        "state": {},
    }
    answer: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        answer.append(message)

    await gateway(scope, receive, send)
    assert answer[0]["status"] == 200, answer
    return json.loads(b"".join(part.get("body", b"") for part in answer[1:]))


def _steps(
    settings: Settings, lake: Lake, consumer: Consumer, gateway: Gateway, loop: asyncio.Runner
) -> dict[str, Callable[[], object]]:
    now = dt.datetime.now(dt.UTC).replace(microsecond=0)
    day = now.date()
    fields = {"user_id": "u1", "device_id": "device_a", "heart_rate": 75}
    body = json.dumps(fields | {"timestamp": now.isoformat()}).encode()
    query = f"user_id=u1&start={day}T00:00:00Z&end={day + dt.timedelta(days=1)}T00:00:00Z"

    def consolidate() -> None:
        with coordinated(lake, settings, start_server=False) as known:
            known.consolidate(lake, day, settings).require()

    def get() -> None:
        assert loop.run(_ask(gateway, "GET", query))["data"]

    return {
        "POST": lambda: loop.run(_ask(gateway, "POST", body=body)),
        "drain": lambda: drain(consumer, lake, settings, until_empty=True),
        "consolidate": consolidate,
        "minutes": lambda: minutes.build(lake, day, settings),
        "GET": get,
    }


def measure(settings: Settings) -> dict[str, Trail]:
    """The trail of each step, of the second time that it is done."""
    found: dict[str, Trail] = {}
    lake = Lake.open(settings)
    gateway = Gateway(settings)
    with (
        closing(Consumer(connection.connect(settings), settings)) as consumer,
        asyncio.Runner() as loop,
        Follower() as follower,
    ):
        consumer.open()
        opened = gateway.opened()
        loop.run(opened.__aenter__())
        for _ in range(2):
            for name, step in _steps(settings, lake, consumer, gateway, loop).items():
                follower.trail = found[name] = Trail()
                step()
            time.sleep(1.1)  # the next heartbeat has another second
        follower.trail = Trail()
        loop.run(opened.__aexit__(None, None, None))
    return found


def main() -> None:
    """Print the table, and with --files the files of each step."""
    with tempfile.TemporaryDirectory(prefix="hb-bench-") as name:
        folder = Path(name)
        with servers.buffer(folder / "redis") as buffer:
            settings = Settings(
                home=folder / "home", redis_url=buffer.url, shards=1, duckdb_threads=1
            )
            found = measure(settings)
    print("| step | files | moves between files |")
    print("|---|---|---|")
    for step, trail in found.items():
        print(f"| {step} | {len(trail.files)} | {trail.moves} |")
    every = set[str]().union(*(trail.files for trail in found.values()))
    print(f"| all of them | {len(every)} | {sum(trail.moves for trail in found.values())} |")
    if "--files" in sys.argv[1:]:
        for step, trail in found.items():
            print(f"\n{step}: {', '.join(sorted(trail.files))}")


if __name__ == "__main__":
    main()
