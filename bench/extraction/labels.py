"""The labelled turns: reading them, and comparing an extraction with what was expected."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from extproc.worker.extract import EPISODE, Extracted, Extractor, Turn

TURNS = Path(__file__).parents[2] / "tests" / "extraction" / "turns.jsonl"
SAID_AT = datetime(2026, 11, 18, 10, 0, tzinfo=UTC)
"""A Wednesday; every date of the labels counts from it."""


@dataclass(frozen=True)
class ExpectedFact:
    slot: str
    """Kind of slot, without its object."""
    value: str
    """Words that the value must hold."""
    subject: str = "user"
    polarity: int = 1
    correction: bool = False
    """Whether it must be recognised as a correction; False: either way."""
    date: str = ""
    """ISO date that the fact must carry; empty: any or none."""

    def is_met_by(self, fact: Extracted) -> bool:
        said = f"{fact.slot.partition(':')[2]} {fact.value}"
        return (
            fact.slot.partition(":")[0] == self.slot
            and fact.polarity == self.polarity
            and words(self.subject) <= words(fact.subject)
            and (self.subject != "user" or fact.subject == "user")
            and words(self.value) <= words(said)
            and len(words(fact.value)) <= 2 * len(words(self.value)) + 8
        )

    def is_dated_by(self, fact: Extracted) -> bool:
        day = fact.valid_from.date().isoformat() if fact.valid_from else str(fact.metadata.get("date", ""))
        return not self.date or day == self.date or self.date.startswith(day or "-")


@dataclass(frozen=True)
class Label:
    id: str
    kind: str
    user: str
    facts: tuple[ExpectedFact, ...]
    episode: bool | None
    """None: either way."""
    assistant: str
    then: str
    """The user's next turn; empty: there is none yet."""
    answer_kept: str | None
    """Words of the assistant that must be kept; None: nothing of it may be."""

    @classmethod
    def parse(cls, row: dict[str, Any]) -> Self:
        return cls(
            row["id"], row["kind"], row["user"],
            tuple(ExpectedFact(**fact) for fact in row["facts"]), row.get("episode"),
            row.get("assistant", ""), row.get("then", ""), row.get("answer_kept"),
        )  # fmt: skip

    @property
    def is_held_out(self) -> bool:
        """Half of the turns, by hash of the text: rules were corrected by looking at the others only."""
        return hashlib.sha256(self.user.encode()).digest()[0] % 2 == 1

    def turns(self) -> list[Turn]:
        first = Turn("s", 0, self.user, self.assistant, SAID_AT)
        return [first, Turn("s", 1, self.then, "", SAID_AT)] if self.then else [first]


@dataclass
class Score:
    """Counts of facts, unless it says otherwise."""

    turns: int = 0
    expected: int = 0
    found: int = 0
    right: int = 0
    dated: int = 0
    """Of those with an expected date: found with that date."""
    to_date: int = 0
    corrections: int = 0
    to_correct: int = 0
    episodes_right: int = 0
    """Turns whose episode is there, or is rightly not there."""
    episodes: int = 0

    @property
    def precision(self) -> float:
        return self.right / self.found if self.found else 1.0

    @property
    def recall(self) -> float:
        return self.right / self.expected if self.expected else 1.0

    def add(self, other: Score) -> None:
        for name in vars(self):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True)
class Miss:
    id: str
    text: str
    missing: tuple[ExpectedFact, ...]
    extra: tuple[Extracted, ...]
    note: str = ""


def words(text: str) -> set[str]:
    return set(re.findall(r"\w+", text.casefold()))


def read_labels(path: Path = TURNS) -> list[Label]:
    return [Label.parse(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(label: Label, extractor: Extractor) -> tuple[Score, Miss | None]:
    memories = [memory for memory in extractor.extract(label.turns()).memories if memory.turn_index == 0]
    facts = [memory for memory in memories if memory.slot != EPISODE]
    score = Score(turns=1, expected=len(label.facts), found=len(facts))
    missing: list[ExpectedFact] = []
    notes = []
    left = list(facts)
    for expected in label.facts:
        fact = next((fact for fact in left if expected.is_met_by(fact)), None)
        if fact is None:
            missing.append(expected)
            continue
        left.remove(fact)
        score.right += 1
        if expected.date:
            score.to_date += 1
            score.dated += expected.is_dated_by(fact)
            if not expected.is_dated_by(fact):
                notes.append(f"date {fact.valid_from} {fact.metadata.get('date')}")
        if expected.correction:
            score.to_correct += 1
            score.corrections += fact.is_correction
    # A turn that is its own statement (`Bob likes mushrooms.`) is kept once, as the fact.
    said = [
        memory for memory in memories if memory.subject != "assistant" and memory.quote in {memory.content, label.user}
    ]
    said += [memory for memory in memories if memory.slot == EPISODE and memory.subject == "user"]
    answered = [memory for memory in memories if memory.subject == "assistant"]
    if label.episode is not None:
        score.episodes += 1
        score.episodes_right += bool(said) == label.episode
        if bool(said) != label.episode:
            notes.append(f"episode {bool(said)}")
    if label.kind == "confirmed":
        score.episodes += 1
        right = any(label.answer_kept in memory.content for memory in answered) if label.answer_kept else not answered
        score.episodes_right += right
        if not right:
            notes.append(f"answer {[memory.content for memory in answered]}")
    miss = (
        Miss(label.id, label.user, tuple(missing), tuple(left), "; ".join(notes)) if missing or left or notes else None
    )
    return score, miss


def judge_all(labels: Iterable[Label], extractor: Extractor) -> tuple[dict[str, Score], list[Miss]]:
    """Scores by kind, and what went wrong."""
    scores: dict[str, Score] = {}
    misses = []
    for label in labels:
        score, miss = judge(label, extractor)
        scores.setdefault(label.kind, Score()).add(score)
        if miss is not None:
            misses.append(miss)
    return scores, misses


def total(scores: dict[str, Score]) -> Score:
    whole = Score()
    for score in scores.values():
        whole.add(score)
    return whole
