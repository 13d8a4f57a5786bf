from __future__ import annotations

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from extproc.memory.model import Category, Namespace, new_memory
from extproc.worker.consolidate import (
    Add,
    Candidate,
    Decision,
    Known,
    Merge,
    Noop,
    Supersede,
    consolidate,
    fact_metadata,
    memory_id,
)
from extproc.worker.extract import Extracted

NOW = datetime(2026, 11, 18, 10, 0, tzinfo=UTC)
EARLIER = NOW - timedelta(days=30)
MINE = Namespace("0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d", "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090", "u1")


def extracted(content: str, **changes: Any) -> Extracted:
    plain = Extracted(content=content, category=Category.FACTUAL, confidence=0.7, turn_index=0, at=NOW, quote=content)
    return replace(plain, **changes)


def home(value: str, **changes: Any) -> Extracted:
    return replace(extracted(f"The user lives in {value}.", slot="home", value=value), **changes)


def like(value: str, polarity: int = 1, **changes: Any) -> Extracted:
    words = "likes" if polarity > 0 else "does not like"
    return extracted(f"The user {words} {value}.", slot="like", value=value, polarity=polarity, **changes)


def candidate(one: Extracted, vector: list[float] | None = None) -> Candidate:
    return Candidate(memory_id(MINE, "session", one), one, vector)


def known(one: Extracted, vector: list[float] | None = None, at: datetime = EARLIER) -> Known:
    return Known(
        str(uuid.uuid5(uuid.NAMESPACE_URL, one.content)), one.content, at, one.confidence, one.subject, one.slot,
        one.value, one.polarity, one.valid_from, vector,
    )  # fmt: skip


def decide(one: Extracted, *others: Known) -> Decision:
    (decision,) = consolidate([candidate(one)], others)
    return decision


def test_something_new_is_added() -> None:
    assert isinstance(decide(home("Porto")), Add)


def test_the_same_words_merge_and_raise_confidence_and_time() -> None:
    old = known(home("Porto"))
    decision = decide(home("Porto"), old)
    assert decision == Merge(old.id, decision.confidence if isinstance(decision, Merge) else 0, NOW)
    assert isinstance(decision, Merge)
    assert 0.7 < decision.confidence < 1


def test_another_value_of_a_single_slot_supersedes_from_when_it_is_so() -> None:
    old = known(home("Lisbon"))
    since = datetime(2026, 11, 1, tzinfo=UTC)
    decision = decide(home("Porto", valid_from=since), old)
    assert isinstance(decision, Supersede)
    assert (decision.replaces, decision.valid_until) == ((old.id,), since)


def test_what_was_said_later_wins_even_when_it_is_read_first() -> None:
    newer = known(home("Porto"), at=NOW + timedelta(days=1))
    decision = decide(home("Lisbon"), newer)
    assert isinstance(decision, Add)
    assert (decision.superseded_by, decision.valid_until) == (newer.id, newer.said_at)


def test_flipped_polarity_of_the_same_thing_supersedes_and_of_another_does_not() -> None:
    assert isinstance(decide(like("opera", -1), known(like("opera"))), Supersede)
    assert isinstance(decide(like("opera"), known(like("opera", -1))), Supersede)
    assert isinstance(decide(like("jazz", -1), known(like("opera"))), Add)


def test_a_narrower_denial_leaves_the_wider_statement() -> None:
    assert isinstance(decide(like("coffee after noon", -1), known(like("coffee"))), Add)


def test_a_slot_with_many_values_keeps_them() -> None:
    assert isinstance(decide(like("tea"), known(like("coffee"))), Add)


def test_another_subject_is_another_slot() -> None:
    assert isinstance(decide(home("Porto", subject="user's sister"), known(home("Lisbon"))), Add)


def test_a_country_beside_its_town_contradicts_nothing_unless_it_is_a_correction() -> None:
    assert isinstance(decide(home("Portugal"), known(home("Lisbon"))), Add)
    assert isinstance(decide(home("Portugal", is_correction=True), known(home("Lisbon"))), Supersede)


