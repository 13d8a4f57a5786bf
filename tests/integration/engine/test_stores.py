"""What an engine in a process of its own answers from a store that it has not read yet."""

from __future__ import annotations

from pathlib import Path

from extproc.memory.model import Namespace
from tests.integration.engine.conftest import Make, engine, opened

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
