from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from extproc.auth.commands import agents_app, organizations_app, tokens_app
from extproc.auth.hashing import is_its_hash
from extproc.auth.store import IdentityStore
from extproc.auth.token import CHAT, mint
from extproc.memory.database import Database
from extproc.memory.demo import Demo

app = typer.Typer()
app.add_typer(organizations_app, name="org")
app.add_typer(agents_app, name="agent")
app.add_typer(tokens_app, name="token")


class Shell:
    def __init__(self, data: Path) -> None:
        self.data = data

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--data", str(self.data)], catch_exceptions=False)

    def json(self, *arguments: str) -> Any:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def store(self) -> IdentityStore:
        return IdentityStore(Database(f"sqlite:///{self.data}/memories.db"))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.delenv("IBEX_REDIS_URL", raising=False)
    (tmp_path / "state").mkdir()
    return Shell(tmp_path / "state")


@pytest.fixture
def org(shell: Shell) -> str:
    return str(shell.json("org", "create", "Acme")["id"])


def test_organisations_are_made_listed_and_limited(shell: Shell) -> None:
    assert "org create" in shell.run("org", "list").stderr
    one = shell.json("org", "create", "Acme", "--limit", "120")
    its_id = str(uuid.uuid4())
    assert shell.json("org", "create", "Other", "--id", its_id.upper())["id"] == its_id
    assert {row["id"]: row["rpm_limit"] for row in shell.json("org", "list")} == {one["id"]: 120, its_id: None}
    for word, limit in (("0", 0), ("7", 7), ("default", None)):
        assert shell.json("org", "set-limit", word, "--org", its_id) == {"id": its_id, "rpm_limit": limit}
    assert "120 requests a minute" in shell.run("org", "list").stdout
    assert shell.run("org", "create", "Again", "--id", its_id).exit_code == 2


def test_a_limit_that_no_gate_hears_of_is_said(shell: Shell, org: str) -> None:
    result = shell.run("org", "set-limit", "7", "--org", org)
    assert result.exit_code == 0
    assert "IBEX_REDIS_URL is not set" in result.stderr


def test_agents_are_made_and_stopped_and_resumed(shell: Shell, org: str) -> None:
    made = shell.json("agent", "create", "Ada", "--org", org)
    for command, status in (
        ("pause", "paused"),
        ("resume", "active"),
        ("suspend", "suspended"),
        ("archive", "archived"),
    ):
        assert shell.json("agent", command, made["id"], "--org", org)["status"] == status
        assert [row["status"] for row in shell.json("agent", "list", "--org", org)] == [status]
    assert shell.run("agent", "create", "Ada", "--org", org, "--id", made["id"]).exit_code == 2


def test_a_token_is_shown_once(shell: Shell, org: str) -> None:
    agent = shell.json("agent", "create", "Ada", "--org", org)["id"]
    made = shell.json("token", "create", "ci", "--org", org, "--agent", agent, "--user", "u1", "--expires", "30d")
    (stored,) = shell.store().tokens(org, 10)
    assert is_its_hash(stored.hash, made["token"])
    assert (stored.agent_id, stored.user_id, stored.permissions) == (agent, "u1", CHAT)
    assert stored.expires_at is not None
    assert abs(stored.expires_at - datetime.now(UTC) - timedelta(days=30)) < timedelta(minutes=5)
    (listed,) = shell.json("token", "list", "--org", org)
    assert (listed["id"], listed["state"], listed["prefix"]) == (stored.id, "valid", stored.prefix)
    secret = made["token"].rpartition("_")[2]
    for shown in (json.dumps(listed), shell.run("token", "list", "--org", org).output):
        assert secret not in shown
        assert stored.hash not in shown


def test_standard_output_holds_the_token_and_nothing_else(shell: Shell, org: str) -> None:
    result = shell.run("token", "create", "ci", "--org", org)
    (stored,) = shell.store().tokens(org, 10)
    assert is_its_hash(stored.hash, result.stdout.removesuffix("\n"))
    assert "shown this once" in result.stderr


@pytest.mark.parametrize(
    ("words", "permissions"),
    [
        ("chat", CHAT),
        ("none", 0),
        ("memory-read", 1),
        ("chat,session-terminate", CHAT | 1 << 18),
        ("token-admin", 1 << 32),
        ("196609", CHAT),
    ],
)
def test_permissions_have_names(shell: Shell, org: str, words: str, permissions: int) -> None:
    assert shell.json("token", "create", "x", "--org", org, "--permissions", words)["permissions"] == permissions


