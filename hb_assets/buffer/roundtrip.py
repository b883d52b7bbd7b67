"""Round trips to Redis: many commands in one pipeline, one reply each.

Script calls go along with them, and scripts that the server has lost are loaded again.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import hiredis
import redis.exceptions as failures

from hb_assets.buffer import scripts
from hb_assets.buffer.connection import AsyncClient, Client, is_wrong_type, unavailable
from hb_assets.core.errors import BufferUnavailableError

Command: TypeAlias = Sequence[str | bytes | int]


def script(name: str, key_names: Sequence[str], arguments: Command) -> Command:
    """The command that calls the script `name`."""
    return ("EVALSHA", scripts.catalogue()[name].sha, len(key_names), *key_names, *arguments)


def exchange(client: Client, commands: Sequence[Command]) -> list[Any]:
    """Replies of the commands in order (as Redis gives them), sent in one pipelined round trip.

    A command that Redis refused has the `redis.exceptions.ResponseError` as its reply.

    Raises:
        redis.exceptions.RedisError, OSError: the round trip itself failed; what Redis did of it is
            unknown.
    """
    return [reply for reply, _ in exchange_confirmed(client, commands, ())]


def exchange_confirmed(
    client: Client, commands: Sequence[Command], confirm: Sequence[Command]
) -> list[tuple[Any, Any]]:
    """As `exchange`, each reply with the last reply to the `confirm` behind it (None without one).

    `confirm` (WAITAOF covers the writes of its own connection alone) is sent behind the commands in
    one pipeline, which is one connection; whatever has to be sent again, after scripts were loaded
    or a connection broke, is sent with a `confirm` of its own behind it.
    """
    replies = _paired(commands, _send(client, _pipeline(commands, confirm)))
    missing = _missing_scripts(replies)
    if missing:
        again, loading = _again(commands, missing, confirm)
        replies_again = _paired(missing, _send(client, again)[loading:])
        for index, reply in zip(missing, replies_again, strict=True):
            replies[index] = reply
    return replies


@dataclass(frozen=True, slots=True)
class Replies:
    """Replies by shard; `faults` has the error of each shard that couldn't reply."""

    by_shard: dict[int, Any]
    faults: dict[int, BufferUnavailableError]

    def whole(self) -> dict[int, Any]:
        """The replies of all shards. Raises BufferUnavailableError where one gave none."""
        for fault in self.faults.values():
            raise fault
        return self.by_shard


def exchange_by_shard(
    client: Client, shards: Iterable[int], commands: Sequence[Command]
) -> Replies:
    """Run one command for each of the shards.

    A shard where something else lies at a key is a fault by itself; what Redis refuses for all
    shards (it is still loading, or we lack a permission) is an error of the whole call.

    Raises:
        BufferUnavailableError: Redis doesn't answer, or refuses all of them.
    """
    try:
        replies = dict(zip(shards, exchange(client, commands), strict=True))
    except (failures.RedisError, OSError) as error:
        raise unavailable(error, client) from None
    refused = {
        shard: reply for shard, reply in replies.items() if isinstance(reply, failures.RedisError)
    }
    if len(refused) == len(replies):
        for reply in refused.values():
            if not is_wrong_type(reply):
                raise unavailable(reply, client)
    return Replies(
        {shard: reply for shard, reply in replies.items() if shard not in refused},
        {shard: unavailable(reply, client, shard) for shard, reply in refused.items()},
    )


class HeldConnection:
    """A connection of one event loop's own, open from one round trip to the next.

    redis-py's pool looks at a connection each time it is taken, and its pipeline takes 25 us of CPU
    time for each command: that is most of what a round trip of a few heartbeats costs.
    """

    def __init__(self, client: AsyncClient) -> None:
        pool: Any = client.connection_pool  # its methods have no types
        self._seconds = pool.connection_kwargs["socket_timeout"]
        self._connection = pool.make_connection()
        self._connection.socket_timeout = None  # ours holds for a whole round trip

    async def exchange_confirmed(
        self, commands: Sequence[Command], confirm: Sequence[Command]
    ) -> list[tuple[Any, Any]]:
        """As the function of that name."""
        replies = _paired(commands, await self._send(_pipeline(commands, confirm)))
        missing = _missing_scripts(replies)
        if missing:
            again, loading = _again(commands, missing, confirm)
            replies_again = _paired(missing, (await self._send(again))[loading:])
            for index, reply in zip(missing, replies_again, strict=True):
                replies[index] = reply
        return replies

    async def close(self, _error: Exception | None = None) -> None:
        """Hang up; the next round trip connects again."""
        await self._connection.disconnect(nowait=True)

    async def _send(self, commands: Sequence[Command]) -> list[Any]:
        if not commands:
            return []
        pack: Any = hiredis.pack_command  # its stub knows tuples of one only
        packed = b"".join([pack(tuple(command)) for command in commands])

        async def attempt() -> list[Any]:
            try:
                async with asyncio.timeout(self._seconds):
                    await self._connection.send_packed_command(packed, check_health=False)
                    return [await _reply(self._connection) for _ in commands]
            except TimeoutError:
                raise failures.TimeoutError("Timeout reading from socket") from None
            except RuntimeError as error:
                # What uvloop says, and redis-py doesn't know, when the peer was faster to hang up.
                if "closed" not in str(error):
                    raise
                raise failures.ConnectionError("Connection closed while writing to it.") from None

        try:
            replies: list[Any] = await self._connection.retry.call_with_retry(attempt, self.close)
        except BaseException:
            await self.close()  # replies may still be on their way
            raise
        return replies


def _pipeline(commands: Sequence[Command], confirm: Sequence[Command]) -> list[Command]:
    return [*commands, *confirm] if commands else []


def _again(
    commands: Sequence[Command], missing: Sequence[int], confirm: Sequence[Command]
) -> tuple[list[Command], int]:
    """The pipeline that loads scripts and calls them anew, and how many commands of it load."""
    loads: list[Command] = [("SCRIPT", "LOAD", text) for text in _texts(commands, missing)]
    return [*loads, *_pipeline([commands[i] for i in missing], confirm)], len(loads)


def _paired(commands: Sequence[object], replies: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Each command's reply with the one that came behind them all, if one did."""
    confirmation = replies[-1] if len(replies) > len(commands) else None
    return [(reply, confirmation) for reply in replies[: len(commands)]]


def _send(client: Client, commands: Sequence[Command]) -> list[Any]:
    if not commands:
        return []
    with client.pipeline(transaction=False) as pipeline:
        pipeline.response_callbacks = {}  # type: ignore[assignment]  # replies as they come
        for command in commands:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]  # theirs is untyped
        return pipeline.execute(raise_on_error=False)


async def _reply(connection: Any) -> Any:
    try:
        # one timeout holds for all of them: redis-py's own, for each, takes longer than reading
        return await connection.read_response(timeout=math.inf)
    except failures.ResponseError as error:
        return error


def _missing_scripts(replies: Sequence[tuple[Any, Any]]) -> list[int]:
    return [i for i, (reply, _) in enumerate(replies) if isinstance(reply, failures.NoScriptError)]


def _texts(commands: Sequence[Command], indexes: Sequence[int]) -> list[str]:
    wanted = {commands[i][1] for i in indexes}
    return [found.text for found in scripts.catalogue().values() if found.sha in wanted]
