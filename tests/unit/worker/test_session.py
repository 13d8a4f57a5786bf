"""A session's turns become memories: on a real SQLite database, without a queue."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import func, select

from extproc.memory.database import Database
from extproc.memory.embedding import StaticTable
from extproc.memory.features import WindowIndexer
from extproc.memory.forgetting import Forgotten, forget_owner
from extproc.memory.model import Memory, Namespace, Status
from extproc.memory.schema import sessions, turns
from extproc.memory.sqlite import SqliteMemoryStore
from extproc.turns.checkpoint import DatabaseCheckpoints
from extproc.turns.turn import End, Entry, Turn, TurnText, checkpoint_id, session_id
from extproc.worker.extract import Extraction, Extractor, ExtractorUnavailable
from extproc.worker.extract import Turn as SaidTurn
from extproc.worker.rules import RuleExtractor
from extproc.worker.session import SessionExtraction

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
ORG, AGENT = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d", "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"
TOWNS = [f"The user lives in {town}." for town in ("Lisbon", "Porto", "Faro")]
TABLE = StaticTable.load()


class Watched:
    """By rules; does something else before it answers, and remembers what it was asked."""

    def __init__(self, meanwhile: Callable[[], object] = lambda: None) -> None:
        self.asked: list[list[int]] = []
        self._meanwhile = meanwhile

    def extract(self, turns: Sequence[SaidTurn]) -> Extraction:
        self.asked.append([turn.index for turn in turns])
        self._meanwhile()
        return RuleExtractor().extract(turns)


class Talk:
    """A database with one session in it."""

    def __init__(self, directory: Path) -> None:
        url = f"sqlite:///{directory / 'memories.db'}"
        self.database = Database(url)
        self.store = SqliteMemoryStore.open(url, WindowIndexer(TABLE, TABLE))
        self.session_id = session_id(ORG, AGENT, "ana", "talk")
        self._said = 0

    def tell(self, *texts: str, external_id: str = "talk", skips: bool = False, took_ms: float = 0) -> None:
        entries = [self._entry(text, external_id, skips, took_ms) for text in texts]
        DatabaseCheckpoints(self.database, 86_400).write(entries)

    def _entry(self, text: str, external_id: str, skips: bool, took_ms: float) -> Entry:
        self._said += 1
        request_id, at = f"request-{self._said}", NOON + timedelta(minutes=self._said)
        turn = Turn(
            request_id=request_id, org_id=ORG, agent_id=AGENT, user_id="ana", external_id=external_id,
            session_id=session_id(ORG, AGENT, "ana", external_id), checkpoint_id=checkpoint_id(ORG, request_id),
            end=End.COMPLETE, status_code=200, is_complete=True, messages_hash="0" * 64,
            requested_at=at, completed_at=at, total_ms=took_ms, skip_extraction=skips,
        )  # fmt: skip
        return Entry(self._said, turn, TurnText(text, "I see."))

    def extraction(self, extractor: Extractor | None = None, turns_at_once: int = 16) -> SessionExtraction:
        return SessionExtraction(self.database, self.store, TABLE, extractor or RuleExtractor(), turns_at_once)

    def memories(self) -> list[Memory]:
        own = Namespace(ORG, AGENT, "ana")
        return sorted(self.store.page(own), key=lambda memory: (memory.turn_index or 0, memory.content))

    def extracted(self) -> int:
        query = select(sessions.c.extracted_turns).where(sessions.c.id == self.session_id)
        return self.database.run(lambda connection: int(connection.execute(query).scalar_one()), writes=False)

    def texts(self) -> int:
        query = select(func.count()).select_from(turns)
        return self.database.run(lambda connection: int(connection.execute(query).scalar_one()), writes=False)


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    made = Talk(tmp_path)
    yield made
    made.store.close()
    made.database.close()


def test_a_turns_memories_are_there_when_its_text_is_gone(talk: Talk) -> None:
    talk.tell("I am allergic to peanuts.")
    done = talk.extraction().run(ORG, talk.session_id)
    assert (done.turns, len(done.memories), done.is_finished) == (1, 2, True)
    assert [memory.content for memory in talk.memories()] == [
        "I am allergic to peanuts.",
        "The user is allergic to peanuts.",
    ]
    assert (talk.extracted(), talk.texts()) == (1, 0)


def test_a_turns_memories_are_the_same_and_in_one_order_whenever_it_is_extracted(
    talk: Talk, tmp_path_factory: pytest.TempPathFactory
) -> None:
    said = "I moved to Lisbon in March and I'm allergic to peanuts"
    again = Talk(tmp_path_factory.mktemp("again"))
    shown = []
    for one in (talk, again):
        one.tell(said)
        one.extraction().run(ORG, one.session_id)
        memories = sorted(one.memories(), key=lambda memory: memory.created_at)
        shown.append([(memory.id, memory.content, memory.created_at) for memory in memories])
    again.store.close()
    again.database.close()
    assert shown[0] == shown[1]
    assert [content for _, content, _ in shown[0]] == [
        "I moved to Lisbon in March (2026-03) and I'm allergic to peanuts",
        "The user lives in Lisbon (moved in March (2026-03)).",
        "The user is allergic to peanuts.",
    ]


def test_a_second_time_nothing_is_due(talk: Talk) -> None:
    talk.tell("I am allergic to peanuts.")
    talk.extraction().run(ORG, talk.session_id)
    before = talk.memories()
    assert talk.extraction().run(ORG, talk.session_id).turns == 0
    assert talk.memories() == before


def test_turns_are_read_in_order_and_in_batches(talk: Talk) -> None:
    talk.tell(*[f"My number {number} is in Town{number}." for number in range(5)])
    extractor = Watched()
    done = talk.extraction(extractor, turns_at_once=2).run(ORG, talk.session_id)
    assert extractor.asked == [[0, 1], [2, 3], [4]]
    assert done.turns == 5


def test_turns_without_text_are_passed_over(talk: Talk) -> None:
    talk.tell("My PIN is nobody's business.", skips=True)
    talk.tell("I live in Porto.")
    talk.tell("Nor is this.", skips=True)
    assert talk.extraction().run(ORG, talk.session_id).turns == 3
    assert {memory.turn_index for memory in talk.memories()} == {1}
    assert talk.extracted() == 3


def test_another_worker_that_was_quicker_leaves_nothing_to_write(talk: Talk) -> None:
    talk.tell("I live in Porto.")
    slower = Watched(lambda: talk.extraction().run(ORG, talk.session_id))
    assert talk.extraction(slower).run(ORG, talk.session_id).turns == 0
    assert len(talk.memories()) == 2


def test_a_turn_that_comes_meanwhile_waits_for_the_next_batch(talk: Talk) -> None:
    talk.tell("I live in Porto.")
    said: list[str] = []

    def say_once() -> None:
        if not said:
            said.append("I am allergic to peanuts.")
            talk.tell(*said)

    assert talk.extraction(Watched(say_once)).run(ORG, talk.session_id).turns == 2
    assert (talk.extracted(), talk.texts()) == (2, 0)


def test_what_fails_changes_nothing(talk: Talk) -> None:
    talk.tell("I live in Porto.")

    def fail() -> None:
        raise ExtractorUnavailable("away")

    with pytest.raises(ExtractorUnavailable):
        talk.extraction(Watched(fail)).run(ORG, talk.session_id)
    assert (talk.extracted(), talk.texts(), talk.memories()) == (0, 1, [])


def test_a_correction_in_another_session_supersedes(talk: Talk) -> None:
    talk.tell("I live in Lisbon.")
    talk.extraction().run(ORG, talk.session_id)
    talk.tell("I live in Porto now.", external_id="other")
    done = talk.extraction().run(ORG, session_id(ORG, AGENT, "ana", "other"))
    assert (done.superseded, done.merged) == (1, 0)
    status = {memory.content: memory.status for memory in talk.memories()}
    assert status["The user lives in Lisbon."] is Status.SUPERSEDED
    assert status["The user lives in Porto."] is Status.ACTIVE


def test_the_history_of_a_memory_shows_what_it_took_the_place_of(talk: Talk) -> None:
    for number, town in enumerate(("Lisbon", "Porto", "Faro")):
        talk.tell(f"I live in {town} now.", external_id=f"talk-{number}")
        talk.extraction().run(ORG, session_id(ORG, AGENT, "ana", f"talk-{number}"))
    facts = [memory for memory in talk.memories() if memory.content.startswith("The user")]
    for fact in facts:
        history = talk.store.history(Namespace(ORG, AGENT, "ana"), fact.id)
        assert [memory.content for memory in history] == TOWNS
    assert talk.store.history(Namespace(ORG, AGENT, "ben"), facts[0].id) == []


def test_what_is_said_again_is_no_second_memory(talk: Talk) -> None:
    talk.tell("I am allergic to peanuts.", "I am allergic to peanuts.")
    talk.extraction(turns_at_once=1).run(ORG, talk.session_id)
    assert len(talk.memories()) == 2
    assert all(memory.confidence > 0.7 for memory in talk.memories())


def test_a_task_ends_early_and_says_so(talk: Talk) -> None:
    talk.tell("I live in Porto.", "I am allergic to peanuts.")
    left = iter([True, False])
    done = talk.extraction(turns_at_once=1).run(ORG, talk.session_id, lambda: next(left))
    assert (done.turns, done.is_finished, talk.extracted()) == (1, False, 1)


def test_an_unknown_session_is_nothing_to_do(talk: Talk) -> None:
    talk.tell("I live in Porto.")
    assert talk.extraction().run(AGENT, talk.session_id).turns == 0


def test_what_is_forgotten_stays_forgotten_when_its_task_comes_again(talk: Talk) -> None:
    talk.tell("I am allergic to peanuts.")
    talk.extraction().run(ORG, talk.session_id)
    for memory in talk.memories():
        assert talk.store.forget(Namespace(ORG, AGENT, "ana"), memory.id)
    talk.extraction().run(ORG, talk.session_id)
    assert talk.memories() == []


class TestAfterAUserWasForgotten:
    ANA = Namespace(ORG, AGENT, "ana")
    LATER = NOON + timedelta(days=1)

    def test_what_was_not_extracted_yet_is_removed_and_counted(self, talk: Talk) -> None:
        talk.tell("I am allergic to peanuts.")
        talk.extraction().run(ORG, talk.session_id)
        talk.tell("I live in Porto.", "I live in Faro.")
        assert forget_owner(talk.store, self.ANA, self.LATER) == Forgotten(memories=2, turn_texts=2)
        assert talk.texts() == 0
        talk.extraction().run(ORG, talk.session_id)
        assert (talk.memories(), talk.extracted()) == ([], 3)

    def test_what_a_worker_holds_at_that_moment_is_not_written(self, talk: Talk) -> None:
        talk.tell("I live in Porto.")
        extractor = Watched(lambda: forget_owner(talk.store, self.ANA, self.LATER))
        talk.extraction(extractor).run(ORG, talk.session_id)
        assert (talk.memories(), talk.texts(), talk.extracted()) == ([], 0, 1)

    def test_what_an_outbox_delivers_afterwards_is_passed_over_and_removed(self, talk: Talk) -> None:
        forget_owner(talk.store, self.ANA, NOON + timedelta(minutes=2))
        talk.tell("I live in Porto.", "I live in Faro.", "I live in Lisbon.")  # a minute apart
        talk.extraction().run(ORG, talk.session_id)
        assert {memory.turn_index for memory in talk.memories()} == {2}
        assert (talk.texts(), talk.extracted()) == (0, 3)

    def test_an_answer_that_was_still_coming_belongs_to_what_was_said_before(self, talk: Talk) -> None:
        forget_owner(talk.store, self.ANA, NOON)
        talk.tell("I live in Porto.", took_ms=120_000)
        talk.extraction().run(ORG, talk.session_id)
        assert talk.memories() == []

    def test_an_earlier_mark_never_takes_the_place_of_a_later_one(self, talk: Talk) -> None:
        for at in (self.LATER, NOON):
            forget_owner(talk.store, self.ANA, at)
        talk.tell("I live in Porto.")
        talk.extraction().run(ORG, talk.session_id)
        assert talk.memories() == []

    def test_nobody_else_is_forgotten(self, talk: Talk) -> None:
        talk.tell("I live in Porto.")
        for other in (Namespace(ORG, AGENT), Namespace(ORG, AGENT, "ben"), Namespace(ORG, ORG, "ana")):
            assert forget_owner(talk.store, other, self.LATER) == Forgotten(0, 0)
        talk.extraction().run(ORG, talk.session_id)
        assert len(talk.memories()) == 2
