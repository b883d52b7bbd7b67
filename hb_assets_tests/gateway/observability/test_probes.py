"""Probes: a flood of queries is one, and one that hangs hinders nobody for long."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hb_assets.gateway.observability.probes import Probe


def run(work: Callable[[ThreadPoolExecutor], Coroutine[Any, Any, None]]) -> None:
    with ThreadPoolExecutor(4) as threads:
        asyncio.run(work(threads))


def test_a_flood_asks_once_and_an_error_counts_as_an_answer() -> None:
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        raise OSError(28, "full")

    async def flood(threads: ThreadPoolExecutor) -> None:
        probe = Probe(ask, fresh=60)
        for _ in range(2):
            answers = (probe.answer(threads) for _ in range(100))
            found = await asyncio.gather(*answers, return_exceptions=True)
            assert {type(one) for one in found} == {OSError}

    run(flood)
    assert asked == [1]


def test_an_answer_that_is_too_old_is_asked_for_again() -> None:
    answers = iter(range(9))

    async def twice(threads: ThreadPoolExecutor) -> None:
        probe = Probe(lambda: next(answers), fresh=0)
        assert [await probe.answer(threads) for _ in range(3)] == [0, 1, 2]

    run(twice)


def test_a_question_that_hangs_is_asked_once_and_nobody_waits_for_it_again() -> None:
    release, asked = threading.Event(), []

    def hang() -> str:
        asked.append(1)
        release.wait(30)
        return "at last"

    async def wait(threads: ThreadPoolExecutor) -> None:
        probe, other = Probe(hang, limit=0.2, fresh=60), Probe(lambda: "ok")
        began = time.monotonic()
        for _ in range(20):
            with pytest.raises(TimeoutError):
                await probe.answer(threads)
        assert time.monotonic() - began < 2  # 20 waits would be 4 s
        assert await other.answer(threads) == "ok"
        release.set()
        while True:
            try:
                assert await probe.answer(threads) == "at last"
                break
            except TimeoutError:
                await asyncio.sleep(0)

    try:
        run(wait)
    finally:
        release.set()
    assert asked == [1]


def test_a_dear_question_is_asked_less_often() -> None:
    asked: list[int] = []

    def ask() -> None:
        asked.append(1)
        began = time.thread_time()
        while time.thread_time() - began < 0.02:
            pass

    async def often(threads: ThreadPoolExecutor) -> None:
        probe = Probe(ask, fresh=0, share=0.001)
        for _ in range(3):
            await probe.answer(threads)

    run(often)
    assert asked == [1]