def test_near_duplicates_merge_only_with_equal_numbers_names_and_negation() -> None:
    vector = [1.0, 0.0]
    first = extracted("We paid 300 euros to Contoso for the new office chairs in Turin")
    for text, merged in (
        ("We paid 300 euros to Contoso for new office chairs in Turin", True),
        ("We paid 400 euros to Contoso for new office chairs in Turin", False),
        ("We paid 300 euros to Fabrikam for new office chairs in Turin", False),
        ("We never paid 300 euros to Contoso for new office chairs in Turin", False),
    ):
        (decision,) = consolidate([candidate(extracted(text), vector)], [known(first, vector)])
        assert isinstance(decision, Merge) == merged, text


def test_likeness_of_words_without_that_of_vectors_is_no_duplicate() -> None:
    one, other = extracted("The red box holds four spare cables"), extracted("The red box holds four cables")
    assert isinstance(consolidate([candidate(one, [1.0, 0.0])], [known(other, [0.0, 1.0])])[0], Add)
    assert isinstance(consolidate([candidate(one, [1.0, 0.0])], [known(other, [1.0, 0.0])])[0], Merge)


def test_what_was_written_is_not_written_again() -> None:
    one = candidate(home("Porto"))
    assert consolidate([one], [], frozenset({one.id})) == [Noop(one.id)]


def test_of_a_turn_that_corrects_itself_the_last_word_counts() -> None:
    first, last = candidate(home("Lisbon")), candidate(home("Porto"))
    assert first.id == last.id
    assert consolidate([first, last], []) == [Noop(first.id), Add(last)]


def test_later_candidates_see_what_earlier_ones_did() -> None:
    first, second = home("Lisbon", turn_index=0), home("Porto", turn_index=1, at=NOW + timedelta(minutes=1))
    decisions = consolidate([candidate(first), candidate(second)], [])
    assert isinstance(decisions[1], Supersede)
    assert decisions[1].replaces == (candidate(first).id,)


def test_ids_follow_slot_or_text_and_all_that_is_whose() -> None:
    assert memory_id(MINE, "s", home("Porto")) == memory_id(MINE, "s", home("Porto", content="He dwells in Porto."))
    ids = {
        memory_id(MINE, "s", home("Porto")),
        memory_id(MINE, "t", home("Porto")),
        memory_id(MINE, "s", home("Porto", turn_index=1)),
        memory_id(MINE, "s", home("Porto", polarity=-1)),
        memory_id(replace(MINE, user_id="u2"), "s", home("Porto")),
        memory_id(replace(MINE, user_id=None), "s", home("Porto")),
        memory_id(MINE, "s", like("tea")),
        memory_id(MINE, "s", like("coffee")),
    }
    assert len(ids) == 8
    assert all(uuid.UUID(one).version == 5 for one in ids)


def test_a_row_gives_back_the_fact_that_was_written() -> None:
    one = like("opera", -1)
    row = new_memory(
        MINE, one.content, id=memory_id(MINE, "s", one), now=NOW + timedelta(hours=1), metadata=fact_metadata(one)
    )
    again = Known.of(row)
    assert (again.subject, again.slot, again.value, again.polarity, again.said_at) == ("user", "like", "opera", -1, NOW)
    assert isinstance(decide(replace(one, at=NOW + timedelta(days=1)), again), Merge)


VALUES = st.sampled_from(["Lisbon", "Porto", "porto", "Portugal", "12 Mill Lane", ""])
FACTS = st.builds(
    lambda value, slot, polarity, correction, days: extracted(
        f"The user {slot} {polarity} {value}.", slot=slot, value=value, polarity=polarity, is_correction=correction,
        at=NOW + timedelta(days=days),
    ),
    VALUES, st.sampled_from(["home", "like", "deadline", "tool:x", ""]), st.sampled_from([1, -1]), st.booleans(),
    st.integers(-3, 3),
)  # fmt: skip


@given(st.lists(FACTS, max_size=8))
def test_a_second_run_over_the_same_turns_does_nothing(facts: list[Extracted]) -> None:
    candidates = [candidate(fact) for fact in facts]
    written = frozenset(one.id for one in candidates)
    assert all(isinstance(decision, Noop) for decision in consolidate(candidates, [], written))


@given(st.lists(FACTS, max_size=8))
def test_nothing_is_superseded_twice_or_by_itself(facts: list[Extracted]) -> None:
    gone: set[str] = set()
    for decision in consolidate([candidate(fact) for fact in facts], []):
        if isinstance(decision, Supersede):
            assert decision.candidate.id not in decision.replaces
            assert gone.isdisjoint(decision.replaces)
            gone.update(decision.replaces)
