"""Round trips: many commands, one pipeline, one reply each.

Belongs here: sending commands and script calls together, and loading scripts that the server has
lost. Doesn't belong here: which commands (`producer`, `consumer`, `depth`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import redis.exceptions as failures

from hb_assets.buffer import scripts
from hb_assets.buffer.connection import AsyncClient, Client

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
    replies = _send(client, commands)
    missing = _missing_scripts(replies)
    if missing:
        _send(client, [("SCRIPT", "LOAD", text) for text in _texts(commands, missing)])
        for index, reply in zip(
            missing, _send(client, [commands[i] for i in missing]), strict=True
        ):
            replies[index] = reply
    return replies


async def exchange_async(client: AsyncClient, commands: Sequence[Command]) -> list[Any]:
    """As `exchange`, in an event loop."""
    replies = await _send_async(client, commands)
    missing = _missing_scripts(replies)
    if missing:
        await _send_async(client, [("SCRIPT", "LOAD", text) for text in _texts(commands, missing)])
        again = await _send_async(client, [commands[i] for i in missing])
        for index, reply in zip(missing, again, strict=True):
            replies[index] = reply
    return replies


def _send(client: Client, commands: Sequence[Command]) -> list[Any]:
    if not commands:
        return []
    with client.pipeline(transaction=False) as pipeline:
        pipeline.response_callbacks = {}  # type: ignore[assignment]  # replies as they come
        for command in commands:
            pipeline.execute_command(*command)  # type: ignore[no-untyped-call]  # theirs is untyped
        return pipeline.execute(raise_on_error=False)


async def _send_async(client: AsyncClient, commands: Sequence[Command]) -> list[Any]:
    async with client.pipeline(transaction=False) as pipeline:
        pipeline.response_callbacks = {}  # replies as they come
        for command in commands:
            pipeline.execute_command(*command)
        return await pipeline.execute(raise_on_error=False)


def _missing_scripts(replies: Sequence[Any]) -> list[int]:
    return [i for i, reply in enumerate(replies) if isinstance(reply, failures.NoScriptError)]


def _texts(commands: Sequence[Command], indexes: Sequence[int]) -> list[str]:
    wanted = {commands[i][1] for i in indexes}
    return [found.text for found in scripts.catalogue().values() if found.sha in wanted]
