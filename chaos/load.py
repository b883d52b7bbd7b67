"""The load: clients that send heartbeats over HTTP and remember what was answered with 2xx.

Heartbeat number `sequence` of a client is a pure function of (client, sequence), so that two bits a
heartbeat are all that has to be remembered of millions. Of 20 in a row 16 are new keys; the others
write a key anew: one a few places later in the same batch, one 1000 and one 2000 places later with
another value, one 1000 places later with the same value. A client sends one batch after the other
and each one until all of it is acknowledged, so that a key's later write is sent after its earlier
one was answered.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

BATCH = 500
USERS = 25
"""Users of one client."""
_BLOCK = 20
_LAG = 50
"""Blocks between a key and its next write: two batches."""
_SPAN_MS = 2 * 86_400_000
_STRIDE_MS = 7919
"""Keys jump about in the two days; a prime, so that no two keys of a client have one timestamp."""
_TIMEOUT = 20.0

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Columns:
    """Heartbeats of one client by column; `user` and `device` are numbers, see `user_id`."""

    user: Ints
    device: Ints
    timestamp_ms: Ints
    heart_rate: Ints


def heartbeats(client: int, sequences: Ints, start_ms: int) -> Columns:
    """What the client sends under these sequence numbers. `start_ms`: midnight of the first day."""
    block, place = sequences // _BLOCK, sequences % _BLOCK
    key = sequences.copy()
    version = np.zeros_like(sequences)
    for at, blocks_back, target, written in (
        (16, 0, 15, 1),  # corrected in the same batch
        (17, _LAG, 1, 0),  # repeated
        (18, 2 * _LAG, 0, 2),  # corrected a second time
        (19, _LAG, 0, 1),  # corrected
    ):
        chosen = (place == at) & (block >= blocks_back)
        key[chosen] = (block[chosen] - blocks_back) * _BLOCK + target
        version[chosen] = written
    return Columns(
        user=key // _BLOCK % USERS,
        device=key % 2,
        timestamp_ms=start_ms + key * _STRIDE_MS % _SPAN_MS,
        heart_rate=30 + (31 * key + 7 * client + 67 * version) % 191,
    )


def user_id(client: int, user: int) -> str:
    """Name of a client's user."""
    return f"chaos-{client:02d}-{user:02d}"


DEVICES = ("device_a", "device_b")


@dataclass(slots=True)
class Sent:
    """What one client sent: bit maps by sequence number.

    `acknowledged`: answered with 2xx. `unsure`: sent more than once, since an attempt was not
    answered, or not with 2xx; a copy of such a write may reach Redis later than its sender knows.
    """

    client: int
    acknowledged: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))
    unsure: npt.NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, bool))

    def extend(self) -> Ints:
        """Make room for one more batch; returns its sequence numbers."""
        first = len(self.acknowledged)
        self.acknowledged = np.append(self.acknowledged, np.zeros(BATCH, bool))
        self.unsure = np.append(self.unsure, np.zeros(BATCH, bool))
        return np.arange(first, first + BATCH, dtype=np.int64)


class Client(threading.Thread):
    """Sends batch after batch to one gateway until `ending` is set.

    Args:
        number: of the client.
        port: of the gateway, or what stands before it.
        rate: heartbeats a second; a client that fell behind hurries.
        start_ms: as `heartbeats` takes it.
    """

    def __init__(self, number: int, port: int, rate: float, start_ms: int) -> None:
        super().__init__(name=f"client {number}", daemon=True)
        self.sent = Sent(number)
        self.answers: Counter[str] = Counter()
        """Attempts by outcome: a status, or what went wrong with the connection."""
        self.attempted = 0
        """Heartbeats sent, those that were sent again included."""
        self.refused: Counter[str] = Counter()
        """Heartbeats refused for good, by reason. All are valid: there must be none."""
        self.ending = threading.Event()
        self.acknowledged = 0
        self._port = port
        self._pause = BATCH / rate
        self._start_ms = start_ms
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        """Send until `ending`."""
        due = time.monotonic()
        while not self.ending.is_set():
            sequences = self.sent.extend()
            body = self._body(sequences)
            while not self.ending.is_set() and not self._attempt(sequences, body):
                self.sent.unsure[sequences] = True
                self.ending.wait(0.2)
            due += self._pause
            self.ending.wait(max(0.0, due - time.monotonic()))

    def _body(self, sequences: Ints) -> bytes:
        made = heartbeats(self.sent.client, sequences, self._start_ms)
        columns = (made.user, made.device, made.timestamp_ms, made.heart_rate)
        return "\n".join(
            f'{{"user_id":"{user_id(self.sent.client, user)}","device_id":"{DEVICES[device]}",'
            f'"timestamp_ms":{at},"heart_rate":{bpm}}}'
            for user, device, at, bpm in zip(*(one.tolist() for one in columns), strict=True)
        ).encode()

    def _attempt(self, sequences: Ints, body: bytes) -> bool:
        """Send a batch once; whether all of it was acknowledged."""
        self.attempted += len(sequences)
        try:
            status, answer = self._post(body)
        except (OSError, http.client.HTTPException) as error:
            self.answers[type(error).__name__] += 1
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            return False
        self.answers[str(status)] += 1
        if not 200 <= status < 300:
            return False
        told = json.loads(answer)
        taken = np.ones(len(sequences), bool)
        for refusal in told["refused"]:
            taken[refusal["index"]] = False
            if not refusal["retry"]:
                self.refused[refusal["reason"]] += 1
        if told["accepted"] != int(taken.sum()):
            self.refused["miscounted"] += 1
        self.sent.acknowledged[sequences[taken]] = True
        self.acknowledged = int(self.sent.acknowledged.sum())
        return bool(taken.all())

    def _post(self, body: bytes) -> tuple[int, bytes]:
        if self._connection is None:
            self._connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_TIMEOUT)
        self._connection.request(
            "POST",
            "/metrics/heart-rate/batch",
            body,
            {"content-type": "application/x-ndjson"},
        )
        response = self._connection.getresponse()
        return response.status, response.read()
