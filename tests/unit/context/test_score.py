from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from extproc.context.score import CHANCES, DEFAULT_PARTS, Weights, rank, required_relevance
from extproc.memory.model import Memory
from extproc.memory.text import parse_query

from .conftest import NOON, Asking

MakeMemory = Callable[..., Memory]


def test_relevance_decides_against_every_prior(asking: Asking, make: MakeMemory) -> None:
    old = replace(make("green tea with milk", confidence=0.1, created_at=NOON - timedelta(days=900)), usefulness=0.0)
    new = replace(make("green shutters for windows", confidence=1.0), usefulness=1.0)
    assert asking.contents("green tea", asking.index(new, old)) == [old.content, new.content]


@pytest.mark.parametrize(
    ("better", "worse"),
    [({"usefulness": 0.6}, {}), ({"confidence": 0.9}, {}), ({}, {"created_at": timedelta(days=-1)})],
)
def test_each_prior_breaks_a_tie(
    asking: Asking, make: MakeMemory, better: dict[str, float], worse: dict[str, timedelta]
) -> None:
    first, second = replace(make("tea one"), **better), make("tea two")  # type: ignore[arg-type]
    second = replace(second, content="tea one", metadata={"second": True})
    if worse:
        second = replace(second, created_at=second.created_at + worse["created_at"])
    scored = asking.rank("tea", asking.index(second, first)).scored
    assert [bool(one.memory.metadata) for one in scored] == [False, True]


def test_equal_ones_go_by_id(asking: Asking, make: MakeMemory) -> None:
    memories = sorted((make("tea") for _ in range(5)), key=lambda memory: memory.id, reverse=True)
    scored = asking.rank("tea", asking.index(*memories)).scored
    assert [one.memory.id for one in scored] == [memory.id for memory in reversed(memories)]


def test_a_caller_or_the_question_can_let_recency_decide(asking: Asking, make: MakeMemory) -> None:
    new = make("the port of the proxy in the staging network is 6432")
    old = make("the staging port is 5432", created_at=NOON - timedelta(days=365))
    index = asking.index(new, old)
    best = asking.rank("staging port", index).scored[0].memory
    assert best == old
    assert asking.rank("staging port", index, weights=Weights(recency=1.0)).scored[0].memory == new
    assert asking.rank("what is the current staging port", index).scored[0].memory == new


def test_an_answer_beside_its_question_is_ahead_of_one_that_stands_elsewhere(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(
        make("where is the harbour festival?", session_id="s", turn_index=0),
        make("in Bergen, as ever", session_id="s", turn_index=1),
        make("in Turin, as ever", session_id="t", turn_index=1),
    )
    ranked = asking.contents("harbour festival", index)
    assert ranked.index("in Bergen, as ever") < ranked.index("in Turin, as ever")


def test_a_part_that_is_worth_nothing_does_nothing(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(make("tea", metadata={"speaker": "Ada"}), make("tea", metadata={"speaker": "Bea"}))
    pool, query = asking.pool("Ada tea", index), asking.indexer.question("Ada tea").query
    parts = replace(DEFAULT_PARTS, lexical=0.0, soft=0.0, cosine=0.0)
    assert [one.composite > 0 for one in rank(pool, query, 9, parts=parts).scored] == [True, False]
    assert not any(one.composite for one in rank(pool, query, 9, parts=replace(parts, named=0.0)).scored)


def test_scores_are_shares_and_the_parts_are_those_of_the_memory(asking: Asking, make: MakeMemory) -> None:
    memory = make("my cello lesson is on Monday", confidence=0.7)
    ranking = asking.rank("when is my cello lesson", asking.index(memory))
    (scored,) = ranking.scored
    assert 0 < scored.composite < 1
    assert 0.3 < scored.similarity <= 1
    assert scored.relevance == ranking.best_relevance
    assert (scored.recency, scored.usefulness, scored.confidence) == (1.0, 0.5, 0.7)


@pytest.mark.parametrize(
    ("query", "names_subject", "gate"),
    [
        ("my tea", False, 0.2),
        ("does Caroline drink tea", True, 0.25),
        ("does Caroline drink tea", False, 0.4),
        ("tea recipe", False, 0.6),
        ("who has the teapot", False, 0.4),
        ("my tea", True, 0.2),
    ],
)
def test_the_gate_is_higher_for_what_is_not_about_the_author(query: str, names_subject: bool, gate: float) -> None:
    required = required_relevance(parse_query(query), 0.2, names_subject=names_subject, evaluated=CHANCES)
    assert required == pytest.approx(gate)


def test_the_gate_is_higher_the_more_memories_may_be_near_by_chance() -> None:
    few, some, many = (
        required_relevance(parse_query("ask Bob"), 0.2, names_subject=False, evaluated=count)
        for count in (0, CHANCES, 10 * CHANCES)
    )
    assert few < some < many < 1.2 * some


def test_a_gate_of_0_is_open_and_a_high_one_stays_as_set() -> None:
    assert required_relevance(parse_query("tea"), 0.0, names_subject=False, evaluated=9) == 0
    assert required_relevance(parse_query("tea"), 0.9, names_subject=False, evaluated=9) == 0.9
