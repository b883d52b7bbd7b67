"""A TCP proxy on the loopback that loses answers.

It passes bytes on, drops a connection between request and answer, and holds all answers back.
`director` says when.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")

_CHUNK = 256 * 1024


class Proxy:
    """Listens on a port of its own and passes everything on to `upstream`.

    Args:
        upstream: a unix socket's path, or a port of the loopback; may be changed at any time.
    """

    def __init__(self, upstream: str | int) -> None:
        self.upstream = upstream
        self.dropped = 0
        """Answers that were lost because `drop_answers` asked for it."""
        self._to_drop = 0
        self._held = False
        self._loop = asyncio.new_event_loop()
        self._writers: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        """Stop listening and drop every connection."""
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def drop_answers(self, count: int) -> None:
        """The next `count` answers are lost: the request arrives, and the connection ends."""
        self._to_drop += count

    def hold_answers(self) -> None:
        """From the return of this on no answer comes through; requests still do."""
        self._held = True
        self._do(asyncio.sleep(0))

    def release(self) -> None:
        """Let new connections through again; those of the hold are dropped, answers and all."""
        self._do(self._drop_all())
        self._held = False

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _end(self) -> None:
        self._server.close()  # here: beside the loop, it and a connection's end both wake who waits
        await self._drop_all()

    async def _drop_all(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _serve(
        self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter
    ) -> None:
        self._writers.add(to_client)
        with suppress(OSError):
            if isinstance(self.upstream, str):
                opening = asyncio.open_unix_connection(self.upstream)
            else:
                opening = asyncio.open_connection("127.0.0.1", self.upstream)
            from_server, to_server = await opening
            self._writers.add(to_server)
            await asyncio.gather(
                self._requests(from_client, to_server), self._answers(from_server, to_client)
            )
        self._writers.discard(to_client)
        to_client.close()

    async def _requests(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(_CHUNK):
                sink.write(data)
                await sink.drain()
        self._writers.discard(sink)
        sink.close()

    async def _answers(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(_CHUNK):
                if self._held:
                    continue
                if self._to_drop > 0:
                    self._to_drop -= 1
                    self.dropped += 1
                    break
                sink.write(data)
                await sink.drain()
        sink.close()
