"""All settings, read from environment variables; no other module reads the environment.

Every setting with its default, meaning and check, and the paths under HB_HOME. Nothing is opened
here (connections, files, lakes). docs/settings.md is generated from this file.
"""

from __future__ import annotations

import datetime as dt
import difflib
import grp
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self
from urllib.parse import urlsplit

import platformdirs
from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from hb_assets.core.days import parse_day
from hb_assets.core.errors import SettingsError
from hb_assets.core.record import TimeBounds

_UNITS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def _duration(value: object) -> object:
    """`500ms`, `90s`, `15m`, `6h`, `7d`, or a number of seconds."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*", value)
    if match is None:
        raise ValueError("not a duration like 500ms, 90s, 15m, 6h or 7d")
    try:
        return dt.timedelta(milliseconds=float(match[1]) * _UNITS[match[2] or "s"])
    except OverflowError:
        raise ValueError("longer than the calendar") from None


def _day(value: object) -> object:
    """A day like 2025-01-15 and nothing else: pydantic takes numbers for seconds, too."""
    return parse_day(value) if isinstance(value, str) else value


def _duration_text(value: dt.timedelta) -> str:
    ms = value // dt.timedelta(milliseconds=1)
    unit = next((unit for unit in ("d", "h", "m", "s") if ms and ms % _UNITS[unit] == 0), "ms")
    return f"{ms // _UNITS[unit]}{unit}"


_SIZES = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def _bytes(value: object) -> object:
    """`64MiB`, `1g`, or a plain number of bytes."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*(\d+)\s*([kmgt]?)(?:i?b)?\s*", value.lower())
    if match is None:
        raise ValueError("not a size like 65536, 64MiB or 1GiB")
    return int(match[1]) * _SIZES[match[2]]


def _bytes_text(value: int) -> str:
    for unit, name in (("t", "TiB"), ("g", "GiB"), ("m", "MiB"), ("k", "KiB")):
        if value >= _SIZES[unit] and value % _SIZES[unit] == 0:
            return f"{value // _SIZES[unit]}{name}"
    return str(value)


def _words(value: object) -> object:
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    return value


class Quota(NamedTuple):
    """A rate limit: an amount, at once or in each window."""

    amount: int
    window: dt.timedelta


def _quota(value: object) -> object:
    """`100000/10m`: an amount and the time in which it is there again; `off` for no limit."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() == "off":
        return None
    amount, slash, window = value.partition("/")
    if not slash or not amount.strip().isdecimal() or int(amount) < 1:
        raise ValueError("not a limit like 100000/10m, nor off")
    length = _duration(window if window.strip()[:1].isdigit() else f"1{window.strip()}")
    if not isinstance(length, dt.timedelta) or length <= dt.timedelta(0):
        raise ValueError("its time must be longer than 0")
    return Quota(int(amount), length)


def _quota_text(value: Quota | None) -> str:
    return "off" if value is None else f"{value.amount}/{_duration_text(value.window)}"


Duration = Annotated[
    dt.timedelta, BeforeValidator(_duration), PlainSerializer(_duration_text, return_type=str)
]
PositiveDuration = Annotated[Duration, Field(gt=dt.timedelta(0))]
Bytes = Annotated[int, BeforeValidator(_bytes), PlainSerializer(_bytes_text, return_type=str)]
Words = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(_words),
    PlainSerializer(",".join, return_type=str),
]
Limit = Annotated[
    Quota | None,
    NoDecode,
    BeforeValidator(_quota),
    PlainSerializer(_quota_text, return_type=str),
]
Port = Annotated[int, Field(ge=1, le=65535)]
Count = Annotated[int, Field(ge=1)]

PACKAGE = Path(__file__).resolve().parents[1]
SOCKET_PATH_BYTES = 100
"""Longest path that is safe as a unix socket's address (the kernel's bound is 104 to 108)."""


def default_home() -> Path:
    """`.hb` in the checkout, or the platform's data folder for an installed package."""
    checkout = PACKAGE.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "hb_assets_tests").is_dir():
        return checkout / ".hb"
    return Path(platformdirs.user_data_dir("hb_assets", appauthor=False))


