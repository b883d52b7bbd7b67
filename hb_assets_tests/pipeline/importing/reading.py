"""Reads files as an import does, without a server to append to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec

from hb_assets.buffer.producer import Producer
from hb_assets.core.record import Heartbeat
from hb_assets.core.settings import Settings
from hb_assets.pipeline.importing.importer import Imported, Importer, RefusedLine
from hb_assets.pipeline.importing.sources import Format
from hb_assets_tests.lake.deliveries import NOON

HEADER = b"user_id,device_id,timestamp,heart_rate\n"
AT = "2025-01-15T12:00:00Z"


@dataclass(slots=True)
class Read:
    """What became of a file."""

    done: Imported
    heartbeats: list[Heartbeat] = field(default_factory=list)
    refused: list[RefusedLine] = field(default_factory=list)

    @property
    def bpm(self) -> list[int]:
        return [one.heart_rate for one in self.heartbeats]

    @property
    def late(self) -> list[int]:
        """Milliseconds after NOON."""
        return [one.timestamp_ms - NOON for one in self.heartbeats]

    @property
    def reasons(self) -> list[tuple[int, str]]:
        return [(one.line, one.reason) for one in self.refused]

    @property
    def fault(self) -> str:
        """The one line that says what is wrong with the file; it quotes nothing of it."""
        message = self.done.fault
        assert message is not None
        assert message.startswith(f"{self.done.path}: ")
        assert "\n" not in message
        said = message.removeprefix(self.done.path)
        assert "secret" not in said
        assert "177" not in said
        return said


def read(path: Path, form: Format | None = None) -> Read:
    """Import a file; a shard, so that heartbeats are in order."""
    kept: list[Heartbeat] = []

    def append(lines: Mapping[int, Sequence[bytes]]) -> dict[int, None]:
        for shard in lines.values():
            kept.extend(msgspec.json.decode(one, type=Heartbeat) for one in shard)
        return dict.fromkeys(lines)

    clock = SimpleNamespace(now_ms=lambda: time.time_ns() // 1_000_000)
    nowhere = cast("Any", SimpleNamespace(clock=clock, append=append))
    refused: list[RefusedLine] = []
    importer = Importer(cast("Producer", nowhere), Settings(shards=1), on_refused=refused.append)
    return Read(importer.run(path, form), kept, refused)


def of(path: Path, content: bytes | str) -> Read:
    """Import what is written to that path before."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(path)
