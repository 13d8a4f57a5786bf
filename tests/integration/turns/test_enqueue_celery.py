"""Stock Celery workers, installed apart from this project, run what the sink sends; a stock producer sends the same."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from extproc.stack.child import die_with_parent
from extproc.turns.enqueue import RedisTasks
from extproc.turns.sinks import ExtractionTask
from tests.integration.turns.valkey_side import Server, eventually, valkey

ENVIRONMENTS = Path(__file__).parents[3] / ".celery"
NAME = "worker.tasks.extraction.extract_session_memories"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

APP = f'''
import json, os, pathlib, time
from celery import Celery

app = Celery("app", broker=os.environ["BROKER"])
app.conf.broker_connection_retry_on_startup = True
app.conf.task_acks_late = "ACKS_LATE" in os.environ
app.conf.broker_transport_options = {{"visibility_timeout": 1}} if "ACKS_LATE" in os.environ else {{}}
here = pathlib.Path(__file__).parent


@app.task(name="{NAME}", bind=True)
def extract(self, *args, **kwargs):
    names = ["id", "root_id", "parent_id", "retries", "traceparent", "correlation_id", "ignore_result", "delivery_info"]
    seen = {{name: getattr(self.request, name, None) for name in names}}
    with (here / "runs").open("a") as runs:
        runs.write(json.dumps({{**seen, "args": args, "kwargs": kwargs}}) + "\\n")
    if kwargs["org_id"] == "retry" and self.request.retries == 0:
        raise self.retry(countdown=0.1)
    if kwargs["org_id"] == "hang" and not (here / "hung").exists():
        (here / "hung").touch()
        time.sleep(60)
'''

PRODUCER = f'''
import json, os, sys
from celery import Celery

task = json.loads(sys.argv[1])
Celery("app", broker=os.environ["BROKER"]).send_task(
    "{NAME}",
    args=[],
    kwargs={{"session_id": task["session_id"], "org_id": task["org_id"]}},
    task_id=task["id"],
    queue="extraction",
    ignore_result=True,
    headers={{"traceparent": task["traceparent"]}},
)
'''


@dataclass(frozen=True)
class Celery:
    """An installation of Celery, and a directory with an app in it."""

    python: Path
    directory: Path
    broker: str

    @property
    def runs(self) -> list[dict[str, Any]]:
        file = self.directory / "runs"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def runs_of(self, task: ExtractionTask) -> list[dict[str, Any]]:
        return [run for run in self.runs if run["id"] == task.id]

    def environment(self, **more: str) -> dict[str, str]:
        """Of this project's environment nothing, so that nothing of it can be imported there."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
        return {**kept, "BROKER": self.broker, "C_FORCE_ROOT": "1", **more}

    @contextmanager
    def worker(self, pool: str = "solo", **environment: str) -> Iterator[subprocess.Popen[bytes]]:
        """One that consumes the queue, a task at a time; killed at the end."""
        options = ["--pool", pool, "--concurrency", "1", "-Q", "extraction", "--loglevel", "INFO"]
        quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        command = [str(self.python), "-m", "celery", "-A", "app", "worker", *options, *quiet]
        log_file = self.directory / "worker.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.directory,
                env=self.environment(**environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - one system call
            )
        try:
            eventually(lambda: process.poll() is not None or b" ready." in log_file.read_bytes(), 90)
            assert process.poll() is None, log_file.read_text()
            yield process
        finally:
            process.kill()
            process.wait(10)


@pytest.fixture(scope="module", params=["5.4.0", "5.7.0"])
def celery_python(request: pytest.FixtureRequest) -> Path:
    version: str = request.param
    python = ENVIRONMENTS / version / "bin" / "python"
    if not python.exists():
        missing = f"{python} is missing; run `make setup-celery`"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    return python


