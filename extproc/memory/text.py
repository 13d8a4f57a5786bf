"""Words of texts: stems and stop words. Pure.

Memories and queries pass the same tokeniser, so that equal words give equal stems; queries lose question words as well.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from dataclasses import dataclass
from enum import Enum, auto
from typing import cast

import Stemmer  # type: ignore[import-not-found]  # PyStemmer ships no types

__all__ = ["Query", "Subject", "parse_query", "stems"]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_STOP_WORDS = _set(
    """a about above after again against all also am an and any are aren as at be because been before being below
    between both but by can cannot could couldn d did didn do does doesn doing don down during each either few for from
    further had hadn has hasn have haven having he her here hers herself him himself his i if in into is isn it its
    itself just let ll m may me might mine more most must my myself no nor not now of off on once only or other our ours
    ourselves out over own re s same shall she should shouldn so some such t than that the their theirs them themselves
    then there these they this those through to too under until up upon us ve very was wasn we were weren what when
    where which while who whom whose why will with won would wouldn yes you your yours yourself yourselves"""
)
"""Words that carry no subject, in no index and in no query; halves of contractions (`don`, `ll`) are among them."""

_QUESTION_WORDS = _set(
    """how kind type sort many much ever please tell remind remember recall know called exactly ok okay hey hi hello
    thanks thank"""
)
"""Words that ask. In a memory they may carry a subject, in a query they only dilute it (LoCoMo, R@10: +6 points)."""

_PERSONAL = _set("i my mine myself we our ours ourselves")
"""Words by which a query speaks of its author, about whom most memories are."""
_HOW_TO = re.compile(r"\bhow (?:do|can|could|would|should|might) (?:i|we)\b|\blike i['’]?m\b", re.IGNORECASE)
"""\"How do I centre a div": the author is in it and not what it is about."""
_SENTENCE_END = re.compile(r"[.!?:;\n]")
_LETTER = re.compile(r"[^\W\d_]")
_CAPITAL_AFTER_WORD = re.compile(r"[^\W_] [\"'(]?[A-Z][a-z]")

_IRREGULAR = {
    "allergic": "allergy", "ate": "eat", "eaten": "eat", "birthdate": "birthday", "born": "birth", "bought": "buy",
    "brought": "bring", "built": "build", "children": "child", "chose": "choose", "chosen": "choose", "colour": "color",
    "colours": "color", "drank": "drink", "driven": "drive", "drove": "drive", "favourite": "favorite",
    "favourites": "favorite", "feet": "foot", "felt": "feel", "flew": "fly", "flies": "fly", "flight": "fly",
    "flights": "fly", "flown": "fly", "grew": "grow", "grown": "grow", "held": "hold", "kept": "keep", "left": "leave",
    "lives": "live", "lost": "lose", "marriage": "marry", "men": "man", "met": "meet", "mice": "mouse", "mum": "mom",
    "paid": "pay", "programme": "program", "programmer": "program", "ran": "run", "sold": "sell", "spent": "spend",
    "spoke": "speak", "spoken": "speak", "taught": "teach", "thought": "think", "travelled": "travel",
    "travelling": "travel", "went": "go", "wives": "wife", "women": "woman", "wore": "wear", "written": "write",
    "wrote": "write",
}  # fmt: skip
"""Forms of one word that Snowball leaves apart, and spellings of both sides of the Atlantic."""

# A word with the suffix that tells C++ and C# from C; or one run of a script that puts no spaces between words.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_TOKEN = re.compile(rf"[^\W_{_UNSPACED}]+(?:\+\+|#)?|[{_UNSPACED}]+")
_ASCII_TOKEN = re.compile(r"[a-z0-9]+(?:\+\+|#)?")
_ACCENTS = re.compile("[\u0300-\u036f]")
_LONG_GAP = re.compile(r"(\W{32})\W+")
"""Longer than any run of marks in a language (UAX #15 allows 30): sorting a run takes time with its square."""


class _Stemmers(threading.local):
    """A Snowball stemmer keeps state during a call, so each thread has one of its own."""

    def __init__(self) -> None:
        self.english = Stemmer.Stemmer("english")


_stemmers = _Stemmers()


class Subject(Enum):
    """What a query speaks of, by its form: the less a memory could be about it, the more it must match."""

    AUTHOR = auto()
    """`my`, `we`: most memories are about who asks."""
    NAMED = auto()
    """Somebody or something with a name."""
    ANYTHING = auto()
    """Most often a task that stands on its own."""


@dataclass(frozen=True, slots=True)
class Query:
    stems: tuple[str, ...]
    """Each once, in order of appearance; empty when the text holds nothing to look for."""
    subject: Subject


def stems(text: str) -> list[str]:
    """Stems of the words that carry a subject, in order, with repetitions."""
    return _stem([word for word in _words(text) if word not in _STOP_WORDS])


def parse_query(text: str) -> Query:
    words = _words(text)
    kept = [word for word in words if word not in _STOP_WORDS and word not in _QUESTION_WORDS]
    return Query(tuple(dict.fromkeys(_stem(kept))), _subject(text))


def _subject(text: str) -> Subject:
    if not _PERSONAL.isdisjoint(_words(_HOW_TO.sub(" ", text))):
        return Subject.AUTHOR
    return Subject.NAMED if any(map(_is_naming, _SENTENCE_END.split(text))) else Subject.ANYTHING


def _is_naming(sentence: str) -> bool:
    """A capital within a sentence: the text names somebody or something."""
    first = _LETTER.search(sentence)
    return first is not None and _CAPITAL_AFTER_WORD.search(sentence, first.end()) is not None


def _stem(words: list[str]) -> list[str]:
    return cast("list[str]", _stemmers.english.stemWords([_IRREGULAR.get(word, word) for word in words]))


def _words(text: str) -> list[str]:
    if text.isascii():
        return _ASCII_TOKEN.findall(text.lower())
    bounded = _LONG_GAP.sub(r"\1 ", _ACCENTS.sub("", text))
    folded = unicodedata.normalize("NFC", _ACCENTS.sub("", unicodedata.normalize("NFKD", bounded.casefold())))
    words = []
    for word in _TOKEN.findall(folded):
        if word[0] > "\u0dff" and re.match(f"[{_UNSPACED}]", word):
            words += [word[i : i + 2] for i in range(max(1, len(word) - 1))]  # character pairs
        else:
            words.append(word)
    return words
