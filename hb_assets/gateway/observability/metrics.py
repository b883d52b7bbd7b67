"""Prometheus metrics of the gateway: names, labels, buckets, counting, and GET /metrics.

The memory in which workers count together is in `tallies`. Every label has few values, and all are
known beforehand: nothing out of a request becomes one.

A request counts in plain numbers, which costs it half a microsecond; they become Prometheus' format
when somebody reads them. Figures of other processes come from where those leave them: Redis'
ledgers and liveness timestamps, the lake's footers, the spool's file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from http import HTTPStatus
from itertools import accumulate
from typing import Literal, get_args

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from hb_assets.buffer import liveness
from hb_assets.buffer.depth import Depths
from hb_assets.buffer.liveness import DAGSTER, Liveness
from hb_assets.core.errors import HbError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import rate_limits
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.http import background, connections, problems
from hb_assets.gateway.observability.health import Health
from hb_assets.gateway.observability.tallies import Tallies
from hb_assets.gateway.spool.queue import Holdings
from hb_assets.lake.integrity.known_faults import Fault, Kind
from hb_assets.lake.survey import Survey
from hb_assets.pipeline import vitals

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of the latency histogram, seconds."""

OTHER = "other"
"""Value of a label for whatever isn't known beforehand."""
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
CLIENT_GONE = 499
"""Status of a request whose client went away (as nginx has it)."""
_CPU_SECONDS = 1.0
"""Between two looks at this process's CPU time."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Described:
    """One metric as docs/http.md lists it."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    text: str


def _table(*rows: tuple[str, str, str]) -> dict[str, Described]:
    """Metrics by name; an end of _total means a counter, :histogram (cut off) a histogram."""
    table = {}
    for name, labels, text in rows:
        kind: Literal["counter", "gauge", "histogram"] = "gauge"
        if name.endswith("_total"):
            kind = "counter"
        name, separator, _ = name.partition(":")
        if separator:
            kind = "histogram"
        table[name] = Described(name, kind, tuple(labels.split()), text)
    return table


