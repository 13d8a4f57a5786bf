"""The extractor without a model: episodes nearly word for word, and facts by patterns. Pure, deterministic.

An episode keeps what the user said, without questions, greetings, code and pasted text: most questions are answered by
it, and it makes deleting the turn's text safe. A fact is a second key to it: short, with subject, slot and value, so
that a later one can take its place.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime, time, timedelta
from itertools import zip_longest
from typing import TYPE_CHECKING, Final

from extproc.memory.model import Category
from extproc.worker.clauses import clauses, ends_own_words, gives_reason, is_in_earnest, is_text_work
from extproc.worker.dates import DateMention, annotated, find_dates, may_name_date
from extproc.worker.extract import FACT_CONFIDENCE, MOST_PER_TURN, Accounting, Extracted, Extraction, Turn
from extproc.worker.facts import Fact, find_facts
from extproc.worker.prose import MOST_CHARACTERS, QUOTE_MARK, is_pleasantry, is_question, own_words, pieces, sentences
from extproc.worker.secrets import ALWAYS, is_empty, may_hold_secret, redact, without_marks
from extproc.worker.slots import kind_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from datetime import date

    from extproc.worker.secrets import Kind

__all__ = ["EPISODE_CONFIDENCE", "MOST_EPISODES", "RuleExtractor", "extract_episodes", "without_secrets"]

EPISODE_CONFIDENCE = 0.8
"""It was said, in these words."""
MOST_EPISODES = 16
"""Of one turn, 120 tokens each: a longer text is a document, not something that was told."""
_MOST_FACT_SENTENCES = 40
"""Of one turn: facts come in few sentences, and only a pasted text has more."""
_MOST_SEARCHED = 2 * MOST_CHARACTERS
"""For secrets: more than is read, since the text gets shorter where one is taken out."""
_FUTURE: Final = frozenset({"plan", "deadline"})
_LASTING: Final = frozenset({"home", "employer", "role", "tool", "name"})
"""Slots whose date says since when it is so."""

_DECIDED = re.compile(
    r"\bi(?:'ve| have)? (?:just |now )?(?:booked|scheduled|reserved|ordered|cancell?ed|created|renamed|"
    r"fixed|moved|changed|"
    r"updated|added|removed|deleted|set|sent|deployed|merged|installed|configured|migrated|replaced|saved|"
    r"registered|submitted)\b"
    r"|\bi (?:recommend|suggest) |\b(?:agreed|decided|decision)\b|\bwe(?:'ll| will) (?:use|go with|take)\b"
    r"|\b(?:is|are|has been|have been) (?:now )?(?:booked|scheduled|reserved|ordered|cancell?ed|confirmed)\b",
    re.IGNORECASE,
)
_CONFIRMS = re.compile(
    r"(?:yes|yeah|yep|yup|perfect|great|exactly|correct|agreed|sounds good|looks good|that works|it works|"
    r"works|good|excellent|"
    r"awesome|ok,? (?:let's|do)|okay,? (?:let's|do)|let's (?:do|go|use|take)|go with|done|lovely|super|wonderful)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(r"\b(?:no|not|wrong|don't|doesn't|isn't|but|instead|actually|wait)\b", re.IGNORECASE)
_GO_AHEAD = re.compile(
    r"(?:yes|ok|okay|sure|please|great)?[,.! ]*(?:go ahead|do it|let's (?:do|go)|yes,? please|book it|send it)\b",
    re.IGNORECASE,
)
_SAID_BY_SOMEBODY = re.compile(r"[,.]?\s+said (?:the|a|he|she)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class RuleExtractor:
    """The default. Takes 0.1 ms for a common turn, and a few milliseconds for the longest (docs/extraction.md)."""

    redacted: frozenset[Kind] = ALWAYS
    """Kinds of secrets and identifiers that never reach a memory."""

    def extract(self, turns: Sequence[Turn]) -> Extraction:
        memories: list[Extracted] = []
        shown, redactions = _without_their_secrets(turns, self.redacted)
        for turn, following in zip_longest(shown, shown[1:]):
            said = sentences(own_words(turn.user_text))
            facts = list(_facts(turn, said))
            told = {fact.content for fact in facts}
            # One text is one memory: `Bob likes mushrooms.` is kept as the fact, which can be superseded.
            episodes = [episode for episode in _episodes(turn, said) if episode.content not in told]
            memories += [*episodes, *_of_the_answer(turn, following), *facts]
        return _finished(memories, turns, self.redacted, redactions)


def extract_episodes(turns: Sequence[Turn], redacted: frozenset[Kind] = ALWAYS) -> Extraction:
    """What was said, without facts: for an extractor that finds those in another way."""
    memories: list[Extracted] = []
    shown, redactions = _without_their_secrets(turns, redacted)
    for turn, following in zip_longest(shown, shown[1:]):
        memories += [*_episodes(turn, sentences(own_words(turn.user_text))), *_of_the_answer(turn, following)]
    return _finished(memories, turns, redacted, redactions)


def _without_their_secrets(turns: Sequence[Turn], kinds: frozenset[Kind]) -> tuple[list[Turn], int]:
    """And how many were taken out. Before a text is cut into sentences: of a private key each line is one."""
    shown, count = [], 0
    for turn in turns:
        if _may_hold_secret(turn):
            user, assistant = (redact(text[:_MOST_SEARCHED], kinds) for text in (turn.user_text, turn.assistant_text))
            shown.append(replace(turn, user_text=user.text, assistant_text=assistant.text))
            count += len(user.kinds) + len(assistant.kinds)
        else:
            shown.append(turn)
    return shown, count


def _finished(memories: list[Extracted], turns: Sequence[Turn], kinds: frozenset[Kind], redactions: int) -> Extraction:
    """Once more without secrets: sentences that are joined may make one, such as a card's number over four lines."""
    found = without_secrets(memories, turns, kinds, are_own_words=True)
    return replace(found, accounting=found.accounting + Accounting(redacted=redactions))


