"""Rate limits per API key, user and IP address, and what a refused client is told.

The policies from the settings, the subjects that a request is charged to, 429 and the RateLimit
headers (draft-ietf-httpapi-ratelimit-headers). The algorithm (GCRA), and how processes share it,
are in `buffer.rate_limit`.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hb_assets.buffer.rate_limit import Denial, Limiter, Policy, Subject
from hb_assets.core.settings import Quota, Settings
from hb_assets.gateway.auth.access import PRINCIPAL
from hb_assets.gateway.http.problems import ProblemError

Headers: TypeAlias = list[tuple[bytes, bytes]]

POLICIES = ("key", "ip", "user", "key-queries", "ip-queries")
_NETWORK_BITS = 64
"""An IPv6 client has a whole network of this size, and is limited as one."""


class Limits:
    """The limits of one gateway process."""

    def __init__(
        self, settings: Settings, limiter: Limiter, count: Callable[[str, int], None]
    ) -> None:
        """`count` is called for each refusal: the policy's name, and how many heartbeats it was."""
        self._limiter = limiter
        self._count = count

        def policy(name: str, quota: Quota | None) -> Policy | None:
            if quota is None:
                return None
            window_us = int(quota.window.total_seconds() * 1e6)
            return Policy(name, quota.amount, window_us, settings.shards)

        self._by_key = policy("key", settings.limit_key)
        self._by_ip = policy("ip", settings.limit_ip)
        self._by_user = policy("user", settings.limit_user)
        self._key_asks = policy("key-queries", settings.limit_queries)
        self._ip_asks = policy("ip-queries", settings.limit_queries)

    def sender(self, scope: Scope) -> list[Subject]:
        """The subjects that all heartbeats of a request are charged to."""
        return _subjects(scope, self._by_key, self._by_ip)

    def asker(self, scope: Scope) -> list[Subject]:
        """The subjects that a query is charged to, at a cost of 1."""
        return _subjects(scope, self._key_asks, self._ip_asks)

    def with_user(self, sender: list[Subject], user: str) -> list[Subject]:
        """The subjects that one heartbeat is charged to: its sender and its user."""
        return sender if self._by_user is None else [*sender, self._by_user.subject(user)]

    def admit(self, subjects: Sequence[Subject], cost: int = 1) -> None:
        """Admit a request that costs each of the subjects `cost`.

        Raises:
            ProblemError: 429, when one of them has to wait; it costs nobody anything then.
        """
        denial = self._limiter.admit([(subject, cost) for subject in subjects])
        if denial is not None:
            self._count(denial.subject.policy.name, cost)
            raise self._refusal(denial)

    def over(self, users: Mapping[str, int]) -> dict[str, Denial]:
        """Admit each user's heartbeats, all or none; returns the users that have to wait."""
        if self._by_user is None:
            return {}
        denied = self._limiter.admit_each(self._by_user, users)
        for user in denied:
            self._count("user", users[user])
        return denied

    def warnings(self, subjects: Sequence[Subject]) -> Headers:
        """As `headers`, once one of the subjects has less than half of its quota left.

        A header costs uvicorn 0.8 us, and both together cost 8 % of a single heartbeat.
        """
        return self.headers(subjects) if self._limiter.is_low(subjects) else []

    def headers(self, subjects: Sequence[Subject]) -> Headers:
        """The headers RateLimit and RateLimit-Policy of the subjects, where there are any."""
        if not subjects:
            return []
        states = self._limiter.states(subjects)
        limit = ", ".join([f'"{name}";r={left};t={reset}' for name, left, reset in states])
        return [
            (b"ratelimit", limit.encode()),
            (b"ratelimit-policy", _policies(tuple([one.policy for one in subjects]))),
        ]

    def _refusal(self, denial: Denial) -> ProblemError:
        headers = {name.decode(): value.decode() for name, value in self.headers([denial.subject])}
        return ProblemError(
            429,
            KIND,
            TITLE,
            f"{denied(denial)}; Retry-After says when",
            retry_after=denial.seconds,
            headers=headers,
            members={"policy": denial.subject.policy.name},
        )


KIND = "rate-limited"
TITLE = "Too much in too short a time"


def denied(denial: Denial) -> str:
    """The message for a client that has to wait."""
    policy = denial.subject.policy
    what = "queries" if policy.name.endswith("queries") else "heartbeats"
    window = policy.window_us / 1e6
    return (
        f"this {_WHOM[policy.name]} may send {policy.quota:,} {what} in {window:g} s: "
        "send it again later"
    )


def all_denied(seconds: float, members: Mapping[str, object]) -> ProblemError:
    """The 429 of a batch whose users all have to wait."""
    detail = "each user of the batch has sent too much; `refused` lists every heartbeat"
    return ProblemError(429, KIND, TITLE, detail, retry_after=seconds, members=members)


class Asking:
    """A handler of queries, with its rate limit around it."""

    def __init__(self, handler: ASGIApp, limits: Limits) -> None:
        self._handler = handler
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless the client has to wait.

        Raises:
            ProblemError: 429.
        """
        asker = self._limits.asker(scope)
        self._limits.admit(asker)

        async def told(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._limits.headers(asker)]
            await send(message)

        await self._handler(scope, receive, told)


_WHOM = {
    "key": "API key",
    "ip": "address",
    "user": "user",
    "key-queries": "API key",
    "ip-queries": "address",
}


def _subjects(scope: Scope, by_key: Policy | None, by_ip: Policy | None) -> list[Subject]:
    found = []
    principal = scope.get(PRINCIPAL)
    if by_key is not None and principal is not None and principal.key_id is not None:
        found.append(by_key.subject(principal.key_id))
    client = scope["client"]
    if by_ip is not None and client:
        found.append(by_ip.subject(_network(client[0])))
    return found


@lru_cache(maxsize=2**16)
def _network(host: str) -> str:
    """The part of an address that is limited as one: an IPv4 address, or an IPv6 network."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        if mapped is not None:
            return str(mapped)
        return str(ipaddress.ip_network((address, _NETWORK_BITS), strict=False))
    return str(address)


@lru_cache(maxsize=64)
def _policies(policies: tuple[Policy, ...]) -> bytes:
    """Value of RateLimit-Policy: quota and window (whole seconds) of each."""
    return ", ".join(
        f'"{one.name}";q={one.quota};w={max(1, math.ceil(one.window_us / 1e6))}' for one in policies
    ).encode()
