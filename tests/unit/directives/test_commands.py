from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import typer
from typer.testing import CliRunner, Result

from extproc.directives.commands import app as directives_app
from extproc.memory.demo import Demo

app = typer.Typer()
app.add_typer(directives_app, name="directive")

ORG, AGENT = str(uuid4()), str(uuid4())


class Shell:
    def __init__(self, data: Path) -> None:
        self.data = data

    def run(self, *arguments: str, given: bytes = b"", whose: tuple[str, ...] | None = None) -> Result:
        owner = whose if whose is not None else ("--org", ORG, "--agent", AGENT)
        return CliRunner().invoke(
            app, ["directive", *arguments, *owner, "--data", str(self.data)], input=given, catch_exceptions=False
        )

    def json(self, *arguments: str, given: bytes = b"") -> Any:
        result = self.run(*arguments, "--json", given=given)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.delenv("IBEX_REDIS_URL", raising=False)
    return Shell(tmp_path)


def test_a_directive_is_set_shown_and_listed(shell: Shell) -> None:
    made = shell.json("set", "Be brief.", "--mode", "system_append")
    digest = hashlib.sha256(b"Be brief.").hexdigest()
    assert made["content_hash"] == digest
    assert (made["version"], made["injection_mode"], made["is_active"]) == (1, "system_append", True)
    assert "Be brief." not in json.dumps(made), "what is set is not repeated"
    assert shell.json("show")["content"] == "Be brief."
    [listed] = shell.json("list")
    assert (listed["agent_id"], listed["version_id"]) == (AGENT, made["version_id"])
    assert "content" not in listed
    plain = shell.run("set", "Be long.").stdout
    assert hashlib.sha256(b"Be long.").hexdigest() in plain
    assert shell.json("show")["version_id"] in plain


def test_it_is_read_from_a_file_or_from_standard_input(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "directive.txt"
    file.write_bytes("\ufeffÄ line.\nAnother.\n\n".encode())
    shell.json("set", "--file", str(file))
    assert shell.json("show")["content"] == "Ä line.\nAnother."
    shell.json("set", "-", given=b"From a pipe.\n")
    shown = shell.run("show")
    assert shown.stdout == "From a pipe.\n"
    assert "version 2" in shown.stderr


def test_versions_come_back(shell: Shell) -> None:
    for content in ("One.", "Two.", "Three."):
        shell.json("set", content)
    assert [(one["version"], one["content"], one["is_current"]) for one in shell.json("history")] == [
        (3, "Three.", True),
        (2, "Two.", False),
        (1, "One.", False),
    ]
    assert shell.json("rollback")["version"] == 2
    assert shell.json("rollback", "--to", "1")["version"] == 1
    assert [line[0] for line in shell.run("history").stdout.splitlines()] == [" ", " ", "*"]
    assert "One." not in shell.run("history").stdout


def test_it_is_switched_and_moved(shell: Shell) -> None:
    shell.json("set", "One.")
    assert shell.json("deactivate")["is_active"] is False
    assert " off " in shell.run("list").stdout
    assert shell.json("mode", "user_prepend")["injection_mode"] == "user_prepend"
    assert shell.json("activate")["is_active"] is True


def test_a_change_that_no_filter_hears_of_is_said(shell: Shell) -> None:
    result = shell.run("set", "One.")
    assert result.exit_code == 0
    assert "IBEX_REDIS_URL is not set" in result.stderr
    assert shell.json("show")["version"] == 1


def test_a_redis_that_is_away_costs_a_warning(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBEX_REDIS_URL", "redis://:sesame@127.0.0.1:1/0")
    result = shell.run("set", "One.", "--json")
    assert result.exit_code == 0
    assert "did not take it" in result.stderr
    assert "sesame" not in result.output
    assert json.loads(result.stdout)["published"] is False


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("set",), "give the directive"),
        (("set", "x", "--file", "y"), "give the directive"),
        (("set", "--file", "/nowhere/at/all"), "cannot be read"),
        (("set", " "), "empty"),
        (("set", "x" * 32_769), "the most is 32,768"),
        (("set", "x", "--mode", "first"), "system_first, system_append, user_prepend"),
        (("mode", "first"), "system_first, system_append, user_prepend"),
        (("show",), "no directive"),
        (("history",), "no directive"),
        (("activate",), "no directive"),
        (("deactivate",), "no directive"),
        (("rollback",), "no directive"),
        (("rollback", "--to", "7"), "no version 7"),
        (("mode", "system_first"), "no directive"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_word(shell: Shell, arguments: tuple[str, ...], problem: str) -> None:
    result = shell.run(*arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert "Traceback" not in result.output


def test_bytes_that_are_no_text_are_refused(shell: Shell) -> None:
    result = shell.run("set", "-", given=b"\xff\xfe")
    assert (result.exit_code, "not UTF-8" in result.stderr) == (2, True)


def test_what_moves_a_terminals_cursor_is_not_shown(shell: Shell) -> None:
    shell.json("set", "-", given=b"One.\x1b[2J\nTwo.")
    assert shell.run("show").stdout == "One. [2J\nTwo.\n"


def test_another_organisation_sees_nothing(shell: Shell) -> None:
    shell.json("set", "Ours.")
    other = ("--org", str(uuid4()), "--agent", AGENT)
    for command in ("show", "history", "deactivate", "rollback"):
        result = shell.run(command, whose=other)
        assert result.exit_code == 2
        assert "Ours." not in result.output
    assert json.loads(shell.run("list", "--json", whose=other).stdout) == []
    assert shell.json("show")["is_active"] is True


def test_the_demo_needs_no_ids(shell: Shell) -> None:
    Demo.find_or_make(shell.data)
    assert shell.run("set", "One.", whose=()).exit_code == 0
