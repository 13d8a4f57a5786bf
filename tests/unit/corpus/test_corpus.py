"""The corpus keeps what its README promises: labels that exist, dates in order, nothing private."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import pytest

from tests.corpus.reader import (
    Conversation,
    Kind,
    Pair,
    Question,
    Said,
    conversations,
    generic_prompts,
    pairs,
    questions,
)

BY_ID = {conversation.id: conversation for conversation in conversations()}
SAID = {conversation.id: {said.reference: said for said in conversation.said()} for conversation in conversations()}

LONG_WORD = re.compile(r"[^\W\d_]{5,}")
"""Shorter ones are mostly "from" and "that"; a shared one of this length gives a lexical search its hold."""
PRIVATE = {
    "e-mail address": r"[\w.+-]+@[\w-]+\.\w{2,}",
    "API key": r"\b(?:sk|pk|rk|ghp|gho|glpat|xox[abp])[-_](?!FAKE)[\w-]{12,}",
    "AWS key": r"\bAKIA[0-9A-Z]{12,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
    "JWT": r"\beyJ[\w-]{8,}\.[\w-]{8,}",
    "card number": r"\b(?:\d[ -]?){13,19}\b(?![\d:.])",
    "IBAN": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,}\b",
    "phone number": r"\+\d{2}[\d /()-]{7,}\d|\b0\d{2,4}[ /-]\d{5,}\b",
}


def of_kind(kind: Kind) -> list[Question]:
    return [question for question in questions() if question.kind is kind]


def evidence(question: Question) -> list[Said]:
    return [SAID[question.conversation][reference] for reference in question.evidence]


def long_words(text: str) -> set[str]:
    return {word.casefold() for word in LONG_WORD.findall(text)}


def every_text() -> list[str]:
    return [
        *(said.turn.text for turns in SAID.values() for said in turns.values()),
        *(question.text for question in questions()),
        *(prompt.text for prompt in generic_prompts()),
        *(text for pair in pairs() for text in (pair.question, pair.memory, pair.unlike)),
    ]


def repeated(values: list[str]) -> list[str]:
    return [value for value, times in Counter(values).items() if times > 1]


# Size and spread


def test_it_is_as_large_as_the_readme_says() -> None:
    turns = sum(len(turns) for turns in SAID.values())
    sessions = sum(len(conversation.sessions) for conversation in conversations())
    assert (len(conversations()), sessions, turns) == (38, 159, 1212)
    assert (len(questions()), len(generic_prompts()), len(pairs())) == (457, 120, 61)


def test_each_kind_of_question_is_asked_often_enough_to_measure() -> None:
    asked = Counter(question.kind for question in questions())
    assert {kind for kind in Kind if asked[kind] < 25} == set()


def test_conversations_are_held_in_several_languages() -> None:
    held = Counter(conversation.language for conversation in conversations())
    assert held == {"en": 19, "de": 6, "fr": 3, "es": 3, "pt": 2, "zh": 2, "ja": 2, "mul": 1}


def test_generic_prompts_come_in_every_language_of_the_conversations() -> None:
    assert {c.language for c in conversations()} - {"mul"} <= {prompt.language for prompt in generic_prompts()}


@pytest.mark.parametrize("conversation", conversations(), ids=lambda conversation: conversation.id)
def test_a_conversation_runs_over_several_sessions(conversation: Conversation) -> None:
    assert len(conversation.sessions) >= 4
    assert len(SAID[conversation.id]) >= 20


def test_some_turns_are_long_pastes_and_some_a_single_word() -> None:
    sizes = sorted(len(said.turn.text) for turns in SAID.values() for said in turns.values())
    assert sizes[0] < 10
    assert sum(size > 400 for size in sizes) >= 15
    assert sizes[-1] > 2000


# Identity and order


def test_every_id_is_given_once() -> None:
    assert repeated([conversation.id for conversation in conversations()]) == []
    assert repeated([conversation.user for conversation in conversations()]) == []
    assert repeated([question.id for question in questions()]) == []
    assert repeated([prompt.id for prompt in generic_prompts()]) == []
    assert repeated([pair.id for pair in pairs()]) == []


def test_sessions_and_turns_are_numbered_without_gaps() -> None:
    for conversation in conversations():
        assert [s.id for s in conversation.sessions] == [f"s{n}" for n in range(1, len(conversation.sessions) + 1)]
        for session in conversation.sessions:
            assert [turn.index for turn in session.turns] == list(range(len(session.turns)))


def test_user_and_assistant_take_turns_and_the_user_begins() -> None:
    for conversation in conversations():
        for session in conversation.sessions:
            roles = [turn.role for turn in session.turns]
            assert roles == [("user", "assistant")[n % 2] for n in range(len(roles))], (conversation.id, session.id)


def test_time_runs_forward() -> None:
    for conversation in conversations():
        times = [said.at for said in conversation.said()]
        assert all(earlier < later for earlier, later in pairwise(times)), conversation.id
        assert all(time.utcoffset() is not None for time in times)


def test_a_question_is_asked_after_the_last_session() -> None:
    late = [
        question.id
        for question in questions()
        if question.asked_at <= list(SAID[question.conversation].values())[-1].at
    ]
    assert late == []


def test_nothing_is_written_twice() -> None:
    assert repeated([text.casefold() for text in every_text() if len(text) > 12]) == []
    assert repeated([prompt.text for prompt in generic_prompts()]) == []


def test_no_text_is_empty_or_padded() -> None:
    assert [text for text in every_text() if not text.strip() or text != text.rstrip()] == []


# Labels


def test_every_evidence_is_a_turn_of_the_question_s_conversation() -> None:
    missing = [
        (question.id, reference)
        for question in questions()
        for reference in question.evidence
        if reference not in SAID.get(question.conversation, {})
    ]
    assert missing == []


def test_a_question_belongs_to_the_conversation_its_id_names() -> None:
    assert [q.id for q in questions() if q.id.rpartition("-")[0] != q.conversation] == []


def test_every_conversation_is_asked_about_with_one_question_that_nothing_answers() -> None:
    asked = Counter(question.conversation for question in questions())
    unanswered = Counter(question.conversation for question in of_kind(Kind.ADVERSARIAL))
    assert all(asked[name] >= 8 and unanswered[name] == 1 for name in BY_ID)


def test_no_evidence_is_named_twice() -> None:
    assert [question.id for question in questions() if repeated(list(question.evidence))] == []


def test_only_adversarial_questions_have_no_evidence() -> None:
    assert [q.id for q in questions() if bool(q.evidence) == (q.kind is Kind.ADVERSARIAL)] == []


def test_a_multi_question_needs_more_than_one_turn() -> None:
    assert [question.id for question in of_kind(Kind.MULTI) if len(question.evidence) < 2] == []


@pytest.mark.parametrize("question", of_kind(Kind.PARAPHRASE), ids=lambda question: question.id)
def test_a_paraphrase_shares_no_long_word_with_its_evidence(question: Question) -> None:
    said = " ".join(said.turn.text for said in evidence(question))
    assert long_words(question.text) & long_words(said) == set()


def test_a_cross_language_question_is_not_in_the_language_of_its_conversation() -> None:
    assert [q.id for q in of_kind(Kind.CROSS_LANGUAGE) if q.language == BY_ID[q.conversation].language] == []


def test_some_evidence_is_what_the_assistant_said() -> None:
    roles = Counter(said.turn.role for question in questions() for said in evidence(question))
    assert roles["assistant"] >= 8


@pytest.mark.parametrize("pair", pairs(), ids=lambda pair: pair.id)
def test_a_pair_s_memory_shares_no_long_word_with_its_question(pair: Pair) -> None:
    assert long_words(pair.question) & long_words(pair.memory) == set()


# Nothing private


@pytest.mark.parametrize("pattern", PRIVATE.values(), ids=PRIVATE)
def test_nothing_in_it_looks_private(pattern: str) -> None:
    assert [match[0] for text in every_text() for match in re.finditer(pattern, text)] == []
