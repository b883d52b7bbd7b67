"""Posts batches at a fixed rate, however long the answers take: `python -m bench.pace`.

Loads that go as fast as they can are in `posting`.
"""

from __future__ import annotations

import http.client
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from bench import load

BATCH_SIZE = 500
USERS = 5000
_BODIES = 200
_CONNECTIONS = 8
_PATH = "/metrics/heart-rate/batch"


@dataclass(slots=True)
class Paced:
    """The outcome of a schedule of posts.

    `accepted` heartbeats, of which the last was answered after `seconds`; `answers_ms` counts from
    when each batch was due, and `behind_ms` is how late the latest one was sent.
    """

    accepted: int = 0
    seconds: float = 0.0
    failed: list[str] = field(default_factory=list)
    answers_ms: list[float] = field(default_factory=list)
    behind_ms: float = 0.0

    def plus(self, other: Paced) -> Paced:
        """Both together."""
        return Paced(
            self.accepted + other.accepted,
            max(self.seconds, other.seconds),
            self.failed + other.failed,
            self.answers_ms + other.answers_ms,
            max(self.behind_ms, other.behind_ms),
        )


def paced(port: int, api_key: str, per_second: int, seconds: float) -> Paced:
    """Send batches of 500 for so long, each when its time has come."""
    texts = load.heartbeats(_BODIES * BATCH_SIZE, USERS)
    bodies = [body.encode() for body in load.batches(texts, BATCH_SIZE, load.JSON)]
    every = BATCH_SIZE / per_second
    count = round(seconds / every)
    done = [Paced() for _ in range(_CONNECTIONS)]
    begin = time.perf_counter() + 0.5

    def send(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        for turn in range(number, count, _CONNECTIONS):
            due = begin + turn * every
            wait = due - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            done[number].behind_ms = max(done[number].behind_ms, -wait * 1000)
            _post(connection, api_key, bodies[turn % _BODIES], due, done[number])
        connection.close()
        done[number].seconds = time.perf_counter() - begin

    threads = [threading.Thread(target=send, args=(number,)) for number in range(_CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total = Paced()
    for one in done:
        total = total.plus(one)
    return total


def _post(
    connection: http.client.HTTPConnection, api_key: str, body: bytes, due: float, done: Paced
) -> None:
    headers = {
        "Authorization": f"Bearer {api_key}",
        "Content-Type": load.JSON,
        "traceparent": f"00-{random.getrandbits(128):032x}-{random.getrandbits(64):016x}-01",
    }
    connection.request("POST", _PATH, body, headers)
    answer = connection.getresponse()
    said = answer.read()
    done.answers_ms.append((time.perf_counter() - due) * 1000)
    if answer.status == 200:
        done.accepted += int(json.loads(said)["accepted"])
    else:
        done.failed.append(f"{answer.status} {said[:200]!r}")


def _main(arguments: Sequence[str]) -> None:
    port, api_key, per_second, seconds = arguments
    print(json.dumps(asdict(paced(int(port), api_key, int(per_second), float(seconds)))))


if __name__ == "__main__":
    _main(sys.argv[1:])
