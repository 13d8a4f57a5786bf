from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.memory.model import MAX_CONTENT_BYTES, Category
from extproc.worker.extract import EPISODE, MOST_PER_TURN, Extracted, Turn
from extproc.worker.rules import MOST_EPISODES, RuleExtractor, extract_episodes
from extproc.worker.secrets import ALWAYS, PII

Build = Callable[..., Turn]
RULES = RuleExtractor()


def facts(turn: Turn) -> list[Extracted]:
    return [memory for memory in RULES.extract([turn]).memories if memory.slot != EPISODE]


def episodes(*turns: Turn) -> list[str]:
    return [memory.content for memory in RULES.extract(turns).memories if memory.slot == EPISODE]


def test_a_turn_gives_its_words_and_its_facts(turn: Build) -> None:
    said = "I moved to Lisbon in March and I'm allergic to peanuts"
    home, allergy = facts(turn(said))
    assert (home.content, home.slot, home.value, home.category) == (
        "The user lives in Lisbon (moved in March (2026-03)).", "home", "Lisbon", Category.FACTUAL
    )  # fmt: skip
    assert home.valid_from == datetime(2026, 3, 1, tzinfo=UTC)
    assert (allergy.content, allergy.value, allergy.polarity) == ("The user is allergic to peanuts.", "peanuts", 1)
    assert episodes(turn(said)) == ["I moved to Lisbon in March (2026-03) and I'm allergic to peanuts"]


@pytest.mark.parametrize(
    ("said", "statement"),
    [
        ("I like my coffee black.", "The user likes their coffee black."),
        ("I don't like coriander.", "The user does not like coriander."),
        ("I no longer work at Siemens.", "The user no longer works at Siemens."),
        ("I'm not vegetarian anymore.", "The user is not vegetarian."),
        ("I used to live in Bordeaux.", "The user used to live in Bordeaux."),
        ("My wife is allergic to shellfish.", "The user's wife is allergic to shellfish."),
        ("We use Django for the shop.", "The user's team uses Django for the shop."),
        ("Never use emojis.", "The user asks: never use emojis."),
        ("Ich wohne in Köln.", "The user lives in Köln."),
    ],
)
def test_statements_are_in_the_third_person(said: str, statement: str, turn: Build) -> None:
    assert [fact.content for fact in facts(turn(said))] == [statement]


@pytest.mark.parametrize("when", ["a year ago", "2 months ago", "last week", "a couple of weeks ago"])
def test_when_somebody_moved_is_no_part_of_where(when: str, turn: Build) -> None:
    (home,) = facts(turn(f"I moved to Porto {when}."))
    assert home.value == "Porto"
    assert home.valid_from is not None


def test_a_correction_says_so_and_denies_the_old_value(turn: Build) -> None:
    new, old = facts(turn("Actually, I live in Porto, not Lisbon."))
    assert (new.value, new.polarity, new.is_correction) == ("Porto", 1, True)
    assert (old.value, old.polarity, old.is_correction) == ("Lisbon", -1, True)


def test_facts_about_others_are_not_about_the_user(turn: Build) -> None:
    assert [fact.subject for fact in facts(turn("My sister lives in Porto. Ana works at Nokia."))] == [
        "user's sister",
        "Ana",
    ]


def test_a_plan_is_valid_at_once_and_carries_its_date(turn: Build) -> None:
    (plan,) = facts(turn("I'm flying to Oslo next Tuesday."))
    assert plan.valid_from is None
    assert plan.metadata["date"] == "2026-11-24"


def test_a_stay_ends_with_its_last_day(turn: Build) -> None:
    (stay,) = facts(turn("I'm in Tokyo until Friday."))
    assert stay.valid_until == datetime(2026, 11, 21, tzinfo=UTC)


def test_the_day_is_that_of_the_speaker(turn: Build) -> None:
    late = datetime(2026, 11, 18, 1, 0, tzinfo=timezone(timedelta(hours=9)))
    assert episodes(turn("We meet tomorrow in Kyoto.", at=late)) == ["We meet tomorrow (2026-11-19) in Kyoto."]


