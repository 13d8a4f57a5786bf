"""A floor under what the engine finds in the project's own corpus. `python -m bench.corpus` prints every number.

A floor stands about two points under what was measured, a kind's about two of its questions: another version of numpy
or of the stemmer may turn one. What falls lower was broken, or is to be explained with the change.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from bench.corpus.dataset import NAMESPACE, conversations, generic_prompts
from bench.corpus.measure import Group, by_kind
from bench.recall.engine import open_stores
from bench.recall.measure import GATES, Store, gate
from extproc.context.score import DEFAULT_PARTS, Parts
from extproc.settings import EngineSettings, load

DEFAULT_GATE = 0.18
TENTH = 1
"""Of FIRST."""

OWN = {
    Group("English", "all"): 82, Group("English", "latest"): 76, Group("English", "multi"): 73,
    Group("English", "paraphrase"): 73, Group("English", "past"): 91, Group("English", "preference"): 50,
    Group("English", "single"): 87, Group("English", "temporal"): 78, Group("across", "all"): 37,
    Group("other", "all"): 66, Group("other", "latest"): 54, Group("other", "past"): 65, Group("other", "single"): 71,
    Group("other", "temporal"): 66, Group("other", "multi"): 50, Group("other", "paraphrase"): 50,
    Group("other", "preference"): 57,
}  # fmt: skip
POOLED = {Group("English", "all"): 59, Group("other", "all"): 47}
"""R@10, percent."""

Stores = tuple[list[Store], Store]


@pytest.fixture(scope="module")
def stores() -> Stores:
    return open_stores(conversations(), NAMESPACE, load(EngineSettings, embedding="static"))


@pytest.fixture(scope="module")
def own(stores: Stores) -> dict[Group, list[float]]:
    return by_kind(stores[0])


@pytest.fixture(scope="module")
def pooled(stores: Stores) -> dict[Group, list[float]]:
    return by_kind([stores[1]])


@pytest.mark.parametrize("group", OWN, ids=" ".join)
def test_the_evidence_is_among_the_first_ten_of_its_own_namespace(group: Group, own: dict[Group, list[float]]) -> None:
    assert own[group][TENTH] >= OWN[group]


@pytest.mark.parametrize("group", POOLED, ids=" ".join)
def test_the_evidence_is_among_the_first_ten_of_all_users_memories(
    group: Group, pooled: dict[Group, list[float]]
) -> None:
    assert pooled[group][TENTH] >= POOLED[group]


@pytest.mark.parametrize(
    "without",
    [
        {"soft": 0.0},
        {"cosine": 0.0},
        {"lexical": 0.0},
        {"previous": 0.0, "next": 0.0, "before_previous": 0.0},
    ],
    ids=["soft", "window vector", "lexical", "neighbours"],
)
def test_a_score_without_one_of_its_parts_is_below_a_floor(stores: Stores, without: dict[str, float]) -> None:
    parts: Parts = replace(DEFAULT_PARTS, **without)
    alone, pooled = stores
    found = by_kind([one.with_parts(parts) for one in alone])
    together = by_kind([pooled.with_parts(parts)])
    missed = [group for group, floor in OWN.items() if found[group][TENTH] < floor]
    missed += [group for group, floor in POOLED.items() if together[group][TENTH] < floor]
    assert missed


def test_few_generic_prompts_get_a_block_and_most_questions_of_english_users_do(stores: Stores) -> None:
    place = GATES.index(DEFAULT_GATE)
    prompts = generic_prompts()
    asked = 0.0
    opened = 0.0
    for store in stores[0]:
        texts = [
            one.text
            for one in store.conversations[0].questions
            if one.evidence and one.language == "en" and one.kind != "cross_language"
        ]
        its = gate(store, prompts[::4], texts)
        asked += len(texts)
        opened += len(texts) * its.asked[place] / 100
        assert its.unrelated[place] <= 10
    assert opened / asked >= 0.73
