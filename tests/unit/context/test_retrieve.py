from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.context import retrieve
from extproc.context.index import Index
from extproc.context.retrieve import Pool, standing
from extproc.context.steps import finish
from extproc.memory.model import Memory

from .conftest import NOON, Asking

MakeMemory = Callable[..., Memory]

texts = st.lists(st.sampled_from(["tea", "coffee", "milk", "sugar", "cake"]), min_size=1, max_size=6).map(" ".join)


def assert_equal(one: Pool, other: Pool) -> None:
    measured = [
        {
            pool.indexes[which].memory(slot).id: pytest.approx(measures, abs=1e-4)
            for which, slot, *measures in zip(pool.which, pool.slots, pool.lexical, pool.soft, pool.cosine, strict=True)
        }
        for pool in (one, other)
    ]
    assert measured[0].keys() == measured[1].keys()
    assert all(measured[0][key].expected == measured[1][key] for key in measured[0])


def by_content(pool: Pool, column: str) -> dict[str, float]:
    values = getattr(pool, column)
    return {pool.indexes[w].memory(s).content: v for w, s, v in zip(pool.which, pool.slots, values, strict=True)}


def test_more_of_the_query_matches_more(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(make("green tea"), make("green tea cake"), make("a black coffee"))
    lexical = by_content(asking.pool("my green tea cake", index), "lexical")
    assert lexical["green tea cake"] > lexical["green tea"] > lexical["a black coffee"] == 0


def test_a_rare_word_weighs_more(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(*(make(f"tea {n}") for n in range(20)), make("sugar"))
    lexical = by_content(asking.pool("tea or sugar", index), "lexical")
    assert max(lexical, key=lambda content: lexical[content]) == "sugar"


def test_a_word_of_like_meaning_matches_softly(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(make("a dog called Rex"), make("the invoice is late"))
    pool = asking.pool("which pets", index)
    soft = by_content(pool, "soft")
    assert not pool.lexical.any()
    assert 0.1 < soft["a dog called Rex"] < 1
    assert soft["the invoice is late"] == 0


def test_a_word_that_the_table_lacks_matches_itself(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(make("about Zyxqvw"), make("about Wvqxyz"))
    assert by_content(asking.pool("Zyxqvw", index), "soft")["about Zyxqvw"] > 0.5


def test_neighbours_in_the_session_come_along(asking: Asking, make: MakeMemory) -> None:
    said = [
        make(f"{word} remark", session_id="s", turn_index=n)
        for n, word in enumerate(["ab", "cd", "ef", "tea", "gh", "ij", "kl"])
    ]
    others = [make(f"unrelated {n}", session_id="t", turn_index=n) for n in range(9)]
    index = asking.index(*others, *said)
    pool = asking.pool("tea", index, candidates=1)
    assert set(by_content(pool, "lexical")) >= {f"{word} remark" for word in ("cd", "ef", "tea", "gh", "ij")}
    at = int(np.argmax(pool.lexical))
    before = pool.indexes[0].memory(int(pool.slots[pool.previous[at]]))
    assert before.content == "ef remark"


def test_whom_it_is_about_is_recognised(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(
        make("likes tea", metadata={"speaker": "Ada"}), make("drinks tea", metadata={"subject": "user"}), make("tea")
    )
    assert by_content(asking.pool("does Ada like tea", index), "is_named") == {
        "likes tea": True, "drinks tea": False, "tea": False,
    }  # fmt: skip
    assert by_content(asking.pool("do I like tea", index), "is_named")["drinks tea"]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("tea in May", {"a", "b"}),
        ("tea on 7 May", {"a"}),
        ("tea on May 7th, 2023", {"a"}),
        ("tea in May 2024", {"b"}),
        ("tea on 2023-05-07", {"a"}),
        ("may I have tea", set()),
    ],
)
def test_a_date_in_the_query_is_that_of_the_memory(
    asking: Asking, make: MakeMemory, query: str, expected: set[str]
) -> None:
    dates = {"a": datetime(2023, 5, 7, 23, tzinfo=UTC), "b": datetime(2024, 5, 8, tzinfo=UTC), "c": NOON}
    index = asking.index(*(make(name, created_at=at, session_id="s") for name, at in dates.items()))
    dated = by_content(asking.pool(query, index), "is_dated")
    assert {name for name, is_dated in dated.items() if is_dated} == expected


def test_of_a_long_query_the_rarest_known_words_are_searched(asking: Asking, make: MakeMemory) -> None:
    words = [f"w{n}" for n in range(retrieve.MOST_SEARCHED)]
    index = asking.index(make("common thing"), make("common"), make(" ".join(words)))
    unknown = " ".join(f"u{n}" for n in range(500))
    pool = asking.pool(f"common {unknown} {' '.join(words)}", index)
    assert by_content(pool, "lexical")[" ".join(words)] > 0


def test_a_request_reads_so_many_postings_and_the_rarest_word_always(
    asking: Asking, make: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = asking.index(*(make(f"tea n{n}") for n in range(3)), *(make(f"milk n{n}") for n in range(4)))
    for most, expected in ((6, ["tea"]), (7, ["tea", "milk"]), (1, ["tea"])):
        monkeypatch.setattr(retrieve, "MOST_POSTINGS", most)
        weighed = retrieve._weighed([index], asking.indexer.question("milk tea"))
        assert [one.stem for one in retrieve._searched(weighed)] == expected


@given(st.lists(texts, max_size=8), texts)
def test_what_is_measured_is_on_a_fixed_scale(
    asking: Asking, make: MakeMemory, contents: list[str], query: str
) -> None:
    pool = asking.pool(query, asking.index(*map(make, contents)))
    assert len(pool) == len(contents)
    assert ((pool.lexical >= 0) & (pool.lexical < 2)).all()
    assert ((pool.soft >= 0) & (pool.soft <= 1)).all()
    assert (np.abs(pool.cosine) < 1.01).all()


@given(st.lists(st.tuples(texts, st.booleans()), max_size=10), texts, st.randoms(use_true_random=False))
def test_adding_and_removing_gives_the_same_as_loading(
    asking: Asking, make: MakeMemory, contents: list[tuple[str, bool]], query: str, chance: random.Random
) -> None:
    memories = [
        (make(content, session_id="s" if n % 2 else None, turn_index=n // 3), stays)
        for n, (content, stays) in enumerate(contents)
    ]
    lived = asking.index()
    for memory, _ in memories:
        lived.update(asking.rows([memory]))
    chance.shuffle(memories)
    for memory, stays in memories:
        if stays:
            lived.update(asking.rows([memory]))  # again: replaces itself
        else:
            lived.remove(memory.id)
    anew = asking.index(*(memory for memory, stays in memories if stays))
    assert_equal(asking.pool(query, lived), asking.pool(query, anew))
    ranked, again = asking.rank(query, lived), asking.rank(query, anew)
    assert [one.memory for one in ranked.scored] == [one.memory for one in again.scored]
    assert len(lived) == len(anew)


@given(st.lists(st.tuples(texts, st.booleans()), max_size=10), texts)
def test_two_partitions_measure_like_one(
    asking: Asking, make: MakeMemory, contents: list[tuple[str, bool]], query: str
) -> None:
    memories = [(make(content), first) for content, first in contents]
    parts = [asking.index(*(memory for memory, first in memories if first is which)) for which in (True, False)]
    whole = asking.index(*(memory for memory, _ in memories))
    assert_equal(asking.pool(query, *parts), asking.pool(query, whole))


def test_the_limit_keeps_the_best_and_of_equals_the_newest(asking: Asking, make: MakeMemory) -> None:
    ids = [str(uuid.UUID(int=n)) for n in range(10)]
    equal = [make(f"tea n{n}", id=ids[n], created_at=NOON + timedelta(days=n // 2)) for n in range(10)]
    best = make("tea milk")
    for memories in ([*equal, best], [best, *equal[::-1]]):
        index = asking.index(*memories)
        searched = retrieve._weighed([index], asking.indexer.question("milk tea"))
        slots = finish(retrieve._best_by_words(index, searched, [], 4, None))
        assert {index.memory(slot).id for slot in slots} == {best.id, ids[8], ids[9], ids[6]}


def test_what_is_not_valid_now_is_not_found(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(
        make("tea two", valid_until=NOON),
        make("tea three", valid_from=NOON + timedelta(seconds=1)),
        make("tea four", valid_until=NOON + timedelta(seconds=1)),
    )
    assert asking.contents("my tea", index) == ["tea four"]
    assert set(asking.contents("what tea did I have before", index)) == {"tea four", "tea two"}


def test_pinned_and_profile_memories_stand_the_newest_first(asking: Asking, make: MakeMemory) -> None:
    old = make("a", metadata={"pinned": True})
    new = make("b", metadata={"pinned": True}, created_at=NOON + timedelta(days=1))
    over = make("c", metadata={"pinned": True}, valid_until=NOON)
    name = make("d", metadata={"slot": "name", "subject": "user"})
    index = asking.index(old, new, over, name, make("e", metadata={"slot": "name", "subject": "Ada"}), make("f"))
    assert standing([index], NOON) == ([new, old], [name])


def test_the_newest_stand_whatever_the_order_in_the_arrays(asking: Asking, make: MakeMemory) -> None:
    pinned = [make(f"tea {n}", created_at=NOON + timedelta(days=n // 2), metadata={"pinned": True}) for n in range(100)]
    newest = sorted(pinned, key=lambda one: (-one.created_at.timestamp(), one.id))[: retrieve.MOST_STANDING]
    for order in (pinned, pinned[::-1], random.sample(pinned, 100)):
        assert standing([asking.index(*order)], NOON)[0] == newest


@pytest.mark.parametrize("query", ["", "what is it?"])
def test_a_query_without_words_finds_nothing_by_words(asking: Asking, make: MakeMemory, query: str) -> None:
    assert asking.indexer.question(query).vector is None
    assert len(asking.pool(query, Index(asking.agent))) == 0


def test_scores_are_the_same_to_the_last_bit_whatever_the_order_in_the_arrays(asking: Asking, make: MakeMemory) -> None:
    names = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hal", "Ida", "Jon", "Kim", "Lea", "Max", "Nia", "Ola")
    things = ("tea", "coffee", "jazz", "rust", "chess", "rugby", "sushi", "piano")
    rows = asking.rows([make(f"{name} likes {thing}.", session_id=name) for thing in things for name in names])
    found = set()
    for part in range(8):
        mixed = random.sample(rows, len(rows))
        index = Index(asking.agent, mixed[: 15 * part])
        index.update(mixed[15 * part :])
        ranking = asking.rank("my sushi", index)
        found.add(tuple((one.memory.id, one.composite, one.relevance, one.similarity) for one in ranking.scored))
    assert len(found) == 1