def without_secrets(
    memories: Iterable[Extracted], turns: Sequence[Turn], kinds: frozenset[Kind], *, are_own_words: bool = False
) -> Extraction:
    """The last step of every extractor: what may be written, and the count of what was taken out.

    `are_own_words`: the memories are made of words of their turns alone, so that one without a secret has none either.
    """
    clean = []
    redactions = 0
    suspect = {turn.index for turn in turns if _may_hold_secret(turn)} if are_own_words else None
    for memory in memories:
        if suspect is None or memory.turn_index in suspect:
            kept, places = _cleaned(memory, kinds)
            redactions += places
        else:
            kept = None if is_empty(memory.content) else memory
        if kept is not None:
            clean.append(kept)
    cut = sum(len(turn.user_text) > MOST_CHARACTERS for turn in turns)
    return Extraction(clean, Accounting(turns=len(turns), redacted=redactions, cut_turns=cut))


def _may_hold_secret(turn: Turn) -> bool:
    return may_hold_secret(turn.user_text[:_MOST_SEARCHED]) or may_hold_secret(turn.assistant_text[:_MOST_SEARCHED])


def _cleaned(memory: Extracted, kinds: frozenset[Kind]) -> tuple[Extracted | None, int]:
    """The memory without secrets, and how many were taken out.

    None: nothing is left of it. A fact whose value is a secret is none; an episode is kept around it.
    """
    content, quote, value = (redact(text, kinds) for text in (memory.content, memory.quote, memory.value))
    count = len(content.kinds)
    if value.kinds or content.is_empty or (memory.slot and without_marks(content.text) != content.text):
        return None, count
    if not count and not quote.kinds:
        return memory, 0
    return replace(memory, content=content.text, quote=quote.text), count


def _episodes(turn: Turn, said: list[str]) -> Iterator[Extracted]:
    kept = [
        sentence
        for sentence in said
        if (gives_reason(sentence) or not is_question(sentence)) and not is_pleasantry(sentence)
    ]
    for number, text in enumerate(pieces(kept)):
        if number == MOST_EPISODES:
            return
        yield Extracted(
            content=annotated(text, turn.at.date()),
            category=Category.EPISODIC,
            confidence=EPISODE_CONFIDENCE,
            turn_index=turn.index,
            at=turn.at,
            quote=text,
            metadata={"speaker": "user"},
        )


