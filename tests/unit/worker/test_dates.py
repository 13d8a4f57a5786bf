from __future__ import annotations

import time
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.worker.dates import annotated, find_dates, first_date

WEDNESDAY = date(2026, 11, 18)


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("last Friday", "2026-11-13"),
        ("next Tuesday", "2026-11-24"),
        ("this Friday", "2026-11-20"),
        ("on Saturday", "2026-11-21"),
        ("we met on Monday", "2026-11-16"),
        ("tomorrow at 3pm", "2026-11-19"),
        ("the day after tomorrow", "2026-11-20"),
        ("yesterday", "2026-11-17"),
        ("I moved in March", "2026-03"),
        ("it starts in March", "2027-03"),
        ("in June 2019", "2019-06"),
        ("since 2019", "2019"),
        ("3 December", "2026-12-03"),
        ("the 4th of July", "2027-07-04"),
        ("December 12, 2027", "2027-12-12"),
        ("2026-02-28", "2026-02-28"),
        ("two weeks ago", "2026-11-04"),
        ("in three weeks", "2026-12-09"),
        ("next month", "2026-12"),
        ("last year", "2025"),
        ("next week", "2026-11-23/2026-11-29"),
        ("last summer", "2026-06-01/2026-08-31"),
        ("nächsten Montag", "2026-11-23"),
        ("übermorgen", "2026-11-20"),
        ("lundi prochain", "2026-11-23"),
        ("ayer", "2026-11-17"),
    ],
)
def test_words_become_days(text: str, iso: str) -> None:
    mention = first_date(text, WEDNESDAY)
    assert mention is not None
    assert mention.iso == iso


@pytest.mark.parametrize(
    ("said", "text", "iso"),
    [
        ("2026-01-05", "I moved in December", "2025-12"),
        ("2026-01-05", "I will move in December", "2026-12"),
        ("2025-12-30", "I'm moving in January", "2026-01"),
        ("2025-12-30", "I moved in January", "2025-01"),
        ("2026-01-01", "I joined on 31 December", "2025-12-31"),
        ("2025-12-31", "I fly on 1 January", "2026-01-01"),
        ("2025-12-31", "tomorrow", "2026-01-01"),
        ("2026-01-02", "last week", "2025-12-22/2025-12-28"),
        ("2025-12-15", "next month", "2026-01"),
        ("2026-01-15", "since December", "2025-12"),
        ("2024-02-29", "a year ago", "2023"),
        ("2027-12-29", "I fly on 29 February", "2028-02-29"),
        ("2025-01-02", "I flew on February 29", "2024-02-29"),
        ("2026-01-05", "last winter", "2024-12-01/2025-02-28"),
        ("2026-12-05", "last winter", "2025-12-01/2026-02-28"),
        ("2026-01-05", "this winter", "2025-12-01/2026-02-28"),
    ],
)
def test_at_the_turn_of_a_year(said: str, text: str, iso: str) -> None:
    mention = first_date(text, date.fromisoformat(said))
    assert mention is not None
    assert mention.iso == iso


@pytest.mark.parametrize(
    ("text", "iso"),
    [
        ("We are getting married in May", "2027-05"),
        ("The flight is booked for 3 June", "2027-06-03"),
        ("The exam is planned on Friday", "2026-11-20"),
        ("I moved to Rome. It starts in March", "2027-03"),
        ("I moved out and will start in May", "2027-05"),
        ("I will tell you where I moved in May", "2026-05"),
        ("We got married in May", "2026-05"),
        ("It was booked for 3 June", "2026-06-03"),
    ],
)
def test_the_last_verb_of_the_sentence_says_the_direction(text: str, iso: str) -> None:
    mention = first_date(text, WEDNESDAY)
    assert mention is not None
    assert mention.iso == iso


@pytest.mark.parametrize(
    "text",
    [
        "I lived there until March",
        "every Monday", "on Fridays", "31 June", "29 February 2027", "may I sit", "we march on", "version 2026.1",
        "at 3pm", "I may 5 times", "Guten Morgen", "por la mañana", "in a second", "", "99999999 days ago",
    ],
)  # fmt: skip
def test_what_names_no_day_is_left_alone(text: str) -> None:
    assert find_dates(text, WEDNESDAY) == []


def test_a_date_is_written_after_its_words_unless_it_says_the_year_itself() -> None:
    text = "We met last Friday, and again on 2026-12-01 and in 2019."
    assert annotated(text, WEDNESDAY) == "We met last Friday (2026-11-13), and again on 2026-12-01 and in 2019."


@given(
    st.text(alphabet=st.sampled_from("last next in on Friday March ago two weeks 20 2026 may 12. "), max_size=80),
    st.dates(),
)
def test_any_text_on_any_day_has_mentions_within_it_and_in_order(text: str, said: date) -> None:
    ends = 0
    for mention in find_dates(text, said):
        assert ends <= mention.start < mention.end <= len(text)
        assert mention.first <= mention.last
        ends = mention.end


@pytest.mark.parametrize("text", ["in March ", "last ", "2026 ", "x ", "1", "two weeks ", "next next "])
def test_a_megabyte_takes_bounded_time(text: str) -> None:
    begun = time.process_time()
    find_dates(text * (1_000_000 // len(text)), WEDNESDAY)
    assert time.process_time() - begun < 5


@pytest.mark.parametrize("text", ["I was born on May 5", "I was born on the 5th of May", "she was born in May"])
def test_a_day_of_birth_is_of_no_year_that_is_near(text: str) -> None:
    assert find_dates(text, WEDNESDAY) == []


def test_a_day_of_birth_with_its_year_is_a_day() -> None:
    assert [mention.iso for mention in find_dates("I was born on 5 May 1990", WEDNESDAY)] == ["1990-05-05"]
