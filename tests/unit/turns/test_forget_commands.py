"""`extproc memory forget` and `extproc outbox forget`, on a real store and outboxes that are in use or left behind."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner, Result

from extproc.memory.database import Database
from extproc.turns._tables import Consumer
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.commands import app as outbox_app
from extproc.turns.forget_commands import app
from extproc.turns.outbox import Outbox
from extproc.turns.turn import Entry, TurnText
from tests.unit.turns.outbox_side import AGENT, ORG, turn

TEXT = TurnText("I am allergic to kumquats", "Noted: kumquats")


class Shell:
    """Memories and outboxes in one directory, as `extproc up` has them."""

    def __init__(self, data: Path) -> None:
        self.data = data

    def run(self, command: str, *arguments: str, stdin: str | None = None) -> Result:
        options = ["--org", ORG, "--agent", AGENT, "--data", str(self.data)]
        return CliRunner().invoke(app, [command, *arguments, *options], input=stdin, catch_exceptions=False)

    def json(self, command: str, *arguments: str) -> Any:
        result = self.run(command, *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def forgotten_elsewhere(self, *arguments: str) -> Any:
        """By `extproc outbox forget`, in a process of its own: this one has the outbox open."""
        options = ["--org", ORG, "--agent", AGENT, "--state", str(self.data), "--json", "--yes", *arguments]
        command = [sys.executable, "-m", "extproc", "outbox", "forget", *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=50)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def holds(self, words: str) -> bool:
        """In any file, whichever process wrote it."""
        return any(words.encode() in file.read_bytes() for file in self.data.rglob("*") if file.is_file())


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "state")


@pytest.fixture
def outbox(shell: Shell) -> Iterator[Outbox]:
    made = Outbox(shell.data, 2**26, CollectorRegistry())
    yield made
    made.close()


def put(outbox: Outbox, user: str | None = "ana", at: datetime | None = None, **given: Any) -> None:
    outbox.put(turn(user_id=user, requested_at=at or datetime.now(UTC), **given), TEXT)
    assert outbox.flush(5)


def texts(outbox: Outbox) -> list[bool]:
    """Of what waits for its checkpoint, in order: whether the text is there."""
    batch = outbox.files()[0].take(Consumer.CHECKPOINT, 100)
    return [row.text is not None for row in batch.rows] if batch else []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "either the id"),
        (["x", "--all"], "either the id"),
        (["x"], "is not a UUID"),
        ([str(uuid.uuid4())], "memory list"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(shell: Shell, arguments: list[str], reason: str) -> None:
    result = shell.run("forget", *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr


def test_it_asks_and_leaves_the_others(shell: Shell) -> None:
    for user in ([], ["--user", "u1"]):
        shell.json("add", "likes tea", *user)
    assert shell.run("forget", "--all", "--user", "u1", stdin="n\n").exit_code == 1
    assert len(shell.json("list", "--user", "u1")) == 2
    result = shell.run("forget", "--all", "--user", "u1", stdin="y\n")
    assert "1 memory of user u1 removed" in result.stdout
    (left,) = shell.json("list", "--user", "u1")
    assert shell.json("forget", left["id"]) == {"removed": 1}
    assert shell.json("forget", "--all", "--yes")["removed"] == 0


def test_texts_that_wait_for_a_worker_go_too_and_leave_nothing_in_the_files(shell: Shell) -> None:
    shell.json("add", "likes kumquats", "--user", "ana")
    database = Database(f"sqlite:///{shell.data / 'memories.db'}")
    DatabaseCheckpoints(database, 86_400).write([Entry(1, turn(user_id="ana", requested_at=datetime.now(UTC)), TEXT)])
    database.close()
    assert shell.holds("kumquats")
    said = shell.json("forget", "--all", "--user", "ana", "--yes")
    assert (said["removed"], said["turn_texts"], said["outbox_texts"]) == (1, 1, 0)
    assert not shell.holds("kumquats")


def test_texts_in_an_outbox_that_was_left_behind_go_too(shell: Shell) -> None:
    outbox = Outbox(shell.data, 2**26, CollectorRegistry())
    put(outbox)
    outbox.close()
    said = shell.json("forget", "--all", "--user", "ana", "--yes")
    assert said["outboxes"] == {"outbox-0": {"texts": 1, "problem": ""}}
    assert not shell.holds("kumquats")


def test_only_the_owners_texts_that_were_said_until_then_are_erased(shell: Shell, outbox: Outbox) -> None:
    before, after = (datetime(2025, 6, 1, hour, tzinfo=UTC) for hour in (10, 12))
    put(outbox, "ana", before)
    put(outbox, "ben", before)
    put(outbox, None, before)
    put(outbox, "ana", before, agent_id=str(uuid.uuid4()))
    put(outbox, "ana", after)
    done = shell.forgotten_elsewhere("--user", "ana", "--until", "2025-06-01T11:00")  # without a zone it is UTC
    assert done["outbox_texts"] == 1
    assert texts(outbox) == [False, True, True, True, True]


def test_the_outbox_goes_on_afterwards_and_counts_right(shell: Shell, outbox: Outbox) -> None:
    put(outbox)
    put(outbox, "ben")
    file, size = outbox.files()[0], outbox.files()[0].waiting_bytes
    shell.forgotten_elsewhere("--user", "ana")
    file.notice_others()  # as the outbox does once a second
    assert 0 < file.waiting_bytes < size
    put(outbox)
    assert texts(outbox) == [False, True, True]
    for consumer in (Consumer.CHECKPOINT, Consumer.ENQUEUE, Consumer.TRACE):
        while (batch := file.take(consumer, 100)) is not None:
            file.done(batch)
    assert {file.state(consumer).depth for consumer in Consumer} == {0}


def test_an_outbox_that_cannot_be_read_is_named_and_the_command_fails(shell: Shell) -> None:
    shell.json("add", "likes tea", "--user", "ana")
    (shell.data / "outbox-0.db").write_bytes(b"no database" * 100)
    result = shell.run("forget", "--all", "--user", "ana", "--yes")
    assert result.exit_code == 1
    assert "1 memory of user ana removed" in result.stdout
    assert "outbox-0 could not be looked into" in result.stderr


def test_it_says_what_it_cannot_reach_and_what_to_run_there(shell: Shell) -> None:
    told = shell.run("forget", "--all", "--user", "ana", "--yes").stdout
    (command,) = [line.split() for line in told.splitlines() if line.startswith("  extproc outbox forget")]
    result = CliRunner().invoke(outbox_app, [*command[2:], "--state", str(shell.data)], catch_exceptions=False)
    assert result.exit_code == 0
    assert "0 texts erased in 0 outboxes" in result.stdout


def test_texts_in_outboxes_are_not_erased_unasked(shell: Shell) -> None:
    options = ["--org", ORG, "--agent", AGENT, "--user", "ana", "--state", str(shell.data)]
    result = CliRunner().invoke(outbox_app, ["forget", *options], input="n\n")
    assert result.exit_code == 1
    assert "Erase every text of user ana" in result.stderr
    assert "erased" not in result.stdout


def test_a_time_that_is_none_is_said(shell: Shell) -> None:
    options = ["--org", ORG, "--agent", AGENT, "--state", str(shell.data)]
    result = CliRunner().invoke(outbox_app, ["forget", *options, "--until", "yesterday"])
    assert result.exit_code == 2
    assert "--until 'yesterday' is not a time" in result.stderr
