"""The gateway's speed, compared with references in one run: `make bench-gateway`.

    make bench-gateway                           medians of 5, 25 minutes
    make bench-gateway ARGS="--runs 3 --quick"   shorter, without the lake of 100 million rows
    make bench-gateway ARGS="--only post"        some of the rows

The figures of the table and their targets. Ours and the reference take turns (ours, reference,
ours, ...), since a machine has better and worse minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import signal
import statistics
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bench import lakes, load, posting, servers, table
from bench.servers import Buffer, Served
from bench.table import Report, Row

HOME = servers.ROOT / ".hb-bench"
ONE = "/metrics/heart-rate"
BATCH = "/metrics/heart-rate/batch"
BATCH_SIZE = 500
BATCH_TARGET = 800_000
"""Heartbeats a second in batches."""
USERS = 1000
MILLION = 1_000_000
PAUSE_MS = 20
"""Mean pause of a connection where POSTs come at a moderate rate."""
NOTES = [
    (
        "nothing is pinned: load, servers and Redis share the cores; the load has one thread, and sends "
        "on each connection as soon as it has the answer"
    ),
    (
        "each request has a traceparent of its own, every other connection sends head and body in two "
        "segments, every tenth request opens a connection anew; behind a proxy 64 clients "
        "(X-Forwarded-For) share 8 connections, and each server trusts it"
    ),
    "Redis: the embedded Valkey, appendfsync always, ours and the reference's each their own",
    "ours asks for an API key, and limits keys, addresses and users, so high that none is refused",
    (
        "the reference has no access control, limits, ledger or shards, and puts a whole micro-batch "
        "into one entry of one stream"
    ),
    (
        "nobody drains: the bench empties the streams after each run, and each second while it watches "
        "the memory; the ledgers prove that all that was answered was appended"
    ),
]


@dataclass(frozen=True, slots=True)
class Bench:
    """One run of the bench: how often and how long to measure, and where."""

    folder: Path
    runs: int
    seconds: float
    quick: bool
    say: Callable[[str], None]


def post(bench: Bench) -> Iterator[Row]:
    """Single POSTs of 64 clients, against FastAPI and against the no-op app."""
    return _single(bench, "single POST", connections=64, proxied=False)


def proxy(bench: Bench) -> Iterator[Row]:
    """The same through a proxy, which has fewer connections than clients."""
    return _single(bench, "single POST through a proxy", connections=8, proxied=True)


def _single(bench: Bench, what: str, *, connections: int, proxied: bool) -> Iterator[Row]:
    bodies = load.heartbeats(5 * USERS, USERS)
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(servers.buffer(bench.folder / "a"))
        theirs = stack.enter_context(servers.buffer(bench.folder / "b"))
        served = {
            "ours": stack.enter_context(
                servers.gateway(bench.folder / "ours", mine, proxied=proxied)
            ),
            "FastAPI": stack.enter_context(
                servers.app(
                    "fastapi_reference",
                    bench.folder / "ref",
                    proxied=proxied,
                    REFERENCE_REDIS_URL=theirs.url,
                )
            ),
            "no-op": stack.enter_context(
                servers.app("noop", bench.folder / "noop", proxied=proxied)
            ),
        }

        def run(one: Served, seconds: float) -> posting.Posts:
            return posting.post(one, ONE, bodies, seconds, connections=connections, proxied=proxied)

        for one in served.values():
            run(one, 1)
        found: dict[str, list[posting.Posts]] = {name: [] for name in served}
        for number in range(bench.runs):
            for name, one in served.items():
                bench.say(f"{what}, run {number + 1} of {bench.runs}: {name}")
                before = mine.appended()
                posts = run(one, bench.seconds)
                if name == "ours":
                    _prove(mine, before, posts.requests)
                found[name].append(posts)
                mine.clear()
                theirs.clear()
    rate = {name: [one.per_second for one in posts] for name, posts in found.items()}
    p99 = {name: [one.p99_ms for one in posts] for name, posts in found.items()}
    yield Row(f"{what} against FastAPI + pydantic", "requests/s", rate["ours"], rate["FastAPI"], 3)
    yield Row("its p99", "ms", p99["ours"], p99["FastAPI"], 1.0, at_most=True)
    yield Row(f"{what} against a no-op ASGI app", "requests/s", rate["ours"], rate["no-op"], 0.4)
    yield Row("its p99", "ms", p99["ours"], p99["no-op"])
    share = {name: [one.load_share for one in posts] for name, posts in found.items()}
    took = "what the load itself took meanwhile (near 1 it was the limit)"
    yield Row(took, "cores", share["ours"], share["no-op"])


def batch(bench: Bench) -> Iterator[Row]:
    """Batches of 500, and the gateway's memory while they keep coming."""
    size = BATCH_SIZE
    many = load.heartbeats(100 * size, USERS)
    # each user's readings side by side: a batch is what one device has kept
    kept = sorted(load.heartbeats(100 * size, 100), key=lambda text: text.partition(",")[0])
    kinds = {
        "JSON array, of 500 users": (load.JSON, load.batches(many, size, load.JSON)),
        "NDJSON, of 500 users": (load.NDJSON, load.batches(many, size, load.NDJSON)),
        "JSON array, of one user": (load.JSON, load.batches(kept, size, load.JSON)),
    }
    first = next(iter(kinds))
    found: dict[str, list[float]] = {name: [] for name in kinds}
    with (
        servers.buffer(bench.folder / "a") as mine,
        servers.gateway(bench.folder / "ours", mine) as served,
    ):

        def run(name: str, seconds: float) -> float:
            """Heartbeats a second."""
            content_type, bodies = kinds[name]
            before = mine.appended()
            posts = posting.post(
                served, BATCH, bodies, seconds, connections=8, content_type=content_type
            )
            _prove(mine, before, posts.requests * size)
            return posts.per_second * size

        for name in kinds:
            run(name, 1)
        for number in range(bench.runs):
            for name in kinds:
                bench.say(f"batches of {size}, run {number + 1} of {bench.runs}: {name}")
                found[name].append(run(name, bench.seconds))
                mine.clear()
        seconds = 20 if bench.quick else 60
        bench.say(f"batches of {size} for {seconds} s: memory")
        with _memory(served, mine) as resident:
            steady = run(first, seconds)
    for name, rates in found.items():
        yield Row(f"batch of {size}, {name}", "heartbeats/s", rates, target=BATCH_TARGET)
    steady_for = f"the first of these for {seconds} s"
    yield Row(steady_for, "heartbeats/s", [steady], target=BATCH_TARGET)
    early, late = max(resident[8:14]), max(resident[-6:])
    yield Row(
        "memory of the gateway at their end, against that after 10 s",
        "MB",
        [late],
        [early],
        1.05,
        at_most=True,
    )


