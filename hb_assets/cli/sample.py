"""The sample of `hb up`: sends the simulated fleet's traffic, and checks that it adds up.

What the fleet expects (`demo.fleet`) is compared with what lies in the lake. The lake is read as
any user would read it, with Polars, so that the comparison doesn't rely on any of our own counts;
`audit` then checks those.
"""

from __future__ import annotations

import datetime as dt
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import polars as pl
import pyarrow as pa
from rich.table import Table
from rich.text import Text

from hb_assets.buffer import connection, depth, external
from hb_assets.buffer.connection import Client
from hb_assets.cli import output
from hb_assets.cli.backfill import follow
from hb_assets.cli.dagster_api import ControlRoom, Run
from hb_assets.core import days, record, schema
from hb_assets.core.errors import HbError
from hb_assets.core.schema import ARRIVAL, KEY
from hb_assets.core.settings import Settings
from hb_assets.demo import fleet
from hb_assets.demo.fleet import Figures, Fleet, Line
from hb_assets.gateway.auth import keyring
from hb_assets.gateway.http import tls
from hb_assets.lake.storage import layout, verified
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline.audit import audit

_NDJSON = {"content-type": "application/x-ndjson"}
_SEND_SECONDS = 120.0
_KEY_SECONDS = 20.0
_DRAIN_SECONDS = 180.0
"""Seconds that the buffer may stay unchanged before we say that nobody drains it."""
_POLL_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class DayResult:
    """One day of the sample: what was found, what the fleet expects, checks of Dagster's run."""

    day: dt.date
    found: Figures
    expected: Figures
    checks_passed: int
    checks: int


@dataclass(slots=True)
class Result:
    """The whole sample; it adds up when there are no differences."""

    gateway: str
    dagster: str
    days: list[DayResult] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    adds_up: bool = False


def run(settings: Settings, room: ControlRoom, gateway: str, dagster: str) -> Result:
    """Send the sample, have it drained, consolidated and checked, and compare.

    Raises:
        HbError: the gateway, the drain or Dagster doesn't do its part.
    """
    now_ms = time.time_ns() // 1_000_000
    made = fleet.simulate(now_ms, settings.time_bounds)
    lake = Lake.open(settings)
    with closing(connection.connect(settings)) as client:
        found = _send(made, settings, gateway, client)
        _wait_until_drained(client, settings)
        runs, checks = _consolidate(list(made.expected), room)
        result = Result(gateway, dagster)
        for day, expected in made.expected.items():
            figures = found[day]
            result.differences += _look_into_lake(lake, made, day, figures, now_ms)
            result.days.append(DayResult(day, figures, expected, *checks[day]))
        result.differences += _differences(result.days, runs)
        result.differences += audit(client, lake, settings).differences
    result.adds_up = not result.differences
    return result


def table(result: Result) -> Table:
    """The figures day by day, with their sums; what differs stands beside what was expected."""
    names = list(Figures.__dataclass_fields__)
    made = output.table("Sample, per day (UTC)", "day", *names, "checks")
    for one in result.days:
        found, expected = asdict(one.found), asdict(one.expected)
        made.add_row(
            one.day.isoformat(),
            *(_cell(found[name], expected[name]) for name in names),
            _cell(one.checks_passed, one.checks, " of "),
        )
    made.add_section()
    total, wanted = (
        _total([one.found for one in result.days]),
        _total([one.expected for one in result.days]),
    )
    made.add_row(
        "all",
        *(_cell(total[name], wanted[name]) for name in names),
        _cell(
            sum(one.checks_passed for one in result.days),
            sum(one.checks for one in result.days),
            " of ",
        ),
        style="bold",
    )
    return made


def _cell(found: int, expected: int, between: str = " \N{NOT EQUAL TO} ") -> Text:
    if found == expected:
        return Text(f"{found:,}")
    return Text(f"{found:,}{between}{expected:,}", style="red")


def _total(figures: Sequence[Figures]) -> dict[str, int]:
    return {
        name: sum(asdict(one)[name] for one in figures) for name in Figures.__dataclass_fields__
    }


