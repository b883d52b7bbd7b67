"""Redis' clock as a producer knows it, which decides when a heartbeat arrives.

The time is carried on from what the server told last, and compared with this machine's clock.

The drain judges a timestamp by the entry's id, which is Redis' clock. Whoever accepts heartbeats
has to judge by the same one, or would answer 2xx for what ends in quarantine (docs/decisions/0010).
"""

from __future__ import annotations

import time

import redis.exceptions as failures

from hb_assets.buffer.connection import Client, unavailable

_TOLERATED_MS = 60_000
"""Clocks that are further apart than this are worth a warning; those of NTP are within a second."""


class ServerClock:
    """Redis' clock, by what it told last and the time that passed since; ours until then.

    It is never ahead of the server's, unless that was set back since it was last heard: every
    append's answer tells it anew.
    """

    def __init__(self) -> None:
        self._offset_ms: int | None = None

    def hear(self, server_ms: int) -> None:
        """Set the clock to what the server's said just now, epoch milliseconds."""
        self._offset_ms = server_ms - _monotonic_ms()

    def ask(self, client: Client) -> None:
        """Set the clock by asking the server. Raises BufferUnavailableError."""
        try:
            seconds, micros = client.time()
        except (failures.RedisError, OSError) as error:
            raise unavailable(error, client) from None
        self.hear(seconds * 1000 + micros // 1000)

    def now_ms(self) -> int:
        """The server's clock, epoch milliseconds."""
        if self._offset_ms is None:
            return _own_ms()
        return _monotonic_ms() + self._offset_ms

    def warnings(self) -> list[str]:
        """One line when the server's clock and this machine's are more than a minute apart."""
        apart = self.now_ms() - _own_ms()
        if abs(apart) <= _TOLERATED_MS:
            return []
        where = "ahead of" if apart > 0 else "behind"
        line = (
            f"Redis' clock is {abs(apart) // 1000:,} s {where} this machine's: set the wrong one "
            "right (NTP); what lies too far in the future is judged by Redis'"
        )
        return [line]


def _own_ms() -> int:
    return time.time_ns() // 1_000_000


def _monotonic_ms() -> int:
    return time.monotonic_ns() // 1_000_000