def server(bench: Bench) -> Iterator[Row]:
    """The same application by uvicorn, as `hb serve` has it, and by granian."""
    single = load.heartbeats(5 * USERS, USERS)
    kinds = {
        "single POST": (ONE, single, 64, 1),
        f"batch of {BATCH_SIZE}": (
            BATCH,
            load.batches(load.heartbeats(100 * BATCH_SIZE, USERS), BATCH_SIZE, load.JSON),
            8,
            BATCH_SIZE,
        ),
    }
    with contextlib.ExitStack() as stack:
        served = []
        for name in ("uvicorn", "granian"):
            buffer = stack.enter_context(servers.buffer(bench.folder / f"redis-{name}"))
            gateway = servers.gateway(bench.folder / name, buffer, by_granian=name == "granian")
            served.append((name, buffer, stack.enter_context(gateway)))
        for what, (path, bodies, connections, size) in kinds.items():
            found: dict[str, list[posting.Posts]] = {name: [] for name, _, _ in served}
            for run in range(-1, bench.runs):
                for name, buffer, one in served:
                    bench.say(f"{what}, run {max(0, run) + 1} of {bench.runs}: {name}")
                    before = buffer.appended()
                    posts = posting.post(one, path, bodies, bench.seconds, connections=connections)
                    _prove(buffer, before, posts.requests * size)
                    buffer.clear()
                    if run >= 0:  # before that, the warm-up
                        found[name].append(posts)
            uvicorn, granian = found["uvicorn"], found["granian"]
            yield Row(
                f"{what} by uvicorn, against granian",
                "requests/s" if size == 1 else "heartbeats/s",
                [one.per_second * size for one in uvicorn],
                [one.per_second * size for one in granian],
            )
            yield Row(
                "its p99", "ms", [one.p99_ms for one in uvicorn], [one.p99_ms for one in granian]
            )


@contextlib.contextmanager
def _memory(served: Served, buffer: Buffer) -> Iterator[list[float]]:
    """Resident MB of each second of the block; the streams are emptied meanwhile."""
    found: list[float] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(1):
            found.append(served.resident_mb())
            buffer.clear()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()


def _prove(buffer: Buffer, before: int, answered: int) -> None:
    """Verify that what was answered with 2xx was appended (or more: answers may be cut off)."""
    appended = buffer.appended() - before
    if appended < answered:
        raise load.FailedLoadError(
            f"{answered:,} heartbeats were answered with 200, {appended:,} were appended"
        )