def _of_the_answer(turn: Turn, following: Turn | None) -> Iterator[Extracted]:
    """What the assistant says it did or advised, when the user agreed: in the next turn, or by asking in this."""
    confirmed = following is not None and _is_confirmation(following.user_text)
    if not confirmed and not _GO_AHEAD.match(turn.user_text):
        return
    kept = [
        sentence
        for sentence in sentences(own_words(turn.assistant_text))
        if _DECIDED.search(sentence) and not is_question(sentence) and not _SAID_BY_SOMEBODY.search(sentence)
    ]
    for text in list(pieces(kept))[:2]:
        yield Extracted(
            content=f"The assistant said: {annotated(text, turn.at.date())}",
            category=Category.EPISODIC,
            confidence=FACT_CONFIDENCE,
            turn_index=turn.index,
            at=turn.at,
            quote=text,
            subject="assistant",
            metadata={"speaker": "assistant"},
        )


def _is_confirmation(text: str) -> bool:
    opening = text[:80]
    return _CONFIRMS.match(opening) is not None and not _DENIES.search(opening)


def _facts(turn: Turn, said: list[str]) -> Iterator[Extracted]:
    """In order; of two that fill the same slot of a subject with one value, the later."""
    found: dict[tuple[str, ...], Extracted] = {}
    for sentence, fact in _stated(said[:_MOST_FACT_SENTENCES]):
        memory = _as_extracted(fact, sentence, turn)
        key = (fact.subject.casefold(), fact.slot, fact.value.casefold())
        found.pop(key, None)
        found[key] = memory
        if len(found) == MOST_PER_TURN:
            break
    yield from found.values()


def _stated(parts: list[str]) -> Iterator[tuple[str, Fact]]:
    """Not from clauses that hold a secret: a fact whose value is one is none."""
    if not is_in_earnest("\n".join(parts)):
        return
    for sentence in parts:
        if is_text_work(sentence):
            return
        readable = without_marks(sentence, QUOTE_MARK)
        for clause in clauses(readable):
            for fact in find_facts(clause):
                yield sentence, fact
        if ends_own_words(readable):
            return


def _as_extracted(fact: Fact, sentence: str, turn: Turn) -> Extracted:
    said = turn.at.date()
    kind = kind_of(fact.slot)
    is_past = None if kind in _FUTURE else True if kind in _LASTING else None
    # A birthday is of every year.
    has_date = kind != "birthday" and may_name_date(sentence)
    mention = _date_of(fact, sentence, said, is_past=is_past) if has_date else None
    metadata: dict[str, object] = {"speaker": "user"}
    statement = annotated(fact.statement, said, is_past=is_past) if has_date else fact.statement
    valid_from = valid_until = None
    if mention is not None:
        metadata["date"] = mention.iso
        if kind in _LASTING and mention.first <= said:
            valid_from = _midnight(mention.first, turn.at)
        if kind == "location":
            valid_until = _midnight(mention.last + timedelta(days=1), turn.at)
    return Extracted(
        content=f"{statement}.",
        category=fact.category,
        confidence=FACT_CONFIDENCE,
        turn_index=turn.index,
        at=turn.at,
        quote=sentence,
        subject=fact.subject,
        slot=fact.slot,
        value=annotated(fact.value, said, is_past=is_past) if has_date else fact.value,
        polarity=fact.polarity,
        is_correction=fact.is_correction,
        valid_from=valid_from,
        valid_until=valid_until,
        metadata=metadata,
    )


def _date_of(fact: Fact, sentence: str, said: date, *, is_past: bool | None) -> DateMention | None:
    """A date in the statement; else the only one in the sentence."""
    if mentions := find_dates(fact.statement, said, is_past=is_past):
        return mentions[0]
    mentions = find_dates(sentence, said, is_past=is_past)
    return mentions[0] if len(mentions) == 1 else None


def _midnight(day: date, at: datetime) -> datetime:
    """The beginning of the day where it was said, as UTC."""
    return datetime.combine(day, time(), tzinfo=at.tzinfo).astimezone(UTC)
