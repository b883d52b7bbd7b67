"""Replays the spool into Redis, in order, once Redis is back.

Each gateway process has a replayer, which notices that Redis is away and asks whether it is back;
replay.lock lets one of them work at a time, and goes with its process. A record is deleted after
Redis has acknowledged it: dying between both repeats it, in order and before anything newer, which
deduplication makes harmless.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from hb_assets.buffer import connection, durability
from hb_assets.buffer.connection import Client
from hb_assets.buffer.producer import Producer
from hb_assets.core.errors import (
    BufferFullError,
    BufferUnavailableError,
    HbError,
    SpoolUnavailableError,
)
from hb_assets.core.settings import Settings
from hb_assets.gateway.spool.database import Record
from hb_assets.gateway.spool.queue import Spool

IDLE_SECONDS = 0.5
"""How often a replayer looks whether another process's spooling, or its death, left it work."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 1.0
"""Between two tries while Redis is away; the pause doubles from the first to the longest."""

_VERIFIED = "verified"

_log = logging.getLogger(__name__)


class Replayer:
    """Empties the spool whenever Redis answers, in a thread of its own."""

    def __init__(self, client: Client, spool: Spool, settings: Settings) -> None:
        self.away = False
        """Whether Redis was away when it was asked last: then the spool takes everything."""
        self._client = client
        self._spool = spool
        self._settings = settings
        self._producer = Producer(client, settings)
        self._thread = threading.Thread(target=self._run, name="replay", daemon=True)
        self._wake = threading.Event()
        self._stopping = False
        self._pause = 0.0
        self._taken: list[Record] = []
        self._told: set[str] = set()
        self._telling = threading.Lock()
        self._remembered = False

    def start(self) -> None:
        """Start working."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the round trip that is under way, then stop."""
        self._stopping = True
        self._wake.set()
        self._thread.join()
        self._producer.close()

    def lost(self, error: BufferUnavailableError) -> None:
        """Tell the replayer that Redis didn't take an append."""
        self._tell("buffer", error)
        self.away = True
        self._wake.set()

    def prepare(self) -> None:
        """Open the spool and ask Redis whether it is as durable as HB_DURABILITY says.

        It may be away if the spool remembers that this Redis was verified in this mode. Without a
        spool that can be used it has to answer.

        Raises:
            BufferUnavailableError: Redis doesn't answer, or isn't as durable.
            SettingsError: as `Spool.open`.
        """
        vouched = False
        try:
            self._spool.open()
            vouched = self._spool.fact(_VERIFIED) == self._promise()
        except SpoolUnavailableError as error:
            self._tell("spool", error)
        try:
            connection.ping(self._client)
        except BufferUnavailableError as error:
            if not vouched:
                raise
            self.lost(error)
            return
        durability.require(self._client, self._settings)
        try:
            self._remember()
        except SpoolUnavailableError as error:
            self._tell("spool", error)

    def turn(self) -> float:
        """Try once to empty the spool, if there is a reason; returns seconds until the next try."""
        if not self.away and not any(self._spool.queued()):
            self._mended("buffer")
            return IDLE_SECONDS
        try:
            connection.ping(self._client)
            durability.require(self._client, self._settings)
        except BufferUnavailableError as error:
            self._tell("buffer", error)
            self.away = True
            return self._longer()
        self.away = False
        self._remember()
        with self._spool.replaying() as ours:
            if not ours:
                return IDLE_SECONDS
            refused = self._replay()
        self._mended("spool")
        if not refused:
            self._mended("buffer")
            self._pause = 0.0
            return 0.0 if any(self._spool.queued()) else IDLE_SECONDS
        for refusal in refused.values():
            self._tell("buffer", refusal)
        waits = [e.retry_after for e in refused.values() if isinstance(e, BufferFullError)]
        return min(waits) if len(waits) == len(refused) else self._longer()

    def _replay(self) -> dict[int, HbError]:
        """Replay the spool once, in order; returns the shards that Redis refused, and why.

        A shard that was refused stays as it is; the others go on.
        """
        refused: dict[int, HbError] = {}
        after = 0
        self._remove_taken()
        while not self._stopping:
            records = self._spool.read(after, frozenset(refused))
            if not records:
                self._finish(whole=not refused)
                break
            after = records[-1].id
            by_shard: dict[int, list[Record]] = {}
            for record in records:
                by_shard.setdefault(record.shard, []).append(record)
            self._taken, errors = self._append(by_shard)
            self._remove_taken()
            if errors:
                self._spool.reopen(errors)
            refused |= errors
            if len(errors) == len(by_shard) and not self._answers():
                self.away = True
                break
        return refused

    def _answers(self) -> bool:
        try:
            connection.ping(self._client)
        except BufferUnavailableError:
            return False
        return True

    def _remove_taken(self) -> None:
        """Delete what Redis has. While that fails (a full disk), nothing is appended again."""
        if self._taken:
            self._spool.remove(self._taken)
            self._taken = []

    def _append(self, by_shard: dict[int, list[Record]]) -> tuple[list[Record], dict[int, HbError]]:
        """Append records; returns those that Redis has, and the shards that it refused."""
        outcomes = self._producer.append({s: _lines(found) for s, found in by_shard.items()})
        done: list[Record] = []
        errors: dict[int, HbError] = {}
        for shard, outcome in outcomes.items():
            records = by_shard[shard]
            if isinstance(outcome, BufferFullError) and len(records) > 1:
                # All of them don't fit; the first ones may.
                for record in records:
                    outcome = self._producer.append({shard: record.lines})[shard]
                    if outcome is not None:
                        break
                    done.append(record)
            elif outcome is None:
                done += records
            if outcome is not None:
                errors[shard] = outcome
        return done, errors

    def _finish(self, *, whole: bool) -> None:
        if whole and any(self._spool.queued()):
            # Either something came just now, or the counts say what the records don't.
            self._spool.recount()
        if not any(self._spool.queued()):
            self._spool.compact()

    def _run(self) -> None:
        wait = 0.0
        while True:
            self._wake.wait(wait)
            if self._stopping:
                return
            self._wake.clear()
            try:
                wait = self.turn()
            except SpoolUnavailableError as error:
                self._tell("spool", error)
                wait = self._longer()
            except Exception as error:  # noqa: BLE001  # what waits on the disk needs this thread
                _log.error("replay: unexpected %s", type(error).__name__)
                wait = self._longer()

    def _longer(self) -> float:
        self._pause = min(max(FIRST_PAUSE_SECONDS, 2 * self._pause), LONGEST_PAUSE_SECONDS)
        return self._pause

    def _remember(self) -> None:
        if not self._remembered:
            self._spool.remember(_VERIFIED, self._promise())
            self._remembered = True

    def _promise(self) -> str:
        # The embedded server's address may change from one start to the next.
        embedded = self._settings.embedded
        where = "embedded" if embedded else connection.address(self._client)
        trusted = "assumed" if self._settings.assume_fsync else "asked"
        return f"{where} {self._settings.durability} {trusted}"

    # One line when something goes wrong and one when it is over, however often it is met.

    def _tell(self, what: str, error: HbError) -> None:
        with self._telling:
            if what not in self._told:
                self._told.add(what)
                _log.warning("%s", error)

    def _mended(self, what: str) -> None:
        with self._telling:
            if what in self._told:
                self._told.discard(what)
                _log.info("the %s answers again", what)


def _lines(records: Sequence[Record]) -> list[bytes]:
    return [line for record in records for line in record.lines]
