"""Settings: read from HB_ variables alone; what can't be used is one line; the page is current."""

from __future__ import annotations

import datetime as dt
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from hb_assets.core import settings, settings_page
from hb_assets.core.errors import SettingsError
from hb_assets.core.settings import Bytes, Duration, Settings

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"
durations: TypeAdapter[dt.timedelta] = TypeAdapter(Duration)
sizes: TypeAdapter[int] = TypeAdapter(Bytes)


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("HB_")]:
        monkeypatch.delenv(name)


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == settings_page.page(), "docs/settings.md is stale: run `make docs`"


def test_every_variable_is_documented() -> None:
    documented = re.findall(r"^\| `HB_(\w+)` \|", PAGE.read_text(), flags=re.MULTILINE)
    assert documented == [name.upper() for name in Settings.model_fields]
    assert all(field.description for field in Settings.model_fields.values())


def test_the_page_knows_nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_GATEWAY_PORT", "8123")
    monkeypatch.setenv("HB_HOME", "/srv/hb")
    assert settings_page.page() == PAGE.read_text()


def test_defaults_stand_on_their_own() -> None:
    found = settings.load()
    assert found.embedded
    assert found.lake_dir == found.home_dir / "lake"
    assert found.home_dir.is_absolute()


def test_a_checkout_keeps_its_state_beside_its_code() -> None:
    assert settings.default_home() == Path(__file__).parents[2] / ".hb"


def test_an_installed_package_uses_the_platforms_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(settings, "PACKAGE", tmp_path / "site-packages" / "hb_assets")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    assert settings.default_home().name == "hb_assets"
    assert not settings.default_home().is_relative_to(tmp_path / "site-packages")


def test_limits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_LIMIT_USER", "600/m")
    monkeypatch.setenv("HB_LIMIT_IP", "off")
    found = settings.load()
    assert found.limit_user == (600, dt.timedelta(minutes=1))
    assert found.limit_ip is None
    stated = settings.environment(found)
    assert (stated["HB_LIMIT_USER"], stated["HB_LIMIT_IP"]) == ("600/1m", "off")


def test_variables_that_are_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are found with what was meant, and aren't handed on."""
    monkeypatch.setenv("HB_SHARD", "4")
    monkeypatch.setenv("HB_XYZ", "1")
    monkeypatch.setenv("HB_EXECUTOR", "multiprocess")
    monkeypatch.setenv("HBOMB", "1")
    assert settings.unknown() == {"HB_SHARD": "HB_SHARDS", "HB_XYZ": None}
    handed_on = settings.environment(settings.load())
    assert "HB_SHARD" not in handed_on
    assert (handed_on["HB_EXECUTOR"], handed_on["HBOMB"]) == ("multiprocess", "1")


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        settings.load().shards = 3  # type: ignore[misc]  # what must fail


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in {
        "HOME": str(tmp_path / "with space"),
        "START_DATE": "2010-01-01",
        "MAX_FUTURE": "36h",
        "DEVICE_PRIORITY": " watch, strap ,",
        "DRAIN_MAX_BYTES": "8MiB",
        "SHARDS": "4",
        "REDIS_URL": "rediss://:geheim@redis.example:6380/1",
    }.items():
        monkeypatch.setenv(f"HB_{name}", value)
    found = settings.load()
    assert found.home_dir == tmp_path / "with space"
    assert found.start_date == dt.date(2010, 1, 1)
    assert found.max_future == dt.timedelta(hours=36)
    assert found.device_priority == ("watch", "strap")
    assert found.drain_max_bytes == 8 * 2**20
    assert found.shards == 4
    assert not found.embedded
    assert "geheim" not in repr(found)
    assert found.time_bounds.start_ms == 1_262_304_000_000
    assert found.time_bounds.future_ms == 36 * 3_600_000


@pytest.mark.parametrize("day", ["1577836800", "20200101", "2020-1-1", "2020-01-01T00:00:00", " "])
def test_a_day_has_one_form(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    monkeypatch.setenv("HB_START_DATE", day)
    with pytest.raises(SettingsError, match="HB_START_DATE"):
        settings.load()


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(f"HB_{name.upper()}", "")
    assert settings.load() == Settings.model_construct()


def test_a_home_of_ones_own_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HB_HOME", "~/hearts")
    monkeypatch.chdir(tmp_path)
    assert settings.load().home_dir == tmp_path / "hearts"
    assert settings.load(home=Path("rel")).home_dir == tmp_path / "rel"
    assert settings.load(lake="rel/lake").lake_dir == tmp_path / "rel" / "lake"
    assert settings.load(lake="file:///srv/lake").lake_dir == Path("/srv/lake")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("90s", 90), ("15m", 900), ("6h", 21600), ("7d", 604800), ("2.5", 2.5)],
)
def test_durations(text: str, seconds: float) -> None:
    assert durations.validate_python(text).total_seconds() == seconds


@given(st.integers(0, 10**12).map(lambda ms: dt.timedelta(milliseconds=ms)))
def test_durations_come_back_as_they_were(value: dt.timedelta) -> None:
    assert durations.validate_python(durations.dump_python(value)) == value


@pytest.mark.parametrize(
    ("text", "number"),
    [("65536", 65536), ("64KiB", 65536), ("64k", 65536), ("64MiB", 2**26), ("1GB", 2**30)],
)
def test_sizes(text: str, number: int) -> None:
    assert sizes.validate_python(text) == number


