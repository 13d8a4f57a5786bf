from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from extproc.context.index import MOST_DEAD, NONE, Index
from extproc.memory.features import Features, Row
from extproc.memory.model import Category, Memory, Namespace, Source, Status

from .conftest import NOON, Asking

MakeMemory = Callable[..., Memory]


def test_a_memory_comes_back_as_it_was(asking: Asking, make: MakeMemory, agent: Namespace) -> None:
    everything = replace(
        make(
            "naïve\ntext 🦊",
            replace(agent, user_id="u"),
            category=Category.EPISODIC,
            confidence=0.1,
            session_id="s",
            turn_index=0,
            valid_from=NOON,
            valid_until=NOON + timedelta(microseconds=1),
            metadata={"tags": ["x"], "deep": {"n": [1.5, None]}},
        ),
        source=Source.IMPORTED,
        status=Status.SUPERSEDED,
        superseded_by=make("x").id,
        usefulness=0.3,
        retrieval_count=7,
        last_retrieved_at=NOON,
    )
    plain = make("plain")
    index = asking.index(plain, everything)
    assert [index.memory(slot) for slot in range(2)] == [plain, everything]


def test_what_is_archived_leaves_and_what_is_replaced_is_there_once(asking: Asking, make: MakeMemory) -> None:
    one, two = make("tea"), make("milk")
    index = asking.index(one, two)
    index.update(asking.rows([replace(one, status=Status.ARCHIVED), replace(two, usefulness=0.9)]))
    assert len(index) == 1
    (found,) = asking.rank("milk", index).scored
    assert found.usefulness == 0.9


def test_keep_only_removes_the_others(asking: Asking, make: MakeMemory) -> None:
    memories = [make(f"tea {n}") for n in range(5)]
    index = asking.index(*memories)
    index.keep_only({memories[1].id, "unknown"})
    assert asking.contents("tea", index) == ["tea 1"]


def test_neighbours_are_in_the_order_of_turns_whenever_they_came(asking: Asking, make: MakeMemory) -> None:
    turns = [make(f"turn {n}", session_id="s", turn_index=n) for n in range(5)]
    index = asking.index(turns[3], turns[0])
    index.update(asking.rows([turns[4], turns[1], turns[2]]))
    index.remove(turns[1].id)

    def chain(column: str, slot: int) -> list[str]:
        names = []
        while slot != -1:
            names.append(index.memory(slot).content)
            slot = int(index.column(column)[slot])
        return names

    slots = {index.memory(slot).content: slot for slot in range(5)}
    assert chain("next", slots["turn 0"]) == ["turn 0", "turn 2", "turn 3", "turn 4"]
    assert chain("previous", slots["turn 4"]) == ["turn 4", "turn 3", "turn 2", "turn 0"]
    assert index.before(make("x", session_id="s", turn_index=9), 2) == [turns[3], turns[4]]
    assert index.before(make("x", session_id="s", turn_index=1), 2) == [turns[0]]


def test_what_is_of_one_turn_has_one_order_whatever_the_ids(asking: Asking, make: MakeMemory) -> None:
    orders = set()
    for _ in range(9):
        said = [make(text, session_id="s", turn_index=0) for text in ("tea", "milk", "rye")]
        index = asking.index(said[0])
        index.update(asking.rows(said[1:]))
        for one in (index, asking.index(*said[::-1])):
            links = {
                one.memory(slot).content: one.memory(int(after)).content
                for slot, after in enumerate(one.column("next"))
                if after != NONE
            }
            orders.add(tuple(sorted(links.items())))
    assert len(orders) == 1


def test_an_index_wears_out(asking: Asking, make: MakeMemory) -> None:
    memories = [make(f"tea {n}") for n in range(MOST_DEAD + 1)]
    row = asking.rows([make("tea")])[0]
    index = Index(asking.agent, [Row(memory, row.features) for memory in memories])
    worn = [index.is_worn]
    for memory in memories:
        index.remove(memory.id)
    assert [*worn, index.is_worn] == [False, True]


def test_without_vectors_words_are_compared(asking: Asking, make: MakeMemory) -> None:
    bare = [
        Row(row.memory, replace(row.features, vector=b"")) for row in asking.rows([make("green tea"), make("milk")])
    ]
    index = Index(asking.agent, bare)
    assert asking.contents("tea", index)[0] == "green tea"
    sizes = [index.vectors and len(index.vectors)]
    index.update(asking.rows([make("black tea")]))
    assert [*sizes, index.vectors and len(index.vectors)] == [None, 3]


def test_a_row_without_words_is_held(asking: Asking, make: MakeMemory) -> None:
    index = Index(asking.agent, [Row(make("..."), Features("", "", b"", b"")), *asking.rows([make("tea")])])
    assert asking.contents("tea", index) == ["tea", "..."]