@pytest.fixture(scope="module")
def broker(celery_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with valkey(tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="module")
def celery(celery_python: Path, broker: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Celery]:
    """With a worker of stock settings."""
    celery = installed(celery_python, tmp_path_factory.mktemp("app"), broker.url)
    with celery.worker():
        yield celery


@pytest.fixture
def sink(broker: Server) -> Iterator[RedisTasks]:
    sink = RedisTasks(broker.url)
    yield sink
    sink.close()


def installed(python: Path, directory: Path, broker: str) -> Celery:
    (directory / "app.py").write_text(APP)
    (directory / "produce.py").write_text(PRODUCER)
    return Celery(python, directory, broker)


def task(org_id: str = "org", traceparent: str = TRACEPARENT) -> ExtractionTask:
    return ExtractionTask(str(uuid.uuid4()), str(uuid.uuid4()), org_id, traceparent)


def is_done(broker: Server) -> bool:
    """Nothing waits, and nothing is taken but not acknowledged."""
    return not any(broker.execute("EXISTS", key) for key in ("extraction", "unacked", "unacked_index"))


def test_the_worker_runs_every_task_of_a_batch_in_order(celery: Celery, broker: Server, sink: RedisTasks) -> None:
    batch = [task() for _ in range(5)]
    sink.send(batch)
    eventually(lambda: all(celery.runs_of(sent) for sent in batch))
    ids = [sent.id for sent in batch]
    assert [run["id"] for run in celery.runs if run["id"] in ids] == ids
    eventually(lambda: is_done(broker))


def test_the_worker_sees_arguments_ids_and_the_trace(celery: Celery, sink: RedisTasks) -> None:
    sent = task()
    sink.send([sent])
    eventually(lambda: bool(celery.runs_of(sent)))
    (run,) = celery.runs_of(sent)
    assert run == {
        "id": sent.id,
        "root_id": sent.id,
        "parent_id": None,
        "retries": 0,
        "traceparent": TRACEPARENT,
        "correlation_id": sent.id,
        "ignore_result": True,
        "delivery_info": {"exchange": "", "routing_key": "extraction", "priority": 0, "redelivered": False},
        "args": [],
        "kwargs": {"session_id": sent.session_id, "org_id": sent.org_id},
    }


def test_a_task_without_a_trace_runs_as_well(celery: Celery, sink: RedisTasks) -> None:
    sent = task(traceparent="")
    sink.send([sent])
    eventually(lambda: bool(celery.runs_of(sent)))
    assert celery.runs_of(sent)[0]["traceparent"] is None


def test_a_task_that_is_sent_twice_runs_and_is_acknowledged_twice(
    celery: Celery, broker: Server, sink: RedisTasks
) -> None:
    sent = task()
    sink.send([sent, sent])
    eventually(lambda: len(celery.runs_of(sent)) == 2)
    eventually(lambda: is_done(broker))


def test_the_worker_can_try_a_task_again(celery: Celery, broker: Server, sink: RedisTasks) -> None:
    sent = task("retry")
    sink.send([sent])
    eventually(lambda: len(celery.runs_of(sent)) == 2)
    first, second = celery.runs_of(sent)
    assert (first["retries"], second["retries"]) == (0, 1)
    assert first["kwargs"] == second["kwargs"]
    eventually(lambda: is_done(broker))


def test_a_task_whose_worker_was_killed_is_delivered_again(celery_python: Path, tmp_path: Path) -> None:
    with valkey(tmp_path / "valkey") as broker:
        celery = installed(celery_python, tmp_path, broker.url)
        sink, sent = RedisTasks(broker.url), task("hang")
        # Twice under one id: one runs, one was fetched ahead, and the acknowledgement of one must not be the other's.
        sink.send([sent, sent])
        sink.close()
        with celery.worker("threads", ACKS_LATE="1"):
            eventually(lambda: len(celery.runs_of(sent)) == 1 and broker.execute("HLEN", "unacked") == 2)
        time.sleep(1.2)  # the visibility timeout
        with celery.worker("threads", ACKS_LATE="1"):
            eventually(lambda: len(celery.runs_of(sent)) == 3)
            assert celery.runs_of(sent)[1]["delivery_info"]["redelivered"]
            eventually(lambda: is_done(broker))


def test_the_message_is_that_of_a_stock_producer(celery_python: Path, tmp_path: Path) -> None:
    sent = task("org")
    with valkey(tmp_path / "valkey") as broker:
        celery = installed(celery_python, tmp_path, broker.url)
        arguments = json.dumps(
            {"id": sent.id, "session_id": sent.session_id, "org_id": sent.org_id, "traceparent": sent.traceparent}
        )
        produce = [str(celery_python), "produce.py", arguments]
        subprocess.run(produce, cwd=tmp_path, env=celery.environment(), check=True, timeout=90)
        theirs = json.loads(broker.execute("RPOP", "extraction"))
        sink = RedisTasks(broker.url)
        sink.send([sent])
        sink.close()
        ours = json.loads(broker.execute("RPOP", "extraction"))
    assert ours.keys() - theirs.keys() == {"id", "task", "args", "kwargs", "retries", "eta"}
    for message in (ours, theirs):
        message["body"] = json.loads(base64.b64decode(message["body"]))
    for name in ("body", "content-type", "content-encoding"):
        assert ours[name] == theirs[name]
    # A process's name, and addresses that are new each time.
    own = {"origin": theirs["headers"]["origin"]}
    assert ours["headers"] | own == theirs["headers"]
    own = {name: theirs["properties"][name] for name in ("reply_to", "delivery_tag")}
    assert ours["properties"] | own == theirs["properties"]