def get(bench: Bench) -> Iterator[Row]:
    """GETs of lakes of several sizes, one client, one query after the other."""
    sizes = [MILLION, 10 * MILLION] + ([] if bench.quick else [100 * MILLION])
    count = 100 if bench.quick else 500
    hours: list[list[float]] = []
    # the same users in each lake: what has to be the same is a query's cost, and queries about
    # twelve users find their pages in the processor's cache whatever the lake
    same: dict[int, list[list[float]]] = {size: [] for size in sizes}
    few = lakes.users_of(sizes[0])
    whole: list[list[float]] = []
    cold = []
    with contextlib.ExitStack() as stack:
        mine = stack.enter_context(servers.buffer(bench.folder / "a"))
        clients = {}
        for size in sizes:
            lake = lakes.lake_of(size, HOME, bench.say)
            home = bench.folder / f"ours-{size}"
            served = stack.enter_context(servers.gateway(home, mine, HB_LAKE=str(lake)))
            clients[size] = stack.enter_context(load.Client(served.port, served.api_key))
        for run in range(-1, bench.runs):
            for size, client in clients.items():
                bench.say(f"GET, run {max(0, run) + 1} of {bench.runs}: {size:,} rows")
                times = client.ask_all(load.hours(few, count, run))
                if run < 0:  # the warm-up
                    cold.append(times[0])
                    continue
                same[size].append(times)
                if size == 10 * MILLION:
                    users = lakes.users_of(size)
                    hours.append(client.ask_all(load.hours(users, count, run)))
                    whole.append(client.ask_all(load.whole_days(users, count // 5, run)))
    yield Row(
        "GET an hour of 10 M rows, p50",
        "ms",
        [load.percentile(one, 0.5) for one in hours],
        target=6,
        at_most=True,
    )
    yield Row(
        "its p99", "ms", [load.percentile(one, 0.99) for one in hours], target=25, at_most=True
    )
    yield Row("the first one after the start", "ms", [cold[1]])
    yield Row(
        "GET a whole day of 1 Hz, p50",
        "ms",
        [load.percentile(one, 0.5) for one in whole],
        target=15,
        at_most=True,
    )
    least, most = sizes[0], sizes[-1]
    yield Row(
        f"GET an hour of {most // MILLION} M rows against {least // MILLION} M, p50",
        "ms",
        [load.percentile(one, 0.5) for one in same[most]],
        [load.percentile(one, 0.5) for one in same[least]],
        1.3,
        at_most=True,
    )


def both(bench: Bench) -> Iterator[Row]:
    """Single POSTs at a moderate rate, alone and while GETs run in a loop."""
    size = 10 * MILLION
    bodies = load.heartbeats(5 * USERS, USERS)
    quiet, busy = [], []
    with (
        servers.buffer(bench.folder / "a") as mine,
        servers.gateway(
            bench.folder / "ours", mine, HB_LAKE=str(lakes.lake_of(size, HOME, bench.say))
        ) as served,
    ):

        def run() -> posting.Posts:
            return posting.post(
                served, ONE, bodies, bench.seconds, connections=16, pause_ms=PAUSE_MS
            )

        run()
        for number in range(bench.runs):
            bench.say(f"POST beside GETs, run {number + 1} of {bench.runs}")
            with load.asking(served, size):
                busy.append(run())
            quiet.append(run())
            mine.clear()
    yield Row(
        f"POST at {statistics.median(one.per_second for one in quiet):,.0f}/s while GETs run in a "
        "loop, against quiet, p99",
        "ms",
        [one.p99_ms for one in busy],
        [one.p99_ms for one in quiet],
        3,
        at_most=True,
    )


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "post": post,
    "proxy": proxy,
    "batch": batch,
    "get": get,
    "both": both,
    "server": server,
}


def main() -> int:
    """Measure and print the table; 1 with --strict when a target wasn't reached."""
    arguments = argparse.ArgumentParser(
        prog="bench.gateway", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    arguments.add_argument("--runs", type=int, default=5, help="measurements of each figure (5)")
    arguments.add_argument("--seconds", type=float, default=5, help="of each load (5)")
    arguments.add_argument("--only", nargs="+", choices=PARTS, help="some parts of the table")
    arguments.add_argument("--quick", action="store_true", help="no lake of 100 M rows, less time")
    arguments.add_argument("--json", action="store_true", help="print JSON, every run in it")
    arguments.add_argument("--strict", action="store_true", help="fail when a target isn't reached")
    chosen = arguments.parse_args()
    HOME.mkdir(exist_ok=True)
    if table.file_system(HOME) == "tmpfs":
        print(f"bench: {HOME} lies in memory, where fsync costs nothing", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    console = Console(stderr=True)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=HOME))
    report = Report(table.machine(HOME), NOTES)
    try:
        with console.status("") as status:
            bench = Bench(folder, chosen.runs, chosen.seconds, chosen.quick, status.update)
            for name in chosen.only or PARTS:
                report.rows += PARTS[name](bench)
    except KeyboardInterrupt:
        return 130
    except load.FailedLoadError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if chosen.json:
        print(report.json())
    else:
        report.show(Console(width=None if sys.stdout.isatty() else 200))
    return int(chosen.strict and not report.good)


if __name__ == "__main__":
    sys.exit(main())