class Settings(BaseSettings):
    """All settings; frozen. Built once per process and handed down."""

    model_config = SettingsConfigDict(
        env_prefix="HB_",
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        hide_input_in_errors=True,  # an URL holds a password
    )

    # -- places
    home: Path = Field(
        default_factory=default_home,
        description="Folder of everything that hb keeps: embedded server, Dagster's state, logs, "
        "and the lake unless HB_LAKE says otherwise. Default: `.hb` in the checkout, or the "
        "platform's data folder for an installed package.",
    )
    lake: str = Field(
        default="",
        description="The lake: a folder, or a file:// URL. Default: `lake` under HB_HOME.",
    )

    lake_group: str | None = Field(
        default=None,
        description="A group of this machine that may read the lake: its folders are made with mode "
        "2750 and its files with 0640. Default: for the user of hb alone (0700, 0600). It counts "
        "when the lake is made; docs/security.md says how to share one that is there.",
    )
    lake_group_writes: bool = Field(
        default=False,
        description="Members of HB_LAKE_GROUP may write, too (folders with mode 2770): for several "
        "users who run hb on one lake.",
    )

    # -- the record
    start_date: Annotated[dt.date, BeforeValidator(_day)] = Field(
        default=dt.date(2020, 1, 1),
        ge=dt.date(1970, 1, 1),
        description="First day that is accepted (UTC). All processes of one installation must agree "
        "on it.",
    )
    max_future: Duration = Field(
        default=dt.timedelta(hours=24),
        description="How far ahead of its arrival a timestamp may lie.",
    )
    device_priority: Words = Field(
        default=("device_a", "device_b"),
        description="Devices in order of trust, comma separated; it decides between readings of "
        "one user at exactly the same timestamp, in minute-level results only. Devices that "
        "aren't listed come last, by name.",
    )

    # -- the buffer (Redis)
    redis_url: SecretStr | None = Field(
        default=None,
        description="Redis to use: redis://, rediss:// (TLS) or unix://. Default: the embedded "
        "server, which hb starts and ends by itself.",
    )
    redis_ca: Path | None = Field(
        default=None, description="CA certificates (PEM) that a rediss:// server is checked with."
    )
    redis_cert: Path | None = Field(
        default=None, description="Client certificate (PEM) shown to a rediss:// server."
    )
    redis_key: Path | None = Field(
        default=None, description="Private key (PEM) of the client certificate."
    )
    redis_timeout: PositiveDuration = Field(
        default=dt.timedelta(seconds=5),
        description="How long one Redis command may take before it counts as failed.",
    )
    durability: Literal["fsync", "replicated", "memory"] = Field(
        default="fsync",
        description="What a 2xx answer is worth. fsync: Redis has the heartbeat on its disk, so "
        "that it survives a crash of Redis or of its machine, but not the loss of that disk or a "
        "failover to a replica that hasn't got it yet (the embedded server does; another one needs "
        "appendonly=yes and appendfsync=always, which is verified at start). replicated: the same, and "
        "HB_REPLICAS replicas have it on their disks (WAITAOF of Redis 7.2 or Valkey, asked for "
        "every append), so that it survives the loss of the primary too, if the replica that takes "
        "over is one of them. memory: Redis has it in memory; a crash of Redis may lose "
        "it.",
    )
    replicas: Count = Field(
        default=1,
        description="How many replicas have to confirm an append in mode replicated, within half "
        "of HB_REDIS_TIMEOUT; else it is refused (503), not spooled. Name as many as there are, and any of them "
        "may take over. Give them appendfsync=always: with everysec an answer takes a second. While "
        "Redis itself is away, a 2xx means this gateway's spool (HB_SPOOL_MAX_BYTES; 0: none).",
    )
    assume_fsync: bool = Field(
        default=False,
        description="Trust that the server fsyncs every write, where its CONFIG can't be asked.",
    )
    shards: int = Field(
        default=16,
        ge=1,
        le=100,
        description="Streams, fragment folders and consolidated files per day. The lake remembers "
        "its number and refuses another.",
    )
    buffer_max_heartbeats: Count = Field(
        default=4_000_000,
        description="Bound of the buffer in heartbeats, shared out evenly among the shards. Above "
        "it appends are refused (503 with Retry-After); nothing is ever trimmed.",
    )
    buffer_max_bytes: Annotated[Bytes, Field(ge=1024)] = Field(
        default=512 * 2**20, description="The same bound in bytes of NDJSON."
    )
    buffer_high_water: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Share of the bound above which the buffer raises an alarm.",
    )
    entry_max_heartbeats: Count = Field(
        default=500, description="Most heartbeats that our own appends put into one stream entry."
    )

    # -- the drain
    drain_max_rows: Count = Field(
        default=200_000,
        description="Heartbeats of one drain cycle: claimed, written, acknowledged.",
    )
    drain_max_bytes: Annotated[Bytes, Field(ge=1024)] = Field(
        default=64 * 2**20, description="The same bound in bytes of NDJSON."
    )
    drain_tick_seconds: float = Field(
        default=10.0,
        gt=0,
        le=45,
        description="How long one tick of the drain sensor goes on draining. Dagster ends a tick "
        "at 60 s.",
    )
    claim_min_idle: PositiveDuration = Field(
        default=dt.timedelta(seconds=60),
        description="How long an entry may be pending before another drainer takes it over. Must "
        "be longer than the two slowest cycles: an entry may be claimed while the cycle before its "
        "own is at work.",
    )
    poison_deliveries: Count = Field(
        default=5,
        description="An entry that was handed out more often than this is a suspect: it is decoded "
        "alone, in a process of its own, and goes to the quarantine if that fails.",
    )
    poison_memory: Annotated[Bytes, Field(ge=512 * 2**20)] = Field(
        default=2**30, description="Memory limit of the process that decodes suspects."
    )
    poison_seconds: float = Field(
        default=10.0,
        ge=1,
        le=15,
        description="CPU seconds that decoding one suspect may take, or each piece of a large one; "
        "by the clock, three times as many.",
    )
    drain_max_wait: Duration = Field(
        default=dt.timedelta(seconds=2),
        le=dt.timedelta(seconds=30),
        description="How long `hb drain --follow` gathers heartbeats, as long as they are fewer than "
        "a cycle may take: the longer, the fewer and larger the fragments, and the later anybody "
        "sees what is in them. Never more than a quarter of HB_CLAIM_MIN_IDLE or HB_HEALTH_DRAIN_AGE. The drain sensor "
        "gathers from one tick to the next.",
    )
    drain_poll: PositiveDuration = Field(
        default=dt.timedelta(milliseconds=200),
        description="Pause of `hb drain --follow` when it found nothing.",
    )

    # -- consolidation
    consolidate_min_rows: Count = Field(
        default=100_000, description="A day is consolidated when it has this many pending rows ..."
    )
    consolidate_ratio: float = Field(
        default=0.5,
        ge=0,
        description="... and this share of the rows that are consolidated already. A day that grows "
        "steadily is written about 1 + 1/share times over, and once more when it has ended.",
    )
    consolidate_max_age: Duration = Field(
        default=dt.timedelta(minutes=15),
        description="A past day is consolidated when its oldest pending fragment is older; that age "
        "begins when the day has ended.",
    )
    consolidate_max_age_today: Duration = Field(
        default=dt.timedelta(hours=6),
        description="The same for today and later, where more rows are still to come.",
    )
    max_pending_fragments: Count = Field(
        default=1000,
        description="A day is consolidated when a shard of it has more pending fragments.",
    )
    raw_keep: Duration = Field(
        default=dt.timedelta(days=7),
        description="How long raw fragments are kept after they were written, once a consolidated "
        "file includes them. As long as raw is kept a damaged consolidated file can be made anew.",
    )
    temp_keep: PositiveDuration = Field(
        default=dt.timedelta(hours=24),
        description="How long a temp file may lie in the lake before it counts as left by a crash.",
    )
    locks: Literal["file", "redis", "none"] = Field(
        default="file",
        description="What keeps consolidators from doing one day's work twice: lock files in the "
        "lake (processes of one machine), leases in Redis (several machines), or nothing. No row "
        "depends on it.",
    )
    lock_wait: PositiveDuration = Field(
        default=dt.timedelta(seconds=30),
        description="How long a consolidator waits for another one before it works beside it.",
    )
    duckdb_memory: Annotated[Bytes, Field(ge=64 * 2**20)] = Field(
        default=2**30,
        description="Memory limit of each DuckDB engine, and of all merges of a consolidation that "
        "go on side by side; what doesn't fit is spilled to disk.",
    )
    duckdb_threads: int = Field(
        default=0,
        ge=0,
        description="Threads of each DuckDB engine, and shards that a consolidation works on at "
        "once; 0: one per core.",
    )

    # -- the gateway
    gateway_host: str = Field(
        default="127.0.0.1",
        description="Address the gateway binds to. Any other than loopback needs an API key "
        "(`hb keys create`).",
    )
    gateway_names: Words = Field(
        default=(),
        description="Further names, comma separated, that a gateway without API keys may be asked "
        "by, besides localhost, 127.0.0.1, [::1] and HB_GATEWAY_HOST. With keys any name will do.",
    )
    gateway_port: Port = Field(default=8000, description="Port of the gateway.")
    gateway_cert: Path | None = Field(
        default=None,
        description="Certificate chain (PEM) of the gateway: with it, it serves TLS, and TLS alone.",
    )
    gateway_key: Path | None = Field(
        default=None, description="Private key (PEM, not encrypted) of that certificate."
    )
    gateway_workers: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description="Processes that serve the gateway's port together."
    )
    max_connections: Count = Field(
        default=4096, description="Most open connections of one worker; above it 503."
    )
    head_timeout: PositiveDuration = Field(
        default=dt.timedelta(seconds=10),
        description="How long a request line with its headers may take to come; above it 408.",
    )
    body_timeout: PositiveDuration = Field(
        default=dt.timedelta(seconds=60),
        description="How long a request body may take to come, or a client to go on reading its "
        "answer.",
    )
    bodies_max_bytes: Annotated[Bytes, Field(ge=2**20)] = Field(
        default=64 * 2**20,
        description="Bound of all request bodies that one worker receives at once, expanded, or "
        "takes apart as batches (in several times as much memory); above it 503.",
    )
    body_max_bytes: Annotated[Bytes, Field(ge=1024)] = Field(
        default=16 * 2**20, description="Largest request body."
    )
    batch_max_heartbeats: Count = Field(
        default=50_000, description="Most heartbeats in one batch request."
    )
    spool_max_bytes: Annotated[Bytes, Field(ge=0)] = Field(
        default=256 * 2**20,
        description="Bound of the spool, in bytes of NDJSON: what the gateway accepts onto its own "
        "disk (under HB_HOME) while Redis is away. Above it heartbeats are refused (503 with "
        "Retry-After). 0: no spool.",
    )
    limit_user: Limit = Field(
        default=Quota(100_000, dt.timedelta(minutes=10)),
        description="Most heartbeats of one user: this many at once, and then this many in that "
        "time, on and on; above it 429 with Retry-After. A day at 1 Hz is 86,400. Holds over all "
        "gateways of one Redis. `off`: no limit.",
    )
    limit_key: Limit = Field(
        default=Quota(60_000_000, dt.timedelta(minutes=1)),
        description="The same for what one API key sends, of whatever users.",
    )
    limit_ip: Limit = Field(
        default=Quota(60_000_000, dt.timedelta(minutes=1)),
        description="The same for what one address (IPv6: network of 64 bits) sends.",
    )
    limit_queries: Limit = Field(
        default=Quota(6_000, dt.timedelta(minutes=1)),
        description="Most queries (GET) of one API key, and of one address.",
    )
    trusted_proxies: Words = Field(
        default=(),
        description="Addresses or networks of reverse proxies, comma separated, whose "
        "X-Forwarded-For is believed; from anywhere else it is ignored.",
    )
    query_max_range: PositiveDuration = Field(
        default=dt.timedelta(days=31), description="Longest time range of one query."
    )
    query_max_points: Count = Field(
        default=100_000,
        description="Most points of one answer; one that has more says where the next page begins.",
    )
    fresh_max_bytes: Annotated[Bytes, Field(ge=1024)] = Field(
        default=32 * 2**20,
        description="Most bytes of NDJSON that a query with fresh=true reads out of the buffer. "
        "Where it holds more, such a query is refused (503) until it is drained.",
    )

    # -- health
    health_drain_age: Duration = Field(
        default=dt.timedelta(minutes=2),
        description="An alarm is raised when entries of a shard wait and no drain has looked for them "
        "for so long. 0, here and below: not watched.",
    )
    health_entry_age: Duration = Field(
        default=dt.timedelta(minutes=10),
        description="The same when the oldest entry of a shard isn't acknowledged for so long.",
    )
    health_consumer_idle: Duration = Field(
        default=dt.timedelta(minutes=2),
        description="The same when a drainer that has claimed entries isn't heard of for so long "
        "beyond HB_CLAIM_MIN_IDLE, and nobody takes them over.",
    )
    health_consolidation_delay: Duration = Field(
        default=dt.timedelta(hours=1),
        description="The same when a day isn't consolidated so long after its oldest pending "
        "fragment reached HB_CONSOLIDATE_MAX_AGE (or ..._TODAY).",
    )
    health_dagster_age: Duration = Field(
        default=dt.timedelta(minutes=2),
        description="The same when Dagster's daemon was there once, and no tick of its buffer "
        "sensor was seen for so long.",
    )
    health_free_space: Annotated[Bytes, Field(ge=0)] = Field(
        default=512 * 2**20,
        description="The same when the lake's disk has less free space.",
    )

    # -- the control room
    dagster_port: Port = Field(default=3000, description="Port of the Dagster UI, on 127.0.0.1.")
    dagster_names: Words = Field(
        default=(),
        description="Further names, comma separated, that the Dagster UI of `hb up` may be asked by, "
        "besides localhost, 127.0.0.1 and [::1]: that of a reverse proxy, for example.",
    )
    drain_sensor_interval: int = Field(
        default=5, ge=1, description="Seconds between ticks of the drain sensor, at best."
    )
    executor: str = Field(
        default="in_process",
        pattern=r"^(in_process|multiprocess|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$",
        description="What runs the steps of a Dagster run: `in_process`, one after the other; "
        "`multiprocess`, each in a process of its own; or another executor as `module:name`, such as "
        "`dagster_celery:celery_executor`. A machine that runs steps needs the same settings and the "
        "lake.",
    )
    alert_webhook: str | None = Field(
        default=None, description="URL that alarms are posted to as JSON; none by default."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe log lines that are written."
    )

    @field_validator("home")
    @classmethod
    def _folder(cls, home: Path) -> Path:
        try:
            return home.expanduser()
        except RuntimeError:
            raise ValueError("no such user's home folder") from None

    @field_validator("lake")
    @classmethod
    def _local(cls, lake: str) -> str:
        scheme, separator, _ = lake.partition("://")
        if separator and scheme != "file":
            raise ValueError("object stores can't be used yet; name a folder or a file:// URL")
        return lake

    @field_validator("lake_group")
    @classmethod
    def _known_group(cls, name: str | None) -> str | None:
        try:
            if name is not None:
                grp.getgrnam(name)
        except KeyError:
            raise ValueError(f"there is no group of this name on this machine: {name}") from None
        return name

    @field_validator("trusted_proxies")
    @classmethod
    def _networks(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for one in proxies:
            try:
                ipaddress.ip_network(one)
            except ValueError:
                raise ValueError(f"not an address or a network: {one}") from None
        return proxies

    @field_validator("gateway_names", "dagster_names")
    @classmethod
    def _host_names(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for one in names:
            if not re.fullmatch(r"[A-Za-z0-9._-]+", one):
                raise ValueError(f"not a host name (no port, no scheme): {one}")
        return names

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, secret: SecretStr | None) -> SecretStr | None:
        try:
            url = urlsplit(secret.get_secret_value() if secret else "redis://")
            known = url.scheme in ("redis", "rediss", "unix") and url.port != 0
        except ValueError:  # its text may hold a part of the password
            known = False
        if not known:
            raise ValueError("not a URL like redis://host:6379/0, rediss://… or unix:///path")
        return secret

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        tls = self.redis_url is not None and self.redis_url.get_secret_value().startswith("rediss:")
        if not tls and (self.redis_ca or self.redis_cert or self.redis_key):
            raise ValueError(
                "HB_REDIS_CA, HB_REDIS_CERT and HB_REDIS_KEY need a HB_REDIS_URL of rediss://"
            )
        if self.durability == "replicated" and self.redis_url is None:
            raise ValueError(
                "HB_DURABILITY=replicated needs a HB_REDIS_URL: the embedded server has no replicas"
            )
        if (self.redis_cert is None) != (self.redis_key is None):
            raise ValueError("HB_REDIS_CERT and HB_REDIS_KEY go together: set both or neither")
        if self.lake_group_writes and self.lake_group is None:
            raise ValueError("HB_LAKE_GROUP_WRITES needs a HB_LAKE_GROUP")
        if (self.gateway_cert is None) != (self.gateway_key is None):
            raise ValueError("HB_GATEWAY_CERT and HB_GATEWAY_KEY go together: set both or neither")
        return self

    @property
    def time_bounds(self) -> TimeBounds:
        """Accepted timestamps as the record's checks take them."""
        return TimeBounds.of(self.start_date, self.max_future)

    @property
    def home_dir(self) -> Path:
        """HB_HOME, absolute."""
        return self.home.absolute()

    @property
    def lake_dir(self) -> Path:
        """The lake's folder, absolute."""
        if not self.lake:
            return self.home_dir / "lake"
        path = urlsplit(self.lake).path if self.lake.startswith("file://") else self.lake
        return Path(path).expanduser().absolute()

    @property
    def run_dir(self) -> Path:
        """Sockets, locks and the state of a running `hb up`."""
        return self.home_dir / "run"

    @property
    def log_dir(self) -> Path:
        """Log files of the members of `hb up`."""
        return self.home_dir / "logs"

    @property
    def redis_dir(self) -> Path:
        """Data folder (AOF) of the embedded server."""
        return self.home_dir / "redis"

    @property
    def spool_dir(self) -> Path:
        """The gateway's spool."""
        return self.home_dir / "spool"

    @property
    def dagster_home(self) -> Path:
        """DAGSTER_HOME of `hb up`."""
        return self.home_dir / "dagster"

    @property
    def first_day_file(self) -> Path:
        """File that records the first day that Dagster has a partition of."""
        return self.home_dir / "first_day"

    @property
    def embedded(self) -> bool:
        """Whether the buffer is the embedded server."""
        return self.redis_url is None


def load(**overrides: object) -> Settings:
    """Settings out of the environment.

    Raises:
        SettingsError: one line that names each variable that can't be used, and why.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]  # pydantic checks the values
    except ValidationError as error:
        faults = []
        for fault in error.errors(include_url=False, include_input=False):
            name = "_".join(str(part) for part in fault["loc"] if isinstance(part, str))
            reason = fault["msg"].removeprefix("Value error, ")
            faults.append(f"HB_{name.upper()}: {reason}" if name else reason)
        raise SettingsError("settings: " + "; ".join(faults)) from None


def unknown() -> dict[str, str | None]:
    """HB_ variables of the environment that are no settings, each with the setting most like it."""
    known = [f"HB_{name.upper()}" for name in Settings.model_fields]
    return {
        name: next(iter(difflib.get_close_matches(name, known, n=1)), None)
        for name in sorted(os.environ)
        if name.startswith("HB_") and name not in known
    }


def environment(settings: Settings) -> dict[str, str]:
    """This process's environment with every setting spelled out, for children that must agree.

    Without HB_ variables that are no settings: it isn't for every child to warn about them again.
    """
    places = {"home": settings.home_dir, "lake": settings.lake_dir}
    stated: dict[str, str] = {}
    for name, value in settings.model_dump(mode="json").items():
        given = getattr(settings, name)
        if isinstance(given, SecretStr):
            value = given.get_secret_value()
        elif isinstance(given, Path):
            value = given.expanduser().absolute()
        # an empty variable means the default, which is None where the value is None
        stated[f"HB_{name.upper()}"] = "" if value is None else str(places.get(name, value))
    dropped = unknown()
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, **stated}
