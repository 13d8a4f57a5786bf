"""What every kind of fact is made with: the clause as it was said, and its statement in the third person. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from extproc.memory.model import Category
from extproc.worker.clauses import Clause
from extproc.worker.extract import USER
from extproc.worker.slots import slot

__all__ = [
    "EMPTY_VALUE",
    "Build",
    "Fact",
    "Row",
    "Said",
    "article",
    "conjugated",
    "listed",
    "plain",
    "row",
    "third_person",
    "told",
    "value_of",
    "without_end",
]


@dataclass(frozen=True, slots=True)
class Fact:
    subject: str
    slot: str
    value: str
    statement: str
    """In the third person, without a full stop."""
    category: Category
    polarity: int = 1
    is_correction: bool = False


@dataclass(frozen=True, slots=True)
class Said:
    """A clause after its negation and its adverbs were taken off."""

    clause: Clause
    text: str
    polarity: int = 1
    is_correction: bool = False
    past: bool = False
    """`used to`"""
    how: str = "{}"
    """As it is told in the third person: the words that were taken off, `{}` for the verb and what follows."""

    @property
    def subject(self) -> str:
        return self.clause.subject

    @property
    def who(self) -> str:
        """The subject as a statement begins with it."""
        subject = self.clause.subject
        return "The user" if subject == USER else f"The {subject}" if subject.startswith("user's") else subject

    def fact(
        self,
        name: str,
        value: str,
        statement: str,
        category: Category = Category.FACTUAL,
        *,
        polarity: int | None = None,
        corrects: bool = False,
    ) -> Fact:
        """`name`: of the slot. `polarity`: None is the clause's own. `corrects`: beside what the clause says itself."""
        polarity = self.polarity if polarity is None else polarity
        return Fact(self.subject, name, value, statement, category, polarity, self.is_correction or corrects)


Build = Callable[[re.Match[str], Said], Iterator[Fact]]


@dataclass(frozen=True, slots=True)
class Row:
    """A pattern, tried when the clause's first word is among its own."""

    pattern: re.Pattern[str]
    build: Build
    heads: frozenset[str]
    """First words, in lower case; empty: any."""


def row(heads: str, pattern: str, build: Build) -> Row:
    return Row(re.compile(pattern), build, frozenset(heads.split()))


_VALUE_END = re.compile(
    r"\s+(?:because|since|so that|so|but|when|while|which|who|where|as well|too|these days|at the moment|right now|now|"
    r"anyway|though|please|instead(?! of)|by the way|btw|originally|as you know|with my|for now|at all|anymore|"
    r"any more|and (?:i|we|it|he|she|they|that|have|need|want)|to me|for everything|last|next|"
    r"this (?:week|month|year|summer|winter)|yesterday|today|tomorrow|ago)\b.*",
    re.IGNORECASE | re.DOTALL,
)
EMPTY_VALUE: Final = re.compile(
    r"(?:it|this|that|these|those|them|you|your|him|her|us|me|anything|nothing|everything|something|here|there|one|ones|"
    r"how|what|when|where|which|who|why|neither|none|not|"
    r"the (?:first|second|third|last|other|idea|way|sound|look|fact|part|result|answer|suggestion|option))\b",
    re.IGNORECASE,
)
_PERSONS: Final = {
    "i": "they", "me": "them", "my": "their", "mine": "theirs", "myself": "themselves", "we": "they", "us": "them",
    "our": "their", "ours": "theirs", "ourselves": "themselves",
}  # fmt: skip
_PERSON_WORD = re.compile(r"\b(?:i|me|my|mine|myself|we|us|our|ours|ourselves)\b(?:(?<=i) am\b)?", re.IGNORECASE)
_IRREGULAR: Final = {
    "am": "is", "are": "is", "have": "has", "do": "does", "go": "goes", "will": "will", "would": "would",
    "cannot": "cannot",
}  # fmt: skip
_PAST_FORMS: Final = frozenset(
    """moved grew started joined left quit switched changed migrated relocated resigned turned became was had got
    bought""".split()  # noqa: SIM905 (a table of words)
)


def third_person(text: str) -> str:
    """`my coffee` → `their coffee`."""
    return _PERSON_WORD.sub(lambda match: "they are" if " " in match[0] else _PERSONS[match[0].lower()], text)


def conjugated(text: str) -> str:
    """`live in Rome` → `lives in Rome`."""
    verb, space, rest = text.partition(" ")
    lowered = verb.lower()
    if lowered in _IRREGULAR:
        verb = _IRREGULAR[lowered]
    elif lowered not in _PAST_FORMS and not lowered.endswith(("ed", "ss")):
        verb += "es" if lowered.endswith(("ch", "sh", "x", "o")) else "s"
        if re.search(r"[^aeiou]ys$", verb):
            verb = f"{verb[:-2]}ies"
    return f"{verb}{space}{rest}"


def article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def told(said: Said, upto: int | None = None, words: str | None = None) -> str:
    """The clause as a statement about its subject, up to the end of its value."""
    text = third_person((said.text[:upto] if words is None else words).strip())
    if said.how in {"not", "no longer"}:
        verb, _, rest = text.partition(" ")
        statement = f"{_IRREGULAR.get(verb.lower(), verb)} {said.how} {rest}"
    elif said.how == "no longer {}" and said.clause.person != "other":
        statement = f"no longer {conjugated(text)}"
    elif said.how != "{}":
        statement = said.how.format(text)
    else:
        statement = text if said.clause.person == "other" else conjugated(text)
    return f"{said.who} {statement}"


def without_end(text: str) -> str:
    """The value without what trails behind it."""
    return _VALUE_END.sub("", text)


def value_of(match: re.Match[str]) -> tuple[str, int]:
    """The value without what trails behind it, and where it ends in the clause."""
    text = without_end(match["v"]).rstrip(" .!-–")
    return text, match.start("v") + len(text)


def plain(kind: str, category: Category = Category.FACTUAL) -> Build:
    """One value, told in the clause's own words."""

    def build(match: re.Match[str], said: Said) -> Iterator[Fact]:
        value, end = value_of(match)
        if value and not EMPTY_VALUE.match(value):
            yield said.fact(slot(kind), third_person(value), told(said, end), category)

    return build


def listed(kind: str, category: Category = Category.FACTUAL, *, flip: bool = False) -> Build:
    """`hiking and crowds` are two values of one kind, each with a statement of its own."""

    def build(match: re.Match[str], said: Said) -> Iterator[Fact]:
        value, _ = value_of(match)
        if EMPTY_VALUE.match(value):
            return
        head = said.text[: match.start("v")]
        # What follows the comma goes on with the list only when it is short and has no verb of its own.
        goes_on = re.fullmatch(r"(?:[\w-]+ ?){1,2}(?:,? (?:and|or) [\w -]{1,30})?", said.clause.tail)
        for one in re.split(r",? (?:and|or) |, ", f"{value}, {said.clause.tail}" if goes_on else value):
            if one and not EMPTY_VALUE.match(one) and not re.match(r"(?:not|so|always|never|mostly)\b", one):
                statement, polarity = told(said, words=head + one), -said.polarity if flip else said.polarity
                yield said.fact(slot(kind), third_person(one), statement, category, polarity=polarity)

    return build
