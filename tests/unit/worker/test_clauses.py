from __future__ import annotations

import pytest

from extproc.worker.clauses import clauses, ends_own_words, is_in_earnest, is_text_work
from extproc.worker.extract import USER


def said(sentence: str) -> list[tuple[str, str]]:
    return [(clause.subject, clause.said) for clause in clauses(sentence) if clause.person in {"i", "we", "other"}]


@pytest.mark.parametrize(
    ("sentence", "stated"),
    [
        ("I live in Rome.", [(USER, "live in Rome")]),
        ("Well, actually I'm vegan and I don't eat eggs", [(USER, "am vegan"), (USER, "do not eat eggs")]),
        ("I live in Rome and work in Ostia", [(USER, "live in Rome"), (USER, "work in Ostia")]),
        ("My sister Ana lives in Porto", [("user's sister Ana", "lives in Porto")]),
        ("My boss, Helen, likes tea.", [("user's boss Helen", "likes tea")]),
        ("Ana Ruiz works at Nokia", [("Ana Ruiz", "works at Nokia")]),
        ("Since I live in Denver, what should I pack?", [(USER, "live in Denver")]),
        ("As a vegan, what can I eat?", [(USER, "am a vegan")]),
    ],
)
def test_a_clause_says_one_thing_of_one_subject(sentence: str, stated: list[tuple[str, str]]) -> None:
    assert said(sentence) == stated


@pytest.mark.parametrize(
    "sentence",
    [
        "Do I live in Rome?",
        "I live in Rome if all goes well",
        "I would live in Rome",
        "Perhaps I live in Rome",
        'I live in "Rome"',
        "I hope I live in Rome",
        "Wenn ich in Rom wohne, lerne ich",
        "x" * 1_000,
    ],
)
def test_nothing_is_stated_by_a_question_a_condition_or_a_quotation(sentence: str) -> None:
    assert said(sentence) == []


@pytest.mark.parametrize(
    ("sentence", "corrects"), [("Actually, I live in Rome", True), ("Also, I live in Rome", False)]
)
def test_a_correction_is_announced(sentence: str, corrects: bool) -> None:
    assert [clause.is_correction for clause in clauses(sentence)] == [corrects]


@pytest.mark.parametrize(
    "text", ["I live on the moon lol", "Pretend I am a king", "I'm 200, jk", "For example, I live here"]
)
def test_jokes_and_play_are_not_in_earnest(text: str) -> None:
    assert not is_in_earnest(text)
    assert is_in_earnest("I live in Rome.")


def test_after_a_colon_or_an_order_to_rewrite_come_other_words() -> None:
    assert ends_own_words("He wrote: I live in Rome")
    assert not ends_own_words("Correction: I live in Rome at 7:40")
    assert is_text_work("Please translate this")
    assert not is_text_work("I translate books")
