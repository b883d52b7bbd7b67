"""The checker: compares what was acknowledged with what lies in the lake.

A few queries of plain DuckDB over the lake's Parquet files, for a reader to follow line by line;
nothing of hb_assets is used, nor what the system says of itself (`hb audit`, the ledgers).

    writes   every heartbeat that was sent: key, value, client, sequence, acknowledged, unsure
    found    every row of the lake: the consolidated files, and of a (day, shard) that has none yet
             its raw fragments with the latest arrival of each key
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from chaos import load
from chaos.load import Sent


@dataclass(frozen=True, slots=True)
class Verdict:
    """Counts of what the lake holds of what was acknowledged.

    `acknowledged` heartbeats have `keys` distinct keys, of which `found` lie in the lake and
    `missing` don't; `twice` keys have more than one row. Of `ordered` keys it is certain which
    write was the last one; `wrong` keys have another value than they may have. `invented` rows
    were never sent.
    """

    acknowledged: int
    keys: int
    found: int
    missing: int
    twice: int
    ordered: int
    wrong: int
    invented: int

    @property
    def clean(self) -> bool:
        """Whether nothing is missing, twice, wrong or invented."""
        return not (self.missing or self.twice or self.wrong or self.invented)


def check(lake: Path, sent: Iterable[Sent], start_ms: int) -> Verdict:
    """Read the whole lake and compare."""
    connection = duckdb.connect(":memory:", config={"memory_limit": "4GiB"})
    connection.execute("SET TimeZone = 'UTC'")
    connection.register("sent", pa.concat_tables([_table(one, start_ms) for one in sent]))
    connection.execute("CREATE TABLE writes AS FROM sent")
    consolidated = sorted(lake.glob("heartbeats/*/*/*.parquet"))
    there = {path.parent.relative_to(lake / "heartbeats") for path in consolidated}
    raw = [
        path
        for path in sorted(lake.glob("raw/*/*/*.parquet"))
        if path.parent.relative_to(lake / "raw") not in there
    ]
    connection.execute(_FOUND)
    if consolidated:
        connection.execute(_FROM_CONSOLIDATED, {"files": [str(path) for path in consolidated]})
    if raw:
        connection.execute(_FROM_RAW, {"files": [str(path) for path in raw]})
    [counts] = connection.sql(_COMPARE).fetchall()
    return Verdict(*(int(count) for count in counts))


def _table(sent: Sent, start_ms: int) -> pa.Table:
    """A client's writes, as the pure function of their sequence numbers says."""
    sequences = np.arange(len(sent.acknowledged), dtype=np.int64)
    made = load.heartbeats(sent.client, sequences, start_ms)
    users = pa.array([load.user_id(sent.client, user) for user in range(load.USERS)])
    return pa.table(
        {
            "user_id": users.take(pa.array(made.user)),
            "device_id": pa.array(load.DEVICES).take(pa.array(made.device)),
            "at_ms": made.timestamp_ms,
            "heart_rate": made.heart_rate,
            "batch": sequences // load.BATCH,
            "sequence": sequences,
            "acknowledged": sent.acknowledged,
            "unsure": sent.unsure,
        }
    )


_FOUND = """
CREATE TABLE found (user_id VARCHAR, device_id VARCHAR, at_ms BIGINT, heart_rate BIGINT)
"""
_FROM_CONSOLIDATED = """
INSERT INTO found SELECT user_id, device_id, epoch_ms(timestamp), heart_rate
FROM read_parquet($files, hive_partitioning = false)
"""
_FROM_RAW = """
INSERT INTO found
SELECT user_id, device_id, epoch_ms(timestamp),
    arg_max(heart_rate, (arrival_ms, arrival_seq, arrival_shard, arrival_pos))
FROM read_parquet($files, hive_partitioning = false) GROUP BY ALL
"""
# A key may have the value of its latest acknowledged write. It may have another one only where
# nobody can know which write came last: an unsure one of an earlier batch may have come again
# after it, and one that was sent later and not acknowledged may have been stored.
_COMPARE = """
WITH last AS (
    SELECT user_id, device_id, at_ms,
        arg_max(heart_rate, sequence) AS heart_rate,
        max(sequence) AS sequence,
        max(batch) AS batch
    FROM writes WHERE acknowledged GROUP BY ALL
), allowed AS (
    SELECT writes.user_id, writes.device_id, writes.at_ms, writes.heart_rate
    FROM writes JOIN last USING (user_id, device_id, at_ms)
    WHERE (writes.unsure AND writes.batch < last.batch) OR writes.sequence > last.sequence
), rows AS (
    SELECT user_id, device_id, at_ms, count(*) AS rows, any_value(heart_rate) AS heart_rate
    FROM found GROUP BY ALL
), compared AS (
    SELECT last.*, rows.rows, rows.heart_rate AS has,
        EXISTS (FROM allowed WHERE allowed.user_id = last.user_id
            AND allowed.device_id = last.device_id AND allowed.at_ms = last.at_ms) AS open,
        EXISTS (FROM allowed WHERE allowed.user_id = last.user_id
            AND allowed.device_id = last.device_id AND allowed.at_ms = last.at_ms
            AND allowed.heart_rate = rows.heart_rate) AS other
    FROM last LEFT JOIN rows USING (user_id, device_id, at_ms)
)
SELECT
    (SELECT count(*) FROM writes WHERE acknowledged) AS acknowledged,
    count(*) AS keys,
    count(rows) AS found,
    count(*) FILTER (rows IS NULL) AS missing,
    (SELECT count(*) FROM rows WHERE rows > 1) AS twice,
    count(*) FILTER (NOT open) AS ordered,
    count(*) FILTER (has IS NOT NULL AND has <> heart_rate AND NOT other) AS wrong,
    (SELECT count(*) FROM rows ANTI JOIN writes USING (user_id, device_id, at_ms)) AS invented
FROM compared
"""
