"""`extproc up`, as a user has it: each answer leaves a checkpoint, an extraction task and a trace row."""

from __future__ import annotations

import base64
import json
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing
from typing import Any

import clickhouse_connect
import httpx2
import pytest
import redis

from tests.integration import commands_side
from tests.integration.whole.conftest import Stack
from tests.integration.whole.test_memory import QUESTION, WAYS, Ask

LIMIT_S = 60


def eventually(look: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while not (found := look()):
        assert time.monotonic() < deadline, "not there in time"
        time.sleep(0.05)
    return found


def rows(stack: Stack, query: str, *values: str) -> list[dict[str, Any]]:
    """Of the SQLite database that the stack uses."""
    file = stack.described["database"].removeprefix("sqlite:///")
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        return [dict(row) for row in connection.execute(query, values)]


def checkpoint(stack: Stack, request_id: str) -> dict[str, Any]:
    query = "SELECT * FROM checkpoints WHERE request_id = ?"
    found: list[dict[str, Any]] = eventually(lambda: rows(stack, query, request_id))
    (one,) = found
    return one


def tasks(stack: Stack, session_id: str) -> list[dict[str, Any]]:
    """The messages in the queue that ask for one session."""
    with closing(redis.Redis.from_url(stack.described["broker"])) as client:
        messages = [json.loads(one) for one in client.lrange("extraction", 0, -1)]
    return [one for one in messages if one["kwargs"]["session_id"] == session_id]


def trace(stack: Stack, request_id: str) -> dict[str, Any]:
    def look() -> list[dict[str, Any]]:
        with closing(clickhouse_connect.get_client(dsn=stack.described["traces"])) as client:
            if not client.command("EXISTS ibex.llm_traces"):  # the first row makes it
                return []
            query = "SELECT * FROM ibex.llm_traces WHERE request_id = {request_id:String}"
            return list(client.query(query, parameters={"request_id": request_id}).named_results())

    found: list[dict[str, Any]] = eventually(look)
    (one,) = found
    return one


def extproc(stack: Stack, *arguments: str) -> str:
    environment = {"IBEX_STATE_DIR": stack.described["state_dir"], "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-m", "extproc", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ask(stack: Stack, text: str, **headers: str) -> httpx2.Response:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}]}
    with stack.client() as client:
        return client.post("/v1/chat/completions", json=body, headers=headers)


@pytest.mark.parametrize("way", WAYS)
def test_every_official_clients_exchange_is_a_turn(stack: Stack, user: str, way: Ask) -> None:
    headers, answer = way(stack, {"x-ibex-user-id": user, "x-ibex-session-id": f"of-{user}"})
    kept = checkpoint(stack, headers["x-request-id"])
    assert (kept["turn_index"], kept["is_complete"], kept["context_fallback"]) == (0, 1, 0)
    (text,) = rows(stack, "SELECT * FROM turns WHERE session_id = ?", kept["session_id"])
    assert (text["user_text"], text["assistant_text"]) == (QUESTION, answer)
    (task,) = eventually(lambda: tasks(stack, kept["session_id"]))
    assert task["task"] == "worker.tasks.extraction.extract_session_memories"
    row = trace(stack, headers["x-request-id"])
    assert (row["status_code"], row["is_complete"], row["checkpoint_id"]) == (200, True, uuid.UUID(kept["id"]))


def test_the_turns_of_a_session_are_counted(stack: Stack, user: str) -> None:
    for number in range(3):
        response = ask(stack, f"Number {number}", **{"x-ibex-user-id": user, "x-ibex-session-id": f"count-{user}"})
        assert checkpoint(stack, response.headers["x-request-id"])["turn_index"] == number
    (session,) = rows(stack, "SELECT * FROM sessions WHERE user_id = ?", user)
    assert (session["turn_count"], session["extracted_turns"], session["status"]) == (3, 0, "active")
    assert session["total_input_tokens"] > 0


def test_who_asks_not_to_learn_leaves_a_checkpoint_and_no_text_and_no_task(stack: Stack, user: str) -> None:
    response = ask(stack, "My PIN is 1234.", **{"x-ibex-user-id": user, "x-ibex-skip-extraction": "1"})
    kept = checkpoint(stack, response.headers["x-request-id"])
    trace(stack, response.headers["x-request-id"])
    after = ask(stack, "Hello.", **{"x-ibex-user-id": user})
    eventually(lambda: tasks(stack, checkpoint(stack, after.headers["x-request-id"])["session_id"]))
    assert rows(stack, "SELECT * FROM turns WHERE session_id = ?", kept["session_id"]) == []
    assert tasks(stack, kept["session_id"]) == []


def test_a_providers_error_leaves_a_trace_and_no_checkpoint(stack: Stack, user: str) -> None:
    response = ask(stack, "Hello.", **{"x-ibex-user-id": user, "x-standin-status": "529"})
    assert response.status_code == 529
    row = trace(stack, response.headers["x-request-id"])
    assert (row["status_code"], row["checkpoint_id"]) == (529, None)
    assert rows(stack, "SELECT * FROM sessions WHERE user_id = ?", user) == []


