"""The rules against the labelled turns and pairs. Floors lie just under what docs/extraction.md reports."""

from __future__ import annotations

import pytest

from bench.extraction.labels import Label, judge_all, read_labels, total
from bench.extraction.pairs import judge_pairs, read_pairs
from extproc.worker.rules import RuleExtractor

LABELS = read_labels()
DEV = [label for label in LABELS if not label.is_held_out]
HELD_OUT = [label for label in LABELS if label.is_held_out]
NOTHING_TO_LEARN = {
    "question",
    "hypothetical",
    "quote",
    "joke",
    "code",
    "code_comment",
    "smalltalk",
    "task",
    "other_language",
    "secret",
    "sarcasm",
    "reported",
    "reminder",
}


def test_the_set_is_large_enough_and_both_halves_are() -> None:
    assert len(LABELS) >= 300
    assert min(len(DEV), len(HELD_OUT)) >= 150
    assert len({label.user for label in LABELS}) == len({label.id for label in LABELS}) == len(LABELS)


@pytest.mark.parametrize(
    ("half", "precision", "recall"), [(DEV, 0.98, 0.97), (HELD_OUT, 0.95, 0.88)], ids=["dev", "held out"]
)
def test_precision_and_recall_do_not_fall(half: list[Label], precision: float, recall: float) -> None:
    score = total(judge_all(half, RuleExtractor())[0])
    assert score.precision >= precision
    assert score.recall >= recall


def test_dates_corrections_and_episodes_are_as_labelled() -> None:
    score = total(judge_all(LABELS, RuleExtractor())[0])
    assert score.dated == score.to_date >= 10
    assert score.corrections == score.to_correct >= 20
    assert score.episodes - score.episodes_right <= 2


@pytest.mark.parametrize("kind", sorted(NOTHING_TO_LEARN))
def test_no_fact_is_invented_from(kind: str) -> None:
    score = total(judge_all([label for label in LABELS if label.kind == kind], RuleExtractor())[0])
    assert score.turns
    assert score.found == score.right


def test_only_what_holds_no_longer_is_superseded() -> None:
    pairs = read_pairs()
    assert len(pairs) >= 200
    score = judge_pairs(pairs, RuleExtractor())
    assert score.precision >= 0.98
    assert score.recall >= 0.95
    assert not score.unmerged
