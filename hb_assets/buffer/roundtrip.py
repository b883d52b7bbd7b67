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


async def exchange_confirmed_async(
    client: AsyncClient, commands: Sequence[Command], confirm: Sequence[Command]
) -> list[tuple[Any, Any]]:
    """As `exchange_confirmed`, in an event loop."""
    replies = _paired(commands, await _send_async(client, _pipeline(commands, confirm)))
    missing = _missing_scripts(replies)
    if missing:
        again, loading = _again(commands, missing, confirm)
        replies_again = _paired(missing, (await _send_async(client, again))[loading:])
        for index, reply in zip(missing, replies_again, strict=True):
            replies[index] = reply
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


async def _send_async(client: AsyncClient, commands: Sequence[Command]) -> list[Any]:
    """As `_send`; by hand, since redis-py's pipeline takes 25 us of CPU time for each command."""
    if not commands:
        return []
    pack: Any = hiredis.pack_command  # its stub knows tuples of one only
    packed = b"".join([pack(tuple(command)) for command in commands])
    pool: Any = client.connection_pool  # its methods have no types
    seconds = pool.connection_kwargs["socket_timeout"]
    connection: Any = None

    async def attempt() -> list[Any]:
        try:
            async with asyncio.timeout(seconds):
                await connection.send_packed_command(packed)
                return [await _reply(connection) for _ in commands]
        except TimeoutError:
            raise failures.TimeoutError("Timeout reading from socket") from None

    async def give_up(_error: Exception) -> None:
        await connection.disconnect(nowait=True)  # replies may still be on their way

    try:
        connection = await pool.get_connection()
        replies: list[Any] = await connection.retry.call_with_retry(attempt, give_up)
    except RuntimeError as error:
        # What uvloop says, and redis-py doesn't know, when the peer was faster to hang up.
        if "closed" not in str(error):
            raise
        raise failures.ConnectionError("Connection closed while writing to it.") from None
    finally:
        if connection is not None:
            await pool.release(connection)
    return replies


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
