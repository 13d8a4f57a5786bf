"""Drills with real workers, a real queue and real databases: each turn's memories exactly once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import psutil
import pytest

from extproc.turns.celery_message import encode_message
from extproc.turns.sinks import ExtractionTask
from tests.integration.turns import postgres_side
from tests.integration.worker.worker_side import AGENT, ORG, Place, eventually

pytestmark = pytest.mark.timeout(240)  # workers start and die, on a machine that may be busy

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TEXTS = [f"My locker number {number} is at the station in Town{number:03}." for number in range(60)]


def once(contents: Counter[tuple[str, str]], texts: list[str]) -> bool:
    """Whether each text is there exactly once, and nothing twice."""
    told = {content for content, _ in contents}
    return set(texts) <= told and set(contents.values()) == {1}


def extproc(place: Place, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "extproc", *arguments], capture_output=True, text=True, timeout=90, env=place.environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_task_that_is_delivered_ten_times_writes_its_memories_once(either: Place) -> None:
    task = either.tell(TEXTS[:5])
    either.start()
    either.queue.send([task] * 10)
    eventually(lambda: either.is_extracted(task) and either.waits() == 0, either.log)
    before = either.contents()
    assert once(before, TEXTS[:5])
    either.queue.send([task] * 10)
    eventually(lambda: either.waits() == 0, either.log)
    assert either.contents() == before
    assert either.failed() == []


def test_two_workers_on_one_session_write_its_memories_once(either: Place) -> None:
    either.start(IBEX_WORKER_TURNS="2", IBEX_WORKER_PROCESSES="2")
    either.start(IBEX_WORKER_TURNS="2", IBEX_WORKER_PROCESSES="2")
    task = either.tell(TEXTS)
    either.queue.send([task] * 8)
    eventually(lambda: either.is_extracted(task) and either.waits() == 0, either.log)
    assert once(either.contents(), TEXTS)
    assert either.failed() == []


def test_a_process_killed_in_the_middle_loses_and_doubles_nothing(either: Place) -> None:
    worker = either.start(IBEX_WORKER_TURNS="1")
    task = either.tell(TEXTS)
    either.queue.send([task])
    eventually(lambda: either.session(task)[1] >= 3, either.log)
    for child in psutil.Process(worker.pid).children():
        child.kill()
    eventually(lambda: either.is_extracted(task) and either.waits() == 0, either.log)
    assert once(either.contents(), TEXTS)


def test_a_whole_worker_killed_in_the_middle_is_taken_over_from(on_sqlite: Place) -> None:
    """Its task comes again by itself, once it counts as lost: 15 s later, with a limit that a busy machine keeps."""
    quick = {"IBEX_WORKER_TURNS": "1", "IBEX_WORKER_LIMIT_S": "5"}
    worker = on_sqlite.start(**quick)
    task = on_sqlite.tell(TEXTS)
    on_sqlite.queue.send([task])
    eventually(lambda: on_sqlite.session(task)[1] >= 3, on_sqlite.log)
    children = psutil.Process(worker.pid).children()
    worker.kill()
    for child in children:
        child.kill()
    assert not on_sqlite.is_extracted(task)
    on_sqlite.start(**quick)
    eventually(lambda: on_sqlite.is_extracted(task), on_sqlite.log)
    assert once(on_sqlite.contents(), TEXTS)


def test_a_database_that_goes_away_in_the_middle_delays_and_loses_nothing(
    on_postgres: tuple[Place, postgres_side.Database],
) -> None:
    place, postgres = on_postgres
    place.start(IBEX_WORKER_TURNS="1")
    task = place.tell(TEXTS)
    place.queue.send([task])
    eventually(lambda: place.session(task)[1] >= 3, place.log)
    postgres.stop()
    eventually(lambda: "the task is tried again" in place.log(), place.log)
    postgres.start()
    eventually(lambda: place.is_extracted(task), place.log)
    assert once(place.contents(), TEXTS)
    assert place.failed() == []


def test_what_is_forgotten_while_it_is_extracted_or_queued_does_not_come_back(either: Place) -> None:
    either.start(IBEX_WORKER_TURNS="1")
    # So many that the worker is not through before the command has started, on however quick a machine.
    talk = [f"My locker number {number} is at the station in Town{number:04}." for number in range(1_000)]
    queued, task = either.tell(TEXTS[:3], "other talk"), either.tell(talk)
    either.queue.send([task])
    eventually(lambda: either.session(task)[1] >= 3, either.log)
    whose = ["--org", ORG, "--agent", AGENT, "--user", either.user, "--state", str(either.directory)]
    said = json.loads(extproc(either, "memory", "forget", "--all", "--yes", *whose, "--json"))
    assert said["removed"] > 0
    assert said["turn_texts"] > 3  # of both sessions
    either.queue.send([task, queued])
    eventually(lambda: either.is_extracted(task) and either.is_extracted(queued) and either.waits() == 0, either.log)
    assert either.contents() == Counter()
    later = either.tell([TEXTS[0]])
    either.queue.send([later])
    eventually(lambda: either.is_extracted(later), either.log)
    assert once(either.contents(), [TEXTS[0]])


def test_messages_that_cannot_be_used_are_set_aside_and_the_next_is_done(either: Place) -> None:
    task = either.tell(TEXTS[:1])
    flat = {"id": "flat", "task": "t", "args": [], "kwargs": {"session_id": task.session_id, "org_id": ORG}}
    unknown = json.loads(encode_message(ExtractionTask("unknown", task.session_id, ORG), "tag-1"))
    unknown["headers"]["task"] = "somebody.elses"
    nobodys = encode_message(ExtractionTask("nobodys", "a canary sings", "no organisation"), "tag-2")
    for message in ("no JSON, a canary sings", "[1]", json.dumps(flat), json.dumps(unknown), nobodys):
        either.valkey.execute("LPUSH", "extraction", message)
    either.start()
    # The two that say nothing of themselves are one row.
    eventually(lambda: sum(one.attempts for one in either.failed()) == 5 and either.waits() == 0, either.log)
    either.queue.send([task])
    eventually(lambda: either.is_extracted(task), either.log)
    assert {one.task_id for one in either.failed()} > {"flat", "unknown", "nobodys"}
    assert "canary" not in either.log() + extproc(either, "worker", "failed", "--json")


def test_a_failed_task_is_replayed(on_sqlite: Place) -> None:
    task = on_sqlite.tell(TEXTS[:2])
    flat = {"id": task.id, "kwargs": {"session_id": task.session_id, "org_id": ORG}}
    on_sqlite.valkey.execute("LPUSH", "extraction", json.dumps(flat))
    on_sqlite.start()
    eventually(lambda: len(on_sqlite.failed()) == 1, on_sqlite.log)
    (shown,) = json.loads(extproc(on_sqlite, "worker", "failed", "--json"))
    assert (shown["task_id"], shown["session_id"], shown["attempts"]) == (task.id, task.session_id, 1)
    assert json.loads(extproc(on_sqlite, "worker", "replay", task.id, "--json")) == {"replayed": 1, "left": 0}
    eventually(lambda: on_sqlite.is_extracted(task), on_sqlite.log)
    assert on_sqlite.failed() == []


def test_a_model_that_is_away_leaves_a_dead_letter_after_its_attempts(on_sqlite: Place) -> None:
    nobody = {"IBEX_EXTRACTOR": "llm", "IBEX_LLM_URL": "http://127.0.0.1:9/v1", "IBEX_LLM_MODEL": "m"}
    on_sqlite.start(IBEX_WORKER_ATTEMPTS="5", **nobody)  # more than Celery's own three retries
    task = replace(on_sqlite.tell(TEXTS[:1]), traceparent=TRACEPARENT)
    on_sqlite.queue.send([task])
    # A message that waits for its next attempt is kept by the broker, with its trace.
    eventually(lambda: any(b'"retries": 2' in one and TRACEPARENT.encode() in one for one in on_sqlite.taken()))
    eventually(on_sqlite.failed, on_sqlite.log)
    (failed,) = on_sqlite.failed()
    assert (failed.task_id, failed.attempts) == (task.id, 5)
    assert on_sqlite.session(task) == (1, 0, 1)
    assert "locker" not in on_sqlite.log()
