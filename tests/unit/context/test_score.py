from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from extproc.context.retrieve import Hit
from extproc.context.score import DEFAULT_WEIGHTS, Weights, required_relevance, score
from extproc.memory.model import Memory
from extproc.memory.text import parse_query

MakeMemory = Callable[..., Memory]


def order(*hits: Hit, weights: Weights = DEFAULT_WEIGHTS) -> list[str]:
    newest = max(hit.memory.created_at for hit in hits)
    return [one.memory.content for one in score(hits, newest, weights)]


def test_relevance_decides_against_every_prior(make: MakeMemory) -> None:
    born = make("x").created_at
    old = replace(make("old", confidence=0.1, created_at=born - timedelta(days=900)), usefulness=0.0)
    new = replace(make("new", confidence=1.0), usefulness=1.0)
    assert order(Hit(new, 0.7), Hit(old, 0.82)) == ["old", "new"]


@pytest.mark.parametrize(
    ("better", "worse"),
    [({"usefulness": 0.6}, {}), ({"confidence": 0.9}, {}), ({}, {"created_at": timedelta(days=-1)})],
)
def test_each_prior_breaks_a_tie(make: MakeMemory, better: dict[str, float], worse: dict[str, timedelta]) -> None:
    first, second = replace(make("first"), **better), make("second")  # type: ignore[arg-type]
    if worse:
        second = replace(second, created_at=second.created_at + worse["created_at"])
    assert order(Hit(second, 0.5), Hit(first, 0.5)) == ["first", "second"]


def test_equal_ones_go_by_id(make: MakeMemory) -> None:
    memories = sorted((make(str(n)) for n in range(5)), key=lambda memory: memory.id, reverse=True)
    assert order(*(Hit(memory, 0.5) for memory in memories)) == [memory.content for memory in reversed(memories)]


def test_the_hour_of_a_day_and_use_do_not_count(make: MakeMemory) -> None:
    memory = make("x")
    later = replace(memory, created_at=memory.created_at + timedelta(hours=3), retrieval_count=9)
    one, other = (score([Hit(each, 0.5)], later.created_at)[0] for each in (memory, later))
    assert one.composite == other.composite


def test_a_caller_can_let_recency_decide(make: MakeMemory) -> None:
    new = make("new")
    old = replace(make("old"), created_at=new.created_at - timedelta(days=365))
    hits = Hit(new, 0.6), Hit(old, 0.8)
    assert order(*hits) == ["old", "new"]
    assert order(*hits, weights=Weights(recency=1.0)) == ["new", "old"]
    assert order(*hits, weights=Weights(relevance=0.1, recency=0.3)) == ["new", "old"]


def test_the_parts_are_those_of_the_memory(make: MakeMemory) -> None:
    memory = make("x", confidence=0.7)
    (scored,) = score([Hit(memory, 0.4)], memory.created_at + timedelta(days=30))
    assert (scored.relevance, scored.recency, scored.usefulness, scored.confidence) == (0.4, 0.5, 0.5, 0.7)
    assert scored.composite == pytest.approx(0.4 * (1 + 0.05 * (0.7 - 0.8)))


@pytest.mark.parametrize(
    ("query", "gate"), [("my tea", 0.2), ("does Caroline drink tea", 0.4), ("tea recipe", 0.6), ("", 0.6)]
)
def test_the_gate_is_higher_for_what_is_not_about_the_author(query: str, gate: float) -> None:
    parsed = parse_query(query)
    assert required_relevance(parsed, 0.2, gate - 0.01) > gate - 0.01
    assert required_relevance(parsed, 0.2, gate + 0.01) == pytest.approx((gate + 0.01) / 4)


def test_a_gate_of_0_is_open_and_a_high_one_stays_as_set() -> None:
    assert required_relevance(parse_query("tea"), 0.0, 0.1) <= 0.1
    assert required_relevance(parse_query("tea"), 0.9, 0.8) == 0.9
