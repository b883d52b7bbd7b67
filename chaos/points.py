"""The catalogue of named points: the moments at which a process is killed or paused.

The harness and hb_assets_tests both use it; `victim` makes a process stop there. Production code
knows nothing of it: a point is a moment before or after a call of a function that is there anyway,
named `module:attribute`. A function that is renamed takes its point along, or
hb_assets_tests/test_kills.py fails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Process = Literal["gateway", "drain", "consolidate", "prune", "damaged"]
When = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Point:
    """One moment in one kind of process: `when` a call of `target` begins or has returned.

    `hit`: the first call that is meant, where earlier ones do something else.
    """

    name: str
    process: Process
    target: str
    when: When
    meaning: str
    hit: int = 1

    @property
    def key(self) -> str:
        """How it is named on a command line: `process/name`."""
        return f"{self.process}/{self.name}"


_WRITE = "pyarrow.parquet:ParquetWriter.write_table"

POINTS = (
    Point(
        *("before append", "gateway", "hb_assets.buffer.producer:AsyncProducer._flush", "before"),
        "a request was read, nothing of it is in Redis",
    ),
    Point(
        *("after append", "gateway", "hb_assets.buffer.producer:AsyncProducer._flush", "after"),
        "Redis has it durably, the client has no answer: it sends again",
    ),
    Point(
        *("claimed", "drain", "hb_assets.buffer.consumer:Consumer.claim", "after"),
        "entries are pending for a process that is gone",
    ),
    Point(
        *("decoded", "drain", "hb_assets.lake.files.fragments:publish", "before"),
        "nothing is written yet",
    ),
    Point(
        *("mid-write of a fragment", "drain", _WRITE, "after"),
        "rows are in a temp file that has no footer",
    ),
    Point(
        *("before fsync", "drain", "hb_assets.lake.storage.durable_files:TempFile._sync", "before"),
        "a whole temp file, not durable",
    ),
    Point(
        *("before link", "drain", "os:link", "before"),
        "a durable temp file without a name that readers see",
    ),
    Point(
        *("after link", "drain", "os:link", "after"),
        "some of the batch's fragments have their names, none is acknowledged",
    ),
    Point(
        *(
            "before folder's fsync",
            "drain",
            "hb_assets.lake.storage.durable_files:sync_folder",
            "before",
        ),
        "a name that is not durable",
    ),
    Point(
        *("fragments durable", "drain", "hb_assets.lake.files.quarantine:publish", "before"),
        "fragments are durable, quarantined records aren't written",
    ),
    Point(
        *(
            "before acknowledge",
            "drain",
            "hb_assets.buffer.consumer:Consumer.acknowledge",
            "before",
        ),
        "all is durable, the entries are still pending: they come again",
    ),
    Point(
        *("after acknowledge", "drain", "hb_assets.buffer.consumer:Consumer.acknowledge", "after"),
        "all is done",
    ),
    Point(
        *(
            "temp file made",
            "consolidate",
            "hb_assets.lake.storage.durable_files:TempFile.__init__",
            "after",
        ),
        "an empty temp file that nobody will publish",
    ),
    Point(
        *("mid-consolidation", "consolidate", _WRITE, "after"),
        "a part of the merged rows is in a temp file",
    ),
    Point(
        *("before checks", "consolidate", "hb_assets.lake.integrity.checks:require", "before"),
        "a whole merged file that wasn't checked",
    ),
    Point(
        *("before publication", "consolidate", "pathlib:Path.replace", "before"),
        "checked and durable, the old file is still in place",
    ),
    Point(
        *("after publication", "consolidate", "pathlib:Path.replace", "after"),
        "the new file is in place, its folder isn't synced",
    ),
    Point(
        *("before minutes", "consolidate", "hb_assets.lake.minutes:build", "before"),
        "the day is published, its minutes are those of the old one",
    ),
    Point(
        *("temp files unlinked", "prune", "hb_assets.lake.compaction.pruning:fence", "after"),
        "consolidators are fenced off, nothing is deleted",
    ),
    Point(
        *("published file read again", "prune", "hb_assets.lake.storage.parquet:verify", "after"),
        "it is known what may be deleted",
    ),
    Point(
        *("between two deletions", "prune", "pathlib:Path.unlink", "after"),
        "some of a shard's fragments are gone, others that may go aren't",
        hit=2,
    ),
    Point(
        *(
            "before folder's fsync",
            "prune",
            "hb_assets.lake.compaction.pruning:sync_folder",
            "before",
        ),
        "fragments are gone, which is not durable",
    ),
    Point(
        *("before set-aside's rename", "damaged", "pathlib:Path.rename", "before"),
        "a damaged file is still in its place",
    ),
    Point(
        *("after set-aside's rename", "damaged", "pathlib:Path.rename", "after"),
        "a damaged file was moved away, which is not durable",
    ),
    Point(
        *("before acceptance", "damaged", "hb_assets.lake.files.accepted_losses:put", "before"),
        "a loss isn't accepted yet",
    ),
    Point(
        *("after acceptance", "damaged", "hb_assets.lake.files.accepted_losses:put", "after"),
        "a loss is accepted; of a consolidated file nothing else is done yet",
    ),
    Point(
        *("before replacing", "damaged", "pathlib:Path.replace", "before"),
        "a whole temp file, an acceptance or a consolidated file, without its name",
    ),
    Point(
        *("after replacing", "damaged", "pathlib:Path.replace", "after"),
        "it has its name, its folder isn't synced",
    ),
    Point(
        *("before restore's link", "damaged", "os:link", "before"),
        "a copy was verified, and lies under tmp/",
    ),
    Point(
        *("after restore's link", "damaged", "os:link", "after"),
        "a fragment is back; its acceptance and the damaged file are still there",
    ),
    Point(
        *(
            "before an acceptance is taken back",
            "damaged",
            "hb_assets.lake.files.accepted_losses:remove",
            "before",
        ),
        "a file is back, its loss is still accepted",
    ),
    Point(
        *(
            "after an acceptance is taken back",
            "damaged",
            "hb_assets.lake.files.accepted_losses:remove",
            "after",
        ),
        "a file is back, the damaged one may still lie under damaged/",
    ),
)


def of(process: str) -> list[Point]:
    """The points of one kind of process."""
    return [point for point in POINTS if point.process == process]


def named(key: str) -> Point:
    """The point of this `process/name`. Raises KeyError."""
    return {point.key: point for point in POINTS}[key]
