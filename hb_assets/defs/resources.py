"""The resource that assets and sensors share, which opens this installation's buffer and lake."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from hb_assets.buffer import connection, server
from hb_assets.buffer.connection import Client
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.errors import BufferUnavailableError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage.catalog import Folders
from hb_assets.lake.storage.store import Lake


@dataclass(frozen=True, slots=True)
class Installation:
    """Buffer and lake as the settings name them, opened anew for each piece of work."""

    settings: Settings
    folders: Folders = field(default_factory=Folders)

    def lake(self) -> Lake:
        """The lake. Raises as `Lake.open`."""
        return Lake.open(self.settings)

    @contextmanager
    def client(self) -> Iterator[Client]:
        """A client of the buffer.

        Raises:
            BufferUnavailableError: the embedded server isn't running.
        """
        if self.settings.embedded and not server.running(self.settings):
            raise BufferUnavailableError(
                f"the embedded Redis isn't running under {self.settings.home_dir}: start `hb up`, "
                "or set HB_REDIS_URL"
            )
        client = connection.connect(self.settings)
        try:
            yield client
        finally:
            client.close()

    @contextmanager
    def consumer(self) -> Iterator[Consumer]:
        """An open consumer. What a killed one left pending is taken over by the next one.

        Raises:
            BufferUnavailableError: Redis doesn't answer.
        """
        with self.client() as client:
            consumer = Consumer(client, self.settings)
            try:
                consumer.open()
                yield consumer
            finally:
                consumer.close()
