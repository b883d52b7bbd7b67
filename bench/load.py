"""Bodies to post, and GETs by one client with the times that their answers took.

POSTs are sent by `posting` and `pace`.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import lakes
from bench.servers import Served

JSON = "application/json"
NDJSON = "application/x-ndjson"


class FailedLoadError(Exception):
    """The load got wrong answers, so that its figures mean nothing."""


def heartbeats(count: int, users: int, seed: int = 7) -> list[str]:
    """JSON texts of heartbeats of many users in turn, each user at 1 Hz; the same every time."""
    chance = random.Random(seed)
    rate = [chance.randrange(55, 100) for _ in range(users)]
    texts = []
    for number in range(count):
        user, second = number % users, number // users % 86_400
        rate[user] = min(180, max(45, rate[user] + chance.randrange(-2, 3)))
        clock = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        texts.append(
            f'{{"user_id":"user-{user:06}","device_id":"device_a",'
            f'"timestamp":"2025-01-15T{clock}Z","heart_rate":{rate[user]}}}'
        )
    return texts


def batches(texts: Sequence[str], size: int, content_type: str) -> list[str]:
    """Bodies of `size` heartbeats each."""
    parts = [texts[start : start + size] for start in range(0, len(texts), size)]
    if content_type == NDJSON:
        return ["\n".join(part) + "\n" for part in parts]
    return ["[" + ",".join(part) + "]" for part in parts]


def _key(served: Served) -> list[str]:
    return [served.api_key] if served.api_key else []


@dataclass(frozen=True, slots=True)
class Query:
    """A GET of one user's minutes, and how many points its answer has to have."""

    path: str
    points: int


def hours(users: Sequence[str], count: int, seed: int) -> Iterator[Query]:
    """An hour each of random users, on the day that `lakes` makes."""
    chance = random.Random(seed)
    for _ in range(count):
        hour = chance.randrange(23)
        yield _query(chance.choice(users), f"{hour:02}:00:00", f"{hour + 1:02}:00:00", 60)


def whole_days(users: Sequence[str], count: int, seed: int) -> Iterator[Query]:
    """The whole day each of random users."""
    chance = random.Random(seed)
    for _ in range(count):
        yield _query(chance.choice(users), "00:00:00", "23:59:59.999", 1440)


def _query(user: str, start: str, end: str, points: int) -> Query:
    day = lakes.DAY.isoformat()
    asked = f"user_id={user}&start={day}T{start}Z&end={day}T{end}Z"
    return Query(f"/metrics/heart-rate?{asked}", points)


class Client:
    """One keep-alive connection that sends one query after the other."""

    def __init__(self, port: int, api_key: str | None) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, query: Query) -> float:
        """Milliseconds to the last byte of the answer.

        Raises:
            FailedLoadError: it isn't the answer.
        """
        began = time.perf_counter()
        self._connection.request("GET", query.path, headers=self._headers)
        answer = self._connection.getresponse()
        body = answer.read()
        taken = (time.perf_counter() - began) * 1000
        if answer.status != 200 or json.loads(body)["count"] != query.points:
            raise FailedLoadError(f"GET {query.path}: {answer.status} {body[:200]!r}")
        return taken

    def ask_all(self, queries: Iterable[Query]) -> list[float]:
        """Milliseconds of each."""
        return [self.ask(query) for query in queries]


def percentile(times: Sequence[float], share: float) -> float:
    """The time that `share` of the times don't exceed."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


@contextlib.contextmanager
def asking(served: Served, rows: int) -> Iterator[None]:
    """GETs in a loop, in a process of its own, for the time of the block: each tenth a whole day.

    It is under way when the block begins: its start, with all its imports, isn't measured.

    Raises:
        FailedLoadError: it ended by itself.
    """
    argv = [sys.executable, "-m", "bench.load", str(served.port), str(rows), *_key(served)]
    child = subprocess.Popen(
        argv, cwd=Path(__file__).parent.parent, start_new_session=True, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    try:
        child.stdout.readline()
        yield
        if child.poll() is not None:
            raise FailedLoadError("the GETs in a loop ended by themselves")
    finally:
        child.terminate()
        child.wait()
        child.stdout.close()


def _ask_for_ever(port: int, rows: int, api_key: str | None = None) -> None:
    users = lakes.users_of(rows)
    with Client(port, api_key) as client:
        for seed in itertools.count():
            client.ask_all(hours(users, 9, seed))
            client.ask_all(whole_days(users, 1, seed))
            if not seed:
                print("asking", flush=True)


if __name__ == "__main__":
    _ask_for_ever(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
