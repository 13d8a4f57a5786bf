"""A dead letter holds ids and nothing else, whatever came from the queue."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from extproc.memory.database import Database
from extproc.worker.failed import NOBODY, FailedTasks, failed_task

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
ORG, SESSION = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d", "6f1b1e7e-9a53-4d0e-8c6f-0c9f5d1b2a3c"


@pytest.fixture
def tasks(tmp_path: Path) -> FailedTasks:
    return FailedTasks(Database(f"sqlite:///{tmp_path / 'memories.db'}"))


def test_of_a_well_formed_task_its_ids_are_kept() -> None:
    task = failed_task("t-1", {"session_id": SESSION, "org_id": ORG}, "why", 3, NOON)
    assert (task.task_id, task.org_id, task.session_id, task.attempts) == ("t-1", ORG, SESSION, 3)
    assert task.can_replay


@pytest.mark.parametrize("kwargs", [None, [], {"session_id": "I live in Rome"}, {"org_id": 5, "session_id": ["x"]}])
def test_what_is_no_id_is_not_kept(kwargs: object) -> None:
    task = failed_task("my secret is 1234", kwargs, "why", 1, NOON)
    assert (task.org_id, task.session_id, task.can_replay) == (NOBODY, "", False)
    assert "secret" not in task.task_id


def test_a_flood_of_tasks_without_an_id_is_one_row(tasks: FailedTasks) -> None:
    for _ in range(3):
        tasks.put(failed_task(None, None, "why", 1, NOON))
    (one,) = tasks.all()
    assert one.attempts == 3


def test_the_last_error_counts(tasks: FailedTasks) -> None:
    for error in ("first", "second"):
        tasks.put(failed_task("t-1", {}, error, 1, NOON))
    assert [task.error for task in tasks.all()] == ["second"]


def test_the_last_reason_counts(tasks: FailedTasks) -> None:
    for reason in ("time", "deadly"):
        tasks.put(replace(failed_task("t-1", {}, "why", 1, NOON), reason=reason))
    assert [task.reason for task in tasks.all()] == ["deadly"]


def test_what_failed_again_since_it_was_seen_stays(tasks: FailedTasks) -> None:
    tasks.put(failed_task("t-1", {}, "why", 1, NOON))
    (seen,) = tasks.all()
    tasks.put(failed_task("t-1", {}, "again", 1, NOON + timedelta(microseconds=1)))
    tasks.remove(seen)
    assert [task.error for task in tasks.all()] == ["again"]


def test_what_is_removed_is_gone(tasks: FailedTasks) -> None:
    tasks.put(failed_task("t-1", {}, "why", 1, NOON))
    tasks.remove(tasks.all()[0])
    assert tasks.all() == []
