"""A clause without its negation, its adverbs and what says that something changed. Pure."""

from __future__ import annotations

import re

from extproc.worker.clauses import Clause
from extproc.worker.facts._telling import Said

__all__ = ["reduced"]

_NEGATION = re.compile(
    r"(?:(?P<never>never )|(?P<do>(?:do|does) not (?:really |even |actually |currently )?)|"
    r"(?P<longer>(?:do |does )?no longer )"
    r"|(?P<be_longer>(?:am|is|are) no longer )|(?P<be>(?:am|is|are) not (?:actually |really )?)|"
    r"(?P<cannot>cannot (?!stand|bear))"
    r"|(?P<past>used to (?!it\b|be able))|(?P<did>(?:did|was|were|have|has|had|will) not ))",
    re.IGNORECASE,
)
_ANY_MORE = re.compile(r" any ?(?:more|longer)(?: by the way)?$| after all$", re.IGNORECASE)
_ADVERBS = re.compile(
    r"(?:(?P<now>now)|just|currently|also|still|mostly|mainly|originally|actually|recently|really|already|"
    r"usually(?= live)|both|all|only(?= use)) ",
    re.IGNORECASE,
)
_AUXILIARY_NOW = re.compile(
    r"(?P<be>am|is|are|have|has) "
    r"(?P<adverb>now|just|currently|also|still|originally|actually|recently|finally|already) ",
    re.IGNORECASE,
)


def reduced(clause: Clause) -> Said | None:
    """Without `do not`, `no longer`, `now`; None where a past or future is denied, which states nothing."""
    text, polarity, correction, past, how = clause.said, 1, clause.is_correction, False, "{}"
    if match := _AUXILIARY_NOW.match(text):
        correction |= match["adverb"].lower() == "now"
        text = f"{match['be']} {text[match.end() :]}"
    for _ in range(2):
        if match := _ADVERBS.match(text):
            correction |= match["now"] is not None and clause.person in {"i", "we"}
            text = text[match.end() :]
    if match := _NEGATION.match(text):
        kind, rest = match.lastgroup, text[match.end() :]
        if kind in {"did", "cannot"}:
            return None
        if kind == "never":
            text = f"never {rest}"
        elif kind in {"be", "be_longer"}:
            text, how = f"{text.split(' ', 1)[0]} {rest}", "not" if kind == "be" else "no longer"
        elif kind == "past":
            text, how, past = rest, "used to {}", True
        else:
            text, how = rest, "does not {}" if kind == "do" else "no longer {}"
        if kind != "never":
            polarity = -1
        correction |= kind in {"longer", "be_longer"}
    if match := _ANY_MORE.search(text):
        correction |= "after" not in match[0]
        text = text[: match.start()]
    return Said(clause, text[:1].lower() + text[1:], polarity, correction, past, how)
