from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.memory.tokens import estimate_tokens
from extproc.worker.prose import PIECE_TOKENS, is_pleasantry, is_question, own_words, pieces, sentences


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("I use Emacs:\n```\nmy name is Bob\n```\nIt fails.", "I use Emacs:\nIt fails."),
        ("See:\n```\nnever closed\nmy name is Bob", "See:"),
        ("Hello.\n> I work at Amazon\nWhat now?", "Hello.\nWhat now?"),
        ("$ whoami\nroot\n\nThat is all.", "That is all."),
        (
            "It fails.\nTraceback (most recent call last):\n  File \"x.py\", line 1, in <module>\nKeyError: 'x'",
            "It fails.",
        ),
        ("2026-11-18 10:00:01 INFO my name is worker", ""),
        ('{"name": "Alice"}', ""),
        ("line one\r\nline two", "line one\nline two"),
    ],
)
def test_only_the_authors_own_words_are_kept(text: str, kept: str) -> None:
    assert own_words(text) == kept


def test_sentences_end_at_marks_and_lines_but_not_at_titles() -> None:
    assert sentences("I saw Dr. Smith. He left!\nReally?  Yes") == ["I saw Dr. Smith.", "He left!", "Really?", "Yes"]
    assert sentences("私は東京に住んでいます。元気です。") == ["私は東京に住んでいます。", "元気です。"]


@pytest.mark.parametrize(
    "text",
    [
        "Where do I live?",
        "I live in which time zone?",
        "where do I live",
        "Is it so",
        "¿Dónde vivo?",
        "Wo wohne ich",
        "hi what is my name",
        "Hello Claude, can I eat this peanut butter",
        "ok so where did I park",
        "and can you book it",
        "what my name is",
        "was ist mein Name",
        "has Anna called",
    ],
)
def test_questions(text: str) -> None:
    assert is_question(text)


@pytest.mark.parametrize(
    "text",
    [
        "I live in Rome.",
        "Don't use tabs.",
        "Have been there twice.",
        "Whatever works.",
        "When I was twelve we moved to Oslo.",
        "What I like most is hiking.",
        "What a day at the lake!",
        "Can't eat gluten.",
        "hi, will be in Paris on Friday",
        "Was at the dentist today",
        "May is my favourite month.",
        "so is my brother",
    ],
)
def test_no_questions(text: str) -> None:
    assert not is_question(text)


@pytest.mark.parametrize("text", ["Thanks!", "ok", "Good morning!", "👍", "Perfect, thank you so much", "Danke"])
def test_pleasantries(text: str) -> None:
    assert is_pleasantry(text)


def test_a_thank_you_with_a_message_is_more_than_that() -> None:
    assert not is_pleasantry("Thanks, I moved to Rome")


@given(st.lists(st.text(alphabet="abc .\n", max_size=300), max_size=30))
def test_pieces_hold_every_word_once_and_are_bounded(parts: list[str]) -> None:
    cut = list(pieces(parts))
    assert " ".join(cut).split() == " ".join(parts).split()
    assert all(estimate_tokens(piece) <= 4 * PIECE_TOKENS for piece in cut)


@pytest.mark.parametrize("text", ["a", "\n", '"', "'a ", "a=b\n", "[", ". ", "`", "```\n", "$ x\n", "SELECT (\n"])
def test_a_megabyte_takes_bounded_time(text: str) -> None:
    begun = time.process_time()
    list(pieces(sentences(own_words(text * (1_000_000 // len(text))))))
    assert time.process_time() - begun < 5
