"""Standing orders to the assistant: how it is to answer, and what to call the user. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from extproc.memory.model import Category
from extproc.worker.extract import USER
from extproc.worker.facts._person import called
from extproc.worker.facts._telling import Fact, Said, row, third_person
from extproc.worker.facts._words import INSTRUCTION, LANGUAGES, V

__all__ = ["ORDERS", "WISHES"]

_NEGATIVE = re.compile(r"(?:please )?(?:never|do not|stop|avoid)\b", re.IGNORECASE)


def _rule(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value = re.sub(r"\s+(?:please|from now on|again)$", "", match["v"].strip())
    whole = re.sub(r"\s+", " ", f"{match['how'].strip()} {value}".replace("please ", "").replace("Please ", "")).strip()
    statement = f"The user asks: {whole[:1].lower()}{whole[1:]}"
    polarity = -1 if _NEGATIVE.match(match["how"]) else 1
    yield said.fact("rule", value, statement, Category.PREFERENCE, polarity=polarity)


def _standing_rule(match: re.Match[str], said: Said) -> Iterator[Fact]:
    """Not of the text at hand."""
    if not re.search(r"\b(?:here|this|that|yet|it)\b", match["v"]):
        yield from _rule(match, said)


def _answer_language(match: re.Match[str], said: Said) -> Iterator[Fact]:
    language = match["v"].capitalize()
    yield said.fact("language", language, f"The user wants answers in {language}", Category.PREFERENCE, polarity=1)


def _wants(match: re.Match[str], said: Said) -> Iterator[Fact]:
    value = third_person(re.sub(r"\s*(?:from now on|always|in future|please)\b", "", match["v"]).strip())
    yield Fact(USER, "rule", value, f"The user wants {value}", Category.PREFERENCE, said.polarity, said.is_correction)


WISHES: Final = (
    row(
        "want",
        r"want (?P<v>(?:all|every|the|my|your|short|no)\b[^;()]{3,90}\b(?:from now on|always|in future))$",
        _wants,
    ),
    row("would", r"would like (?P<v>(?:all|your|short|long)\b[^;()]{3,90})", _wants),
)
"""Of a clause with a subject."""
ORDERS: Final = (
    row("call", rf"call me {V}", called),
    row("please", rf"please call me {V}", called),
    row(
        "everyone everybody people friends they",
        rf"(?:everyone|everybody|people|friends|they|my friends) calls? me {V}",
        called,
    ),
    row(
        "",
        r"(?:please )?(?:(?:always|from now on,?|only)(?: please)? )(?:please )?(?:answer|reply|respond|write|"
        rf"speak|talk)(?: to me)? (?:only )?in (?P<v>(?i:{LANGUAGES}))\b",
        _answer_language,
    ),
    row(
        "answer reply respond please",
        rf"(?:please )?(?:answer|reply|respond|write|speak)(?: to me)? (?:only )?in (?P<v>(?i:{LANGUAGES})) "
        r"(?:from now on|always|please from now on)",
        _answer_language,
    ),
    row(
        "always never please",
        rf"(?P<how>(?:please )?(?:always|never)) (?P<v>(?:{INSTRUCTION})\b[^;()]{{2,100}})",
        _rule,
    ),
    row(
        "do please",
        r"(?P<how>(?:please )?do not) (?P<v>(?:use|add|include|call|start|end|apologi[sz]e|address|mention|"
        r"make assumptions|explain)\b[^,;()]{2,80})",
        _standing_rule,
    ),
    row("stop please avoid", r"(?P<how>(?:please )?(?:stop|avoid)) (?P<v>\w{3,15}ing\b[^,;()]{2,60})", _rule),
    row(
        "please keep",
        r"(?P<how>(?:please )?keep) (?P<v>(?:your|the|all) (?:answers|responses|replies|explanations|messages)"
        r"\b[^;()]{2,60})",
        _rule,
    ),
    row(
        "when",
        r"when you [\w ]{2,40}, ?(?P<how>(?:please )?(?:do not|always|never)) (?P<v>[^;()]{3,80})",
        _rule,
    ),
    row(
        "from",
        rf"from now on,? (?P<how>(?:please )?(?:do not|always|never|)) ?(?P<v>(?:{INSTRUCTION})\b[^;()]{{3,80}})",
        _rule,
    ),
)
