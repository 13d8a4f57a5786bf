"""An engine whose PostgreSQL is gone: when it starts, while it serves, and when it has come back."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from ibex.context.v1 import context_pb2 as pb

from extproc.memory.model import Namespace
from tests.integration.engine.conftest import ANSWER_S, STOP_S, UP_S, Make, engine, is_up, opened, starting_engine
from tests.integration.turns import postgres_side
from tests.integration.turns.valkey_side import eventually

QUESTION = "What is the name of my dog?"
OUTAGE_S = float(os.environ.get("IBEX_OUTAGE_S", "0"))
"""For a drill by hand: how long the server is gone beyond the moment when the engine says so."""


@contextmanager
def frozen(server: postgres_side.Server) -> Iterator[None]:
    with server.frozen():
        yield


@contextmanager
def killed(server: postgres_side.Server) -> Iterator[None]:
    server.kill()
    try:
        yield
    finally:
        server.start()


@pytest.mark.timeout(180 + OUTAGE_S)
@pytest.mark.parametrize("gone", [frozen, killed])
def test_warm_namespaces_are_served_it_is_said_and_afterwards_all_is_as_the_server_has_it(
    postgres: postgres_side.Database,
    tmp_path: Path,
    agent: Namespace,
    make: Make,
    gone: Callable[[postgres_side.Server], AbstractContextManager[None]],
    record_property: Callable[[str, object], None],
) -> None:
    cold = replace(agent, agent_id=agent.org_id)
    with opened(postgres.url) as store:
        store.add(memory := make("The user's dog is called Rex."))
        store.add(make("The user's dog is called Max.", cold))
        with engine(postgres.url, tmp_path) as running:
            assert running.says(agent, QUESTION, "Rex")
            eventually(lambda: running.ready() == (200, "ok") and running.is_serving("memory_store"))

            with gone(postgres.server):
                answers = 0
                # Where a beat of a busy machine was late just now, the version is asked for first, and that waits.
                assert running.says(agent, QUESTION, "Rex")
                eventually(lambda: not running.is_serving("memory_store"))
                went = time.monotonic()
                while not answers or time.monotonic() - went < OUTAGE_S:
                    assert "Rex" in running.ask(agent, QUESTION).assembled_context
                    assert running.ask(cold, QUESTION).assembled_context == ""
                    status, state = running.ready()
                    assert status == 200
                    assert "loaded namespaces are served" in state
                    assert running.is_serving("readiness")
                    answers += 1
                    time.sleep(0.05)
                assert running.metric("store_away_seconds") > 0

            store.forget(agent, memory.id)
            store.add(make("The user's dog is called Bello."))
            assert running.says(agent, QUESTION, "Rex", is_there=False)
            assert running.says(agent, QUESTION, "Bello")
            assert running.says(cold, QUESTION, "Max")
            assert "Rex" not in running.ask(agent, QUESTION).assembled_context
            eventually(lambda: running.ready() == (200, "ok") and running.is_serving("memory_store"))
            assert running.metric("requests_total", '{code="INTERNAL",method="AssembleContext"}') == 0
            ready, *changes = (line["event"] for line in running.log())
            away, back = "postgresql_is_away_loaded_memories_are_served", "postgresql_is_back"
            # More than once where a busy machine's server is late with an answer.
            assert (ready, changes) == ("ready", [away, back] * (len(changes) // 2))
            assert changes
            record_property("answers_without_the_server", answers)


def test_an_engine_waits_for_its_store_alive_and_not_ready(postgres: postgres_side.Database, tmp_path: Path) -> None:
    postgres.stop()
    with (
        starting_engine(postgres.url, tmp_path / "a") as waiting,
        starting_engine(postgres.url, tmp_path / "b") as other,
    ):
        for running in (waiting, other):
            eventually(lambda running=running: is_up(running, "health"), UP_S)  # type: ignore[misc]
        assert waiting.ready() == (503, "unavailable")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(waiting.listen.rpartition(":")[2])))
        eventually(lambda: any(line["event"].startswith("the memory store is away") for line in waiting.log()))
        assert other.ends_with() == 0
        postgres.start()
        eventually(lambda: waiting.ready() == (200, "ok"), UP_S)
        assert waiting.is_serving("readiness")
        assert waiting.is_serving("")


def test_a_stopping_engine_says_so_at_once_and_ends_what_runs(
    postgres: postgres_side.Database, tmp_path: Path, agent: Namespace, make: Make
) -> None:
    user = replace(agent, user_id="u1")
    with opened(postgres.url) as store:
        store.add(make("The user's dog is called Rex.", user))
    with engine(postgres.url, tmp_path, IBEX_NOTICE_S="0.5") as running:
        running.ask(agent, QUESTION)  # now the agent's version is known, and only the user's part is not
        with postgres.server.frozen():
            request = pb.SearchMemoriesRequest(org_id=user.org_id, agent_id=user.agent_id, user_id="u1", query=QUESTION)
            search = running.stub.SearchMemories.future(request, timeout=ANSWER_S)
            eventually(lambda: running.metric("requests_inside") == 1)
            running.process.send_signal(signal.SIGTERM)
            eventually(lambda: not running.is_serving("readiness"))
            assert running.ready()[0] == 503
            assert running.process.poll() is None
        assert [memory.content for memory in search.result().memories] == ["The user's dog is called Rex."]
        assert running.process.wait(STOP_S) == 0
        assert running.log()[-1]["event"] == "stopped"