def test_a_confirmed_answer_is_kept_and_another_is_not(turn: Build) -> None:
    booked = turn("Book the train then.", "I booked the 7:15 train. Have fun!")
    assert episodes(booked, turn("Perfect, thanks!", index=1))[-1] == "The assistant said: I booked the 7:15 train."
    assert episodes(booked, turn("No, the later one", index=1)) == ["Book the train then.", "No, the later one"]
    assert episodes(booked, turn("Yes, but not that one", index=1))[1:] == ["Yes, but not that one"]
    assert episodes(booked) == ["Book the train then."]


def test_a_long_turn_is_split_and_bounded(turn: Build) -> None:
    kept = episodes(turn("The committee has met again and decided little. " * 2_000))
    assert len(kept) == MOST_EPISODES
    assert all(len(content.encode()) <= MAX_CONTENT_BYTES for content in kept)


def test_a_list_gives_no_more_than_its_share(turn: Build) -> None:
    assert len(facts(turn(" ".join(f"I like thing{n}." for n in range(50))))) == MOST_PER_TURN


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("My card is 4111 1111 1111 1111, I live in Malmö.", ["My card is [redacted: card number], I live in Malmö."]),
        ("4111 1111 1111 1111", []),
    ],
)
def test_secrets_never_reach_a_memory(said: str, kept: list[str], turn: Build) -> None:
    extraction = RULES.extract([turn(said)])
    assert [memory.content for memory in extraction.memories if not memory.slot] == kept
    assert all("4111" not in f"{memory.content}{memory.quote}{memory.value}" for memory in extraction.memories)
    assert extraction.accounting.redacted >= 1


def test_of_a_private_key_no_line_reaches_a_memory(turn: Build) -> None:
    lines = [hashlib.sha256(bytes([number])).hexdigest() for number in range(30)]
    key = "\n".join(["-----BEGIN RSA PRIVATE KEY-----", *lines, "-----END RSA PRIVATE KEY-----"])
    for extraction in (
        RULES.extract([turn(f"My deploy key:\n{key}\nI live in Malmö.")]),
        extract_episodes([turn(key)]),
    ):
        assert not any(line in f"{one.content}{one.quote}" for one in extraction.memories for line in lines)
        assert extraction.accounting.redacted == 1


def test_one_secret_is_counted_once(turn: Build) -> None:
    assert RULES.extract([turn("My key is sk-proj-abcd1234efgh5678ijkl9012.")]).accounting.redacted == 1


def test_beside_a_secret_facts_are_found(turn: Build) -> None:
    said = "My key is sk-proj-abcd1234efgh5678ijkl9012. I live in Malmö. AKIAIOSFODNN7EXAMPLE expired, and I like tea."
    assert [fact.content for fact in facts(turn(said))] == ["The user lives in Malmö.", "The user likes tea."]


def test_a_turn_that_begins_with_a_secret_is_no_code(turn: Build) -> None:
    assert episodes(turn("AKIAIOSFODNN7EXAMPLE is my old key.")) == ["[redacted: token] is my old key."]


@pytest.mark.parametrize(
    "said",
    [
        "No vivo en Madrid.",
        "I am allergic to neither nuts nor milk.",
        "I turned 30 off.",
        "As they say, I live in Rome.",
        "I live in Rome, she said.",
        "I live in Rome, said my sister.",
        "I am a vegan, says Tom.",
        "I live in <city>.",
        "I live in ${CITY}",
        "I live in Rome or in Milan.",
        "Ich wohne in Berlin nicht.",
        "I moved to Rome but came back.",
        "I moved from Rome to Milan and back to Rome.",
        "We moved from Rome to Milan.",
        "My birthday is tomorrow.",
        "My wife's birthday is next Friday.",
        "The deadline is not Friday.",
        "I left Paris for Rome.",
        "I joined Anna for lunch.",
        "I left Maria a message.",
        "I work for free.",
        "I live in the same house as my brother.",
        "I prefer not to say.",
        "I am blind to it.",
        "I like where this is going.",
        "Hi, I'm Done.",
        "Call me Ishmael is the first line of it.",
        "Correct my English. I am living in Rome since 2 years.",
    ],
)
def test_what_only_looks_like_a_fact_is_none(said: str, turn: Build) -> None:
    assert facts(turn(said)) == []


