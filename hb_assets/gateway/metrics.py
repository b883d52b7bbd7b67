"""Metrics: what the gateway tells Prometheus.

Belongs here: names, labels and buckets, and the GET /metrics answer. Doesn't belong here: the
places that count. Every label has few values: nothing out of a request becomes one unchecked.
One registry per application, counted in this process.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from hb_assets.buffer.depth import ShardDepth
from hb_assets.errors import HbError
from hb_assets.gateway.backend import Backend
from hb_assets.gateway.spool import Holdings

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds of the latency histogram, seconds."""

_log = logging.getLogger(__name__)


class Metrics:
    """All metrics of one application."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "hb_http_requests",
            "Requests by route, method and status (499: the client went away).",
            ("route", "method", "status"),
            registry=registry,
        )
        self._latency = Histogram(
            "hb_http_request_seconds",
            "Time from a request's head to the end of its answer.",
            ("route", "method"),
            buckets=BUCKETS,
            registry=registry,
        )
        self.accepted = Counter(
            "hb_heartbeats_accepted",
            "Heartbeats that the buffer or the spool took.",
            registry=registry,
        )
        self._refused = Counter(
            "hb_heartbeats_refused",
            "Heartbeats refused, by reason.",
            ("reason",),
            registry=registry,
        )
        self._rate_limited = Counter(
            "hb_rate_limited",
            "Heartbeats (or questions) that a rate limit refused, by its policy.",
            ("policy",),
            registry=registry,
        )
        self.unknown_fields = Counter(
            "hb_unknown_fields", "Fields of heartbeats that were ignored.", registry=registry
        )
        self.buffer_up = Gauge(
            "hb_buffer_up",
            "Whether Redis answered when these metrics were read.",
            registry=registry,
        )
        shard = ("shard",)
        self._depth = {
            name: Gauge(f"hb_buffer_{name}", text, shard, registry=registry)
            for name, text in (
                ("entries", "Entries in the buffer."),
                ("heartbeats", "Heartbeats in the buffer."),
                ("bytes", "Bytes of NDJSON in the buffer."),
                ("pending", "Entries that were handed out and not acknowledged."),
                ("foreign", "Entries of other producers, which the bound doesn't hold off."),
                ("lost", "Entries that were deleted before they were drained: data loss."),
            )
        }
        self._oldest = Gauge(
            "hb_buffer_oldest_seconds", "Age of the oldest entry.", shard, registry=registry
        )
        self._spool = {
            name: Gauge(f"hb_spool_{name}", text, registry=registry)
            for name, text in (
                ("heartbeats", "Heartbeats that wait in the spool for Redis."),
                ("bytes", "Bytes of NDJSON in the spool."),
                ("most_bytes", "Bytes of NDJSON that the spool may hold."),
                ("damaged_records", "Records of the spool that were set aside as damaged."),
                ("damaged_files", "Databases of the spool that can't be read."),
            )
        }
        self.spool_up = Gauge(
            "hb_spool_up",
            "Whether the spool could be used when these metrics were read.",
            registry=registry,
        )
        self._replayed = Counter(
            "hb_spool_replayed",
            "Heartbeats that Redis took over from the spool.",
            registry=registry,
        )
        self._replayed_before = 0
        # labels() takes a lock and builds a key of texts; a hot path does that once per label set.
        self._request_cells: dict[tuple[str, str, int], Counter] = {}
        self._latency_cells: dict[tuple[str, str], Histogram] = {}

    def request(self, route: str, method: str, status: int, elapsed: float) -> None:
        """Count one answered request; `elapsed` in seconds."""
        counted = self._request_cells.get((route, method, status))
        if counted is None:
            counted = self._requests.labels(route, method, str(status))
            self._request_cells[route, method, status] = counted
        counted.inc()
        timed = self._latency_cells.get((route, method))
        if timed is None:
            timed = self._latency.labels(route, method)
            self._latency_cells[route, method] = timed
        timed.observe(elapsed)

    def refused(self, reason: str, count: int = 1) -> None:
        """Count refused heartbeats by reason code."""
        self._refused.labels(reason).inc(count)

    def rate_limited(self, policy: str, cost: int) -> None:
        """Count what a limit refused: `cost` heartbeats, or questions."""
        self._rate_limited.labels(policy).inc(cost)

    def depths(self, depths: Sequence[ShardDepth]) -> None:
        """Set the buffer's gauges."""
        now = time.time()
        for depth in depths:
            shard = f"{depth.shard:02d}"
            for name, gauge in self._depth.items():
                gauge.labels(shard).set(getattr(depth, name))
            oldest = 0.0 if depth.oldest_ms is None else max(0.0, now - depth.oldest_ms / 1000)
            self._oldest.labels(shard).set(oldest)

    def spool(self, held: Holdings) -> None:
        """Set the spool's gauges and counter: those of its file, whichever process counts."""
        for name, gauge in self._spool.items():
            gauge.set(getattr(held, name))
        # a spool that was begun anew counts from 0 again
        self._replayed.inc(max(0, held.replayed - self._replayed_before))
        self._replayed_before = held.replayed


class Exposition:
    """GET /metrics."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics

    async def get(self, _request: Request) -> Response:
        """Prometheus' text format; the gauges are read now, or keep their last values."""
        try:
            self._metrics.depths(await self._backend.depths())
            self._metrics.buffer_up.set(1)
        except HbError as error:
            _log.debug("metrics without the buffer's depth: %s", error)
            self._metrics.buffer_up.set(0)
        try:
            held = await self._backend.holdings()
            self._metrics.spool_up.set(held is not None)
            if held is not None:
                self._metrics.spool(held)
        except HbError as error:
            _log.debug("metrics without the spool: %s", error)
            self._metrics.spool_up.set(0)
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)
