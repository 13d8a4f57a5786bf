from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

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


def test_a_long_session_has_the_same_order_however_it_came(asking: Asking, make: MakeMemory) -> None:
    features = asking.rows([make("tea")])[0].features
    turns = [Row(make(f"turn {n}", session_id="s", turn_index=n), features) for n in range(400)]
    index = Index(asking.agent, turns[:300])
    index.update([turns[0], turns[5], *turns[350:300:-1], turns[120]])
    index.remove(turns[1].memory.id)
    index.update([*turns[350:], turns[300], turns[2]])
    alive = {index.memory(slot).content: slot for slot in range(index.slots)}
    slot, names = alive["turn 0"], []
    while slot != NONE:
        names.append(index.memory(slot).content)
        after = int(index.column("next")[slot])
        assert after == NONE or index.column("previous")[after] == slot
        slot = after
    assert names == [f"turn {n}" for n in range(400) if n != 1]
    assert index.session_sizes(index.column("session")[:1])[0] == 399
    assert index.before(make("x", session_id="s", turn_index=999), 1) == [turns[399].memory]


@pytest.mark.parametrize(
    "metadata",
    [
        {"slot": ["name"]},
        {"slot": {"name": 1}},
        {"tags": [["x"], 5, None]},
        {"subject": 5, "speaker": [], "role": {}},
        {"n": 10**30},
        {"half": "\ud800"},
    ],
)
def test_metadata_of_any_kind_is_held(asking: Asking, make: MakeMemory, metadata: dict[str, object]) -> None:
    odd = replace(make("tea"), metadata=metadata)
    index = asking.index(odd)
    index.update(asking.rows([replace(odd, usefulness=0.9)]))
    assert [one.memory.metadata for one in asking.rank("tea", index).scored] == [metadata]


def test_a_count_beyond_its_column_is_the_most(asking: Asking, make: MakeMemory) -> None:
    index = asking.index(replace(make("tea"), retrieval_count=2**40))
    assert index.memory(0).retrieval_count == 2**31 - 1


def test_a_removed_memory_leaves_its_tags(asking: Asking, make: MakeMemory) -> None:
    one, two = make("tea", metadata={"tags": ["x", "x"]}), make("milk", metadata={"tags": ["x", "y"]})
    index = asking.index(one, two)
    index.remove(one.id)
    index.update(asking.rows([replace(two, metadata={"tags": ["y"]})]))
    assert [int(index.accepted((), [tag]).sum()) for tag in ("x", "y")] == [0, 1]


def test_what_was_removed_does_not_count(asking: Asking, make: MakeMemory) -> None:
    memories = [make(f"tea {n}") for n in range(9)]
    index = asking.index(*memories, make("milk"))
    counts = []
    for memory in memories:
        index.remove(memory.id)
        counts.append(index.count("tea"))
    assert counts == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert index.count("milk") == 1


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
