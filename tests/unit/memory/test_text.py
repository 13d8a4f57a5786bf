from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.memory.text import Subject, parse_query, stems
from extproc.memory.tokens import estimate_tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The user's cats were RUNNING", ["user", "cat", "run"]),
        ("I don't like what's-his-name", ["like", "name"]),
        ("C++ and C# and C", ["c++", "c#", "c"]),
        ("Café, naïve", ["cafe", "naiv"]),
        ("an allergy; allergic; allergies", ["allergi"] * 3),
        ("東京都に住む", ["東京", "京都", "都に", "に住", "住む"]),
        ("", []),
        ("\x00\ud800 …!", []),
    ],
)
def test_stems(text: str, expected: list[str]) -> None:
    assert stems(text) == expected


@given(st.text(max_size=200))
def test_any_text_has_stems_and_tokens(text: str) -> None:
    assert all(stems(text))
    assert (estimate_tokens(text) > 0) == bool(text)


@given(st.lists(st.text(max_size=40), max_size=5))
def test_lines_together_never_cost_more_than_alone(texts: list[str]) -> None:
    lines = [text + "\n" for text in texts]
    assert estimate_tokens("".join(lines)) <= sum(map(estimate_tokens, lines))


def test_a_query_loses_question_words_and_repetitions() -> None:
    assert parse_query("Please tell me: what kind of dog is my dog?").stems == ("dog",)
    assert parse_query("who am I?").stems == ()


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("What is my name?", Subject.AUTHOR),
        ("where do we meet", Subject.AUTHOR),
        ("How do I center a div?", Subject.ANYTHING),
        ("When did Caroline move?", Subject.NAMED),
        ("write a haiku", Subject.ANYTHING),
        ("Write a haiku. Thanks", Subject.ANYTHING),
        ("Fix this SQL", Subject.ANYTHING),
        ("ask Bob", Subject.NAMED),
        ("1 ask 'Bob'", Subject.NAMED),
        ("what of (Bob)?", Subject.NAMED),
        ("wo wohnt Änne", Subject.ANYTHING),
        ("A Bob", Subject.ANYTHING),
        ("12 Bob", Subject.ANYTHING),
        ("fine; Bob", Subject.ANYTHING),
        ("fine\nask Bob", Subject.NAMED),
    ],
)
def test_what_a_query_speaks_of(text: str, subject: Subject) -> None:
    assert parse_query(text).subject is subject


@pytest.mark.parametrize(
    "text", ["ab " * 21_845, "a" * 65_536, "1 A" * 21_845, "a" + "\u0315\u0300" * 32_768, "\ufdfa" * 3_640]
)
def test_a_hostile_text_takes_time_in_proportion(text: str) -> None:
    began = time.perf_counter()
    parse_query(text)
    assert time.perf_counter() - began < 0.5


def test_a_long_run_of_marks_parts_words_and_a_short_one_does_not() -> None:
    assert stems("cafe" + "\u0301" * 20) == stems("café")
    assert stems("tea" + "\u05b0\u05b1" * 50 + "milk") == ["tea", "milk"]


@pytest.mark.parametrize(
    ("text", "o200k", "cl100k"),
    [
        ("The user's name is Ada and she lives in Lisbon.", 11, 12),
        ("def add(a: int, b: int) -> int:\n    return a + b\n", 19, 19),
        ("Die Benutzerin heißt Ada und wohnt in Lissabon.", 13, 17),
        ("Пользователя зовут Ада, она живёт в Лиссабоне.", 18, 24),
        ("用户的名字是艾达，她住在里斯本。", 13, 19),
        ("उपयोगकर्ता का नाम अदा है।", 10, 29),
    ],
)
def test_estimates_stay_between_a_third_under_and_thrice_over(text: str, o200k: int, cl100k: int) -> None:
    """The counts are those of OpenAI's two vocabularies."""
    assert 0.67 * o200k <= estimate_tokens(text) <= 3 * o200k
    assert 0.67 * cl100k <= estimate_tokens(text) <= 2 * cl100k
