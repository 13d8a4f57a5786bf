"""The corpus of tests/corpus as memories, one a turn, and its questions with the turns that answer them."""

from __future__ import annotations

import uuid

from bench.recall.measure import Conversation, Question
from extproc.memory.model import Namespace, new_memory
from tests.corpus import reader

__all__ = ["NAMESPACE", "conversations", "generic_prompts"]

NAMESPACE = Namespace("c0790500-0000-4000-8000-000000000000", "c0790500-0000-4000-8000-000000000001")
_IDS = uuid.UUID("5d0a7c5e-3f4e-4f6a-9b58-6a1f2c8d9e70")


def conversations() -> list[Conversation]:
    asked: dict[str, list[Question]] = {}
    for question in reader.questions():
        evidence = frozenset(_id(question.conversation, reference) for reference in question.evidence)
        asked.setdefault(question.conversation, []).append(
            Question(question.text, question.kind.value, evidence, question.language)
        )
    return [_conversation(one, asked.get(one.id, [])) for one in reader.conversations()]


def generic_prompts() -> list[str]:
    return [prompt.text for prompt in reader.generic_prompts()]


def _conversation(one: reader.Conversation, questions: list[Question]) -> Conversation:
    memories = [
        new_memory(
            NAMESPACE,
            said.turn.text,
            id=_id(one.id, said.reference),
            now=said.at,
            created_at=said.at,
            session_id=f"{one.id}/{said.session.id}",
            turn_index=said.turn.index,
            metadata={"role": said.turn.role},
        )
        for said in one.said()
    ]
    return Conversation(one.id, memories, questions)


def _id(conversation: str, reference: str) -> str:
    return str(uuid.uuid5(_IDS, f"{conversation} {reference}"))