def test_a_revoked_token_stays_in_the_list(shell: Shell, org: str) -> None:
    made = shell.json("token", "create", "ci", "--org", org)
    revoked = shell.json("token", "revoke", made["id"], "--org", org, "--reason", "lost")
    assert not revoked["published"]
    (listed,) = shell.json("token", "list", "--org", org)
    assert (listed["state"], listed["revoke_reason"]) == ("revoked", "lost")
    again = shell.run("token", "revoke", made["id"], "--org", org)
    assert again.exit_code == 0
    assert "IBEX_REDIS_URL is not set: the token is revoked, but" in again.stderr


def test_a_redis_that_is_away_is_a_warning_and_the_token_is_revoked(
    shell: Shell, org: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = shell.json("token", "create", "ci", "--org", org)
    for url, words in (("redis://:hush@127.0.0.1:1/0", "127.0.0.1:1"), ("nonsense-hush", "IBEX_REDIS_URL cannot")):
        monkeypatch.setenv("IBEX_REDIS_URL", url)
        result = shell.run("token", "revoke", made["id"], "--org", org)
        assert result.exit_code == 0
        assert words in result.stderr
        assert "hush" not in result.output
    assert shell.json("token", "list", "--org", org)[0]["state"] == "revoked"


def test_without_an_org_it_is_that_of_extproc_up(shell: Shell) -> None:
    demo = Demo.find_or_make(shell.data)
    shell.json("org", "create", "Demo", "--id", demo.org_id)
    assert shell.json("agent", "create", "Ada")["org_id"] == demo.org_id
    assert shell.json("token", "create", "ci")["org_id"] == demo.org_id
    assert shell.json("org", "set-limit", "9")["id"] == demo.org_id


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["org", "create", ""], "name is not"),
        (["org", "create", "x", "--id", "x"], "--id is not a UUID"),
        (["org", "create", "x", "--limit", "-1"], "--limit"),
        (["org", "set-limit", "many", "--org", "ORG"], "the limit is not"),
        (["org", "set-limit", "5", "--org", str(uuid.uuid4())], "no such organisation"),
        (["agent", "create", "x"], "give --org: no `extproc up` has run in "),
        (["agent", "create", "x", "--org", str(uuid.uuid4())], "no such organisation"),
        (["agent", "pause", "x", "--org", "ORG"], "the agent is not a UUID"),
        (["agent", "pause", str(uuid.uuid4()), "--org", "ORG"], "no such agent"),
        (["token", "create", "x", "--org", "ORG", "--permissions", "all"], "permissions are not of chat"),
        (["token", "create", "x", "--org", "ORG", "--permissions", "9" * 30], "permissions are not a number"),
        (["token", "create", "x", "--org", "ORG", "--expires", "soon"], "--expires is not"),
        (["token", "create", "x", "--org", "ORG", "--expires", "999999w"], "year 9999"),
        (["token", "create", "x", "--org", "ORG", "--agent", str(uuid.uuid4())], "no such agent"),
        (["token", "create", "x", "--org", str(uuid.uuid4())], "no such organisation"),
        (["token", "revoke", str(uuid.uuid4()), "--org", "ORG"], "no such token"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(shell: Shell, org: str, arguments: list[str], reason: str) -> None:
    result = shell.run(*[org if argument == "ORG" else argument for argument in arguments])
    assert result.exit_code == 2
    assert reason in result.stderr
    assert result.stdout == ""


def test_a_token_given_in_place_of_its_id_is_not_repeated(shell: Shell, org: str) -> None:
    plaintext = mint()[0]
    for arguments in (["revoke", plaintext], ["create", plaintext], ["create", "x", "--description", plaintext]):
        result = shell.run("token", *arguments, "--org", org)
        assert result.exit_code == 2
        assert plaintext not in result.output


def test_no_plaintext_is_in_the_files_of_the_database(shell: Shell, org: str) -> None:
    made = [shell.json("token", "create", "ci", "--org", org) for _ in range(3)]
    shell.json("token", "revoke", made[0]["id"], "--org", org)
    files = [file.read_bytes() for file in shell.data.rglob("*") if file.is_file()]
    assert any(made[0]["prefix"].encode() in file for file in files)
    for token in made:
        secret = token["token"].rpartition("_")[2].encode()
        assert all(secret not in file for file in files)