_ID_CODES = ("missing", "wrong_type", "wrong_length")
TABLE = _table(
    # -- this gateway, all of its workers
    (
        "hb_http_requests_total",
        "route method status",
        "Requests by route, method and status (499: the client went away).",
    ),
    (
        "hb_http_request_seconds:histogram",
        "route method",
        "Time from a request's head to the end of its answer.",
    ),
    (
        "hb_connections_refused_total",
        "reason",
        "Connections that were closed before a request was whole, by reason.",
    ),
    ("hb_heartbeats_accepted_total", "", "Heartbeats that the buffer or the spool took."),
    ("hb_heartbeats_refused_total", "reason", "Heartbeats refused, by reason."),
    ("hb_rate_limited_total", "policy", "Heartbeats (or queries) that a rate limit refused."),
    ("hb_unknown_fields_total", "", "Fields of heartbeats that were ignored."),
    ("hb_gateway_workers", "", "Workers of this gateway."),
    ("process_cpu_seconds_total", "", "CPU time of all workers of this gateway."),
    ("process_resident_memory_bytes", "", "Resident memory of all workers, summed up."),
    ("process_open_fds", "", "Open file descriptors of all workers."),
    # -- health
    (
        "hb_healthy",
        "part",
        "Whether a part of /health/ready is well: it neither fails nor is an alarm.",
    ),
    # -- the buffer
    ("hb_buffer_up", "", "Whether Redis answered when these metrics were read."),
    ("hb_buffer_unusable", "shard", "Whether something else lies at one of the shard's keys."),
    ("hb_buffer_entries", "shard", "Entries in the buffer."),
    ("hb_buffer_heartbeats", "shard", "Heartbeats in the buffer."),
    ("hb_buffer_bytes", "shard", "Bytes of NDJSON in the buffer."),
    ("hb_buffer_pending", "shard", "Entries that were handed out and not acknowledged."),
    (
        "hb_buffer_external",
        "shard",
        "Entries of other producers, which the bound doesn't hold off.",
    ),
    ("hb_buffer_lost", "shard", "Entries that were deleted before they were drained: data loss."),
    ("hb_buffer_oldest_seconds", "shard", "Age of the oldest entry; 0 where there is none."),
    ("hb_buffer_consumers", "shard", "Drainers that the consumer group knows."),
    ("hb_buffer_dead_consumers", "shard", "Those with claimed entries that are gone."),
    ("hb_buffer_appended_total", "shard", "Heartbeats that were ever appended, by the ledger."),
    ("hb_drained_total", "shard", "Heartbeats that were ever acknowledged, by the ledger."),
    # -- drains, anywhere
    (
        "hb_drain_age_seconds",
        "shard",
        "Time since a drain looked for entries of the shard; 0 before the first.",
    ),
    (
        "hb_drain_neglected_seconds",
        "shard",
        "How long entries have waited without a drain that looked for them.",
    ),
    ("hb_drain_seconds:histogram", "", "Time of drain cycles that drained anything."),
    (
        "hb_drain_flushes_total",
        "reason",
        "Such cycles by what ended their claim: a bound (rows, bytes, entries), age, or all was there.",
    ),
    ("hb_drain_rows_total", "", "Rows that drains wrote into fragments."),
    ("hb_drain_entries_total", "", "Entries that drains acknowledged."),
    ("hb_drain_fragments_total", "", "Fragments that drains published."),
    ("hb_drain_unknown_fields_total", "", "Fields of external entries that drains ignored."),
    ("hb_quarantined_total", "reason", "Records that drains put into the quarantine, by reason."),
    # -- consolidations, anywhere
    (
        "hb_consolidation_seconds:histogram",
        "",
        "Time of consolidations, of a day or of some of its shards.",
    ),
    (
        "hb_consolidations_total",
        "outcome",
        "Consolidations, of a day or of some of its shards: done or failed.",
    ),
    ("hb_consolidation_rows_total", "", "Rows that consolidations wrote."),
    (
        "hb_consolidation_overdue_seconds",
        "",
        "How far the oldest pending fragment is beyond its HB_CONSOLIDATE_MAX_AGE.",
    ),
    (
        "hb_dagster_age_seconds",
        "",
        "Time since the last tick of Dagster's buffer sensor; 0 before the first.",
    ),
    # -- the lake
    ("hb_lake_up", "", "Whether the lake's folder could be written when these metrics were read."),
    ("hb_lake_free_bytes", "", "Free space of its disk."),
    ("hb_lake_partitions", "", "Days that the lake holds anything of."),
    ("hb_lake_damaged_partitions", "", "Days with a fault that nobody has resolved."),
    (
        "hb_lake_faults",
        "kind",
        "Damage and loss in the lake that nobody has resolved, by kind.",
    ),
    ("hb_lake_fragments", "", "Raw fragments."),
    ("hb_lake_pending_fragments", "", "Raw fragments that aren't consolidated."),
    ("hb_lake_pending_bytes", "", "Bytes of them."),
    ("hb_lake_rows", "", "Distinct rows that were ever consolidated."),
    ("hb_lake_unique_rows", "", "Those of them that are in the consolidated files."),
    (
        "hb_lake_duplicate_rows",
        "kind",
        "Those that aren't: repeats and corrections; and replays, which aren't counted as rows.",
    ),
    ("hb_lake_bytes", "", "Bytes of the consolidated files."),
    (
        "hb_lake_write_amplification_ratio",
        "",
        "Rows that publications of the consolidated files wrote, for each row that came in.",
    ),
    # -- the spool
    ("hb_spool_up", "", "Whether the spool could be used when these metrics were read."),
    ("hb_spool_heartbeats", "", "Heartbeats that wait in the spool for Redis."),
    ("hb_spool_bytes", "", "Bytes of NDJSON in the spool."),
    ("hb_spool_most_bytes", "", "Bytes of NDJSON that the spool may hold."),
    ("hb_spool_damaged_records", "", "Records of the spool that were set aside as damaged."),
    ("hb_spool_damaged_files", "", "Databases of the spool that can't be read."),
    ("hb_spool_replayed_total", "", "Heartbeats that Redis took over from the spool."),
)

_RECORD_REASONS = (
    "record_not_json",
    "record_not_an_object",
    "record_duplicate_field",
    *(f"{field}_{code}" for field in ("user_id", "device_id") for code in _ID_CODES),
    "timestamp_missing",
    "timestamp_wrong_type",
    "timestamp_not_a_time",
    "timestamp_too_old",
    "timestamp_in_the_future",
    "heart_rate_missing",
    "heart_rate_wrong_type",
    "heart_rate_out_of_range",
)
KNOWN: Mapping[str, Sequence[str]] = {
    "hb_connections_refused_total": connections.REASONS,
    "hb_heartbeats_refused_total": (
        *_RECORD_REASONS,
        "rate_limited",
        *problems.STORAGE_REASONS,
    ),
    "hb_rate_limited_total": rate_limits.POLICIES,
    "hb_drain_flushes_total": ("rows", "bytes", "entries", "age", "all"),
    "hb_quarantined_total": (*_RECORD_REASONS, "record_no_data", "record_poison"),
    "hb_consolidations_total": ("done", "failed"),
}
"""Values of the one label of these metrics: shown as 0 until they are counted, since Prometheus'
`increase` can't see a series' first step."""

