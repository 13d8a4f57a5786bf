"""What an engine in a process of its own answers while its store is cold, changes, or is gone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from extproc.memory.model import Memory, Namespace
from tests.integration.engine.conftest import engine, opened
from tests.integration.turns import postgres_side

Make = Callable[[str], Memory]

COLD = 10_000
QUESTION = "What is the name of my dog?"


def test_the_first_question_to_a_cold_namespace_gets_memories(
    url: str, tmp_path: Path, agent: Namespace, make: Make
) -> None:
    with opened(url) as store:
        made = [make(f"The customer ordered {n} red bicycles for shop {n % 97}.") for n in range(COLD - 1)]
        for first in range(0, len(made), 1000):
            store.add_many(made[first : first + 1000])
        store.add(make("The user's dog is called Rex."))
    with engine(url, tmp_path) as running:
        answer = running.ask(agent, QUESTION)
        assert "Rex" in answer.assembled_context
        assert running.metric("requests_total", '{code="OK",method="AssembleContext"}') == 1


def test_what_one_process_adds_and_forgets_two_engines_see(
    postgres: postgres_side.Database, tmp_path: Path, agent: Namespace, make: Make
) -> None:
    with (
        opened(postgres.url) as store,
        engine(postgres.url, tmp_path / "a") as one,
        engine(postgres.url, tmp_path / "b") as other,
    ):
        for running in (one, other):
            assert running.ask(agent, QUESTION).assembled_context == ""
        store.add(memory := make("The user's dog is called Rex."))
        assert all(running.says(agent, QUESTION, "Rex") for running in (one, other))
        store.forget(agent, memory.id)
        assert all(running.says(agent, QUESTION, "Rex", is_there=False) for running in (one, other))


def test_without_its_server_an_engine_serves_what_it_holds_and_says_so(
    postgres: postgres_side.Database, tmp_path: Path, agent: Namespace, make: Make
) -> None:
    with opened(postgres.url) as store:
        store.add(make("The user's dog is called Rex."))
    with engine(postgres.url, tmp_path, IBEX_RETRIEVAL_WALL_MS="1000") as running:
        assert running.says(agent, QUESTION, "Rex")
        assert running.metric("store_away_seconds") == 0
        postgres.stop()
        try:
            assert "Rex" in running.ask(agent, QUESTION).assembled_context
            assert running.ask(Namespace(agent.org_id, agent.org_id), QUESTION).assembled_context == ""
            for _ in range(20):
                if running.metric("store_away_seconds"):
                    break
                assert running.says(agent, QUESTION, "Rex")
            assert running.metric("store_away_seconds") > 0
            assert "Rex" in running.ask(agent, QUESTION).assembled_context
        finally:
            postgres.start()
        assert running.says(agent, QUESTION, "Rex")
