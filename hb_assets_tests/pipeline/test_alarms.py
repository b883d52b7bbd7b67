"""Alarms: told once, again after an hour, and when they are over."""

from __future__ import annotations

import datetime as dt
import logging

import pytest

from hb_assets.core.settings import Settings
from hb_assets.lake.integrity.known_faults import Fault
from hb_assets.pipeline import alarms
from hb_assets.pipeline.alarms import REPEAT_MS
from hb_assets_tests.receiver import receiving

FULL = {"full": "the buffer is full"}


def told(notices: list[alarms.Alarm]) -> list[tuple[str, str]]:
    return [(notice.alarm, notice.severity) for notice in notices]


def test_a_new_alarm_is_told_and_then_stands() -> None:
    notices, standing = alarms.changes({}, FULL, 0)
    assert told(notices) == [("full", "error")]
    assert alarms.changes(standing, FULL, REPEAT_MS - 1)[0] == []
    again, _ = alarms.changes(standing, FULL, REPEAT_MS)
    assert told(again) == [("full", "error")]


def test_what_is_over_is_told_once() -> None:
    _, standing = alarms.changes({}, FULL, 0)
    notices, standing = alarms.changes(standing, {}, 1)
    assert told(notices) == [("full", "resolved")]
    assert notices[0].message == "over: the buffer is full"
    assert alarms.changes(standing, {}, 2) == ([], {})


def test_a_message_may_change_while_the_alarm_stands() -> None:
    _, standing = alarms.changes({}, FULL, 0)
    notices, standing = alarms.changes(standing, {"full": "fuller"}, 1)
    assert notices == []
    assert standing["full"].message == "fuller"


def test_what_stands_survives_as_text() -> None:
    _, standing = alarms.changes({}, FULL, 5)
    assert alarms.load(alarms.dump(standing)) == standing


@pytest.mark.parametrize("text", [None, "", "x", "[]"])
def test_a_text_that_is_none_means_no_alarms(text: str | None) -> None:
    assert alarms.load(text) == {}


def test_the_webhook_gets_json_and_the_log_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with receiving() as receiver:
        settings = Settings(alert_webhook=receiver.url)
        alarms.tell([alarms.alarm("full", "the buffer is full", 0, shard="03")], settings)
    assert receiver.received == [
        {
            "alarm": "full",
            "severity": "error",
            "message": "the buffer is full",
            "at": "1970-01-01T00:00:00.000Z",
            "details": {"shard": "03"},
        }
    ]
    assert [
        record.levelno for record in caplog.records if record.name == "hb_assets.pipeline.alarms"
    ] == [logging.ERROR]


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/token", "no url", "http://[::1", "ftp://x/"])
def test_a_webhook_that_fails_raises_nothing_and_its_url_is_not_logged(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    alarms.tell([alarms.alarm("full", "the buffer is full", 0)], Settings(alert_webhook=url))
    assert "HB_ALERT_WEBHOOK can't be told" in caplog.text
    assert "token" not in caplog.text


def test_of_the_lake_there_is_one_of_each_kind_and_day() -> None:
    day, next_day = dt.date(2025, 1, 15), dt.date(2025, 1, 16)
    found = alarms.of_lake(
        [
            Fault("damaged", day, 0, None, None, "a"),
            Fault("damaged", day, 1, 7, None, "b"),
            Fault("missing", day, 1, 7, None, "c"),
            Fault("damaged", next_day, 1, 7, None, "d"),
            Fault("unreadable", None, None, None, None, "e"),
        ]
    )
    assert found == {
        "lake_damaged:2025-01-15": "a; 1 more of this day",
        "lake_missing:2025-01-15": "c",
        "lake_damaged:2025-01-16": "d",
        "lake_unreadable": "e",
    }
