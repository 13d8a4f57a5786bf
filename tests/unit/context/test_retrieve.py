from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.context import retrieve
from extproc.context.retrieve import Document, Index, Matches, search
from extproc.memory.model import Memory, Status
from extproc.memory.text import parse_query

MakeMemory = Callable[..., Memory]

texts = st.lists(st.sampled_from(["tea", "coffee", "milk", "sugar", "cake"]), min_size=1, max_size=6).map(" ".join)


def ranked(matches: Matches) -> list[tuple[str, float]]:
    return sorted((hit.memory.id, hit.relevance) for hit in matches.hits)


def ask(make: MakeMemory, query: str, *indexes: Index, limit: int = 50) -> Matches:
    return search(indexes, parse_query(query), limit, make("now").created_at)


def index_of(*memories: Memory) -> Index:
    return Index(map(Document.of, memories))


def test_more_of_the_query_is_more_relevant(make: MakeMemory) -> None:
    index = index_of(make("green tea"), make("green tea cake"), make("a black coffee"))
    hits = {hit.memory.content: hit.relevance for hit in ask(make, "my green tea cake", index).hits}
    assert hits["green tea cake"] > hits["green tea"]
    assert len(hits) == 2


def test_a_rare_word_weighs_more(make: MakeMemory) -> None:
    index = index_of(*(make(f"tea {n}") for n in range(20)), rare := make("sugar"))
    best = max(ask(make, "tea or sugar", index).hits, key=lambda hit: hit.relevance)
    assert best.memory is rare


def test_of_a_long_query_the_rarest_known_words_are_searched(make: MakeMemory) -> None:
    words = [f"w{n}" for n in range(retrieve.MOST_SEARCHED)]
    index = index_of(make("common thing"), make("common"), rare := make(" ".join(words)))
    unknown = " ".join(f"u{n}" for n in range(500))
    matches = ask(make, f"common {unknown} {' '.join(words)}", index)
    assert [hit.memory for hit in matches.hits] == [rare]
    assert len(ask(make, f"common {unknown} {' '.join(words[1:])}", index).hits) == 3


def test_a_request_reads_so_many_postings_and_the_rarest_word_always(
    make: MakeMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = index_of(*(make(f"tea n{n}") for n in range(3)), *(make(f"milk n{n}") for n in range(4)))
    monkeypatch.setattr(retrieve, "MOST_POSTINGS", 6)
    assert ask(make, "tea or milk", index).evaluated == 3
    monkeypatch.setattr(retrieve, "MOST_POSTINGS", 7)
    assert ask(make, "tea or milk", index).evaluated == 7
    monkeypatch.setattr(retrieve, "MOST_POSTINGS", 1)
    assert ask(make, "tea or milk", index).evaluated == 3


@given(st.lists(texts, max_size=8), texts)
def test_relevance_is_a_share(make: MakeMemory, contents: list[str], query: str) -> None:
    matches = ask(make, query, index_of(*map(make, contents)))
    assert all(0 < hit.relevance <= 1 for hit in matches.hits)
    assert matches.evaluated == len(matches.hits)


@given(st.lists(st.tuples(texts, st.booleans()), max_size=10), texts, st.randoms(use_true_random=False))
def test_adding_and_removing_gives_the_same_as_building_anew(
    make: MakeMemory, contents: list[tuple[str, bool]], query: str, chance: random.Random
) -> None:
    memories = [(make(content), stays) for content, stays in contents]
    lived = Index()
    for memory, _ in memories:
        lived.put(Document.of(memory))
    chance.shuffle(memories)
    for memory, stays in memories:
        if stays:
            lived.put(Document.of(memory))  # again: replaces itself
        else:
            lived.remove(memory.id)
    anew = index_of(*(memory for memory, stays in memories if stays))
    assert ranked(ask(make, query, lived)) == ranked(ask(make, query, anew))
    assert (len(lived), lived.approximate_bytes) == (len(anew), anew.approximate_bytes)


@given(st.lists(st.tuples(texts, st.booleans()), max_size=10), texts)
def test_two_partitions_rank_like_one(make: MakeMemory, contents: list[tuple[str, bool]], query: str) -> None:
    memories = [(make(content), first) for content, first in contents]
    parts = [index_of(*(memory for memory, first in memories if first is which)) for which in (True, False)]
    whole = index_of(*(memory for memory, _ in memories))
    assert ranked(ask(make, query, *parts)) == ranked(ask(make, query, whole))


def test_the_limit_keeps_the_best_and_of_equals_the_newest(make: MakeMemory) -> None:
    born = make("x").created_at
    ids = [str(uuid.UUID(int=n)) for n in range(10)]
    equal = [make(f"tea n{n}", id=ids[n], created_at=born + timedelta(days=n // 2)) for n in range(10)]
    index = index_of(*equal, best := make("tea milk"))
    hits = [hit.memory.id for hit in ask(make, "tea with milk", index, limit=4).hits]
    assert hits == [best.id, ids[8], ids[9], ids[6]]


def test_what_is_not_active_or_not_valid_now_is_not_found(make: MakeMemory) -> None:
    now = make("x").created_at
    index = index_of(
        replace(make("tea one"), status=Status.SUPERSEDED),
        make("tea two", valid_until=now),
        make("tea three", valid_from=now + timedelta(seconds=1)),
        valid := make("tea four", valid_until=now + timedelta(seconds=1)),
    )
    assert [hit.memory for hit in ask(make, "my tea", index).hits] == [valid]


def test_a_memory_that_is_no_longer_active_leaves(make: MakeMemory) -> None:
    memory = make("tea")
    index = index_of(memory)
    index.put(Document.of(replace(memory, status=Status.ARCHIVED)))
    assert len(index) == 0


def test_only_what_is_accepted_is_found(make: MakeMemory) -> None:
    index = index_of(make("tea one"), two := make("tea two"))
    matches = search([index], parse_query("tea"), 1, two.created_at, lambda memory: memory.id == two.id)
    assert [hit.memory for hit in matches.hits] == [two]
    assert matches.evaluated == 1


@pytest.mark.parametrize("query", ["", "what is it?", "zebra"])
def test_a_query_without_a_known_word_finds_nothing(make: MakeMemory, query: str) -> None:
    assert ask(make, query, index_of(make("tea"))).hits == []
    assert ask(make, query, Index()) == Matches([], 0)
