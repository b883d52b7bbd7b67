"""The reference gateway: the same job with FastAPI, pydantic and redis-py, as one would write it.

The same answer, worth the same (Redis has it, fsynced), and the same micro-batches: while one round
trip is under way, heartbeats queue up and leave together in the next. It has nothing of what the
gateway does beyond that (access, limits, a bound of the buffer, a ledger, a spool, shards,
metrics). All of a round trip goes into one entry of one stream, which is the cheapest there is.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
from collections.abc import AsyncIterator

from fastapi import FastAPI, HTTPException
from pydantic import AwareDatetime, BaseModel, Field
from redis.asyncio import Redis

START = dt.datetime(2020, 1, 1, tzinfo=dt.UTC)
MAX_FUTURE = dt.timedelta(hours=24)
ENTRY_HEARTBEATS = 500


class Heartbeat(BaseModel):
    """One record, with the bounds that the gateway checks."""

    user_id: str = Field(min_length=1, max_length=128)
    device_id: str = Field(min_length=1, max_length=128)
    timestamp: AwareDatetime
    heart_rate: int = Field(ge=30, le=220)


class Appender:
    """One task that appends what waits."""

    def __init__(self, client: Redis) -> None:
        self._client = client
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._wake = asyncio.Event()

    async def append(self, line: str) -> None:
        """Return when Redis has it."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, future))
        self._wake.set()
        await future

    async def flush_for_ever(self) -> None:
        """Send all that waits in one round trip, again and again."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            batch, self._waiting = self._waiting, []
            try:
                async with self._client.pipeline(transaction=False) as pipeline:
                    for start in range(0, len(batch), ENTRY_HEARTBEATS):
                        lines = [line for line, _ in batch[start : start + ENTRY_HEARTBEATS]]
                        pipeline.xadd("heartbeats", {"data": "\n".join(lines), "n": len(lines)})
                    await pipeline.execute()
            except Exception as error:  # noqa: BLE001  # whoever waits has to be told
                for _, future in batch:
                    future.set_exception(error)
            else:
                for _, future in batch:
                    future.set_result(None)


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Connect; flush for as long as the server runs."""
    client = Redis.from_url(os.environ["REFERENCE_REDIS_URL"])
    app.state.appender = Appender(client)
    flusher = asyncio.create_task(app.state.appender.flush_for_ever())
    yield
    flusher.cancel()
    await client.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/metrics/heart-rate")
async def post(heartbeat: Heartbeat) -> dict[str, str]:
    """Accept one heartbeat."""
    if not START <= heartbeat.timestamp <= dt.datetime.now(dt.UTC) + MAX_FUTURE:
        raise HTTPException(422, "timestamp out of range")
    await app.state.appender.append(heartbeat.model_dump_json())
    return {"status": "accepted"}