def _send(made: Fleet, settings: Settings, gateway: str, client: Client) -> dict[dt.date, Figures]:
    """Send everything in order; returns what the gateway answered: sent, accepted, refused."""
    found = {day: Figures() for day in made.expected}
    total = sum(figures.sent for figures in made.expected.values())
    with (
        output.progress() as progress,
        _connected(settings, gateway) as http,
    ):
        task = progress.add_task("sending the sample", total=total)
        for post in made.posts:
            _post_batch(http, post, found)
            progress.advance(task, len(post))
        for line in made.singles:
            answer = _post(http, "/metrics/heart-rate", line.data)
            figures = found[line.day]
            figures.sent += 1
            figures.accepted += answer.is_success
            figures.refused += answer.status_code == httpx.codes.UNPROCESSABLE_ENTITY
            progress.advance(task)
        for entry in made.external:
            data = b"\n".join(line.data for line in entry.lines)
            external.append(client, record.shard_of(entry.user_id, settings.shards), data)
            for line in entry.lines:
                found[line.day].sent += 1
            progress.advance(task, len(entry.lines))
    output.note(f"sent {total:,} heartbeats")
    return found


@contextmanager
def _connected(settings: Settings, gateway: str) -> Iterator[httpx.Client]:
    """A client of the gateway, with a key of its own where the gateway asks for one."""
    verify = tls.client_context(settings)
    with (
        keyring.borrowed(settings, "sample of hb up", [keyring.INGEST]) as token,
        httpx.Client(base_url=gateway, timeout=30, trust_env=False, verify=verify) as http,
    ):
        if token is not None:
            http.headers["authorization"] = f"Bearer {token}"
            deadline = time.monotonic() + _KEY_SECONDS
            while _post(http, "/metrics/heart-rate", b"").status_code == httpx.codes.UNAUTHORIZED:
                if time.monotonic() > deadline:
                    raise HbError("the gateway doesn't take a new API key; see its log")
                time.sleep(_POLL_SECONDS)
        yield http


def _post_batch(http: httpx.Client, post: list[Line], found: dict[dt.date, Figures]) -> None:
    """Post a batch; what the buffer had no room for is posted again, when the gateway says."""
    for line in post:
        found[line.day].sent += 1
    waiting = post
    deadline = time.monotonic() + _SEND_SECONDS
    while waiting:
        body = b"\n".join(line.data for line in waiting)
        answer = _post(http, "/metrics/heart-rate/batch", body)
        try:
            refused = {one["index"]: one["retry"] for one in answer.json()["refused"]}
        except (ValueError, KeyError):
            refused = None
        if refused is None and answer.status_code != httpx.codes.TOO_MANY_REQUESTS:
            raise HbError(f"the gateway answered a batch with {answer.status_code}")
        again = []
        for index, line in enumerate(waiting):
            if refused is None or refused.get(index) is True:
                again.append(line)
            else:
                found[line.day].refused += index in refused
                found[line.day].accepted += index not in refused
        waiting = again
        if waiting:
            if time.monotonic() > deadline:
                raise HbError("the gateway takes no heartbeats: the buffer stays full; see its log")
            time.sleep(float(answer.headers.get("retry-after", "1")))


def _post(http: httpx.Client, path: str, body: bytes) -> httpx.Response:
    try:
        return http.post(path, content=body, headers=_NDJSON if path.endswith("batch") else {})
    except httpx.HTTPError as error:
        raise HbError(
            f"the gateway stopped answering ({type(error).__name__}); see its log"
        ) from None


def _wait_until_drained(client: Client, settings: Settings) -> None:
    """Wait for the drain sensor. Raises HbError when nothing moves for long."""
    with output.progress() as progress:
        task = progress.add_task("draining the buffer", total=None)
        least, moved = None, time.monotonic()
        while True:
            states = depth.depths(client, settings).states
            waiting = sum(state.pending + state.undelivered for state in states)
            if waiting == 0:
                break
            if least is None or waiting < least:
                least, moved = waiting, time.monotonic()
            buffered = sum(state.heartbeats for state in states)
            most = max(progress.tasks[0].total or 0, buffered)
            progress.update(task, total=most, completed=most - buffered)
            if time.monotonic() - moved > _DRAIN_SECONDS:
                raise HbError(
                    f"the buffer isn't drained: {waiting:,} entries wait for "
                    f"{_DRAIN_SECONDS:.0f} s already; is the drain sensor on?"
                )
            time.sleep(_POLL_SECONDS)
    output.note("the drain sensor emptied the buffer")


