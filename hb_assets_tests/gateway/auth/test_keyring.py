"""The file of keys: made, changed and read safely, and nothing secret in it."""

from __future__ import annotations

import datetime as dt
import json
import stat
import threading
from pathlib import Path

import pytest

from hb_assets.core.errors import HbError, SettingsError
from hb_assets.core.settings import Settings
from hb_assets.gateway.auth import keyring


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def test_no_file_and_an_empty_one_are_not_the_same(settings: Settings) -> None:
    assert keyring.read(keyring.path(settings)) is None
    key, _ = keyring.create(settings, "phones", ["ingest"])
    assert keyring.revoke(settings, key.id) == key
    assert keyring.read(keyring.path(settings)) == ()


def test_a_key_comes_back_as_it_was_made(settings: Settings) -> None:
    key, token = keyring.create(
        settings, "app", ["read"], user_id="u1", lifetime=dt.timedelta(days=90)
    )
    assert keyring.TOKEN.fullmatch(token)
    assert token.split("_")[1] == key.id
    assert key.expires == key.created + dt.timedelta(days=90)
    assert keyring.read(keyring.path(settings)) == (key,)
    assert key.is_for("u1")
    assert not key.is_for("u2")


def test_the_file_is_its_owners_alone_and_gives_nothing_away(settings: Settings) -> None:
    file = keyring.path(settings)
    _, first = keyring.create(settings, "a", ["admin"])
    _, second = keyring.create(settings, "b", ["read"], user_id="Erika Mustermann")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    text = file.read_text()
    assert not [token for token in (first, second) if token.split("_")[2] in text]
    assert "Erika" not in text


def test_writers_at_once_lose_no_key(settings: Settings) -> None:
    threads = [
        threading.Thread(target=keyring.create, args=(settings, f"k{n}", ["ingest"]))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    keys = keyring.read(keyring.path(settings)) or ()
    assert sorted(key.name for key in keys) == [f"k{n}" for n in range(8)]
    assert len({key.id for key in keys}) == 8


def test_what_is_not_there_can_not_be_revoked(settings: Settings) -> None:
    keyring.create(settings, "phones", ["ingest"])
    with pytest.raises(HbError, match="hb keys list"):
        keyring.revoke(settings, "0" * 12)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"keys": [{"id": "x"}]},
        {"digest": "abc"},
        {"scopes": ["everything"]},
        {"expires": "2026-01-01T00:00:00"},
        {"user": "u1"},
        None,
    ],
)
def test_a_damaged_file_is_refused_and_left_alone(
    settings: Settings, change: dict[str, object] | None
) -> None:
    file = keyring.path(settings)
    keyring.create(settings, "phones", ["ingest"])
    whole = json.loads(file.read_text())
    if change is None:
        damaged = file.read_text()[:-20]
    elif change.keys() & whole.keys():
        damaged = json.dumps(whole | change)
    else:
        damaged = json.dumps(whole | {"keys": [whole["keys"][0] | change]})
    file.write_text(damaged)
    for use in (
        lambda: keyring.read(file),
        lambda: keyring.create(settings, "more", ["ingest"]),
        lambda: keyring.revoke(settings, "0" * 12),
    ):
        with pytest.raises(SettingsError, match="damaged") as caught:
            use()
        assert "\n" not in str(caught.value)
    assert file.read_text() == damaged


def test_a_folder_that_can_not_be_written(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    with pytest.raises(SettingsError, match=r"can't be (read|written)"):
        keyring.create(Settings(home=tmp_path / "home"), "phones", ["ingest"])