@pytest.mark.parametrize(
    ("said", "content"),
    [
        ("No, I live in Rome.", "The user lives in Rome."),
        ("I turned 30 last week.", "The user is 30 years old."),
        ("My birthday is in May.", "The user's birthday is in May."),
        ("We moved from GitHub to GitLab.", "The user's team uses GitLab."),
        ("The deadline is not Friday but Monday.", "The deadline is Monday."),
        ("I moved from Rome to Milan.", "The user lives in Milan."),
        ("I love tea <3", "The user loves tea <3."),
        ("I left Siemens.", "The user left Siemens."),
        ("I joined Bank of Ireland.", "The user joined Bank of Ireland."),
        ("I live in the south of France.", "The user lives in the south of France."),
        ("Hi, I'm Tom.", "The user is called Tom."),
        ("I am blind.", "The user is blind."),
    ],
)
def test_what_is_one_stays_one(said: str, content: str, turn: Build) -> None:
    assert content in [fact.content for fact in facts(turn(said))]


def test_a_move_keeps_its_day(turn: Build) -> None:
    (fact,) = facts(turn("I moved to Oslo on December 31."))
    assert "December 31 (" in fact.content


def test_a_fact_whose_value_is_a_secret_is_none(turn: Build) -> None:
    assert facts(turn("My phone number is +44 20 7946 0958."))[0].value == "+44 20 7946 0958"
    strict = RuleExtractor(ALWAYS | PII).extract([turn("My phone number is +44 20 7946 0958.")]).memories
    assert [memory.content for memory in strict] == ["My phone number is [redacted: phone number]."]


def test_turns_are_extracted_alike_alone_and_together(turn: Build) -> None:
    turns = [turn("I live in Rome.", index=0), turn("I like tea.", index=1)]
    alone = [memory for one in turns for memory in RULES.extract([one]).memories]
    assert RULES.extract(turns).memories == alone


@given(st.text(max_size=300), st.text(max_size=100))
def test_any_text_gives_memories_that_can_be_stored(user: str, assistant: str) -> None:
    first = Turn("s", 0, user, assistant, datetime(2026, 11, 18, tzinfo=UTC))
    for memory in RULES.extract([first, replace(first, index=1, user_text="Yes, perfect")]).memories:
        assert memory.content.strip()
        assert 0 <= memory.confidence <= 1
        assert memory.polarity in {-1, 1}
        assert memory.valid_from is None or memory.valid_from <= memory.at


WORDS = (
    "I my we am live in at work like not no longer never is Rome tea if would ? . , and my sister name moved to from"
)


@given(st.lists(st.sampled_from(WORDS.split()), max_size=30).map(" ".join))
def test_any_order_of_words_gives_memories_that_can_be_stored(user: str) -> None:
    for memory in RULES.extract([Turn("s", 0, user, "", datetime(2026, 11, 18, tzinfo=UTC))]).memories:
        assert memory.slot == EPISODE or memory.value.strip()


@pytest.mark.parametrize(
    "text",
    [
        "a", "I ", "my ", "I am a ", "I live in ", "'", '"a', "\n", "if ", ". ", "Hi, ", "I'm not ", "x and ", "1",
        "in March ", " ", "I work at a as a ", "My sister, Ana, ", "“", "I like a, b and c; ", "please ",
        "the the. I live in Rome. ", "I'm A. ",
    ],
)  # fmt: skip
def test_a_hostile_megabyte_takes_bounded_time(text: str, turn: Build) -> None:
    hostile = text * (1_000_000 // len(text))
    begun = time.process_time()
    extraction = RULES.extract([turn(hostile, hostile), turn("yes", index=1)])
    assert time.process_time() - begun < 5
    assert extraction.accounting.cut_turns == 1
    assert len(extraction.memories) <= 2 * (MOST_EPISODES + MOST_PER_TURN + 2)
