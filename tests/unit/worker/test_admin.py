"""The worker's admin process: when a worker is stalled, and what others write into its pipe."""

from __future__ import annotations

import os

import pytest

from extproc.settings import WorkerSettings, load
from extproc.worker.admin import AdminProcess, Progress
from extproc.worker.metrics import Began, Ready

LIMIT_S = 60.0


def test_a_worker_that_leaves_tasks_where_they_are_is_stalled() -> None:
    progress = Progress(LIMIT_S, now=0.0)
    progress.look(3, now=10.0)
    assert not progress.is_stalled(now=LIMIT_S)
    assert progress.is_stalled(now=LIMIT_S + 1)


@pytest.mark.parametrize("length", [0, None])
def test_without_tasks_or_a_broker_nobody_is_stalled(length: int | None) -> None:
    progress = Progress(LIMIT_S, now=0.0)
    progress.look(length, now=100.0)
    assert not progress.is_stalled(now=150.0)


def test_a_task_that_is_taken_is_progress() -> None:
    progress = Progress(LIMIT_S, now=0.0)
    progress.look(3, now=50.0)
    progress.move(now=55.0)
    assert not progress.is_stalled(now=100.0)


def test_a_queue_waits_since_it_was_empty_last() -> None:
    progress = Progress(LIMIT_S, now=0.0)
    for length, now in ((0, 10.0), (5, 20.0), (None, 30.0), (2, 40.0)):
        progress.look(length, now)
    assert progress.waited_s(now=40.0) == 30.0


def test_without_an_address_nothing_listens_and_nothing_is_told() -> None:
    admin = AdminProcess(load(WorkerSettings, admin_listen=""))
    admin.start()
    admin.tell(Ready())
    admin.stop()


def test_a_pipe_that_nobody_reads_stops_nobody_who_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    admin = AdminProcess(load(WorkerSettings, admin_listen=""))
    events, writer = os.pipe()
    os.set_blocking(writer, False)
    monkeypatch.setattr(admin, "_writer", writer)
    for _ in range(10_000):
        admin.tell(Began(False))
    os.close(events)
    admin.tell(Began(False))
    os.close(writer)
