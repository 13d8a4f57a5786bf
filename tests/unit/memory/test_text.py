from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.memory.features import asked_date_stems
from extproc.memory.text import Moment, Subject, WrittenDate, parse_query, stems
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


def test_of_several_sentences_those_of_the_author_stand_alone() -> None:
    query = parse_query("What should we cook tonight? It is raining. Is there anything that I am allergic to?")
    assert query.own == (frozenset({"cook", "tonight"}), frozenset({"anyth", "allergi"}))
    assert parse_query("Is there anything that I am allergic to?").own == ()
    assert parse_query("Fix this error. Be quick.").own == ()


def test_a_script_without_spaces_is_known() -> None:
    assert parse_query("我每个月的房租是多少？").is_unspaced
    assert not parse_query("Translate 房租").is_unspaced


def test_a_query_loses_question_words_and_repetitions() -> None:
    assert parse_query("Please tell me: what kind of dog is my dog?").stems == ("dog",)
    assert parse_query("what are they?").stems == ()


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("What is my name?", Subject.AUTHOR),
        ("where do we meet", Subject.AUTHOR),
        ("How do I center a div?", Subject.ANYTHING),
        ("Where does Caroline live?", Subject.NAMED),
        ("write a haiku", Subject.ANYTHING),
        ("Write a haiku. Thanks", Subject.ANYTHING),
        ("Fix this SQL", Subject.ANYTHING),
        ("ask Bob", Subject.NAMED),
        ("1 ask 'Bob'", Subject.NAMED),
        ("what of (Bob)?", Subject.NAMED),
        ("wo wohnt Änne", Subject.ANYTHING),
        ("Which port did the proxy use?", Subject.EVENT),
        ("Wo wohne ich?", Subject.AUTHOR),
        ("Quel est notre budget ?", Subject.AUTHOR),
        ("我用哪支镜头?", Subject.AUTHOR),
        ("帮我写一个函数", Subject.ANYTHING),
        ("A Bob", Subject.ANYTHING),
        ("12 Bob", Subject.ANYTHING),
        ("fine; Bob", Subject.ANYTHING),
        ("fine\nask Bob", Subject.NAMED),
        ("Who has the key?", Subject.EVENT),
        ("Who opens the front door?", Subject.KNOWN),
        ("Draft the opening paragraph", Subject.KNOWN),
        ("What is the colour of milk?", Subject.ANYTHING),
        ("What is the difference?", Subject.ANYTHING),
        ("What puts me off museums?", Subject.AUTHOR),
        ("Can you give me a list?", Subject.ANYTHING),
        ("Explain it to me, will it rain?", Subject.EVENT),
        ("Quel oiseau a mangé le pain ?", Subject.EVENT),
        ("Quelle est ma rue ?", Subject.AUTHOR),
        ("¿Dónde celebraron la boda?", Subject.EVENT),
        ("Wann sind die Monteure gekommen?", Subject.EVENT),
        ("Was wächst bei mir?", Subject.AUTHOR),
        ("erkläre mir die beugung", Subject.ANYTHING),
    ],
)
def test_what_a_query_speaks_of(text: str, subject: Subject) -> None:
    assert parse_query(text).subject is subject


@pytest.mark.parametrize(
    "text", ["ab " * 21_845, "a" * 65_536, "1 A" * 21_845, "a" + "\u0315\u0300" * 32_768, "\ufdfa" * 3_640]
)
def test_a_hostile_text_takes_time_in_proportion(text: str) -> None:
    began = time.thread_time()
    parse_query(text)
    assert time.thread_time() - began < 0.5


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


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("What is the current port?", Moment.LATEST),
        ("Where do I live now?", Moment.LATEST),
        ("Do I still smoke?", Moment.LATEST),
        ("Where did I live before?", Moment.PAST),
        ("Wo habe ich früher gewohnt?", Moment.PAST),
        ("¿Dónde vivía antes?", Moment.PAST),
        ("以前はどこに住んでいた?", Moment.PAST),
        ("Quel vélo ai-je maintenant ?", Moment.LATEST),
        ("我现在住在哪里?", Moment.LATEST),
        ("Which editor did I use to love, previously?", Moment.PAST),
        ("Where I used to work", Moment.PAST),
        ("Where do I live?", Moment.ANY),
        ("a knowledge base", Moment.ANY),
    ],
)
def test_the_time_that_a_query_asks_about(text: str, moment: Moment) -> None:
    assert parse_query(text).moment is moment


@pytest.mark.parametrize(
    ("text", "dates"),
    [
        ("on 7 May 2023", [(2023, 5, 7)]),
        ("on the 7th of May", [(None, 5, 7)]),
        ("May 7th, 2023", [(2023, 5, 7)]),
        ("in December 2022 or in june", [(2022, 12, None), (None, 6, None)]),
        ("2023-05-07 and 2023-05", [(2023, 5, 7), (2023, 5, None)]),
        ("may I march on", []),
        ("Marching in Mayfair", []),
        ("version 12-05", []),
    ],
)
def test_dates_that_a_query_writes(text: str, dates: list[tuple[int | None, int, int | None]]) -> None:
    assert list(parse_query(text).dates) == dates


def test_an_idiom_is_looked_up_by_what_it_means() -> None:
    assert parse_query("Who am I?").stems == ("name",)
    assert {"job", "work"} <= set(parse_query("What do I do for a living?").stems)


def test_each_stem_keeps_its_word() -> None:
    query = parse_query("running Dogs and dogs")
    assert dict(zip(query.stems, query.words, strict=True)) == {"run": "running", "dog": "dogs"}


def test_of_many_dates_the_last_ones_are_asked_about() -> None:
    log = " ".join(f"May {year}" for year in range(1000, 2000))
    query = parse_query(f"{log}. What did we do in June 2024?")
    assert len(query.dates) == 8
    assert query.dates[-1] == WrittenDate(2024, 6, None)
    assert asked_date_stems(query) == ["@05", "@06"]
