from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from urllib.parse import urlsplit

import redis

from hb_assets.buffer import keys
from hb_assets.buffer.consumer import Consumer
from hb_assets.core.settings import Settings


def documented_example() -> list[str]:
    """Arguments of the redis-cli command that the module's docstring shows."""
    text = keys.__doc__ or ""
    shown = re.search(r"redis-cli (.*\n.*)\n", text)
    assert shown is not None
    return shlex.split(shown[1])


def test_a_shards_keys_share_its_hash_tag() -> None:
    assert keys.stream(7) == "hb:{07}:stream"
    assert keys.ledger(99) == "hb:{99}:ledger"


def test_the_documented_example_appends_an_entry(
    redis_url: str, client: redis.Redis, settings: Settings
) -> None:
    arguments = documented_example()
    if shutil.which("redis-cli"):
        port = str(urlsplit(redis_url).port)
        subprocess.run(["redis-cli", "-p", port, *arguments], check=True, capture_output=True)
    else:
        client.execute_command(*arguments)

    consumer = Consumer(client, settings)
    consumer.open()
    [entry] = consumer.claim(100, 10_000)

    assert (entry.shard, entry.own, entry.rows) == (0, None, 1)
    assert entry.data is not None
    assert entry.data.startswith(b'{"user_id":"u1"')
