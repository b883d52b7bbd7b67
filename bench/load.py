"""Ask what is measured: POSTs by wrk, GETs by one client.

Belongs here: bodies, clients and the times that answers took. Doesn't belong here: what the times
are held against.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPT = Path(__file__).with_name("post.lua")
END_OF_BODY = "\x1e"
JSON = "application/json"
NDJSON = "application/x-ndjson"


class FailedLoadError(Exception):
    """The load wasn't answered as it should be, so that its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Posts:
    """What wrk saw: answers, seconds, and times to the answer in ms."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    max_ms: float

    @property
    def per_second(self) -> float:
        """Answers a second."""
        return self.requests / self.seconds


def missing() -> str | None:
    """What has to be installed first, in one line."""
    if shutil.which("wrk") is None:
        return "bench: wrk is not installed; on Debian and Ubuntu: apt-get install wrk"
    return None


def post(
    url: str,
    bodies: Path,
    seconds: float,
    *,
    connections: int = 64,
    content_type: str = JSON,
    pause_ms: int = 0,
    api_key: str | None = None,
) -> Posts:
    """Let wrk (one thread) post the bodies of a file in turn.

    Without a pause each connection sends its next request as soon as it has its answer.

    Raises:
        FailedLoadError: an answer was not a 2xx, or a connection broke.
    """
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "30s"]
    argv += ["-s", str(SCRIPT), url, "--", str(bodies), content_type, str(pause_ms)]
    argv += [api_key] if api_key else []
    done = subprocess.run(argv, check=False, capture_output=True, text=True)
    try:
        found = json.loads(done.stdout.strip().splitlines()[-1])
        refused, broken = found.pop("refused"), found.pop("broken")
    except (IndexError, ValueError):
        raise FailedLoadError(f"wrk: {done.stderr or done.stdout}") from None
    if refused or broken or not found["requests"]:
        raise FailedLoadError(
            f"{url}: of {found['requests']} requests {refused} were refused, {broken} broke"
        )
    return Posts(**found)


def write_bodies(path: Path, bodies: Iterable[str]) -> Path:
    """Write request bodies as `post` reads them."""
    path.write_text("".join(body + END_OF_BODY for body in bodies), encoding="utf-8")
    return path


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
