from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from random import randrange

import numpy as np
import pytest
from numpy.typing import NDArray

from extproc.memory.embedding import EmbedderUnavailable, StaticTable
from extproc.memory.features import WindowIndexer, indexed_text, open_indexer, speaker, subject, window
from extproc.memory.model import Memory, Namespace, new_memory

NOON = datetime(2025, 6, 1, 12, tzinfo=UTC)
AGENT = Namespace(str(uuid.UUID(int=1)), str(uuid.UUID(int=2)))


def made(content: str, **metadata: object) -> Memory:
    return new_memory(AGENT, content, id=str(uuid.uuid4()), now=NOON, metadata=metadata)


@pytest.fixture(scope="module")
def indexer() -> WindowIndexer:
    return open_indexer()


def vector(data: bytes) -> NDArray[np.float32]:
    return np.frombuffer(data, "<f2").astype(np.float32)


def test_stems_are_of_speaker_text_and_date(indexer: WindowIndexer) -> None:
    (features,) = indexer.features([made("likes running", speaker="Ada")], [()])
    assert features.stems == "ada like run @06 @06-01"
    assert features.version == indexer.version


def test_words_are_known_ones_without_stop_words_each_once(indexer: WindowIndexer) -> None:
    (features,) = indexer.features([made("the dog and the cat and the dog, zyxqvw")], [()])
    table = indexer.table
    assert isinstance(table, StaticTable)
    ids = np.frombuffer(features.words, "<i4").tolist()
    assert [table.word(id_) for id_ in ids] == ["dog", "cat"]


def test_a_vector_is_of_the_memory_and_its_last_two_predecessors(indexer: WindowIndexer) -> None:
    before = [made("unrelated tax return"), made("the harbour"), made("a festival")]
    alone, window = indexer.features([made("yes, on Friday")] * 2, [(), before])
    asked = indexer.question("harbour festival").vector
    assert asked is not None
    assert vector(window.vector) @ asked > vector(alone.vector) @ asked + 0.2
    assert indexer.features([made("yes, on Friday")], [before[1:]])[0] == window
    assert abs(float(np.linalg.norm(vector(window.vector))) - 1) < 0.01


def test_predecessors_are_the_fullest_of_the_turns_before_whatever_the_ids() -> None:
    def said(content: str, turn: int) -> Memory:
        apart = NOON + timedelta(microseconds=randrange(5))  # as a worker writes them
        return new_memory(AGENT, content, id=str(uuid.uuid4()), now=apart, session_id="s", turn_index=turn)

    for _ in range(9):
        turns = [
            [said("I moved to Lisbon and eat no peanuts", 0), said("Lives in Lisbon", 0), said("Eats no peanuts", 0)],
            [said("My dog is called Rex", 1), said("Dog: Rex", 1)],
            [said("a", 2), said("b", 2)],
            [said("later", 3)],
        ]
        line = sorted((one for turn in turns for one in turn), key=lambda memory: memory.id)
        for one in turns[2]:
            assert [found.content for found in window(one, line)] == [
                "I moved to Lisbon and eat no peanuts", "My dog is called Rex"
            ]  # fmt: skip
        assert all(window(one, line) == [] for one in turns[0])
        assert [found.content for found in window(turns[3][0], line)] == ["My dog is called Rex", "b"]


def test_what_has_no_known_word_has_no_vector(indexer: WindowIndexer) -> None:
    (features,) = indexer.features([made("...")], [()])
    assert (features.words, features.vector) == (b"", b"")
    assert indexer.features([], []) == []


def test_a_question_knows_the_word_of_each_stem(indexer: WindowIndexer) -> None:
    question = indexer.question("Which dogs does Zyxqvw like?")
    assert question.query.stems == ("dog", "zyxqvw", "like")
    assert (question.ids >= 0).tolist() == [True, False, True]
    assert indexer.question("what is it?").vector is None


def test_without_an_answer_of_the_embedder_words_are_left(indexer: WindowIndexer) -> None:
    class Away:
        name = "away"
        dimension = 8

        def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
            raise EmbedderUnavailable("away")

    away = WindowIndexer(indexer.table, Away())
    question = away.question("which dogs")
    assert question.vector is None
    assert question.query.stems == ("dog",)
    assert not away.is_quick
    assert away.version != indexer.version


@pytest.mark.parametrize(
    ("metadata", "who", "whom"),
    [
        ({}, "", ""),
        ({"role": "user"}, "user", "user"),
        ({"role": "user", "speaker": " Ada "}, "Ada", "Ada"),
        ({"subject": "Bea", "speaker": "Ada"}, "Ada", "Bea"),
        ({"speaker": 7}, "", ""),
    ],
)
def test_who_said_it_and_whom_it_is_about(metadata: dict[str, object], who: str, whom: str) -> None:
    memory = made("x", **metadata)
    assert (speaker(memory), subject(memory)) == (who, whom)
    assert indexed_text(memory) == (f"{who}: x" if who else "x")
