"""Tallies: rows of numbers that processes share, and that outlive the one that writes them."""

from __future__ import annotations

import multiprocessing
import signal
from multiprocessing.connection import Connection

from hb_assets.gateway.observability.tallies import Tallies


def count_on(tallies: Tallies, done: Connection) -> None:
    tallies.mine()[3] += 1
    done.send(None)
    signal.pause()


def test_a_killed_worker_keeps_its_row_and_its_successor_counts_on() -> None:
    spawn = multiprocessing.get_context("spawn")
    tallies = Tallies(3)
    tallies.mine()[3] = 7
    for count in (1, 2):
        done, tell = spawn.Pipe(duplex=False)
        worker = spawn.Process(target=count_on, args=(tallies.of(2), tell))
        worker.start()
        done.recv()
        worker.kill()
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        assert [row[3] for row in tallies.rows()] == [7, 0, count]
    for end in (done, tell):
        end.close()
