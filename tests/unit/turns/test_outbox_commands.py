"""`extproc outbox`, on files that an observer left behind or has in use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from typer.testing import CliRunner, Result

from extproc.turns._tables import Consumer
from extproc.turns.commands import app
from extproc.turns.outbox import Outbox
from extproc.turns.turn import TurnText
from tests.unit.turns.outbox_side import ORG, turn

SECRET = TurnText("the user's secret", "the answer's secret")


def run(state: Path, *arguments: str) -> Result:
    """In this process, so only for files that no outbox of this process has open."""
    return CliRunner().invoke(app, [*arguments, "--state", str(state)], catch_exceptions=False)


def run_json(state: Path, *arguments: str) -> Any:
    result = run(state, *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def set_aside(outbox: Outbox, consumer: Consumer) -> None:
    file = outbox.files()[0]
    batch = file.take(consumer, 1)
    assert batch is not None
    file.set_aside(consumer, batch.rows[0], "Refused")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """Two turns wait, one of them was refused by the database."""
    directory = tmp_path / "state"
    outbox = Outbox(directory, 2**26, CollectorRegistry())
    outbox.put(turn("r1"), SECRET)
    outbox.put(turn("r2"), SECRET)
    assert outbox.flush(5)
    set_aside(outbox, Consumer.CHECKPOINT)
    outbox.files()[0].note_problem(Consumer.TRACE, "connection refused")
    outbox.close()
    return directory


def test_every_outbox_is_shown_with_what_waits_for_whom(state: Path) -> None:
    (outbox,) = run_json(state)
    assert (outbox["outbox"], outbox["in_use"], outbox["set_aside"]) == ("outbox-0", False, 1)
    assert outbox["bytes"] > 0
    assert {name: one["depth"] for name, one in outbox["consumers"].items()} == {
        "checkpoint": 1,
        "enqueue": 0,
        "trace": 2,
    }
    assert outbox["consumers"]["trace"]["problem"] == "connection refused"
    assert 0 <= outbox["consumers"]["trace"]["oldest_s"] < 60
    text = run(state).stdout
    assert "left behind" in text
    assert "connection refused" in text
    assert "1 set aside" in text


def test_what_was_set_aside_is_shown_by_its_ids(state: Path) -> None:
    (entry,) = run_json(state, "show-aside")
    assert (entry["consumer"], entry["error"], entry["org_id"], entry["request_id"]) == (
        "checkpoint",
        "Refused",
        ORG,
        "r1",
    )
    assert run_json(state, "show-aside", "--consumer", "trace") == []
    assert "request_id=r1" in run(state, "show-aside").stdout


def test_content_is_never_shown(state: Path) -> None:
    for arguments in ([], ["--json"], ["show-aside"], ["show-aside", "--json"]):
        assert "secret" not in run(state, *arguments).output


def test_what_was_set_aside_waits_again_for_who_refused_it(state: Path) -> None:
    assert run_json(state, "retry-aside", "outbox-0", "--id", "99") == {"retried": 0}
    assert run(state, "retry-aside").stdout == "1 entry brought back\n"
    (outbox,) = run_json(state)
    assert outbox["set_aside"] == 0
    assert {name: one["depth"] for name, one in outbox["consumers"].items()} == {
        "checkpoint": 2,
        "enqueue": 0,
        "trace": 2,
    }
    assert run(state, "show-aside").stderr == "Nothing is set aside.\n"


def test_all_of_it_works_beside_the_owner(state: Path) -> None:
    outbox = Outbox(state, 2**26, CollectorRegistry())

    def elsewhere(*arguments: str) -> Any:
        program = "import sys; from extproc.turns.commands import app; app()"
        command = [sys.executable, "-c", program, *arguments, "--state", str(state), "--json"]
        return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=30).stdout)

    try:
        (before,) = elsewhere()
        assert before["in_use"]
        assert elsewhere("retry-aside") == {"retried": 1}
        outbox.put(turn("r3"), SECRET)
        assert outbox.flush(5)
        file = outbox.files()[0]
        batch = file.take(Consumer.CHECKPOINT, 10)
        assert batch is not None
        assert len(batch.rows) == 3
        assert file.state(Consumer.CHECKPOINT).depth == 3
    finally:
        outbox.close()


def test_what_cannot_be_read_is_said_beside_the_others(state: Path) -> None:
    (state / "outbox-7.db").write_bytes(b"no database " * 1000)
    first, second = run_json(state)
    assert first["consumers"]
    assert second["outbox"] == "outbox-7"
    assert "not a database" in second["problem"]
    assert "outbox-7  cannot be read" in run(state).stdout
    result = run(state, "show-aside")
    assert result.exit_code == 2
    assert "outbox-7.db" in result.stderr


def test_an_empty_directory_is_no_error(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        result = run(directory)
        assert result.exit_code == 0
        assert "No outbox here" in result.stderr
        assert run_json(directory) == []


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["show-aside", "outbox-5"], "no outbox-5 here"),
        (["retry-aside", "--id", "1"], "name it"),
        (["show-aside", "--consumer", "nobody"], "nobody"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(state: Path, arguments: list[str], reason: str) -> None:
    result = run(state, *arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_the_environment_names_the_directory(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBEX_STATE_DIR", str(state))
    assert "outbox-0" in CliRunner().invoke(app, []).stdout
