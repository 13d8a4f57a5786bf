from __future__ import annotations

import json
import os
import sqlite3
import stat
import subprocess
import sys
import uuid
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from extproc.context.commands import app
from extproc.memory import commands, lines
from extproc.memory.commands import opened
from extproc.memory.model import Namespace, Source, Status, new_memory
from tests.unit.memory.test_store import wait_until

ORG, AGENT = str(uuid.UUID(int=1)), str(uuid.UUID(int=2))
MOMENT = datetime(2025, 3, 1, 12, 30, 15, 250_000, tzinfo=UTC)


class Shell:
    def __init__(self, data: Path) -> None:
        self.data = data

    def run(self, command: str, *arguments: str, agent: str = AGENT, stdin: str | bytes | None = None) -> Result:
        options = ["--org", ORG, "--agent", agent, "--data", str(self.data)]
        return CliRunner().invoke(app, [command, *arguments, *options], input=stdin, catch_exceptions=False)

    def json(self, command: str, *arguments: str) -> Any:
        result = self.run(command, *arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    return Shell(tmp_path / "state")


def test_add_list_and_search(shell: Shell) -> None:
    added = shell.json("add", "The user's name is Ada.", "--category", "preference")
    assert added["is_new"]
    assert shell.json("add", "The user's name is  Ada.") == {"id": added["id"], "is_new": False}
    (listed,) = shell.json("list")
    assert (listed["id"], listed["category"], listed["source"]) == (added["id"], "preference", "user_provided")
    (found,) = shell.json("search", "what is my name?")
    assert found["id"] == added["id"]
    assert 0 < found["relevance"] <= 1
    assert "Ada" in shell.run("list").stdout
    relevance = f"{found['score']:.3f}  {found['relevance']:.3f}"
    assert shell.run("search", "what is my name?").stdout.startswith(relevance)


def test_a_users_memories_are_the_users(shell: Shell) -> None:
    shell.json("add", "likes tea", "--user", "u1")
    assert shell.json("list") == []
    assert shell.json("search", "tea", "--user", "u2") == []
    assert len(shell.json("search", "tea", "--user", "u1")) == 1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["add", "x", "--category", "gossip"], "category is not one of"),
        (["add", "x", "--confidence", "2"], "confidence"),
        (["add", ""], "content is empty"),
        (["add", "x" * 10_001], "10,001 bytes"),
        (["list", "--user", "a\nb"], "--user"),
        (["list", "--limit", "10001"], "--limit"),
        (["import", "/no/such/file"], "cannot be read"),
        (["export", "/no/such/file"], "cannot be written"),
        (["export", "/"], "cannot be written"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(shell: Shell, arguments: list[str], reason: str) -> None:
    result = shell.run(*arguments)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert "Traceback" not in result.stderr


def test_an_agent_that_is_no_uuid_is_named(shell: Shell) -> None:
    result = shell.run("list", agent="bot")
    assert result.exit_code == 2
    assert "--agent is not a UUID" in result.stderr


@pytest.mark.parametrize(
    ("options", "said"), [([], "give --org and --agent: no `extproc up`"), (["--org", ORG], "give --agent too")]
)
def test_options_that_are_not_given_are_asked_for(tmp_path: Path, options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["list", "--data", str(tmp_path), *options])
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = Shell(tmp_path / "file" / "state").run("list")
    assert result.exit_code == 2
    assert "directory of the memory store" in result.stderr


def test_a_memory_is_pinned_and_no_longer_pinned(shell: Shell) -> None:
    added = shell.json("add", "The user's name is Ada.")
    for options, is_pinned in (([], True), (["--off"], False)):
        assert shell.json("pin", added["id"], *options) == {"pinned": is_pinned}
        (listed,) = shell.json("list")
        assert (listed["metadata"].get("pinned") is True) == is_pinned
    result = shell.run("pin", added["id"], "--user", "u1")
    assert result.exit_code == 2
    assert "memory list" in result.stderr


def test_memories_of_another_model_are_computed_anew(shell: Shell) -> None:
    shell.json("add", "likes tea")
    raw = sqlite3.connect(shell.data / "memories.db")
    raw.execute("UPDATE memories SET features_version = 'old'")
    raw.commit()
    raw.close()
    for expected in (1, 0):
        result = CliRunner().invoke(app, ["reindex", "--data", str(shell.data), "--json"], catch_exceptions=False)
        assert json.loads(result.stdout) == {"reindexed": expected}


def test_an_export_of_an_import_is_the_same_bytes(shell: Shell, tmp_path: Path) -> None:
    file, again = tmp_path / "out.jsonl", tmp_path / "again.jsonl"
    agent = Namespace(ORG, AGENT)
    made = [
        new_memory(
            agent if n % 3 else Namespace(ORG, AGENT, "u1"),
            f"Zeile {n}\nzwei: ß 😀",
            id=str(uuid.uuid4()),
            now=MOMENT + timedelta(microseconds=n),
            source=list(Source)[n % 3],
            session_id="s",
            turn_index=n,
            valid_from=MOMENT + timedelta(seconds=n),
            metadata={"role": "user", "tags": ["a"]},
        )
        for n in range(7)
    ]
    ended = {"valid_until": MOMENT, "superseded_by": made[2].id, "last_retrieved_at": MOMENT, "retrieval_count": 3}
    made[1] = replace(made[1], status=Status.SUPERSEDED, usefulness=0.55, **ended)  # type: ignore[arg-type]
    made[4] = replace(made[4], status=Status.QUARANTINED)
    with opened(shell.data, writes=True) as store:
        store.add_many(made)
    shell.json("pin", made[2].id)
    assert shell.run("export", str(file), "--user", "u1").exit_code == 0
    assert len(file.read_text().splitlines()) == 7

    other = Shell(tmp_path / "other")
    result = other.run("import", str(file), "--user", "ignored", "--json")
    assert json.loads(result.stdout) == {"added": 7, "known": 0, "bad": 0}
    assert other.run("export", str(again), "--user", "u1").exit_code == 0
    assert again.read_bytes() == file.read_bytes()
    assert [row["id"] for row in other.json("history", made[1].id)] == [made[1].id, made[2].id]
    repeated = other.run("import", "-", "--json", stdin=file.read_text())
    assert json.loads(repeated.stdout) == {"added": 0, "known": 7, "bad": 0}


def test_an_import_that_was_killed_goes_on_when_it_is_run_again(tmp_path: Path) -> None:
    lines = [
        json.dumps({"content": f"The user's note {n} is about tea.", "session_id": f"s{n // 20}", "turn_index": n % 20})
        for n in range(700)
    ]
    text = "\n".join(lines)
    killed, whole = Shell(tmp_path / "killed"), Shell(tmp_path / "whole")
    arguments = [sys.executable, "-m", "extproc", "memory", "import", "-", "--org", ORG, "--agent", AGENT]
    with subprocess.Popen([*arguments, "--data", str(killed.data)], stdin=subprocess.PIPE) as running:
        try:
            assert running.stdin is not None
            running.stdin.write("\n".join(lines[:600]).encode())
            running.stdin.flush()
            wait_until(lambda: stored(killed) == 500)
        finally:
            running.kill()
    for shell, known in ((killed, 500), (whole, 0)):
        result = shell.run("import", "-", "--json", stdin=text)
        assert json.loads(result.stdout) == {"added": 700 - known, "known": known, "bad": 0}
    assert features(killed) == features(whole)


def stored(shell: Shell) -> int:
    if not (shell.data / "memories.db").exists():
        return 0
    with closing(sqlite3.connect(shell.data / "memories.db")) as raw:
        try:
            return int(raw.execute("SELECT count(*) FROM memories").fetchone()[0])
        except sqlite3.OperationalError:  # the table is not there yet
            return 0


def features(shell: Shell) -> list[Any]:
    with closing(sqlite3.connect(shell.data / "memories.db")) as raw:
        return raw.execute("SELECT content, stems, words, embedding FROM memories ORDER BY content").fetchall()


def test_progress_is_told_in_lines_where_there_is_no_terminal(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "TOLD_EVERY_S", 0.0)
    lines = [json.dumps({"content": f"note {n}"}) for n in range(600)]
    result = shell.run("import", "-", stdin="\n".join(lines))
    assert result.stderr.splitlines() == ["500 added, 0 known, 0 bad", "600 added, 0 known, 0 bad"]
    assert "500 written" in shell.run("export", "-").stderr


def test_bad_lines_are_numbered_and_the_rest_goes_on(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "in.jsonl"
    lines: list[bytes] = [
        b'{"content": "one"}',
        b"nonsense",
        b"",
        b"[1]",
        b'{"content": 5}',
        b'{"content": "x", "created_at": "yesterday"}',
        b'{"content": "x", "org_id": "y"}',
        b'{"content": "\xff"}',
        b'{"content": "x", "confidence": "high"}',
        b'{"content": "x", "status": "deleted"}',
        b'{"content": "x", "status": "lost"}',
        b'{"content": "x", "superseded_by": "y"}',
        b'{"content": "x", "retrieval_count": -1}',
        b'{"content": "\\ud800"}',
        b'{"content": "two", "created_at": "2024-02-03T04:05:06Z", "category": "episodic"}',
    ]
    file.write_bytes(b"\n".join(lines))
    result = shell.run("import", str(file))
    assert result.exit_code == 1
    assert [int(line.split()[1][:-1]) for line in result.stderr.splitlines()] == [2, 4, *range(5, 15)]
    assert result.stdout == "2 added, 0 there already, 12 bad\n"
    rows = {row["content"]: row for row in shell.json("list")}
    assert rows["two"]["created_at"] == "2024-02-03T04:05:06+00:00"
    assert rows["two"]["source"] == "imported"


@pytest.mark.parametrize(
    "given",
    [
        '"confidence": 1' + "0" * 400,
        '"confidence": 1' + "0" * 5_000,
        '"confidence": NaN',
        '"turn_index": 99999999999999999999999',
        '"turn_index": 2147483648',
        '"turn_index": -1',
        '"turn_index": true',
        '"metadata": ' + '{"k":' * 5_000 + "1" + "}" * 5_000,
        '"metadata": ' + '{"k":' * 500 + "1" + "}" * 500,
        '"metadata": {"k": "\\ud800"}',
        '"metadata": {"k": [NaN]}',
        '"metadata": {"k": 1e999}',
        '"session_id": "\\ud800"',
        '"session_id": "a b"',
        '"session_id": "' + "s" * 65 + '"',
        '"user_id": "\\ud800"',
        '"created_at": "\\ud800"',
        '"created_at": "0001-01-01T00:00:00+14:00"',
        '"valid_until": "9999-12-31T23:59:59-14:00"',
    ],
)
def test_no_line_ends_an_import(shell: Shell, given: str) -> None:
    lines = ['{"content": "one"}', '{"content": "x", ' + given + "}", '{"content": "two"}']
    result = shell.run("import", "-", stdin="\n".join(lines))
    assert result.stdout == "2 added, 0 there already, 1 bad\n"
    assert result.stderr.startswith("line 2: ")


def test_a_mark_of_byte_order_before_the_first_line_is_none_of_it(shell: Shell, tmp_path: Path) -> None:
    lines = b'\xef\xbb\xbf{"content": "one"}\n{"content": "two", "confidence": null}\n'
    (tmp_path / "in.jsonl").write_bytes(lines)
    assert shell.run("import", str(tmp_path / "in.jsonl")).stdout == "2 added, 0 there already, 0 bad\n"
    assert shell.run("import", "-", stdin=lines).stdout == "0 added, 2 there already, 0 bad\n"


def test_standard_input_that_is_no_utf8_is_one_bad_line(shell: Shell) -> None:
    result = shell.run("import", "-", stdin=b'{"content": "\xff"}\n{"content": "one"}')
    assert result.stdout == "1 added, 0 there already, 1 bad\n"
    assert "not valid Unicode" in shell.run("add", "-", stdin=b"\xff").stderr


def test_halves_of_surrogate_pairs_in_an_old_row_come_out_escaped(shell: Shell, tmp_path: Path) -> None:
    shell.json("add", "tea ß")
    raw = sqlite3.connect(shell.data / "memories.db")
    raw.execute("UPDATE memories SET metadata = ?", [json.dumps({"k": "\ud800"})])
    raw.commit()
    raw.close()
    (listed,) = shell.json("list")
    assert (listed["content"], listed["metadata"]) == ("tea ß", {"k": "\ud800"})
    for file in (str(tmp_path / "out.jsonl"), "-"):
        assert shell.run("export", file).exit_code == 0
    assert json.loads((tmp_path / "out.jsonl").read_text()) == listed


def test_an_export_is_whole_or_leaves_the_file_as_it_was(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.json("add", "tea")
    (directory := tmp_path / "exports").mkdir()
    file = directory / "out.jsonl"
    file.write_text("before")
    (link := tmp_path / "link").symlink_to(file)

    def fail(_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(lines, "as_json", fail)
        result = shell.run("export", str(link))
    assert (result.exit_code, file.read_text()) == (2, "before")
    assert "No space left" in result.stderr
    assert list(directory.iterdir()) == [file]
    assert shell.run("export", str(link)).exit_code == 0
    assert json.loads(file.read_text())["content"] == "tea"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(directory.iterdir()) == [file]
    assert link.is_symlink()


def test_a_pipe_or_a_device_is_written_and_not_replaced(shell: Shell, tmp_path: Path) -> None:
    shell.json("add", "tea")
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert shell.run("export", str(pipe)).exit_code == 0
    assert json.loads(os.read(reader, 10_000))["content"] == "tea"
    os.close(reader)
    assert pipe.is_fifo()


def test_an_id_of_somebody_elses_memory_is_a_bad_line(shell: Shell) -> None:
    added = shell.json("add", "likes tea", "--user", "u1")
    result = shell.run("import", "-", stdin=json.dumps({"id": added["id"], "content": "other"}))
    assert result.exit_code == 1
    assert "line 1: another memory has this id" in result.stderr


def test_the_environment_names_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IBEX_DATA", str(tmp_path / "state"))
    arguments = ["add", "tea", "--org", ORG, "--agent", AGENT]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert (tmp_path / "state" / "memories.db").exists()
    monkeypatch.setenv("IBEX_DATABASE_URL", "mysql://localhost/x")
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "sqlite:///PATH" in result.stderr


def test_a_text_with_control_characters_cannot_move_the_cursor(shell: Shell) -> None:
    shell.json("add", "tea\x1b[2J\nmilk")
    assert "\x1b" not in shell.run("list").stdout + shell.run("search", "tea").stdout
