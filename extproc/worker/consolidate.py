"""What becomes of something that was extracted, beside what is known already. Pure: it decides, the task writes.

Nothing is deleted and nothing is overwritten: a memory that no longer holds is superseded, with the time from which it
does not. Likeness alone never supersedes, as sentences that differ in one number are the common case; only a slot with
one value does, or the same thing said with the opposite polarity. A wrong supersession hides something true.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final, TypeAlias

from extproc.memory.model import Memory, Namespace, content_hash
from extproc.memory.text import stems
from extproc.worker.extract import EPISODE, USER, Extracted, normalised
from extproc.worker.slots import WIDE_PLACES, is_single_valued, kind_of

__all__ = [
    "Add",
    "Candidate",
    "Decision",
    "Known",
    "Merge",
    "Noop",
    "Supersede",
    "consolidate",
    "fact_metadata",
    "memory_id",
]

_IDS = uuid.UUID("0d4c2a52-6a0b-5a57-9a55-3f6e0f1c7b21")
"""Of every derived memory id. Changing it would write each memory a second time."""
_NEAR_COSINE = 0.92
_NEAR_JACCARD = 0.6
"""Of stems; both must hold for a near duplicate (measured, with the static word table)."""
_NEAR_JACCARD_ALONE = 0.85
"""Where a vector is missing."""
_RAISE = 0.25
"""Share of the way to certainty that saying something again goes."""
_MOST_CONFIDENCE = 0.98

Vector: TypeAlias = Sequence[float]
"""Of length 1; the same model for all."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something extracted, as it would be written."""

    id: str
    """See `memory_id`."""
    extracted: Extracted
    vector: Vector | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """An active memory of the same partition that may have to do with what is new."""

    id: str
    content: str
    said_at: datetime
    """When it was last said; for what was entered, when it was written."""
    confidence: float
    subject: str = USER
    slot: str = EPISODE
    value: str = ""
    polarity: int = 1
    valid_from: datetime | None = None
    vector: Vector | None = None
    content_hash: str = ""

    @classmethod
    def of(cls, memory: Memory, vector: Vector | None = None) -> Known:
        fact = memory.metadata
        polarity = fact.get("polarity", 1)
        return cls(
            memory.id, memory.content, _said_at(memory), memory.confidence, str(fact.get("subject", USER)),
            str(fact.get("slot", EPISODE)), str(fact.get("value", "")), polarity if isinstance(polarity, int) else 1,
            memory.valid_from, vector, memory.content_hash,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Noop:
    """This very memory was written before, or follows in a later form: nothing is to be done."""

    id: str


@dataclass(frozen=True, slots=True)
class Merge:
    """Said before, in these or nearly these words: the older memory is seen again, and nothing is added."""

    into: str
    confidence: float
    seen_at: datetime


@dataclass(frozen=True, slots=True)
class Add:
    candidate: Candidate
    superseded_by: str | None = None
    """Known already to be past: something that was said later, but read earlier, holds in its place."""
    valid_until: datetime | None = None


@dataclass(frozen=True, slots=True)
class Supersede:
    """Add, and of the older ones: `valid_until`, `superseded_by` the new id, status `superseded`."""

    candidate: Candidate
    replaces: tuple[str, ...]
    valid_until: datetime


Decision: TypeAlias = Noop | Merge | Add | Supersede


def memory_id(namespace: Namespace, session_id: str, extracted: Extracted) -> str:
    """The same turn and the same slot, or else text, give the same id: written twice, it is recognised.

    A slot with one value counts by its name, since a model words the same fact differently each time it is asked.
    """
    if is_single_valued(extracted.slot) and extracted.polarity > 0:
        what = f"slot\n{_key(extracted.subject)}\n{extracted.slot}"
    else:
        what = f"text\n{content_hash(extracted.content)}"
    whose = (namespace.org_id, namespace.agent_id, namespace.user_id or "", session_id, str(extracted.turn_index))
    return str(uuid.uuid5(_IDS, "\n".join((*whose, what))))


def fact_metadata(extracted: Extracted) -> dict[str, object]:
    """What a row's `metadata` must hold for `Known.of`."""
    fact: dict[str, object] = {"said_at": extracted.at.isoformat()}
    if extracted.slot:
        fact |= {
            "subject": extracted.subject, "slot": extracted.slot, "value": extracted.value,
            "polarity": extracted.polarity,
        }  # fmt: skip
    return {**extracted.metadata, **fact}


def consolidate(
    candidates: Iterable[Candidate], known: Iterable[Known], written: frozenset[str] = frozenset()
) -> list[Decision]:
    """One decision for each candidate, in order; each sees what the ones before it decided.

    Of candidates with one id (a turn that corrects itself) the last counts.

    `known`: active memories of exactly this partition; all with the hash, or the subject and slot, of a candidate, and
    its nearest by vector or words. `written`: ids of candidates that exist, whatever became of them since.
    """
    shelf = _Shelf()
    for memory in known:
        shelf.put(memory)
    every = list(candidates)
    last = {candidate.id: place for place, candidate in enumerate(every)}
    decisions = []
    for place, candidate in enumerate(every):
        is_done = candidate.id in written or last[candidate.id] != place
        decision = Noop(candidate.id) if is_done else _decide(candidate, shelf)
        shelf.apply(decision)
        decisions.append(decision)
    return decisions


@dataclass(slots=True)
class _Shelf:
    """The active memories by what they can be found with."""

    by_id: dict[str, Known] = field(default_factory=dict)
    by_slot: dict[tuple[str, str], list[str]] = field(default_factory=dict)
    by_hash: dict[str, str] = field(default_factory=dict)
    stems_of: dict[str, frozenset[str]] = field(default_factory=dict)

    def put(self, memory: Known) -> None:
        self.by_id[memory.id] = memory
        self.by_slot.setdefault((_key(memory.subject), memory.slot), []).append(memory.id)
        self.by_hash.setdefault(memory.content_hash or content_hash(memory.content), memory.id)

    def apply(self, decision: Decision) -> None:
        match decision:
            case Merge(into, confidence, seen_at):
                self.by_id[into] = replace(self.by_id[into], confidence=confidence, said_at=seen_at)
            case Supersede(candidate, replaces, _):
                for old in replaces:
                    self.take(old)
                self.put(_known(candidate))
            case Add(candidate, None, _):
                self.put(_known(candidate))
            case _:
                pass

    def take(self, memory_id: str) -> None:
        memory = self.by_id.pop(memory_id)
        self.by_hash.pop(memory.content_hash or content_hash(memory.content), None)

    def stems(self, memory: Known) -> frozenset[str]:
        if memory.id not in self.stems_of:
            self.stems_of[memory.id] = frozenset(stems(memory.content))
        return self.stems_of[memory.id]

    def in_slot(self, subject: str, slot: str) -> list[Known]:
        return [self.by_id[one] for one in self.by_slot.get((_key(subject), slot), ()) if one in self.by_id]


def _known(candidate: Candidate) -> Known:
    new = candidate.extracted
    return Known(
        candidate.id, new.content, new.at, new.confidence, new.subject, new.slot, new.value, new.polarity,
        new.valid_from,
        candidate.vector, content_hash(new.content),
    )  # fmt: skip


def _decide(candidate: Candidate, shelf: _Shelf) -> Decision:
    new = candidate.extracted
    if (same := shelf.by_hash.get(content_hash(new.content))) is not None:
        return _merged(shelf.by_id[same], new)
    rivals = shelf.in_slot(new.subject, new.slot) if new.slot else []
    for rival in rivals:
        if rival.polarity == new.polarity and _is_same_value(rival.value, new.value):
            return _merged(rival, new)
    contradicted = [rival for rival in rivals if _contradicts(new, rival)]
    if not contradicted and len(rivals) == 1 and _moves(new, rivals[0]):
        contradicted = rivals
    if later := [rival for rival in contradicted if rival.said_at > new.at]:
        first = min(later, key=lambda rival: rival.said_at)
        return Add(candidate, first.id, first.valid_from or first.said_at)
    if contradicted:
        until = new.valid_from if new.valid_from is not None and new.valid_from <= new.at else new.at
        return Supersede(candidate, tuple(rival.id for rival in contradicted), until)
    if near := _near_duplicate(candidate, shelf):
        return _merged(near, new)
    return Add(candidate)


def _merged(known: Known, new: Extracted) -> Merge:
    confidence = max(known.confidence, new.confidence)
    raised = min(_MOST_CONFIDENCE, confidence + _RAISE * (1 - confidence))
    return Merge(known.id, max(raised, known.confidence), max(known.said_at, new.at))


def _contradicts(new: Extracted, old: Known) -> bool:
    """Of the same subject and slot, with another value or polarity."""
    same = _is_same_value(old.value, new.value)
    if new.polarity != old.polarity:
        return same
    if new.polarity < 0 or same:
        return False
    return is_single_valued(new.slot) and not _is_refinement(new, old)


def _moves(new: Extracted, old: Known) -> bool:
    """`The deadline has changed to May 3`, where one deadline is known: it says itself that there is an older value."""
    return new.is_correction and new.slot == "deadline" and new.polarity == old.polarity == 1


def _is_refinement(new: Extracted, old: Known) -> bool:
    """`Lisbon` and `Portugal`, `engineer` and `senior engineer`: one says more, neither is wrong.

    Not so where the words say that something changed, or where the values are numbers or names of one word.
    """
    if new.is_correction:
        return False
    ours, theirs = _words(new.value), _words(old.value)
    if new.slot in {"home", "origin"} and _is_wide(ours) != _is_wide(theirs):
        return True
    return (
        bool(ours and theirs)
        and (ours < theirs or theirs < ours)
        and kind_of(new.slot) in {"home", "role", "employer", "origin"}
    )


def _is_wide(place: frozenset[str]) -> bool:
    return " ".join(sorted(place)) in _WIDE


_WIDE: Final = frozenset(" ".join(sorted(place.split())) for place in WIDE_PLACES)
_FILLING: Final = frozenset("a an the my their his her our very really quite of to in at for and".split())  # noqa: SIM905
_WORD = re.compile(r"[^\W_]+(?:[.'’-][^\W_]+)*[+#]*")
_DATE_GIVEN = re.compile(r" ?\(\d{4}(?:-\d\d){0,2}(?:/[\d-]+)?\)")
_NEGATIVE: Final = frozenset(
    "not no never without cannot stopped longer nicht kein keine keinen nie pas jamais nunca ni hates dislikes".split()  # noqa: SIM905
)
_PUNCTUATED_NUMBER = re.compile(r"\d[\d.,:/-]*\d|\d")


def _key(text: str) -> str:
    return normalised(text).replace("\n", " ")


def _words(text: str) -> frozenset[str]:
    found = frozenset(_WORD.findall(normalised(_DATE_GIVEN.sub("", text))))
    return found - _FILLING or found


def _is_same_value(one: str, other: str) -> bool:
    """Equal but for case, accents' form, articles and the form of words; numbers must be equal as written."""
    ours, theirs = _words(one), _words(other)
    if ours == theirs:
        return bool(ours)
    if _numbers(one) != _numbers(other):
        return False
    return (
        bool(ours)
        and len(ours) == len(theirs)
        and sorted(stems(" ".join(ours))) == sorted(stems(" ".join(theirs))) != []
    )


def _numbers(text: str) -> frozenset[str]:
    return frozenset(_PUNCTUATED_NUMBER.findall(text))


def _names(text: str) -> frozenset[str]:
    """Words with a capital that do not begin a sentence."""
    return frozenset(word.casefold() for word in re.findall(r"(?<=[\w,;:] )[A-ZÀ-Þ][\w'’-]*", text))


def _is_negative(text: str) -> bool:
    return "n't" in text or not _NEGATIVE.isdisjoint(normalised(text).split())


def _near_duplicate(candidate: Candidate, shelf: _Shelf) -> Known | None:
    """The memory that says the same in nearly the same words: the nearest by words, and by id."""
    new = candidate.extracted
    ours = frozenset(stems(new.content))
    if not ours:
        return None
    found: list[tuple[float, str]] = []
    for old in shelf.by_id.values():
        if (old.slot, _key(old.subject), old.polarity) != (new.slot, _key(new.subject), new.polarity):
            continue
        theirs = shelf.stems(old)
        jaccard = len(ours & theirs) / len(ours | theirs)
        if (
            jaccard >= _NEAR_JACCARD
            and _is_near(candidate.vector, old.vector, jaccard)
            and _agree(new.content, old.content)
        ):
            found.append((-jaccard, old.id))
    return shelf.by_id[min(found)[1]] if found else None


def _is_near(one: Vector | None, other: Vector | None, jaccard: float) -> bool:
    if one is None or other is None:
        return jaccard >= _NEAR_JACCARD_ALONE
    return sum(float(a) * float(b) for a, b in zip(one, other, strict=True)) >= _NEAR_COSINE


def _agree(one: str, other: str) -> bool:
    """On numbers, names and negation: what a vector does not see."""
    return (
        _numbers(one) == _numbers(other) and _names(one) == _names(other) and _is_negative(one) == _is_negative(other)
    )


def _said_at(memory: Memory) -> datetime:
    said = memory.metadata.get("said_at")
    try:
        at = datetime.fromisoformat(said) if isinstance(said, str) else memory.created_at
    except ValueError:
        return memory.created_at
    return at if at.tzinfo is not None else memory.created_at
