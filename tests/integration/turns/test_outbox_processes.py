"""What the outbox promises of processes that are killed, of several on one directory, and of a disk that is full."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from extproc.turns.turn import task_id
from tests.unit.turns.outbox_side import ORG, turn

ROOT = Path(__file__).parents[3]
CHILD = Path(__file__).with_name("outbox_child.py")
KILLS = 12


class Child:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self._output = process.stdout
        self.file = self.line().split()[1]

    def line(self) -> str:
        return self._output.readline().strip()

    def lines(self) -> list[str]:
        return self._output.read().split("\n")[:-1]

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@contextmanager
def running(mode: str, directory: Path, name: str = "") -> Iterator[Child]:
    command = [sys.executable, str(CHILD), mode, str(directory / "state"), str(directory / "sinks.db"), name]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    try:
        yield Child(process)
    finally:
        process.kill()
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()


def drain(directory: Path) -> None:
    with running("drain", directory) as child:
        assert child.process.wait(40) == 0


class Arrived:
    def __init__(self, directory: Path) -> None:
        with closing(sqlite3.connect(directory / "sinks.db")) as db:
            self.checkpoints = dict(db.execute("SELECT request_id, turn_index FROM checkpoints").fetchall())
            self.texts = {text for (text,) in db.execute("SELECT DISTINCT text FROM checkpoints")}
            self.traces = [request for (request,) in db.execute("SELECT request_id FROM traces")]
            self.tasks = {id_ for (id_,) in db.execute("SELECT id FROM tasks")}

    def check(self) -> None:
        """The three systems have the same turns, each once."""
        assert len(self.traces) == len(set(self.traces))
        assert set(self.traces) == set(self.checkpoints)
        session = turn().session_id
        assert self.tasks == {task_id(ORG, session, index) for index in self.checkpoints.values()}


@pytest.mark.timeout(120)
def test_kill_at_any_moment_loses_nothing_that_was_committed_and_doubles_nothing(tmp_path: Path) -> None:
    confirmed: list[str] = []
    for kill in range(KILLS):
        with running("put", tmp_path, f"run{kill}") as child:
            child.line()  # at least ten are on the disk
            time.sleep(random.uniform(0, 0.4))
            child.kill()
            whole = [line for line in child.lines() if line.isdigit()]
            confirmed += [f"run{kill}-{number}" for number in range(int(whole[-1]) if whole else 10)]
    drain(tmp_path)
    arrived = Arrived(tmp_path)
    assert len(confirmed) >= 10 * KILLS
    assert set(confirmed) <= set(arrived.checkpoints)
    assert arrived.texts == {"my name is Ada"}
    arrived.check()
    left = {path.name for path in (tmp_path / "state").iterdir()} - {"outbox-0.reserve"}
    assert left == {"outbox-0.db", "outbox-0.lock"}


def test_two_processes_share_a_directory_and_the_living_one_delivers_for_the_dead(tmp_path: Path) -> None:
    with running("hold", tmp_path, "dead") as dead, running("put", tmp_path, "living") as living:
        assert {dead.file, living.file} == {"outbox-0.db", "outbox-1.db"}
        committed = int(dead.line())
        dead.kill()
        left = tmp_path / "state" / dead.file
        assert left.exists()
        deadline = time.monotonic() + 20
        while left.with_suffix(".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not left.with_suffix(".lock").exists(), "an adopted outbox goes when it is empty"
        assert not left.exists()
        living.kill()
    drain(tmp_path)
    arrived = Arrived(tmp_path)
    assert {f"dead-{number}" for number in range(committed)} <= set(arrived.checkpoints)
    arrived.check()


def test_a_machine_that_starts_again_finds_its_turns(tmp_path: Path) -> None:
    """Every process of the directory ended at once, with every system down."""
    with running("hold", tmp_path, "a") as first, running("hold", tmp_path, "b") as second:
        numbers = {"a": int(first.line()), "b": int(second.line())}
        first.kill()
        second.kill()
    drain(tmp_path)
    drain(tmp_path)  # the other file, unless the first one was there for long enough to adopt it
    arrived = Arrived(tmp_path)
    for name, number in numbers.items():
        assert {f"{name}-{one}" for one in range(number)} <= set(arrived.checkpoints)
    arrived.check()


def test_a_full_disk_costs_what_finds_no_room_and_is_counted_and_it_goes_on_by_itself(tmp_path: Path) -> None:
    with running("full", tmp_path, "r") as child:
        assert child.line() == "full"
        assert child.process.wait(50) == 0
        ended = [line.split() for line in child.lines() if line.startswith("ended")]
    (_, committed, lost) = ended[0]
    assert int(lost) > 0
    assert int(committed) + int(lost) == 3100
    arrived = Arrived(tmp_path)
    assert len(arrived.checkpoints) == int(committed)
    assert {f"r-{number}" for number in range(3000, 3100)} <= set(arrived.checkpoints)
    assert sorted(arrived.traces) == sorted(arrived.checkpoints)
