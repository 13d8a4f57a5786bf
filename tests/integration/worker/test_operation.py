"""What keeps a worker going and lets people see it: metrics, readiness, messages that kill, and the end."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from typing import Any

import httpx2
import psutil
import pytest

from extproc.stack.envoy import free_port
from extproc.worker.transport import DELIVERIES_HEADER
from tests.integration.worker import marked_worker
from tests.integration.worker.test_worker import TEXTS, extproc, once
from tests.integration.worker.worker_side import Place, eventually

pytestmark = pytest.mark.timeout(240)  # workers start and die, on a machine that may be busy

MARKED = "tests.integration.worker.marked_worker"


@pytest.fixture
def admin() -> str:
    return f"127.0.0.1:{free_port()}"


def metrics(admin: str) -> dict[str, float]:
    """All samples, by name and labels as they are written."""
    text = httpx2.get(f"http://{admin}/metrics", trust_env=False, timeout=20).text
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


def ready(admin: str) -> tuple[int, Any]:
    response = httpx2.get(f"http://{admin}/ready", trust_env=False, timeout=20)
    return response.status_code, response.json()["dependencies"]


def test_what_a_worker_did_is_counted_whoever_of_its_processes_did_it(on_sqlite: Place, admin: str) -> None:
    worker = on_sqlite.start(IBEX_ADMIN_LISTEN=admin, IBEX_WORKER_TURNS="2")
    first = on_sqlite.tell(TEXTS[:3], "first")
    on_sqlite.queue.send([first])
    eventually(lambda: metrics(admin)['ibex_worker_tasks_total{outcome="done"}'] == 1, on_sqlite.log)
    for child in extracting(worker.pid, admin):
        child.kill()
    second = on_sqlite.tell(["I live in Lisbon.", "I live in Porto now.", "My key is sk-" + "a1B2" * 12], "second")
    on_sqlite.queue.send([second])
    on_sqlite.valkey.execute("LPUSH", "extraction", "no JSON")
    eventually(lambda: metrics(admin)['ibex_worker_set_aside_total{reason="unreadable"}'] == 1, on_sqlite.log)
    eventually(lambda: metrics(admin)['ibex_worker_tasks_total{outcome="done"}'] == 2, on_sqlite.log)
    shown = metrics(admin)
    assert shown["ibex_worker_turns_total"] == 6
    assert shown['ibex_worker_memories_total{change="added"}'] == sum(on_sqlite.contents().values())
    assert shown["ibex_worker_redacted_total"] >= 1
    assert shown["ibex_worker_task_seconds_count"] == 2
    assert shown["ibex_worker_last_success_timestamp_seconds"] > 1_600_000_000
    assert httpx2.get(f"http://{admin}/health", trust_env=False, timeout=20).json() == {
        "process": "worker",
        "status": "ok",
    }
    eventually(lambda: metrics(admin)["ibex_worker_queue_length"] == 0, on_sqlite.log)
    eventually(lambda: ready(admin) == (200, {"broker": "ok", "store": "ok"}), on_sqlite.log)


def extracting(main: int, admin: str) -> list[psutil.Process]:
    """The pool's processes: all but the one that listens."""
    port = int(admin.rpartition(":")[2])
    children = psutil.Process(main).children()
    return [
        child for child in children if port not in {connection.laddr.port for connection in child.net_connections()}
    ]


def test_a_worker_is_ready_while_it_reaches_what_it_needs(on_sqlite: Place, admin: str) -> None:
    nobody = {"IBEX_EXTRACTOR": "llm", "IBEX_LLM_URL": "http://127.0.0.1:9/v1", "IBEX_LLM_MODEL": "m"}
    on_sqlite.start(IBEX_ADMIN_LISTEN=admin, **nobody)
    without_model = {"broker": "ok", "store": "ok", "model": "unavailable"}
    eventually(lambda: ready(admin) == (503, without_model), on_sqlite.log)
    on_sqlite.valkey.freeze()
    try:
        eventually(lambda: ready(admin) == (503, without_model | {"broker": "unavailable"}), on_sqlite.log)
    finally:
        on_sqlite.valkey.thaw()
    eventually(lambda: ready(admin) == (503, without_model), on_sqlite.log)


