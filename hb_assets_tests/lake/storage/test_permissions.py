"""Who may read what hb keeps: nobody else, or HB_LAKE_GROUP; whatever the umask."""

from __future__ import annotations

import grp
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from hb_assets.buffer.consumer import Consumer
from hb_assets.core import settings as settings_module
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Settings
from hb_assets.lake.storage import permissions
from hb_assets.lake.storage.store import Lake
from hb_assets.pipeline import coordination
from hb_assets.pipeline.drain import drain
from hb_assets_tests.conftest import on_valkey
from hb_assets_tests.lake.deliveries import DAY

redis_url = on_valkey


@pytest.fixture
def settings(redis_url: str, tmp_path: Path) -> Settings:
    """With a server, which the lake's other tests need not."""
    return Settings(home=tmp_path / "home", redis_url=redis_url, shards=4)  # type: ignore[arg-type]  # pydantic makes a secret of it


BODY = b'{"user_id":"u1","device_id":"device_a","timestamp":"2025-01-15T10:00:00Z","heart_rate":75}'
SCRIPT = """
import os, sys
from hb_assets.__main__ import main

os.umask(int(sys.argv[1], 8))
for words in ("import beats.ndjson", "drain", "keys create a-key --scope read", "status"):
    sys.argv = ["hb", *words.split()]
    try:
        main()
    except SystemExit as end:
        assert end.code in (0, None), (words, end.code)
"""
"""Commands as a shell would start them one after the other, with another umask."""


def group() -> grp.struct_group:
    """A group that files may be given to by this user, which isn't what they have anyway."""
    if os.geteuid() == 0:
        return next(one for one in grp.getgrall() if one.gr_gid not in (0, os.getgid()))
    return grp.getgrgid(os.getgid())


