"""Limits: who is limited, and what a client is told of it.

Belongs here: the policies out of the settings, the subjects of a request (its API key, its address,
its users), 429 and the RateLimit headers (draft-ietf-httpapi-ratelimit-headers). Doesn't belong
here: the algorithm, and what crosses processes (`buffer.limits`).
"""

from __future__ import annotations

import hashlib
import ipaddress
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TypeAlias

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hb_assets.buffer.limits import Denial, Limiter, Policy, Subject
from hb_assets.gateway.access import PRINCIPAL
from hb_assets.gateway.problems import ProblemError
from hb_assets.record import shard_of
from hb_assets.settings import Quota, Settings

Headers: TypeAlias = list[tuple[bytes, bytes]]

_SUBJECTS = 2**16
"""Subjects whose digests are kept, not made anew for each request."""
_NETWORK_BITS = 64
"""An IPv6 client has a whole network of this size, and is limited as one."""


class Limits:
    """The limits of one gateway process."""

    def __init__(
        self, settings: Settings, limiter: Limiter, count: Callable[[str, int], None]
    ) -> None:
        """`count` is told of each refusal: the policy's name, and how many heartbeats it was."""
        self._limiter = limiter
        self._count = count
        self._by_key = _finder("key", settings.limit_key, settings.shards, str)
        self._by_ip = _finder("ip", settings.limit_ip, settings.shards, _network)
        self._by_user = _finder("user", settings.limit_user, settings.shards, str)
        self._key_asks = _finder("key-queries", settings.limit_queries, settings.shards, str)
        self._ip_asks = _finder("ip-queries", settings.limit_queries, settings.shards, _network)

    def sender(self, scope: Scope) -> list[Subject]:
        """Who sends heartbeats: the subjects that the whole of a request is charged to."""
        return _present(scope, self._by_key, self._by_ip)

    def asker(self, scope: Scope) -> list[Subject]:
        """Who asks for readings, at a cost of 1 a question."""
        return _present(scope, self._key_asks, self._ip_asks)

    def admit(
        self, subjects: Sequence[Subject], cost: int = 1, users: Mapping[str, int] | None = None
    ) -> None:
        """Admit a request that costs each of the subjects so much, and each user his own.

        Raises:
            ProblemError: 429, when one of them has to wait; it costs nobody anything then.
        """
        wanted = [(subject, cost) for subject in subjects]
        if users and self._by_user is not None:
            wanted += [(self._by_user(user), heartbeats) for user, heartbeats in users.items()]
        denial = self._limiter.admit(wanted)
        if denial is not None:
            self._count(denial.subject.policy.name, cost)
            raise self._refusal(denial)

    def over(self, users: Mapping[str, int]) -> dict[str, Denial]:
        """Admit each user's heartbeats, all or none of his; those who have to wait."""
        denied = {}
        if self._by_user is not None:
            for user, heartbeats in users.items():
                denial = self._limiter.admit([(self._by_user(user), heartbeats)])
                if denial is not None:
                    self._count("user", heartbeats)
                    denied[user] = denial
        return denied

    def headers(self, subjects: Iterable[Subject], user: str | None = None) -> Headers:
        """RateLimit and RateLimit-Policy of the subjects, where there are any."""
        found = [*subjects]
        if user is not None and self._by_user is not None:
            found.append(self._by_user(user))
        if not found:
            return []
        states = [(one.policy.name, *self._limiter.state(one)) for one in found]
        limit = ", ".join([f'"{name}";r={left};t={reset}' for name, left, reset in states])
        return [
            (b"ratelimit", limit.encode()),
            (b"ratelimit-policy", _policies(tuple([one.policy for one in found]))),
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
    """What a client is told who has to wait."""
    policy = denial.subject.policy
    what = "questions" if policy.name.endswith("queries") else "heartbeats"
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
    """A handler that answers questions, and its limit around it."""

    def __init__(self, handler: ASGIApp, limits: Limits) -> None:
        self._handler = handler
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, unless whoever asks has to wait.

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


_Finder: TypeAlias = Callable[[str], Subject]

_WHOM = {
    "key": "API key",
    "ip": "address",
    "user": "user",
    "key-queries": "API key",
    "ip-queries": "address",
}


def _finder(
    name: str, quota: Quota | None, shards: int, meant: Callable[[str], str]
) -> _Finder | None:
    """Finds the subject of a policy by a key's id, an address or a user; None: not limited."""
    if quota is None:
        return None
    policy = Policy(name, quota.amount, int(quota.window.total_seconds() * 1e6))

    @lru_cache(maxsize=_SUBJECTS)
    def subject(whom: str) -> Subject:
        text = meant(whom)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        return Subject(policy, shard_of(text, shards), digest)

    return subject


def _present(scope: Scope, by_key: _Finder | None, by_ip: _Finder | None) -> list[Subject]:
    found = []
    principal = scope.get(PRINCIPAL)
    if by_key is not None and principal is not None and principal.key_id is not None:
        found.append(by_key(principal.key_id))
    client = scope["client"]
    if by_ip is not None and client:
        found.append(by_ip(client[0]))
    return found


def _network(host: str) -> str:
    """What is limited as one address: an IPv4 address, or an IPv6 network."""
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