def _consolidate(
    wanted: list[dt.date], room: ControlRoom
) -> tuple[list[Run], dict[dt.date, tuple[int, int]]]:
    """Have Dagster consolidate and check each day; the runs, and checks (passed, all) by day."""
    room.wait_for_partition(min(wanted))
    ids = [room.launch(day) for day in wanted]

    def poll() -> tuple[list[Run], bool]:
        runs = room.runs(ids)
        return runs, len(runs) == len(ids)

    runs = follow("consolidating and checking", poll, expected=len(ids))
    ended = sum(run.succeeded for run in runs)
    output.note(f"{ended} of {len(ids)} Dagster runs consolidated and checked their day")
    return runs, {run.day: room.checks(run.run_id) for run in runs}


def _look_into_lake(
    lake: Lake, made: Fleet, day: dt.date, figures: Figures, since_ms: int
) -> list[str]:
    """Count the sample's rows of a day in the lake's Parquet; values that differ from the fleet's.

    Fills in what the gateway's answers couldn't say; heartbeats of external entries that became
    rows count as accepted.
    """
    ours = pl.col("user_id").is_between(pl.lit(made.prefix), pl.lit(made.prefix + "~"))
    raw = _rows(layout.day_folder(lake.root, layout.RAW, day), schema.HEARTBEATS, ours)
    raw = raw.unique(ARRIVAL).sort(*KEY, *ARRIVAL)
    follows = pl.all_horizontal(pl.col(name) == pl.col(name).shift(-1) for name in KEY)
    same = pl.col("heart_rate") == pl.col("heart_rate").shift(-1)
    superseded = raw.select(follows.alias("gone"), same.alias("same"))
    figures.repeats = superseded.filter(pl.col("gone") & pl.col("same")).height
    figures.corrections = superseded.filter(pl.col("gone") & ~pl.col("same")).height

    kept = _rows(layout.day_folder(lake.root, layout.HEARTBEATS, day), schema.HEARTBEATS, ours)
    figures.unique = kept.height
    strangers = {entry.user_id for entry in made.external}
    figures.accepted += raw.filter(pl.col("user_id").is_in(strangers)).height

    bad = [
        line.data
        for entry in made.external
        for line in entry.lines
        if line.day == day and not line.valid
    ]
    for arrived in days.days_between(since_ms, time.time_ns() // 1_000_000 + 1):
        folder = layout.day_folder(lake.root, layout.QUARANTINE, arrived)
        held = _rows(folder, schema.QUARANTINE, pl.col("raw").is_in(bad))
        figures.quarantined += held.unique(ARRIVAL).height

    expected = {key: bpm for key, bpm in made.survivors.items() if days.day_of(key[2]) == day}
    stored = {
        (user, device, instant): bpm
        for user, device, instant, bpm in kept.select(
            "user_id", "device_id", pl.col("timestamp").dt.epoch("ms"), "heart_rate"
        ).iter_rows()
    }
    wrong = len(expected.items() ^ stored.items())
    return [f"{day}: {wrong:,} heartbeats differ from those that were sent"] if wrong else []


def _rows(folder: Path, schema: pa.Schema, which: pl.Expr) -> pl.DataFrame:
    """Rows of all Parquet files below a folder of the lake that satisfy `which`."""
    files = sorted(folder.glob("**/[!.]*.parquet"))
    rows = [pl.DataFrame(rows).filter(which) for rows in verified.tables(files)]
    return pl.concat([pl.DataFrame(schema.empty_table()), *rows])


def _differences(results: Sequence[DayResult], runs: Sequence[Run]) -> list[str]:
    lines = [
        f"{one.day}: {name}: found {found:,}, expected {asdict(one.expected)[name]:,}"
        for one in results
        for name, found in asdict(one.found).items()
        if found != asdict(one.expected)[name]
    ]
    lines += [
        f"{run.day}: its Dagster run ended as {run.status}" for run in runs if not run.succeeded
    ]
    lines += [
        f"{one.day}: {one.checks_passed} of {one.checks} checks passed"
        for one in results
        if one.checks_passed < one.checks or not one.checks
    ]
    return lines