_DEPTH = ("entries", "heartbeats", "bytes", "pending", "external", "lost", "consumers")
_SPOOL = ("heartbeats", "bytes", "most_bytes", "damaged_records", "damaged_files")
_LAKE = ("fragments", "pending_fragments", "pending_bytes", "rows", "bytes")
_DRAIN = ("rows", "entries", "fragments", "unknown_fields")

# -- the numbers of a worker's row: its pid, the series below, and a block for each route and method

_ACCEPTED = ("hb_heartbeats_accepted_total", "")
_UNKNOWN_FIELDS = ("hb_unknown_fields_total", "")
_CPU = ("process_cpu_seconds_total", "")
_LABELLED = (
    "hb_heartbeats_refused_total",
    "hb_rate_limited_total",
    "hb_connections_refused_total",
)
_PID = 0
_PLACES = {
    series: place
    for place, series in enumerate(
        (
            _ACCEPTED,
            _UNKNOWN_FIELDS,
            _CPU,
            *((name, label) for name in _LABELLED for label in (*KNOWN[name], OTHER)),
        ),
        start=1,
    )
}
_STATUSES = (OTHER, *map(int, HTTPStatus), CLIENT_GONE)
_STATUS = {status: place for place, status in enumerate(_STATUSES)}
_SECONDS = len(_STATUSES)
_BUCKETS = _SECONDS + 1
_BLOCK = _BUCKETS + len(BUCKETS) + 1
"""How often each status was answered, the seconds, and what fell into each bucket and above."""


class Metrics:
    """What this worker counts; for its event loop."""

    def __init__(self, tallies: Tallies | None = None) -> None:
        self._tallies = tallies or Tallies()
        self._row = self._tallies.mine()
        self._row[_PID] = os.getpid()
        self._cpu_before = self._row[_PLACES[_CPU]]
        self._shown: set[tuple[str, str]] = set()
        self._blocks: dict[str, dict[str, int]] = {}

    def expect(self, routes: Mapping[str, Collection[str]]) -> None:
        """Count by these routes; requests of their methods are shown before there were any."""
        place = 1 + len(_PLACES)
        for route in (*routes, OTHER):
            self._shown.update((route, method) for method in routes.get(route, ()))
            self._blocks[route] = {}
            for method in (*METHODS, OTHER):
                self._blocks[route][method] = place
                place += _BLOCK
        assert place <= len(self._row)

    def request(self, path: str, method: str, status: int, elapsed: float) -> None:
        """Count one answered request; `elapsed` in seconds."""
        methods = self._blocks.get(path) or self._blocks[OTHER]
        block = methods.get(method) or methods[OTHER]
        self._row[block + _STATUS.get(status, 0)] += 1
        self._row[block + _SECONDS] += elapsed
        self._row[block + _BUCKETS + bisect_left(BUCKETS, elapsed)] += 1

    def accepted(self, count: int = 1) -> None:
        """Count heartbeats that the buffer or the spool took."""
        self._row[_PLACES[_ACCEPTED]] += count

    def unknown_fields(self, count: int) -> None:
        """Count fields of heartbeats that were ignored."""
        self._row[_PLACES[_UNKNOWN_FIELDS]] += count

    def refused(self, reason: str, count: int = 1) -> None:
        """Count refused heartbeats by reason code."""
        self._inc("hb_heartbeats_refused_total", reason, count)

    def rate_limited(self, policy: str, cost: int) -> None:
        """Count what a limit refused: `cost` heartbeats, or queries."""
        self._inc("hb_rate_limited_total", policy, cost)

    def connection_refused(self, reason: str) -> None:
        """Count a connection that was closed before a request was whole."""
        self._inc("hb_connections_refused_total", reason, 1)

    def _inc(self, name: str, label: str, count: int) -> None:
        place = _PLACES.get((name, label)) or _PLACES[name, OTHER]
        self._row[place] += count

    def measuring(self) -> AbstractAsyncContextManager[None]:
        """Context within which this process's CPU time is kept in its row.

        Nobody can ask for that of a process that is gone.
        """
        return background.running(self._measure_on())

    async def _measure_on(self) -> None:
        while True:
            self._measure()
            await asyncio.sleep(_CPU_SECONDS)

    def _measure(self) -> None:
        self._row[_PLACES[_CPU]] = self._cpu_before + time.process_time()

    def show(self, families: Families) -> None:
        """Show what all workers of this gateway counted."""
        self._measure()
        rows = self._tallies.rows()
        used = 1 + len(_PLACES) + len(self._blocks) * (len(METHODS) + 1) * _BLOCK
        sums = [sum(numbers) for numbers in zip(*(row[:used] for row in rows), strict=True)]
        for (name, label), place in _PLACES.items():
            if label != OTHER or sums[place]:
                families.set(name, sums[place], *filter(None, [label]))
        for route, methods in self._blocks.items():
            for method, place in methods.items():
                shown = (route, method) in self._shown
                self._show_requests(families, route, method, sums[place : place + _BLOCK], shown)
        _show_processes(families, [int(row[_PID]) for row in rows])

    def _show_requests(
        self, families: Families, route: str, method: str, block: list[float], shown: bool
    ) -> None:
        """Requests of one route and method; `shown`: before there were any, too."""
        if not shown and not any(block[:_SECONDS]):
            return
        for status, count in zip(_STATUSES, block, strict=False):
            if count or (shown and status == HTTPStatus.OK):
                families.set("hb_http_requests_total", count, route, method, str(status))
        families.observe(
            "hb_http_request_seconds", BUCKETS, block[_BUCKETS:], block[_SECONDS], route, method
        )