def test_a_worker_that_leaves_tasks_in_the_queue_is_not_alive(on_sqlite: Place, admin: str) -> None:
    worker = on_sqlite.start(IBEX_ADMIN_LISTEN=admin, IBEX_WORKER_LIMIT_S="2")

    def health() -> int:
        return httpx2.get(f"http://{admin}/health", trust_env=False, timeout=20).status_code

    assert health() == 200
    worker.send_signal(signal.SIGSTOP)
    # The first is handed to the worker, which asked before.
    on_sqlite.queue.send([on_sqlite.tell(TEXTS[:1])] * 3)
    eventually(lambda: health() == 503, on_sqlite.log)
    worker.send_signal(signal.SIGCONT)
    eventually(lambda: health() == 200, on_sqlite.log)


def test_a_task_that_kills_each_process_is_set_aside_and_the_others_go_on(on_sqlite: Place) -> None:
    on_sqlite.start(MARKED, IBEX_WORKER_DELIVERIES="3")
    deadly = on_sqlite.tell([marked_worker.DEADLY], "deadly")
    others = [on_sqlite.tell([text], f"other-{number}") for number, text in enumerate(TEXTS[:6])]
    on_sqlite.queue.send([others[0], deadly, *others[1:]])
    eventually(lambda: all(map(on_sqlite.is_extracted, others)) and on_sqlite.failed(), on_sqlite.log)
    eventually(lambda: on_sqlite.waits() == 0, on_sqlite.log)
    assert once(on_sqlite.contents(), TEXTS[:6])
    (shown,) = json.loads(extproc(on_sqlite, "worker", "failed", "--json"))
    assert (shown["task_id"], shown["session_id"], shown["attempts"]) == (deadly.id, deadly.session_id, 3)
    assert "that had it died" in shown["error"]
    on_sqlite.stop_workers()
    on_sqlite.start()
    assert json.loads(extproc(on_sqlite, "worker", "replay", "--json")) == {"replayed": 1, "left": 0}
    eventually(lambda: on_sqlite.is_extracted(deadly), on_sqlite.log)
    assert on_sqlite.failed() == []


def test_a_worker_that_is_told_to_stop_ends_its_task_and_gives_back_the_others(on_sqlite: Place) -> None:
    worker = on_sqlite.start(MARKED)
    tasks = [on_sqlite.tell([text], f"talk-{text}"[:64]) for text in (marked_worker.SLOW, *TEXTS[:3])]
    on_sqlite.queue.send(tasks)
    eventually(lambda: marked_worker.BEGUN in on_sqlite.log(), on_sqlite.log)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert on_sqlite.is_extracted(tasks[0])
    left = {task.id for task in tasks if not on_sqlite.is_extracted(task)}
    assert left
    assert on_sqlite.taken() == []
    # The one that ended may be there too: the worker may be gone before it could say so.
    queued = {
        json.loads(message)["headers"]["id"] for message in on_sqlite.valkey.execute("LRANGE", "extraction", 0, -1)
    }
    assert left <= queued <= left | {tasks[0].id}


def test_a_task_that_waits_for_its_next_attempt_is_given_back_at_the_end(on_sqlite: Place) -> None:
    nobody = {"IBEX_EXTRACTOR": "llm", "IBEX_LLM_URL": "http://127.0.0.1:9/v1", "IBEX_LLM_MODEL": "m"}
    worker = on_sqlite.start(**nobody)
    on_sqlite.queue.send([on_sqlite.tell(TEXTS[:1])])
    eventually(lambda: any(b'"retries": 2' in one for one in on_sqlite.taken()), on_sqlite.log)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert (on_sqlite.waits(), on_sqlite.taken()) == (1, [])
    (message,) = on_sqlite.valkey.execute("LRANGE", "extraction", 0, -1)
    assert DELIVERIES_HEADER not in json.loads(message)["headers"]  # a restart is no sign of a deadly task


def test_an_address_that_is_taken_is_said(on_sqlite: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "extproc", "worker", "--admin", listen],
            capture_output=True, text=True, timeout=60, env=on_sqlite.environment,
        )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert f"cannot listen on {listen} (IBEX_ADMIN_LISTEN)" in done.stderr
