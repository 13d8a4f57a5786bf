"""LoCoMo's conversations as memories, one a turn, and its questions with the turns that hold the evidence."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from extproc.memory.features import Indexer, Row
from extproc.memory.model import Memory, Namespace, new_memory

__all__ = ["CATEGORIES", "Conversation", "Question", "load", "rows"]

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}

_EVIDENCE = re.compile(r"D\s*:?\s*(\d+)\s*:\s*(\d+)")
"""Ids are not always well written: `D8:6; D9:17`, `D:11:26`, `D30:05`."""
_TIME = "%I:%M %p on %d %B, %Y"
_IDS = uuid.UUID("3d1c6a52-7f0e-4a43-9d0c-5b8a0e6f2c11")


@dataclass(frozen=True, slots=True)
class Question:
    text: str
    category: int
    evidence: frozenset[str]
    """Ids of memories."""


@dataclass(frozen=True, slots=True)
class Conversation:
    name: str
    memories: list[Memory]
    """In order."""
    questions: list[Question]
    """Those that have evidence."""


def load(path: Path, namespace: Namespace) -> list[Conversation]:
    """Raises OSError, and ValueError when the file is not LoCoMo."""
    try:
        return [_conversation(one, namespace) for one in json.loads(path.read_text(encoding="utf-8"))]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not LoCoMo's locomo10.json or a part of it") from error


def rows(conversations: list[Conversation], indexer: Indexer) -> list[Row]:
    found: list[Row] = []
    for conversation in conversations:
        memories = conversation.memories
        before = [
            [one for one in memories[max(0, place - 2) : place] if one.session_id == memory.session_id]
            for place, memory in enumerate(memories)
        ]
        found += map(Row, memories, indexer.features(memories, before))
    return found


def _conversation(record: dict[str, Any], namespace: Namespace) -> Conversation:
    name = str(record["sample_id"])
    talk = record["conversation"]
    memories = []
    numbers = sorted(int(key.removeprefix("session_")) for key in talk if re.fullmatch(r"session_\d+", key))
    for number in numbers:
        began = datetime.strptime(talk[f"session_{number}_date_time"], _TIME).replace(tzinfo=UTC)
        for turn, said in enumerate(talk[f"session_{number}"]):
            photo = said.get("blip_caption")
            memories.append(
                new_memory(
                    namespace,
                    f"{said['text']} [photo: {photo}]" if photo else said["text"],
                    id=_id(name, str(said["dia_id"])),
                    now=began,
                    created_at=began + timedelta(seconds=turn),
                    session_id=f"{name}/{number}",
                    turn_index=turn,
                    metadata={"speaker": said["speaker"]},
                )
            )
    known = {memory.id for memory in memories}
    questions = []
    for asked in record["qa"]:
        turns = _EVIDENCE.findall(" ".join(asked.get("evidence", [])))
        evidence = frozenset(_id(name, f"D{int(session)}:{int(turn)}") for session, turn in turns) & known
        if evidence:
            questions.append(Question(asked["question"], int(asked["category"]), evidence))
    return Conversation(name, memories, questions)


def _id(conversation: str, turn: str) -> str:
    return str(uuid.uuid5(_IDS, f"{conversation} {turn}"))
