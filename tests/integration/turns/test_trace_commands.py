"""`extproc traces` shows what is in ClickHouse, and only what was asked for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import clickhouse_connect
import pytest
import typer
from clickhouse_connect.driver.exceptions import DatabaseError
from typer.testing import CliRunner, Result

from extproc.stack.envoy import free_port
from extproc.turns.trace import ClickHouseTraces
from extproc.turns.trace_commands import TraceFilter, read_traces, traces
from extproc.turns.turn import End, Entry, Turn, checkpoint_id, session_id
from tests.integration.turns.clickhouse_side import ClickHouse, running

ORG, OTHER_ORG, AGENT, OTHER_AGENT = (str(uuid.UUID(int=number)) for number in range(1, 5))


def entry(now: datetime, request_id: str, *, minutes_ago: float = 0, external_id: str = "s1", **changes: Any) -> Entry:
    org, agent = changes.get("org_id", ORG), changes.get("agent_id", AGENT)
    given: dict[str, Any] = {
        "request_id": request_id,
        "org_id": org,
        "agent_id": agent,
        "external_id": external_id,
        "session_id": session_id(org, agent, None, external_id),
        "checkpoint_id": checkpoint_id(org, request_id),
        "end": End.COMPLETE,
        "status_code": 200,
        "is_complete": True,
        "context_fallback": False,
        "model": "gpt-4o",
        "outcome": "injected",
        "requested_at": now - timedelta(minutes=minutes_ago),
        "completed_at": now - timedelta(minutes=minutes_ago),
    }
    return Entry(seq=1, turn=Turn(**{**given, **changes}))


def entries(now: datetime) -> list[Entry]:
    return [
        entry(now, "r-hours-ago", minutes_ago=150),
        entry(now, "r-other-org", minutes_ago=50, org_id=OTHER_ORG),
        entry(now, "r-other-agent", minutes_ago=40, agent_id=OTHER_AGENT),
        entry(now, "r-other-session", minutes_ago=30, external_id="s2"),
        entry(
            now,
            "r-denied",
            minutes_ago=20,
            end=End.DENIED,
            status_code=403,
            error_code="AGENT_SUSPENDED",
            is_complete=False,
        ),
        entry(now, "r-gone", minutes_ago=10, end=End.CLIENT_GONE, is_complete=False),
        entry(
            now,
            "r-newest",
            minutes_ago=1,
            input_tokens=1234,
            output_tokens=56,
            memories_injected=4,
            ttfb_ms=321,
            total_ms=2345,
        ),
    ]


@pytest.fixture(scope="module")
def now() -> datetime:
    """When these tests begin, which may be many minutes after they were collected."""
    return datetime.now(UTC)


@pytest.fixture(scope="module")
def server(now: datetime, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClickHouse]:
    with running(tmp_path_factory.mktemp("clickhouse")) as server:
        sink = ClickHouseTraces(server.url, 90)
        sink.insert(entries(now), "all")
        sink.close()
        yield server


app = typer.Typer()
app.command()(traces)


def run(*arguments: str, url: str = "", **environment: str) -> Result:
    return CliRunner().invoke(
        app, [*arguments, *(["--url", url] if url else [])], env=environment, catch_exceptions=False
    )


def shown(server: ClickHouse, *arguments: str) -> list[str]:
    """Ids of the requests that the command shows, in its order."""
    result = run(*arguments, "--json", url=server.url)
    assert result.exit_code == 0, result.output
    return [json.loads(line)["request_id"] for line in result.stdout.splitlines()]


def test_the_newest_come_last(server: ClickHouse, now: datetime) -> None:
    assert shown(server) == [one.turn.request_id for one in entries(now)]
    assert shown(server, "-n", "2") == ["r-gone", "r-newest"]


@pytest.mark.parametrize(
    ("arguments", "ids"),
    [
        (["--org", OTHER_ORG], ["r-other-org"]),
        (["--org", OTHER_ORG.upper(), "--agent", OTHER_AGENT], []),
        (["--agent", OTHER_AGENT], ["r-other-agent"]),
        (["--session", session_id(ORG, AGENT, None, "s2")], ["r-other-session"]),
        (["--session", "s2", "--org", ORG, "--agent", AGENT], ["r-other-session"]),
        (["--session", "s2", "--org", ORG, "--agent", AGENT, "--user", "u1"], []),
        (["--errors"], ["r-denied", "r-gone"]),
        (["--errors", "--since", "15m"], ["r-gone"]),
        (["--since", "1h", "-n", "1"], ["r-newest"]),
        (["--since", "1h", "--org", OTHER_ORG], ["r-other-org"]),
        (["--since", "30s"], []),
    ],
)
def test_a_filter_shows_what_it_names(server: ClickHouse, arguments: list[str], ids: list[str]) -> None:
    assert shown(server, *arguments) == ids


def test_json_has_every_column_in_plain_values(server: ClickHouse, now: datetime) -> None:
    result = run("-n", "1", "--json", url=server.url)
    row = json.loads(result.stdout)
    assert len(row) == 28
    assert (row["org_id"], row["total_tokens"], row["context_fallback"]) == (ORG, 1290, False)
    assert row["requested_at"].endswith("Z")
    assert abs(datetime.fromisoformat(row["requested_at"]) - (now - timedelta(minutes=1))) <= timedelta(milliseconds=1)


def test_the_table_says_what_one_looks_for(server: ClickHouse, now: datetime) -> None:
    lines = run(url=server.url).stdout.splitlines()
    assert lines[0].split()[:3] == ["TIME", "STATUS", "MODEL"]
    assert len(lines) == 1 + len(entries(now))
    for text in ("200", "gpt-4o", "injected", "1234/56", "321 ms", "2345 ms", " 4 ", AGENT[-8:], "r-newest"):
        assert text in lines[-1]
    assert "AGENT_SUSPENDED" in lines[5]
    assert "200~" in lines[6]


def test_what_a_client_sends_moves_no_cursor_and_colours_nothing(server: ClickHouse) -> None:
    sink = ClickHouseTraces(server.url, 90)
    odd = entry(datetime.now(UTC), "r-odd", minutes_ago=5000, model="[red]\x1b[2Jx\n", org_id=str(uuid.UUID(int=9)))
    sink.insert([odd], "odd")
    sink.close()
    table = run("--org", str(uuid.UUID(int=9)), url=server.url).stdout
    assert "[red] [2Jx" in table
    assert "\x1b" not in table
    assert "\x1b" not in run("--org", str(uuid.UUID(int=9)), "--json", url=server.url).stdout
    server.command("ALTER TABLE ibex.llm_traces DELETE WHERE request_id = 'r-odd' SETTINGS mutations_sync = 1")


def test_a_reader_that_leaves_is_not_taken_for_trouble_with_clickhouse(server: ClickHouse) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "extproc", "traces", "--json", "--url", server.url]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=50)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


INJECTIONS = ["' OR 1 = 1 --", "x' OR '1' = '1", "0) OR (1", "{org:String}", "\\' OR 1 = 1 --"]


@pytest.mark.parametrize("text", INJECTIONS)
def test_an_option_is_a_value_and_no_sql(server: ClickHouse, text: str) -> None:
    for option in ("--org", "--agent", "--session"):
        result = run(option, text, url=server.url)
        assert (result.exit_code, result.stdout) == (2, "")
        assert f"{option} is not a UUID" in result.stderr
    assert shown(server, "--session", text, "--org", ORG, "--agent", AGENT) == []


@pytest.mark.parametrize("text", INJECTIONS)
def test_the_server_binds_what_is_asked_for(server: ClickHouse, text: str) -> None:
    with clickhouse_connect.get_client(host=server.address.host, port=server.address.port) as client:
        for wanted in (TraceFilter(org=text), TraceFilter(agent=text), TraceFilter(sessions=[text])):
            with pytest.raises(DatabaseError) as caught:
                read_traces(client, wanted, 10)
            assert caught.value.code in {6, 26, 27, 53, 376, 386, 457}


@pytest.mark.parametrize("since", ["1", "h", "-1h", "1w", "1h30m", "١h"])
def test_a_time_that_is_none_is_an_error(server: ClickHouse, since: str) -> None:
    result = run("--since", since, url=server.url)
    assert (result.exit_code, "--since is not a time" in result.stderr) == (2, True)


def test_the_server_is_named_by_setting_or_by_a_stack_that_runs(server: ClickHouse, tmp_path: Path) -> None:
    state = {"IBEX_STATE_DIR": str(tmp_path), "IBEX_CLICKHOUSE_URL": ""}
    nowhere = run(**state)
    assert nowhere.exit_code == 2
    assert "give --url, set IBEX_CLICKHOUSE_URL" in nowhere.stderr
    (tmp_path / "clickhouse.url").write_text(f"{server.url}\n")
    assert "r-newest" in run(**state).stdout
    assert "r-newest" in run(**{**state, "IBEX_STATE_DIR": "/nowhere", "IBEX_CLICKHOUSE_URL": server.url}).stdout


def test_errors_say_what_to_do() -> None:
    away = run(url=f"http://127.0.0.1:{free_port()}")
    assert (away.exit_code, "does not answer" in away.stderr) == (2, True)
    assert run(url="nonsense").exit_code == 2


def test_before_the_first_trace_it_says_so(tmp_path: Path) -> None:
    with running(tmp_path / "data") as fresh:
        result = run(url=fresh.url)
        assert result.exit_code == 2
        assert "extproc migrate" in result.stderr
        ClickHouseTraces(fresh.url, 90).insert([entry(datetime.now(UTC), "r1")], "t")
        assert "No traces here yet" in run("--errors", url=fresh.url).stderr


SCRIPT = "import typer; from extproc.turns.trace_commands import traces; typer.run(traces)"


def test_follow_shows_each_new_row_once_until_it_is_interrupted(server: ClickHouse) -> None:
    command = [sys.executable, "-c", SCRIPT, "--follow", "--json", "-n", "1", "--org", str(uuid.UUID(int=8))]
    environment = {**os.environ, "IBEX_CLICKHOUSE_URL": server.url, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    lines: list[str] = []

    def read() -> None:
        assert process.stdout is not None
        with process.stdout as output:
            lines.extend(iter(output.readline, ""))

    reader = threading.Thread(target=read)
    reader.start()
    sink = ClickHouseTraces(server.url, 90)
    try:
        for number in range(150):
            # Until the command listens, its rows are older than its start.
            now = datetime.now(UTC)
            new = entry(now, f"n{number:02}", org_id=str(uuid.UUID(int=8)), requested_at=now, completed_at=now)
            sink.insert([new], f"follow-{number}")
            time.sleep(0.2)
            if len(lines) >= 8:
                break
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)
        reader.join(10)
        sink.close()
    ids = [json.loads(line)["request_id"] for line in lines]
    assert len(ids) >= 8
    assert ids == sorted(set(ids))