@pytest.fixture(params=[0o000, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def every(folder: Path) -> dict[Path, int]:
    """The modes of all files and folders, the folder too."""
    return {path: stat.S_IMODE(path.lstat().st_mode) for path in (folder, *folder.rglob("*"))}


def filled(lake: Lake, client: redis.Redis, settings: Settings) -> None:
    """A lake that something of everything was written into, in this process."""
    client.xadd("hb:{00}:stream", {"data": BODY})
    client.xadd("hb:{00}:stream", {"data": b"not json"})
    consumer = Consumer(client, settings)
    consumer.open()
    drain(consumer, lake, settings, until_empty=True)
    consumer.close()
    with coordination.coordinated(lake, settings, start_server=False) as known:
        known.consolidate(lake, DAY, settings)


def test_everything_under_hb_home_is_its_owners(tmp_path: Path) -> None:
    """Embedded server, keys, logs and lake, as commands leave them; `hb up`'s own test does so."""
    (tmp_path / "beats.ndjson").write_bytes(BODY)
    home = tmp_path / "made" / "home"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "000"],
        cwd=tmp_path,
        env={**os.environ, "HB_HOME": str(home), "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    found = every(home.parent)
    assert {"keys.json", "receipts", "lake", "raw", "redis"} <= {path.name for path in found}
    assert {path: oct(mode) for path, mode in found.items() if mode & 0o077} == {}


def test_a_lake_is_its_owners_whatever_the_umask(
    umask: int, settings: Settings, client: redis.Redis
) -> None:
    """Also in a process that isn't ours, and has no umask of ours."""
    filled(Lake.open(settings), client, settings)
    found = every(settings.lake_dir)
    assert len(found) > 10
    assert set(found.values()) == {0o700, 0o600}
    assert permissions.warnings(settings) == []


@pytest.mark.parametrize("writes", [False, True])
def test_a_lake_of_a_group(
    umask: int, settings: Settings, client: redis.Redis, *, writes: bool
) -> None:
    shared = {"lake_group": group().gr_name, "lake_group_writes": writes}
    settings = settings.model_copy(update=shared)
    filled(Lake.open(settings), client, settings)
    # a process without the setting goes on so
    filled(Lake.open(settings), client, settings.model_copy(update={"lake_group": None}))
    found = every(settings.lake_dir)
    folders = {mode for path, mode in found.items() if path.is_dir()}
    locks = {mode for path, mode in found.items() if path.suffix == ".lock"}
    files = {mode for path, mode in found.items() if path.is_file() and path.suffix != ".lock"}
    assert folders == {0o2770 if writes else 0o2750}
    assert files == {0o640}
    assert locks == {0o660 if writes else 0o640}
    assert {path.stat().st_gid for path in found} == {group().gr_gid}
    # the group gets through HB_HOME, which the lake lies in, and sees nothing else of it
    assert every(settings.home_dir)[settings.home_dir] == 0o710
    assert permissions.warnings(settings) == []


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A folder that other users may pass through, which those of tests are not."""
    with tempfile.TemporaryDirectory(prefix="hb-") as made:
        Path(made).chmod(0o711)
        yield Path(made)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("member", [False, True])
def test_as_another_user(
    umask: int, settings: Settings, client: redis.Redis, reachable: Path, *, member: bool
) -> None:
    changes = {"home": reachable / "home", "lake_group": group().gr_name}
    settings = settings.model_copy(update=changes)
    filled(Lake.open(settings), client, settings)
    script = (
        "import pathlib, sys; print(len([p.read_bytes() for p in map(pathlib.Path, sys.argv[1:])]))"
    )
    files = sorted(settings.lake_dir.rglob("*.parquet"))
    done = subprocess.run(
        ["/usr/bin/env", "python3", "-c", script, *map(str, files)],
        user=65_533,
        group=65_533,
        extra_groups=[group().gr_gid] if member else [],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if member:
        assert done.stdout == f"{len(files)}\n", done.stderr
    else:
        assert "PermissionError" in done.stderr


def test_a_lake_that_is_there_keeps_its_modes(
    umask: int, settings: Settings, client: redis.Redis
) -> None:
    """What is made in it is closed; the warning names what closes the rest, and what shares it."""
    lake = Lake.open(settings)
    filled(lake, client, settings)
    for path, mode in every(settings.home_dir).items():
        path.chmod(mode | 0o055 if path.is_dir() else mode | 0o044)
    before = every(lake.root)
    filled(Lake.open(settings), client, settings)
    after = every(lake.root)
    replaced = {path for path in before if path.name == "heartbeats.parquet"}
    assert {path: mode for path, mode in before.items() if path not in replaced}.items() <= (
        after.items()
    )
    assert {after[path] for path in replaced | (after.keys() - before.keys())} <= {0o600, 0o700}
    told = "\n".join(permissions.warnings(settings))
    assert f"`chmod go-rwx {settings.home_dir}`" in told
    assert f"`chmod -R go-rwx {lake.root}` closes it" in told
    assert f"`chgrp -R GROUP {lake.root} && chmod " in told
    assert "HB_LAKE_GROUP" in told


def test_what_the_warning_names_helps(settings: Settings, client: redis.Redis) -> None:
    lake = Lake.open(settings)
    filled(lake, client, settings)
    for path, mode in every(lake.root).items():
        path.chmod(mode | 0o055 if path.is_dir() else mode | 0o044)
    shared = settings.model_copy(update={"lake_group": group().gr_name})
    (told,) = permissions.warnings(shared)
    closing, sharing = told.split("`")[1::2]
    subprocess.run(sharing, shell=True, check=True)
    settings.home_dir.chmod(0o710)
    assert permissions.warnings(shared) == []
    filled(lake, client, settings)
    assert {mode for path, mode in every(lake.root).items() if path.is_file()} == {0o640}
    for path in every(lake.root):
        path.chmod(0o755)
    subprocess.run(closing, shell=True, check=True)
    assert not any(mode & 0o077 for mode in every(lake.root).values())
    assert "isn't shared" in permissions.warnings(shared)[0]


def test_a_group_that_there_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_LAKE_GROUP", "no-such-group")
    with pytest.raises(SettingsError, match="HB_LAKE_GROUP: there is no group of this name"):
        settings_module.load()


def test_a_group_that_the_lake_can_not_be_given_to(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    other = next(one for one in grp.getgrall() if one.gr_gid != os.getgid())
    with pytest.raises(SettingsError, match="as a member of that group"):
        Lake.open(settings.model_copy(update={"lake_group": other.gr_name}))
