"""The corpus as typed records, read from the JSONL files beside this module. README.md describes the fields."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "Conversation",
    "GenericPrompt",
    "Kind",
    "Pair",
    "Question",
    "Said",
    "Session",
    "Turn",
    "conversations",
    "generic_prompts",
    "pairs",
    "questions",
]

FOLDER = Path(__file__).parent
TURN_SPACING = timedelta(minutes=1)
"""Turns carry no time of their own; a minute apart they keep their order, and no session overlaps the next."""

Record = TypeVar("Record")


class Kind(StrEnum):
    """What a question asks of the memory; README.md says how each was written."""

    SINGLE = "single"
    MULTI = "multi"
    TEMPORAL = "temporal"
    LATEST = "latest"
    PAST = "past"
    PREFERENCE = "preference"
    PARAPHRASE = "paraphrase"
    CROSS_LANGUAGE = "cross_language"
    ADVERSARIAL = "adversarial"


@dataclass(frozen=True, slots=True)
class Turn:
    index: int
    """From 0 within its session, without gaps."""
    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, slots=True)
class Session:
    id: str
    """Unique within its conversation: s1, s2, …"""
    started_at: datetime
    turns: tuple[Turn, ...]


class Said(NamedTuple):
    """A turn with what names and dates it: one memory for a retrieval run."""

    reference: str
    """`session/index`, as `Question.evidence` writes it."""
    session: Session
    turn: Turn
    at: datetime


@dataclass(frozen=True, slots=True)
class Conversation:
    """Everything one user and the assistant said to each other, over several sessions in order of time."""

    id: str
    language: str
    """ISO 639; `mul` where the user mixes two."""
    user: str
    sessions: tuple[Session, ...]

    def said(self) -> Iterator[Said]:
        """Every turn, oldest first."""
        for session in self.sessions:
            for turn in session.turns:
                yield Said(f"{session.id}/{turn.index}", session, turn, session.started_at + TURN_SPACING * turn.index)


@dataclass(frozen=True, slots=True)
class Question:
    id: str
    conversation: str
    asked_at: datetime
    """After the conversation's last session."""
    kind: Kind
    language: str
    text: str
    evidence: tuple[str, ...]
    """`Said.reference` of each turn that is needed; empty for `ADVERSARIAL` alone."""


@dataclass(frozen=True, slots=True)
class GenericPrompt:
    """A prompt that no memory helps with."""

    id: str
    language: str
    text: str


@dataclass(frozen=True, slots=True)
class Pair:
    """An everyday question, a memory that helps to answer it, and one that only looks near."""

    id: str
    language: str
    question: str
    memory: str
    unlike: str


@cache
def conversations() -> tuple[Conversation, ...]:
    return _records("conversations.jsonl", Conversation)


@cache
def questions() -> tuple[Question, ...]:
    return _records("questions.jsonl", Question)


@cache
def generic_prompts() -> tuple[GenericPrompt, ...]:
    return _records("generic.jsonl", GenericPrompt)


@cache
def pairs() -> tuple[Pair, ...]:
    return _records("pairs.jsonl", Pair)


def _records(name: str, kind: type[Record]) -> tuple[Record, ...]:
    """Raises `msgspec.ValidationError`, which names the field, when a line is not such a record."""
    with (FOLDER / name).open("rb") as lines:
        return tuple(msgspec.json.decode(line, type=kind) for line in lines)