class Families(Collector):
    """Metric families, filled sample by sample, in the order of TABLE."""

    def __init__(self) -> None:
        self._found: dict[str, Metric] = {}

    def collect(self) -> Iterator[Metric]:
        """The families that have samples."""
        return iter([self._found[name] for name in TABLE if name in self._found])

    def describe(self) -> Iterable[Metric]:
        """Nothing that a registry would have to check."""
        return ()

    def set(self, name: str, value: float, *labels: str) -> None:
        """A sample of a counter or a gauge."""
        about = TABLE[name]
        kind = CounterMetricFamily if about.kind == "counter" else GaugeMetricFamily
        family = self._found.setdefault(name, kind(name, about.text, labels=about.labels))
        assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
        family.add_metric(labels, value)

    def observe(
        self,
        name: str,
        bounds: Sequence[float],
        numbers: Sequence[float],
        seconds: float,
        *labels: str,
    ) -> None:
        """A histogram: how many fell into each bucket and, as the last number, above them."""
        about = TABLE[name]
        family = self._found.setdefault(
            name, HistogramMetricFamily(name, about.text, labels=about.labels)
        )
        assert isinstance(family, HistogramMetricFamily)
        names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        buckets = list(zip(names, accumulate(numbers), strict=True))
        family.add_metric(labels, buckets, seconds)

    def text(self) -> bytes:
        """Prometheus' text format."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)


def _show_processes(families: Families, pids: Sequence[int]) -> None:
    """The workers that live; a row keeps the pid of one that was killed until another has it."""
    living = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            living.append((process.memory_info().rss, process.num_fds()))
    families.set("hb_gateway_workers", len(living))
    families.set("process_resident_memory_bytes", sum(memory for memory, _ in living))
    families.set("process_open_fds", sum(files for _, files in living))


def show_buffer(families: Families, depths: Depths, signs: Liveness, settings: Settings) -> None:
    """Metrics of the buffer and its drains."""
    for number in range(settings.shards):
        families.set("hb_buffer_unusable", number in depths.faults, f"{number:02d}")
    for depth in depths.states:
        shard = f"{depth.shard:02d}"
        for name in _DEPTH:
            families.set(f"hb_buffer_{name}", getattr(depth, name), shard)
        oldest = 0.0 if depth.oldest_ms is None else (signs.now_ms - depth.oldest_ms) / 1000
        families.set("hb_buffer_oldest_seconds", max(0.0, oldest), shard)
        dead = vitals.dead_consumers(depth, settings)
        families.set("hb_buffer_dead_consumers", dead, shard)
        families.set("hb_buffer_appended_total", depth.appended, shard)
        families.set("hb_drained_total", depth.acknowledged, shard)
        age = signs.age(liveness.drained(depth.shard)) or 0.0
        families.set("hb_drain_age_seconds", age, shard)
        neglected = vitals.neglected_seconds(depth, signs)
        families.set("hb_drain_neglected_seconds", neglected, shard)


def show_work(families: Families, signs: Liveness) -> None:
    """Metrics of drains and consolidations, wherever they ran."""
    for work in ("drain", "consolidation"):
        found = signs.labelled(f"{work}_le")
        names = [*(f"{bound:g}" for bound in liveness.BOUNDS), liveness.BEYOND]
        seconds = signs.counts.get(f"{work}_us", 0) / 1_000_000
        numbers = [found.get(name, 0) for name in names]
        families.observe(f"hb_{work}_seconds", liveness.BOUNDS, numbers, seconds)
    for name in _DRAIN:
        families.set(f"hb_drain_{name}_total", signs.counts.get(f"drained_{name}", 0))
    families.set("hb_consolidation_rows_total", signs.counts.get("consolidated_rows", 0))
    for name, count in (
        ("hb_drain_flushes_total", "drain_flushes"),
        ("hb_quarantined_total", "quarantined"),
        ("hb_consolidations_total", "consolidations"),
    ):
        numbers_by_label = dict.fromkeys(KNOWN[name], 0) | signs.labelled(count)
        for label, number in sorted(numbers_by_label.items()):
            families.set(name, number, label)
    families.set("hb_dagster_age_seconds", signs.age(DAGSTER) or 0.0)


def show_lake(families: Families, survey: Survey) -> None:
    """Metrics of the lake, from names and footers."""
    for name in _LAKE:
        families.set(f"hb_lake_{name}", getattr(survey, name))
    families.set("hb_lake_unique_rows", survey.unique)
    families.set("hb_lake_partitions", survey.days)
    families.set("hb_lake_damaged_partitions", len({fault.day for fault in survey.faults} - {None}))
    show_faults(families, survey.faults)
    kinds = {
        "repeat": survey.repeats,
        "correction": survey.corrections,
        "replay": survey.replayed,
    }
    for kind, rows in kinds.items():
        families.set("hb_lake_duplicate_rows", rows, kind)
    families.set("hb_lake_write_amplification_ratio", survey.write_amplification)
    families.set("hb_consolidation_overdue_seconds", survey.overdue_seconds)


def show_faults(families: Families, faults: Sequence[Fault]) -> None:
    """Known faults of the lake, each kind from the start."""
    counts = Counter(fault.kind for fault in faults)
    for kind in get_args(Kind):
        families.set("hb_lake_faults", counts[kind], kind)


def show_spool(families: Families, held: Holdings) -> None:
    """Metrics of the spool, from its file, whichever process counts."""
    for name in _SPOOL:
        families.set(f"hb_spool_{name}", getattr(held, name))
    families.set("hb_spool_replayed_total", held.replayed)


class Exposition:
    """GET /metrics."""

    def __init__(self, backend: Backend, metrics: Metrics, health: Health) -> None:
        self._backend = backend
        self._metrics = metrics
        self._health = health

    async def get(self, _request: Request) -> Response:
        """Prometheus' text format. What can't be read now is left out: the gauges `..._up` tell."""
        families = Families()
        self._metrics.show(families)
        for name, part in (await self._health.parts()).items():
            families.set("hb_healthy", part.healthy, name)
        await self._show_buffer(families)
        await self._show_lake(families)
        await self._show_spool(families)
        return Response(families.text(), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    async def _show_buffer(self, families: Families) -> None:
        try:
            depths = await self._backend.depths()
        except HbError as error:
            _log.debug("metrics without the buffer: %s", error)
            families.set("hb_buffer_up", 0)
            return
        families.set("hb_buffer_up", 1)
        try:
            signs = await self._backend.signs()
            show_work(families, signs)
        except HbError as error:
            _log.debug("metrics without liveness timestamps: %s", error)
            signs = Liveness(self._backend.now_ms())
        show_buffer(families, depths, signs, self._backend.settings)

    async def _show_lake(self, families: Families) -> None:
        try:
            disk = await self._backend.disk()
            families.set("hb_lake_free_bytes", disk.free)
            families.set("hb_lake_up", disk.unwritable is None)
        except (OSError, TimeoutError) as error:
            _log.debug("metrics without the lake: %s", error)
            families.set("hb_lake_up", 0)
            return
        survey = await self._backend.survey()
        if survey is None:
            show_faults(families, ())
        else:
            show_lake(families, survey)

    async def _show_spool(self, families: Families) -> None:
        try:
            held = await self._backend.holdings()
        except HbError as error:
            _log.debug("metrics without the spool: %s", error)
            held = None
        families.set("hb_spool_up", held is not None)
        if held is not None:
            show_spool(families, held)
