"""Recall by kind of question, the share that is in a block, and what the gate lets through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.corpus.dataset import generic_prompts
from bench.recall.measure import Answer, Gate, Question, Store, answers, blocks, gate, mean, recalls

__all__ = ["CROSS_LANGUAGE", "Group", "by_kind", "gate_by_language", "group", "in_block"]

CROSS_LANGUAGE = "cross_language"
ADVERSARIAL = "adversarial"


class Group(NamedTuple):
    language: str
    """`English`, `other`, or `across`: asked in another language than it was said in."""
    kind: str


def group(question: Question) -> Group:
    if question.kind == CROSS_LANGUAGE:
        return Group("across", question.kind)
    return Group("English" if question.language == "en" else "other", question.kind)


def by_kind(stores: Sequence[Store]) -> dict[Group, list[float]]:
    """Recall of FIRST, percent; `all` sums up the kinds of a language."""
    return _grouped(answers(stores, recalls))


def in_block(stores: Sequence[Store], min_relevance: float) -> dict[Group, list[float]]:
    """Evidence inside a block of BUDGETS tokens, percent."""
    return _grouped(answers(stores, blocks(min_relevance)))


def gate_by_language(alone: Sequence[Store]) -> dict[str, Gate]:
    """Generic prompts beside questions that memories answer, and beside those that nothing answers."""
    prompts = generic_prompts()
    found: dict[str, Gate] = {}
    for language in ("English", "other"):
        gates, weights = [], []
        for store in alone:
            asked = [one.text for _, one in _questions(store) if group(one).language == language and one.evidence]
            if asked:
                gates.append(gate(store, prompts, asked))
                weights.append(len(asked))
        unanswered = [
            (store, one.text)
            for store in alone
            for _, one in _questions(store)
            if group(one).language == language and not one.evidence
        ]
        unrelated = _weighted([one.unrelated for one in gates])
        found[language] = Gate(unrelated, _weighted([one.asked for one in gates], weights))
        opened = [gate(store, [], [text]).asked for store, text in unanswered]
        found[f"{language}, nothing answers"] = Gate(unrelated, _weighted(opened))
    return found


def _questions(store: Store) -> list[tuple[str, Question]]:
    return [(one.name, asked) for one in store.conversations for asked in one.questions]


def _weighted(curves: Sequence[Sequence[float]], weights: Sequence[float] | None = None) -> list[float]:
    weights = weights or [1.0] * len(curves)
    return [
        sum(w * value for w, value in zip(weights, column, strict=True)) / sum(weights)
        for column in zip(*curves, strict=True)
    ]


def _grouped(found: Sequence[Answer]) -> dict[Group, list[float]]:
    groups: dict[Group, list[Answer]] = {}
    for one in found:
        its = group(one.question)
        groups.setdefault(its, []).append(one)
        groups.setdefault(Group(its.language, "all"), []).append(one)
    return {its: mean(ones) for its, ones in sorted(groups.items())}