@given(st.integers(0, 2**60))
def test_sizes_come_back_as_they_were(value: int) -> None:
    assert sizes.validate_python(sizes.dump_python(value)) == value


FREE_TEXT = {"lake", "gateway_host", "alert_webhook", "device_priority", "redis_ca"}
BAD = {
    "home": ["~no-such-user/hb"],
    "lake": ["s3://bucket/prefix", "http://[/"],
    "lake_group": ["no-such-group", "no such group"],
    "lake_group_writes": ["perhaps", "1"],
    "start_date": ["2025-02-30", "soon", "1969-12-31"],
    "max_future": ["tomorrow", "-1h", "1y", "9" * 400],
    "redis_url": ["localhost:6379", "http://localhost", "redis://[", "redis://host:port"],
    "redis_ca": ["/etc/ca.pem"],
    "redis_cert": ["/etc/cert.pem"],
    "redis_key": ["/etc/key.pem"],
    "redis_timeout": ["1w", "0"],
    "durability": ["forever"],
    "assume_fsync": ["perhaps"],
    "replicas": ["0", "-1", "all"],
    "shards": ["0", "101", "many", "1.5"],
    "buffer_max_heartbeats": ["0"],
    "buffer_max_bytes": ["1", "1XB"],
    "buffer_high_water": ["0", "1.1", "nan"],
    "entry_max_heartbeats": ["0"],
    "drain_max_rows": ["0", "1e5"],
    "drain_max_bytes": ["-1"],
    "drain_tick_seconds": ["0", "46", "nan"],
    "claim_min_idle": ["later"],
    "drain_poll": ["often"],
    "drain_max_wait": ["soon", "31s"],
    "poison_deliveries": ["0", "few"],
    "poison_memory": ["1MiB", "much"],
    "poison_seconds": ["0", "60", "long"],
    "consolidate_min_rows": ["0"],
    "consolidate_ratio": ["-0.1", "nan"],
    "consolidate_max_age": ["old"],
    "consolidate_max_age_today": ["old"],
    "max_pending_fragments": ["0"],
    "raw_keep": ["a week"],
    "temp_keep": ["0s"],
    "locks": ["paper"],
    "lock_wait": ["0s"],
    "duckdb_memory": ["1MiB"],
    "duckdb_threads": ["-1"],
    "gateway_port": ["0", "65536", "http"],
    "gateway_cert": ["/etc/cert.pem"],
    "gateway_key": ["/etc/key.pem"],
    "gateway_workers": ["0", "65", "some"],
    "max_connections": ["0"],
    "head_timeout": ["0s", "soon"],
    "body_timeout": ["0s"],
    "bodies_max_bytes": ["1KiB"],
    "body_max_bytes": ["1"],
    "batch_max_heartbeats": ["0"],
    "limit_user": ["100", "0/1m", "many/1m", "5/0s", "5/later"],
    "limit_key": ["100", "0/1m", "many/1m", "5/0s", "5/later"],
    "limit_ip": ["100", "0/1m", "many/1m", "5/0s", "5/later"],
    "limit_queries": ["100", "0/1m", "many/1m", "5/0s", "5/later"],
    "gateway_names": ["hb.test:8000", "https://hb.test"],
    "dagster_names": ["hb.test:3000"],
    "trusted_proxies": ["proxy.example", "10.0.0.1,10.0.0.0/33"],
    "query_max_range": ["all"],
    "query_max_points": ["0"],
    "fresh_max_bytes": ["1"],
    "spool_max_bytes": ["-1", "much"],
    "health_drain_age": ["soon", "-1s"],
    "health_entry_age": ["soon"],
    "health_consumer_idle": ["soon"],
    "health_consolidation_delay": ["soon"],
    "health_dagster_age": ["soon"],
    "health_free_space": ["-1", "enough"],
    "dagster_port": ["0", "65536"],
    "drain_sensor_interval": ["0", "5s"],
    "executor": ["celery", "module:", "a b:c"],
    "log_level": ["loud"],
}


def test_every_setting_has_bad_values_to_try_or_takes_any_text() -> None:
    assert BAD.keys() | FREE_TEXT >= Settings.model_fields.keys()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in BAD.items() for value in values]
)
def test_a_bad_value_is_one_line_that_names_its_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"HB_{name.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        settings.load()
    message = str(caught.value)
    assert message.startswith("settings: ")
    assert "\n" not in message
    assert f"HB_{name.upper()}" in message


def test_all_bad_values_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_SHARDS", "0")
    monkeypatch.setenv("HB_LOG_LEVEL", "loud")
    with pytest.raises(SettingsError, match=r"HB_SHARDS: .*; HB_LOG_LEVEL: "):
        settings.load()


def test_a_password_stays_out_of_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_REDIS_URL", "http://:geheim@host")
    with pytest.raises(SettingsError) as caught:
        settings.load()
    assert "geheim" not in str(caught.value)


def test_the_embedded_server_has_no_replicas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HB_DURABILITY", "replicated")
    with pytest.raises(SettingsError, match="HB_DURABILITY=replicated needs a HB_REDIS_URL"):
        settings.load()
    monkeypatch.setenv("HB_REDIS_URL", "redis://redis.example")
    monkeypatch.setenv("HB_REPLICAS", "2")
    assert settings.load().replicas == 2