def test_a_request_that_the_gate_refuses_leaves_a_trace_and_nothing_else(stack: Stack, user: str) -> None:
    """Where org and agent are known; who has no token is nobody's."""
    owner = ["--org", stack.described["org_id"], "--data", stack.described["state_dir"]]
    settings = {"IBEX_DATABASE_URL": "", "IBEX_REDIS_URL": ""}
    agent = commands_side.run("agent", "create", "paused", *owner, **settings)["id"]
    token = commands_side.run("token", "create", "paused", *owner, "--agent", agent, **settings)["token"]
    commands_side.run("agent", "pause", agent, *owner, **settings)
    own = {"authorization": f"Bearer {token}", "x-ibex-user-id": user}
    stranger = ask(stack, "Hello.", authorization="Bearer nonsense")
    response = ask(stack, "Hello.", **own)
    assert (stranger.status_code, response.status_code) == (401, 403)
    row = trace(stack, response.headers["x-request-id"])
    assert (row["status_code"], row["error_code"], row["checkpoint_id"]) == (403, "AGENT_SUSPENDED", None)
    assert (str(row["org_id"]), str(row["agent_id"])) == (stack.described["org_id"], agent)
    assert row["auth_latency_ms"] > 0
    assert rows(stack, "SELECT * FROM sessions WHERE agent_id = ?", agent) == []
    with closing(clickhouse_connect.get_client(dsn=stack.described["traces"])) as client:
        query = "SELECT count() FROM ibex.llm_traces WHERE status_code = 401"
        assert client.command(query) == 0


def test_a_trace_says_how_long_the_gate_took(stack: Stack, user: str) -> None:
    response = ask(stack, "Hello.", **{"x-ibex-user-id": user})
    assert trace(stack, response.headers["x-request-id"])["auth_latency_ms"] > 0


def test_a_session_can_be_ended_and_lives_on_with_its_next_turn(stack: Stack, user: str) -> None:
    external_id = f"end-{user}"[:64]
    headers = {"x-ibex-user-id": user, "x-ibex-session-id": external_id}
    checkpoint(stack, ask(stack, "Hello.", **headers).headers["x-request-id"])
    url = f"{stack.described['observer_admin']}/v1/sessions/{external_id}/terminate"
    owner = {"org_id": stack.described["org_id"], "agent_id": stack.described["agent_id"], "user_id": user}
    ended = httpx2.post(url, json=owner, timeout=10)
    assert (ended.status_code, ended.json()["status"], ended.json()["turn_count"]) == (200, "completed", 1)
    assert httpx2.post(url, json=owner, timeout=10).json() == ended.json()
    stranger = httpx2.post(url, json={**owner, "user_id": "somebody-else"}, timeout=10)
    assert (stranger.status_code, stranger.json()["error"]["code"]) == (404, "NOT_FOUND")
    checkpoint(stack, ask(stack, "One more thing.", **headers).headers["x-request-id"])
    (session,) = rows(stack, "SELECT * FROM sessions WHERE user_id = ?", user)
    assert (session["status"], session["turn_count"]) == ("active", 2)


def test_one_trace_leads_from_the_request_to_the_task(stack: Stack, user: str) -> None:
    response = ask(stack, "Where does it lead?", **{"x-ibex-user-id": user})
    request_id = response.headers["x-request-id"]
    kept = checkpoint(stack, request_id)

    def find(name: str) -> Any:
        return stack.spans.wait_for(
            lambda span: span.name == name and span.attributes.get("ibex.request.id") == request_id
        )

    assembled, written = find("context.assemble"), find("outbox.checkpoint")
    assert written.trace_id == assembled.trace_id
    (task,) = eventually(lambda: tasks(stack, kept["session_id"]))
    assert task["headers"]["traceparent"].split("-")[1:3] == [written.trace_id, written.span_id]
    assert trace(stack, request_id)["trace_id"] == written.trace_id


def test_the_message_holds_ids_and_no_text(stack: Stack, user: str) -> None:
    response = ask(stack, "A canary sings.", **{"x-ibex-user-id": user})
    session_id = checkpoint(stack, response.headers["x-request-id"])["session_id"]
    (task,) = eventually(lambda: tasks(stack, session_id))
    assert "canary" not in json.dumps(task) + base64.b64decode(task["body"]).decode()
    assert task["kwargs"] == {"session_id": session_id, "org_id": stack.described["org_id"]}


def test_the_outbox_is_empty_when_everything_is_delivered(stack: Stack, user: str) -> None:
    trace(stack, ask(stack, "Hello.", **{"x-ibex-user-id": user}).headers["x-request-id"])

    def is_empty() -> bool:
        (outbox,) = json.loads(extproc(stack, "outbox", "--json"))
        return all(consumer["depth"] == 0 for consumer in outbox["consumers"].values())

    assert eventually(is_empty)
    assert "outbox-0" in extproc(stack, "outbox")


def test_the_table_of_traces_can_be_read(stack: Stack, user: str) -> None:
    trace(stack, ask(stack, "Hello.", **{"x-ibex-user-id": user}).headers["x-request-id"])
    shown = extproc(stack, "traces", "--limit", "5")
    assert "gpt-4o-mini" in shown
    assert "200" in shown
    assert len(extproc(stack, "traces", "--limit", "2", "--json").splitlines()) == 2
