"""The patterns by which a clause states a fact or a preference: English, and the commonest of three more. Pure.

Precise rather than many: a pattern that is right four times in five is left out. Each is a row of a table, tried when
the clause's first words are among its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

from extproc.memory.model import Category
from extproc.worker.clauses import RELATIONS, Clause
from extproc.worker.extract import USER
from extproc.worker.slots import slot

__all__ = ["Fact", "find_facts", "third_person"]


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


FACTUAL, PREFERENCE, BEHAVIORAL, PROCEDURAL, EPISODIC = (
    Category.FACTUAL,
    Category.PREFERENCE,
    Category.BEHAVIORAL,
    Category.PROCEDURAL,
    Category.EPISODIC,
)

_V = r"(?P<v>[^,;()\n※]{1,90})"
_NUMBER_WORDS: Final = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|"
    "nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety"
)
_LANGUAGES: Final = (
    "English|German|French|Spanish|Portuguese|Italian|Dutch|Polish|Czech|Russian|Ukrainian|Turkish|Arabic|Hebrew|Hindi|"
    "Urdu|Bengali|Tamil|Japanese|Korean|Chinese|Mandarin|Cantonese|Vietnamese|Thai|Swedish|Norwegian|"
    "Danish|Finnish|Greek|"
    "Hungarian|Romanian|Bulgarian|Croatian|Serbian|Slovak|Catalan|Basque|Irish|Welsh|Persian|Farsi|"
    "Indonesian|Malay|Swahili"
)
_OCCUPATIONS: Final = (
    "nurse|doctor|physician|surgeon|dentist|vet|veterinarian|pharmacist|paramedic|midwife|therapist|"
    "psychologist|teacher|"
    "professor|lecturer|tutor|student|researcher|scientist|physicist|chemist|biologist|mathematician|"
    "statistician|economist|"
    "engineer|developer|programmer|architect|designer|analyst|administrator|consultant|accountant|auditor|"
    "banker|lawyer|"
    "attorney|solicitor|paralegal|judge|journalist|editor|writer|author|translator|librarian|photographer|"
    "musician|pianist|"
    "painter|actor|actress|director|producer|chef|cook|baker|barista|waiter|waitress|bartender|butcher|farmer|gardener|"
    "florist|carpenter|plumber|electrician|mechanic|welder|builder|driver|pilot|sailor|soldier|firefighter|policeman|"
    "police officer|officer|manager|founder|co-founder|entrepreneur|freelancer|contractor|recruiter|"
    "salesman|salesperson|"
    "hairdresser|tailor|secretary|receptionist|intern|apprentice|trainee|CEO|CTO|CFO|COO|VP|product owner|scrum master|"
    "data engineer|sysadmin|DBA|SRE|postdoc|PhD student|social worker|realtor|estate agent|landlord|pensioner|retiree"
)
_ILLNESSES: Final = (
    "asthma|diabetes|epilepsy|migraines?|arthritis|dyslexia|ADHD|celiac disease|coeliac disease|high blood pressure|"
    "hypertension|insomnia|tinnitus|Crohn's(?: disease)?|IBS|anxiety|depression|a pacemaker|a heart condition|hay fever"
)
_CONDITIONS: Final = (
    "diabetic|asthmatic|colou?r[- ]?blind|deaf|blind|pregnant|epileptic|dyslexic|autistic|hard of hearing|"
    "coeliac|celiac|"
    "anaemic|anemic|visually impaired|in a wheelchair|a wheelchair user"
)
_DIETS: Final = (
    "vegan|vegetarian|pescatarian|pescetarian|keto|kosher|halal|gluten[- ]free|teetotal|teetotaller|flexitarian"
)
_OWNED: Final = (
    "kids?|children|child|sons?|daughters?|siblings?|brothers?|sisters?|dogs?|cats?|horses?|rabbits?|"
    "hamsters?|parrots?|"
    "chickens|pets?|cars?|bikes?|motorbikes?|motorcycles?|vans?|boats?|houses?|flats?|apartments?|gardens?|"
    "grandchildren|"
    "twins|piano|guitar|violin|driving licen[cs]e|mortgage|allotment|cottage"
)
_PRESENT_HABIT: Final = (
    "take|drink|eat|get up|wake up|wake|go|work|run|walk|cycle|swim|buy|deploy|travel|fly|drive|read|cook|"
    "sleep|pay|wear|"
    "smoke|train|meet|start my|start work|order|book|shop|ship|release|test|review|write|commute|meditate|"
    "skip|have breakfast|"
    "have lunch|have dinner|play|watch|listen|study|practi[sc]e"
)
_INSTRUCTION: Final = (
    "use|add|write|include|call|say|start|end|explain|apologi[sz]e|ask|mention|put|give|show|format|keep|"
    "answer|reply|respond|"
    "address|translate|summari[sz]e|quote|cite|send|suggest|recommend|make|speak|talk|be|assume"
)
_DAY_NAME = (
    r"(?:monday|tuesday|wednesday|thursday|friday|saturday|sunday|weekend|weekday|day|week|month|morning|"
    r"evening|night|year|summer|winter)"
)
_MONTH: Final = "January|February|March|April|May|June|July|August|September|October|November|December"
_TASTE = r"(?:really |absolutely |also |just |still |truly |generally |usually |kind of )?"

Build = Callable[[re.Match[str], "_Said"], Iterator[Fact]]


@dataclass(frozen=True, slots=True)
class _Said:
    """A clause after its negation and its adverbs were taken off."""

    clause: Clause
    text: str
    polarity: int
    is_correction: bool
    past: bool
    """`used to`"""
    how: str
    """As it is told in the third person: the words that were taken off, `{}` for the verb and what follows."""


_NEGATION = re.compile(
    r"(?:(?P<never>never )|(?P<do>(?:do|does) not (?:really |even |actually |currently )?)|"
    r"(?P<longer>(?:do |does )?no longer )"
    r"|(?P<be_longer>(?:am|is|are) no longer )|(?P<be>(?:am|is|are) not (?:actually |really )?)|"
    r"(?P<cannot>cannot (?!stand|bear))"
    r"|(?P<past>used to (?!it\b|be able))|(?P<did>(?:did|was|were|have|has|had|will) not ))",
    re.IGNORECASE,
)
_ANY_MORE = re.compile(r" any ?(?:more|longer)$| after all$", re.IGNORECASE)
_ADVERBS = re.compile(
    (
        r"(?:(?P<now>now)|just|currently|also|still|mostly|mainly|originally|actually|recently|really|already|"
        r"usually(?= live)|both|all|only(?= use)) "
    ),
    re.IGNORECASE,
)
_AUXILIARY_NOW = re.compile(
    (
        r"(?P<be>am|is|are|have|has) (?P<adverb>now|just|currently|also|still|originally|actually|recently|"
        r"finally|already) "
    ),
    re.IGNORECASE,
)
_VALUE_END = re.compile(
    r"\s+(?:because|since|so that|so|but|when|while|which|who|where|as well|too|these days|at the moment|"
    r"right now|now|anyway|"
    r"though|please|instead(?! of)|by the way|btw|originally|as you know|with my|for now|at all|anymore|"
    r"any more|and (?:i|we|it|he|she|they|that|have|need|want)|"
    r"to me|for everything|last|next|this (?:week|month|year|summer|winter)|yesterday|today|tomorrow|ago)\b.*",
    re.IGNORECASE | re.DOTALL,
)
_EMPTY_VALUE = re.compile(
    r"(?:it|this|that|these|those|them|you|your|him|her|us|me|anything|nothing|everything|something|here|"
    r"there|one|ones|how|what|"
    r"when|why|the (?:first|second|third|last|other|idea|way|sound|look|fact|part|result|answer|suggestion|option))\b",
    re.IGNORECASE,
)


def find_facts(clause: Clause) -> Iterator[Fact]:
    """What the clause states outright, at most a few facts; nothing where it is unsure."""
    if clause.person == "my":
        yield from _try(_OF_THINGS, _Said(clause, clause.said, 1, clause.is_correction, False, "{}"))
    elif clause.person:
        said = _reduced(clause)
        if said is not None:
            yield from _try(_PREDICATES, said)
    else:
        yield from _try(_ORDERS, _Said(clause, clause.said, 1, clause.is_correction, False, "{}"))
    yield from _foreign(clause)


def _try(rows: tuple[_Row, ...], said: _Said) -> Iterator[Fact]:
    text = said.text[:1].lower() + said.text[1:]
    said = replace(said, text=text)
    first = text.split(" ", 1)[0].lower()
    for row in rows:
        if (not row.heads or first in row.heads) and (match := row.pattern.match(text)):
            facts = list(row.build(match, said))
            if facts:
                yield from facts
                return


def _reduced(clause: Clause) -> _Said | None:
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
        if match["did"] or (match["cannot"]):
            return None
        kind = match.lastgroup
        rest = text[match.end() :]
        if kind == "never":
            text, how = f"never {rest}", "{}"
        elif kind in {"be", "be_longer"}:
            verb = text.split(" ", 1)[0]
            text, how = f"{verb} {rest}", "not" if kind == "be" else "no longer"
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
    return _Said(clause, text, polarity, correction, past, how)


# Telling it in the third person.

_PERSONS: Final = {
    "i": "they", "me": "them", "my": "their", "mine": "theirs", "myself": "themselves", "we": "they", "us": "them",
    "our": "their", "ours": "theirs", "ourselves": "themselves",
}  # fmt: skip
_PERSON_WORD = re.compile(r"\b(?:i|me|my|mine|myself|we|us|our|ours|ourselves)\b(?:(?<=i) am\b)?", re.IGNORECASE)
_IRREGULAR: Final = {
    "am": "is",
    "are": "is",
    "have": "has",
    "do": "does",
    "go": "goes",
    "will": "will",
    "would": "would",
    "cannot": "cannot",
}
_PAST_FORMS: Final = frozenset(
    [
        "moved",
        "grew",
        "started",
        "joined",
        "left",
        "quit",
        "switched",
        "changed",
        "migrated",
        "relocated",
        "resigned",
        "turned",
        "became",
        "was",
        "had",
        "got",
        "bought",
    ]
)


def third_person(text: str) -> str:
    """`my coffee` → `their coffee`."""
    return _PERSON_WORD.sub(lambda match: "they are" if " " in match[0] else _PERSONS[match[0].lower()], text)


def _conjugated(text: str) -> str:
    verb, space, rest = text.partition(" ")
    lowered = verb.lower()
    if lowered in _IRREGULAR:
        verb = _IRREGULAR[lowered]
    elif lowered not in _PAST_FORMS and not lowered.endswith(("ed", "ss")):
        verb += "es" if lowered.endswith(("ch", "sh", "x", "o")) else "s"
        if re.search(r"[^aeiou]ys$", verb):
            verb = f"{verb[:-2]}ies"
    return f"{verb}{space}{rest}"


def _subject_words(subject: str) -> str:
    return "The user" if subject == USER else f"The {subject}" if subject.startswith("user's") else subject


def _told(said: _Said, upto: int | None = None, words: str | None = None) -> str:
    """The clause as a statement about its subject, up to the end of its value."""
    text = third_person((said.text[:upto] if words is None else words).strip())
    if said.how in {"not", "no longer"}:
        verb, _, rest = text.partition(" ")
        told = f"{_IRREGULAR.get(verb.lower(), verb)} {said.how} {rest}"
    elif said.how != "{}":
        told = said.how.format(text)
    elif said.clause.person == "other":
        told = text
    else:
        told = _conjugated(text)
    if said.how == "no longer {}" and said.clause.person != "other":
        told = f"no longer {_conjugated(text)}"
    return f"{_subject_words(said.clause.subject)} {told}"


def _value(match: re.Match[str], group: str = "v") -> tuple[str, int]:
    """The value without what trails behind it, and where it ends in the clause."""
    text = _VALUE_END.sub("", match[group]).rstrip(" .!-–")
    return text, match.start(group) + len(text)


def _plain(kind: str, category: Category = FACTUAL, *, group: str = "v", flip: bool = False) -> Build:
    def build(match: re.Match[str], said: _Said) -> Iterator[Fact]:
        value, end = _value(match, group)
        if value and not _EMPTY_VALUE.match(value):
            polarity = -said.polarity if flip else said.polarity
            yield Fact(
                said.clause.subject,
                slot(kind),
                third_person(value),
                _told(said, end),
                category,
                polarity,
                said.is_correction,
            )

    return build


def _list(kind: str, category: Category = FACTUAL, *, flip: bool = False) -> Build:
    """`hiking and crowds` are two values of one kind, each with a statement of its own."""

    def build(match: re.Match[str], said: _Said) -> Iterator[Fact]:
        value, _ = _value(match)
        if _EMPTY_VALUE.match(value):
            return
        head = said.text[: match.start("v")]
        polarity = -said.polarity if flip else said.polarity
        # What follows the comma goes on with the list only when it is short and has no verb of its own.
        more = (
            [said.clause.tail]
            if re.fullmatch(r"(?:[\w-]+ ?){1,2}(?:,? (?:and|or) [\w -]{1,30})?", said.clause.tail)
            else []
        )
        for one in re.split(r",? (?:and|or) |, ", ", ".join([value, *more])):
            if one and not _EMPTY_VALUE.match(one) and not re.match(r"(?:not|so|always|never|mostly)\b", one):
                statement = _told(said, words=head + one)
                yield Fact(
                    said.clause.subject,
                    slot(kind),
                    third_person(one),
                    statement,
                    category,
                    polarity,
                    said.is_correction,
                )

    return build


_NO_PLACE = re.compile(
    r"(?:the (?:office|past|future|moment|moon|sea)|fear|hope|denial|my|your|our|this|that|an?)\b", re.IGNORECASE
)


def _home(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value = re.sub(r"\s+(?:with|for|on|as|and)\b.*", "", _value(match)[0])
    if not value or _NO_PLACE.match(value):
        return
    end = match.start("v") + len(value)
    yield Fact(said.clause.subject, "home", value, _told(said, end), FACTUAL, said.polarity, said.is_correction)
    if other := re.fullmatch(r"(?:and )?not (?:in |at )?((?!my |your |the |so )[\w .-]{2,40})", said.clause.tail):
        told = f"{_subject_words(said.clause.subject)} does not live in {other[1]}"
        yield Fact(said.clause.subject, "home", other[1], told, FACTUAL, -1, True)


_SOFTWARE = re.compile(
    r"\d|\b(?:Linux|Ubuntu|Debian|Windows|Mac|macOS|Android|iOS|iPhone|Python|Java|JavaScript|TypeScript|Rust|Go|"
    r"Kotlin|Swift|React|Vue|Angular|Svelte|Django|Rails|AWS|Azure|GCP|Kubernetes|Docker|Terraform|Ansible|Slack|"
    r"Teams|Zoom|Discord|Telegram|Signal|WhatsApp|Notion|Jira|Trello|GitHub|GitLab|Bitbucket|Vim|Neovim|Emacs|"
    r"VS ?Code|Cursor|Postgres\w*|MySQL|MongoDB|Redis|Kafka|Chrome|Firefox|Safari|Twitter|Facebook|Instagram|"
    r"LinkedIn|Reddit|Mastodon|Netflix|Spotify)\b"
)
"""What people move to and join without changing home or employer; a number is a version."""


def _moved(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    value = re.sub(r"\s+(?:with|for|on|as|and|in)\b.*", "", value)
    source = match["source"]
    if (
        said.polarity < 0
        or not value[:1].isupper()
        or _SOFTWARE.search(value)
        or (said.clause.person == "we" and source)
    ):
        return
    who = said.clause.subject
    # "We moved to X" is as often about software.
    if said.clause.person == "we" and not said.is_correction:
        return
    if source:
        yield Fact(who, "home", source, f"{_subject_words(who)} no longer lives in {source}", FACTUAL, -1, True)
    told = f"{_subject_words(who)} lives in {value}{_since(match, said)}"
    yield Fact(who, "home", value, told, FACTUAL, 1, said.is_correction or source is not None)


def _since(match: re.Match[str], said: _Said) -> str:
    """The words that say when, kept for the date that stands for them."""
    when = re.search(
        rf"\b(?:(?:in|since|on) (?:\w+ ){{0,2}}?(?:\d{{4}}|{_MONTH})"
        r"(?: \d{4})?|last \w+|yesterday|today|\w+ (?:days?|weeks?|months?|years?) ago)\b",
        said.text[match.start("v") :], re.IGNORECASE,
    )  # fmt: skip
    return f" (moved {when[0]})" if when else ""


def _employer(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    value, _, role = value.partition(" as ")
    value = re.sub(rf"\s+(?:and|on|from|every|(?:in|since) (?:[a-z]|\d{{4}}|{_MONTH}))\b.*", "", value)
    if not value or re.match(
        r"(?:home|night|nights|it|this|that|my|myself|the (?:moment|bottom|same)|weekends?|two|a solution|[\d])\b",
        value,
        re.IGNORECASE,
    ):
        return
    groups = match.groupdict()
    if "capital" in groups and (not value[:1].isupper() or ("gone" not in groups and _SOFTWARE.search(value))):
        return
    said_polarity = -1 if groups.get("gone") else said.polarity
    told = _told(said, match.start("v") + len(value))
    correction = said.is_correction or said_polarity < said.polarity
    when = _when(match, said)
    yield Fact(said.clause.subject, "employer", value, told + when, FACTUAL, said_polarity, correction)
    if role and said.polarity > 0:
        role = re.sub(r"^(?:an?|the) ", "", role)
        yield Fact(
            said.clause.subject,
            "role",
            role,
            f"{_subject_words(said.clause.subject)} works as {_article(role)}",
            FACTUAL,
        )


def _when(match: re.Match[str], said: _Said) -> str:
    return _since(match, said).replace(" (moved ", " ").rstrip(")")


def _article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def _role(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    role = f"{match['kind'] or ''}{match['v']}".strip()
    who = said.clause.subject
    yield Fact(
        who,
        "role",
        role,
        _told(said, match.end("employer" if match["at"] == "of" else "v")),
        FACTUAL,
        said.polarity,
        said.is_correction,
    )
    employer = match["employer"]
    if employer and said.polarity > 0 and match["at"] == "at":
        employer = re.sub(r"^the ", "", _VALUE_END.sub("", employer)).strip()
        if employer[:1].isupper():
            yield Fact(
                who, "employer", employer, f"{_subject_words(who)} works at {employer}", FACTUAL, 1, said.is_correction
            )


def _name(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value = _name_of(match["v"])
    if value:
        yield Fact(
            said.clause.subject,
            "name",
            value,
            f"{_subject_words(said.clause.subject)} is called {value}",
            FACTUAL,
            1,
            said.is_correction,
        )


def _renamed(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    for fact in _name(match, said):
        yield replace(fact, is_correction=True)


def _name_of(text: str) -> str:
    """The name at the start of the text: words with a capital, or one alone in lower case."""
    text = _VALUE_END.sub("", text).strip(" .!")
    if match := re.match(
        r"[A-ZÀ-Þ][\w'’.-]{0,30}(?: (?:(?:de|von|van|da|del|bin|al) )?[A-ZÀ-Þ][\w'’.-]{0,30}){0,3}", text
    ):
        return match[0] if match.end() == len(text) or text[match.end()] == " " else ""
    if re.fullmatch(r"[^\W\d_]{2,20}", text) and text.lower() not in _NOT_A_NAME:
        return text
    return ""


_NOT_A_NAME: Final = frozenset(
    """back later when if now tomorrow tonight today at on a an the it me out here there missing not wrong sir maam
    crazy anytime again soon first whatever please private unknown""".split()  # noqa: SIM905
)


def _introduced(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    """`Hi, I'm Tom`: a name only after a greeting, as `I'm Dutch` looks the same."""
    value = match["v"]
    if said.clause.after_greeting and said.polarity > 0 and not re.search(r"(?:ish|ese|ch|ian|can|ist)$", value):
        yield from _name(match, said)


def _age(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value = match["v"]
    if not value.isdigit() or 3 <= int(value) <= 119:
        told = f"{_subject_words(said.clause.subject)} is {value} years old"
        yield Fact(said.clause.subject, "age", value, told, FACTUAL, said.polarity, said.is_correction)


def _tool(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    value, _, purpose = value.partition(" for ")
    other = ""
    for divider in (" instead of ", " rather than ", " over "):
        value, _, replaced = value.partition(divider)
        purpose, _, replaced_late = purpose.partition(divider)
        other = other or replaced or replaced_late
    other = other or ""
    value = re.sub(r"\s+(?:to|in|at|on|as|with|and)\b.*", "", value).strip()
    if (
        not value
        or len(value.split()) > 4
        or re.match(
            rf"(?:it|this|that|them|these|the|a|an|my|our|your|one|both|all|some|only|\d|{_NUMBER_WORDS})\b",
            value,
            re.IGNORECASE,
        )
    ):
        return
    thing = purpose.strip()
    if thing.lower() in {"everything", "it", "this", "that", "work"}:
        thing = ""
    yield from _tools(said, value, thing, other, said.polarity, correction=said.is_correction or bool(other))


def _tools(said: _Said, value: str, thing: str, other: str, polarity: int, *, correction: bool) -> Iterator[Fact]:
    who = "The user's team" if said.clause.person == "we" else _subject_words(said.clause.subject)
    purpose = f" for {third_person(thing)}" if thing else ""
    name, subject = slot("tool", re.sub(r"^(?:our|my|the|all|their) ", "", thing)), said.clause.subject
    if other:
        told = f"{who} no longer uses {other}{purpose}"
        yield Fact(subject, name, other, told, FACTUAL, -1, True)
    verb = "uses" if polarity > 0 else "no longer uses" if said.is_correction else "does not use"
    yield Fact(subject, name, value, f"{who} {verb} {value}{purpose}", FACTUAL, polarity, correction)


def _switched(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    value, _, thing = value.partition(" for ")
    value = re.sub(r"\s+(?:in|on|at|and)\b.*", "", value)
    if said.polarity > 0 and value[:1].isupper():
        for fact in _tools(said, value, thing, match["source"] or "", 1, correction=True):
            when = _when(match, said) if fact.polarity > 0 else ""
            yield replace(
                fact,
                statement=fact.statement
                + (f" since {when.removeprefix(' in ').strip()}" if when.startswith(" in ") else when),
            )


def _taste(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    flip = match["verb"].lower().rstrip("s") in {
        "hate",
        "dislike",
        "despise",
        "loathe",
        "detest",
        "cannot stand",
        "cannot bear",
    }
    yield from _list("like", PREFERENCE, flip=flip)(match, said)


def _prefer(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    parts = re.split(r" (?:over|to|rather than|instead of|than) ", value, maxsplit=1)
    if _EMPTY_VALUE.match(parts[0]) and not parts[1:]:
        return
    told = (
        f"{_subject_words(said.clause.subject)} {'prefers' if said.polarity > 0 else 'does not prefer'} "
        f"{third_person(value)}"
    )
    yield Fact(
        said.clause.subject, "prefer", third_person(parts[0]), told, PREFERENCE, said.polarity, said.is_correction
    )


def _habit(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    often = match["often"].lower()
    polarity = -said.polarity if often == "never" else said.polarity
    value = third_person(_VALUE_END.sub("", match["v"]).strip())
    told = (
        f"{_subject_words(said.clause.subject)} {often} "
        f"{_conjugated(value) if said.clause.person != 'other' else value}"
    )
    if said.polarity > 0:
        yield Fact(said.clause.subject, "habit", value, told, BEHAVIORAL, polarity, said.is_correction)


def _regular(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value = third_person(match["v"]).strip()
    yield Fact(said.clause.subject, "habit", value, _told(said), BEHAVIORAL, said.polarity, said.is_correction)


def _abstains(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    if said.polarity < 0 and not said.past:
        value, end = _value(match)
        kind = "diet" if match["verb"].lower().startswith("eat") else "habit"
        full = value if kind == "diet" else f"{match['verb']} {value}".strip()
        yield Fact(said.clause.subject, kind, third_person(full), _told(said, end), PREFERENCE, -1, said.is_correction)


def _gave_up(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    if said.polarity > 0 and not re.match(r"(?:working|here|trying)\b", value):
        told = f"{_subject_words(said.clause.subject)} has stopped {third_person(value)}"
        yield Fact(said.clause.subject, "habit", value, told, BEHAVIORAL, -1, True)


def _diet(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    yield Fact(
        said.clause.subject, "diet", match["v"], _told(said, match.end("v")), FACTUAL, said.polarity, said.is_correction
    )
    if match["intolerant"]:
        told = f"{_subject_words(said.clause.subject)} is {match['intolerant']} intolerant"
        yield Fact(
            said.clause.subject, "allergy", match["intolerant"], told, FACTUAL, said.polarity, said.is_correction
        )


def _owns(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, end = _value(match)
    polarity, words = said.polarity, said.text[:end]
    if match["none"]:
        polarity, value = -1, value.removeprefix("no ")
    if "called" in value or " named " in value:
        value = re.split(r" (?:called|named) ", value)[0]
    value = re.sub(r"^(?:an?|the) ", "", value)
    yield Fact(
        said.clause.subject,
        "owns",
        third_person(value),
        _told(said, words=words),
        FACTUAL,
        polarity,
        said.is_correction,
    )


def _plan(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    if said.polarity < 0 or said.past:
        return
    value = re.sub(r"\s+(?:because|but|so|and i|which|as)\b.*", "", match["v"], flags=re.IGNORECASE)
    if value and not _EMPTY_VALUE.match(value):
        end = match.start("v") + len(value)
        yield Fact(said.clause.subject, "plan", third_person(value), _told(said, end), EPISODIC, 1, said.is_correction)


def _staying(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    yield Fact(said.clause.subject, "location", match["v"], _told(said), FACTUAL, said.polarity, said.is_correction)


def _origin(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    who = said.clause.subject
    if other := re.match(r"(?P<a>[\w .-]{1,40}?),? but (?:from )?(?P<b>[\w .-]{1,40})", match["v"]):
        if said.polarity < 0:
            yield Fact(who, "origin", other["a"], f"{_subject_words(who)} is not from {other['a']}", FACTUAL, -1)
            yield Fact(who, "origin", other["b"], f"{_subject_words(who)} is from {other['b']}", FACTUAL)
        return
    value = re.sub(r"\s+and\b.*", "", _value(match)[0])
    if value[:1].isupper() or (match[0].lower().startswith("grew") and value.startswith("a ")):
        told = _told(said, match.start("v") + len(value))
        yield Fact(who, "origin", value, told, FACTUAL, said.polarity, said.is_correction)


# Of things: the deadline, my birthday, our budget.

_UNINFORMATIVE: Final = frozenset(
    """question problem issue point guess code computer laptop internet connection idea understanding answer
    request concern goal aim task query bad mistake fault apologies thinking assumption hope dream turn favorite
    favourite program script function app server test build error message input output file text essay prompt life
    day table database dataset repo repository branch cluster""".split()  # noqa: SIM905 (a table of words)
)
_INFORMATIVE = re.compile(
    rf"\d|\b(?:{_NUMBER_WORDS})\b|(?<!^)\b[A-Z][a-z]|^[A-Z]|\b(?:tomorrow|monday|tuesday|wednesday|thursday|friday)\b"
)
_VERBAL = re.compile(
    r"(?:not|being|going|getting|working|broken|about|that|to|how|why|very|so|too|also|still|here|there|all)\b",
    re.IGNORECASE,
)


def _named_thing(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value = _name_of(match["v"])
    if not value and re.match(r"[A-Z]", match["v"]):
        value, _ = _value(match)
    if value:
        thing = f"user's {match['thing'].strip().lower()}"
        yield Fact(thing, "name", value, f"The {thing} is called {value}", FACTUAL, 1, said.is_correction)


def _my_name(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    yield from _name(match, said)


def _of_relation(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    """`My manager is Dana Ruiz`; `my husband's birthday is 9 May`."""
    value, _ = _value(match)
    name = _name_of(value)
    if name == value and name[:1].isupper() and not re.search(r"(?:ish|ese|ian|can|German|French|Dutch)$", name):
        relation = match["relation"].lower()
        yield Fact(USER, slot(relation), name, f"The user's {relation} is {name}", FACTUAL, 1, said.is_correction)


def _relation_birthday(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    who = f"user's {match['relation'].lower()}"
    yield Fact(who, "birthday", value, f"The {who}'s birthday is {value}", FACTUAL, 1, said.is_correction)


def _my(kind: str) -> Build:
    def build(match: re.Match[str], said: _Said) -> Iterator[Fact]:
        value, _ = _value(match)
        if value and not _VERBAL.match(value):
            told = third_person(said.text[: match.start("v")] + value)
            yield Fact(USER, slot(kind), value, f"The user's {told.split(' ', 1)[1]}", FACTUAL, 1, said.is_correction)

    return build


def _deadline(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value = match["v"].strip()
    if not _INFORMATIVE.search(value) and not re.search(rf"\b(?i:{_DAY_NAME})\b", value, re.IGNORECASE):
        return
    thing = re.sub(r"^(?:the|my|our) ", "", match["thing"] or "")
    thing = thing or ("" if match["kind"].lower() == "deadline" else match["kind"])
    told = f"The {match['kind'].lower()}{f' for the {thing}' if match['thing'] else ''} is {value}"
    correction = said.is_correction or match["moved"] is not None
    yield Fact(USER, slot("deadline", thing), value, told, FACTUAL, 1, correction)


def _favourite(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value, _ = _value(match)
    if value and not _VERBAL.match(value) and not re.match(r"(?:thing|part|bit|way)\b", match["thing"]):
        told = f"The user's favourite {match['thing']} is {value}"
        yield Fact(USER, slot("favourite", match["thing"]), value, told, PREFERENCE, 1, said.is_correction)


_ABOUT_SOMEBODY = re.compile(r"(?:from|in|at|on|allergic|called|named|now|born)\b")
"""What a predicate says of a person, and better."""


def _attribute(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    thing = match["thing"].lower()
    value, _ = _value(match)
    words = thing.split()
    if re.fullmatch(RELATIONS, words[-1]) and _ABOUT_SOMEBODY.match(value):
        return
    if (
        words[-1] in _UNINFORMATIVE
        or re.fullmatch(r"(?:\w+ )?\w+ and .*", value)
        or "'s" in thing
        or _VERBAL.match(value)
        or not _INFORMATIVE.search(value)
    ):
        return
    new = words[0] == "new"
    bare = thing.removeprefix("new ")
    told = f"The user's {bare} {match['be'].lower()} {third_person(value)}"
    yield Fact(USER, slot("attribute", bare), third_person(value), told, FACTUAL, 1, said.is_correction or new)


# Orders to the assistant.


def _rule_order(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    negative = re.match(r"(?:please )?(?:never|do not|stop|avoid)\b", match["how"], re.IGNORECASE) is not None
    value = re.sub(r"\s+(?:please|from now on|again)$", "", match["v"].strip())
    whole = re.sub(r"\s+", " ", f"{match['how'].strip()} {value}".replace("please ", "").replace("Please ", "")).strip()
    told = f"The user asks: {whole[:1].lower()}{whole[1:]}"
    yield Fact(USER, "rule", value, told, PREFERENCE, -1 if negative else 1, said.is_correction)


def _answer_language(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    language = match["v"].capitalize()
    yield Fact(USER, "language", language, f"The user wants answers in {language}", PREFERENCE, 1, said.is_correction)


def _wants(match: re.Match[str], said: _Said) -> Iterator[Fact]:
    value = re.sub(r"\s*(?:from now on|always|in future|please)\b", "", match["v"]).strip()
    yield Fact(
        USER,
        "rule",
        third_person(value),
        f"The user wants {third_person(value)}",
        PREFERENCE,
        said.polarity,
        said.is_correction,
    )


@dataclass(frozen=True, slots=True)
class _Row:
    pattern: re.Pattern[str]
    build: Build
    heads: frozenset[str]
    """First words, in lower case; empty: any."""


def _row(heads: str, pattern: str, build: Build) -> _Row:
    return _Row(re.compile(pattern), build, frozenset(heads.split()))


_BE = r"(?:am|is|are|was|were)"
_PREDICATES: Final = (
    _row(
        "live lives living am is are reside resides",
        rf"(?:(?:live|lives|reside|resides)|{_BE} (?:living|based|residing)) (?:in|at|near) {_V}",
        _home,
    ),
    _row(
        "moved relocated have has",
        (
            r"(?:have |has )?(?:just |recently )?(?:moved|relocated) (?:from (?P<source>[A-Z][\w .-]{1,40}?) )"
            rf"?to {_V}"
        ),
        _moved,
    ),
    _row(
        "moved switched migrated changed have has",
        rf"(?:have |has )?(?:switched|migrated|changed|moved) (?:from (?P<source>[\w .#+-]{{1,40}}?) )to {_V}",
        _switched,
    ),
    _row("work works working am is are", rf"(?:(?:work|works)|{_BE} working) (?:at|for) {_V}", _employer),
    _row(
        "started joined have has start",
        (
            r"(?:have |has )?(?:just |recently )?(?:started|joined)(?: work)?(?: working)?(?: at)? (?P<capital>)"
            rf"{_V}"
        ),
        _employer,
    ),
    _row(
        "left quit resigned have has",
        (
            r"(?:have |has )?(?:just |recently )?(?P<gone>left|quit|resigned)(?: my job)?(?: at| from)? "
            rf"(?P<capital>){_V}"
        ),
        _employer,
    ),
    _row(
        "work works am is are was were",
        (
            rf"(?:(?:work|works|working) as|{_BE}(?: working as)?) (?:an?|the) (?P<kind>(?:(?!bit|lot|little|fan|"
            rf"friend)[\w-]+ ){{0,3}})(?P<v>(?i:{_OCCUPATIONS}))\b(?! of (?:this|that|the (?:story|film)))(?: "
            r"(?P<at>at|for|of|with|in) (?P<employer>[^,;()]{1,60}))?(?=$| )"
        ),
        lambda m, s: iter(()) if m[0].lower().startswith("was") else _role(m, s),
    ),
    _row(
        "teach teaches",
        rf"{_V}",
        lambda m, s: iter(
            [Fact(s.clause.subject, "role", m["v"], _told(s), FACTUAL, s.polarity)]
            if s.polarity > 0 and re.match(r"teach(?:es)? [a-z]{4,}", m["v"])
            else []
        ),
    ),
    _row("am is", rf"{_BE} (?:called|named|known as) {_V}", _name),
    _row("am", r"am (?P<v>[A-Z][a-zà-ÿ]{1,20})(?= from\b|$)", _introduced),
    _row("go goes", rf"goe?s? by {_V}", _name),
    _row(
        "changed have has",
        rf"(?:have |has )?changed (?:my|her|his|their) name to {_V}",
        _renamed,
    ),
    _row("am is are", rf"{_BE} (?P<v>\d{{1,3}}|{_NUMBER_WORDS})(?: years? old)?$", _age),
    _row("turned", r"turned (?P<v>\d{1,3})\b(?!%)", _age),
    _row("am is come comes are", rf"(?:{_BE}|comes?) (?:originally )?from {_V}", _origin),
    _row("grew", rf"grew up in {_V}", _origin),
    _row(
        "was",
        r"was born in (?P<v>[A-Z][^,;()\n]{1,60})",
        lambda m, s: _origin(m, s) if s.clause.person == "i" else iter(()),
    ),
    _row(
        "am is are",
        rf"{_BE} (?:very |severely |deadly |also )?allergic to {_V}",
        lambda m, s: (
            iter(()) if re.match(r"(?:mondays|work|stupid)", m["v"], re.IGNORECASE) else _list("allergy")(m, s)
        ),
    ),
    _row("have has", r"(?:have|has) an? (?:severe |bad |mild )?(?P<v>[\w ]{2,30}) allergy", _plain("allergy")),
    _row(
        "am is are",
        (
            rf"{_BE} (?:an? )?(?:strict |lifelong )?(?P<v>(?i:{_DIETS}))\b(?: and (?P<intolerant>\w+)"
            r"[- ]intolerant)?"
        ),
        _diet,
    ),
    _row(
        "am is are",
        rf"{_BE} (?P<v>\w{{3,20}})[- ]intolerant\b",
        lambda m, s: (replace(f, statement=f"{f.statement} intolerant") for f in _plain("allergy")(m, s)),
    ),
    _row("am is are", rf"{_BE} (?:also )?(?P<v>(?i:{_CONDITIONS}))\b", _plain("health")),
    _row(
        "have has suffer suffers", rf"(?:have|has|suffers? from) (?:also )?(?P<v>(?i:{_ILLNESSES}))\b", _plain("health")
    ),
    _row(
        "speak speaks",
        rf"speaks? (?:fluent |some |a little |a bit of )?(?P<v>(?:(?i:{_LANGUAGES}))\b[^,;.]{{0,60}})",
        _list("speaks"),
    ),
    _row(
        "have has own owns got",
        (
            rf"(?:(?:have|has)(?: got)?|own|owns|got) (?P<v>(?:(?P<none>no )|an? |one |(?:{_NUMBER_WORDS}|"
            rf"\d{{1,2}}) )(?:[\w-]+ ){{0,2}}(?:(?i:{_OWNED}))\b(?! (?:appointment|problem|question|accident))"
            r"[^,;()]{0,60})"
        ),
        _owns,
    ),
    _row(
        "have has own owns",
        r"(?:(?:have|has)(?: got)|own|owns) (?P<v>(?P<none>no )?an? [A-Z0-9][^,;()\n]{1,60})",
        _owns,
    ),
    _row("have has", r"(?:have|has) (?P<none>)(?P<v>(?:an? )?(?:car|dog|cat))$", _owns),
    _row(
        "drink drinks eat eats smoke smokes drive drives fly use",
        rf"(?P<verb>drinks?|eats?|smokes?|drives?|fly)(?: {_V})?$",
        lambda m, s: _abstains(m, s) if m["v"] else iter(()),
    ),
    _row(
        (
            "love loves like likes enjoy enjoys adore adores hate hates dislike dislikes despise despises loathe "
            "detest cannot really absolutely"
        ),
        (
            rf"{_TASTE}(?P<verb>loves?|likes?|enjoys?|adores?|hates?|dislikes?|despises?|loathe|detest|cannot "
            rf"stand|cannot bear) {_V}"
        ),
        _taste,
    ),
    _row(
        "am is are",
        rf"{_BE} (?:not )?(?:an? )?(?:really )?(?:big |huge |great )?(?:fan of|fond of|really into|into) {_V}",
        _list("like", PREFERENCE),
    ),
    _row(
        "prefer prefers strongly would generally much",
        rf"(?:would )?(?:strongly |generally |much )?(?:prefers?|rather(?: have| use| get| see)?) {_V}",
        _prefer,
    ),
    _row("use uses am is are", rf"(?:uses?|{_BE} using) {_V}", _tool),
    _row(
        "always usually normally typically never only often",
        (
            rf"(?P<often>always|usually|normally|typically|never|only|often) (?P<v>(?:{_PRESENT_HABIT})"
            r"s?\b[^;()]{1,90})"
        ),
        _habit,
    ),
    _row(
        "go run swim cycle meet deploy train work release ship play goes runs plays works",
        (
            rf"(?P<v>(?:{_PRESENT_HABIT})(?:s|es)?\b[^;()]{{0,60}}\b(?:every|each|on) (?i:{_DAY_NAME})"
            r"s?\b[^;()]{0,40})"
        ),
        lambda m, s: _regular(m, s) if re.search(r"every|each|(?:day|end)s\b", m["v"]) else iter(()),
    ),
    _row(
        "have has stopped quit gave given",
        (
            r"(?:have |has )?(?:stopped|quit|gave up|given up) (?P<v>\w{3,15}ing\b[^,;()]{0,60}|coffee|"
            r"alcohol|sugar|meat)"
        ),
        _gave_up,
    ),
    _row("am are is", rf"{_BE} (?:planning|hoping|about) to {_V}", _plan),
    _row("am are is", rf"{_BE} going to (?!be (?:honest|fair))(?=\w+ |[A-Z]){_V}", _plan),
    _row("am are is", rf"{_BE} (?:flying|travell?ing|moving|driving|sailing|cycling) (?:back )?to {_V}", _plan),
    _row("am are is", rf"{_BE} (?:training|preparing|studying|saving) for {_V}", _plan),
    _row(
        "will",
        (
            r"will (?P<v>(?:start|move|fly|travel|visit|launch|leave|retire|marry|finish|graduate|join)"
            r"\b[^,;()]{2,80})"
        ),
        _plan,
    ),
    _row(
        "want wants",
        (
            r"wants? to (?P<v>(?:run|learn|lose|quit|visit|move|start|become|travel|retire|climb|finish my)"
            r"\b[^,;()]{2,80})"
        ),
        _plan,
    ),
    _row(
        "have has",
        (
            r"(?:have|has) (?:got )?(?P<v>(?:an?|my) (?:[\w'-]+ ){0,3}(?:appointment|interview|exam|flight|"
            r"surgery|wedding|deadline|conference|meeting|presentation)\b[^,;()]{0,60})"
        ),
        lambda m, s: (
            _plan(m, s)
            if re.search(rf"\b(?:tomorrow|tonight|today|next|(?i:{_DAY_NAME})|\d)", m["v"], re.IGNORECASE)
            else iter(())
        ),
    ),
    _row(
        "am is are", rf"{_BE} in (?P<v>[A-Z][\w .-]{{1,40}}?) (?:until|till|through) (?P<until>[^,;]{{2,40}})", _staying
    ),
    _row(
        "want",
        r"want (?P<v>(?:all|every|the|my|your|short|no)\b[^;()]{3,90}\b(?:from now on|always|in future))$",
        _wants,
    ),
    _row("would", r"would like (?P<v>(?:all|your|short|long)\b[^;()]{3,90})", _wants),
)


_OF_THINGS: Final = (
    _row("my", rf"my (?:full |first |real |new )?name is (?:now |spelled |actually |spelt )?{_V}", _my_name),
    _row(
        "my our",
        rf"(?:my|our) (?P<thing>{RELATIONS})(?:'s name)? is (?:called |named )(?P<v>[^,;()]{{1,60}})",
        _named_thing,
    ),
    _row("my our", rf"(?:my|our) (?P<thing>{RELATIONS})'s name is (?P<v>[^,;()]{{1,60}})", _named_thing),
    _row("my our", rf"(?:my|our) (?P<relation>{RELATIONS}) is (?P<v>[A-Z][^,;()]{{1,60}})$", _of_relation),
    _row("my our", rf"(?:my|our) (?P<relation>{RELATIONS})'s birthday is (?:on )?{_V}", _relation_birthday),
    _row("my", rf"my birthday is (?:on )?(?:the )?{_V}", _my("birthday")),
    _row("my", rf"my time ?zone is {_V}", _my("timezone")),
    _row(
        "my our",
        rf"(?:my|our) (?:all[- ]time )?(?:favou?rite|preferred) (?P<thing>[\w -]{{2,30}}?) (?:is|are) {_V}",
        _favourite,
    ),
    _row(
        "the my our",
        (
            r"(?:the|my|our) (?P<kind>deadline|due date|code freeze|release date|launch date|submission date)(?: "
            r"for (?P<thing>[\w -]{2,40}?))? (?:is (?:now )?|will be |(?P<moved>(?:has |is |was |got |had )"
            r"?(?:been )?(?:changed|moved|pushed|shifted|postponed|extended|brought forward)(?: back)? to ))"
            r"(?P<v>(?:on |by )?[^,;()]{2,60})"
        ),
        _deadline,
    ),
    _row("my our", r"(?:my|our) (?P<thing>(?:[\w'-]+ ){0,2}[\w'-]+) (?P<be>is|are) (?P<v>[^,;()]{1,80})", _attribute),
)
_ORDERS: Final = (
    _row("call", rf"call me {_V}", _name),
    _row("please", rf"please call me {_V}", _name),
    _row(
        "everyone everybody people friends they",
        rf"(?:everyone|everybody|people|friends|they|my friends) calls? me {_V}",
        _name,
    ),
    _row(
        "",
        (
            r"(?:please )?(?:(?:always|from now on,?|only)(?: please)? )(?:please )?(?:answer|reply|respond|write|"
            rf"speak|talk)(?: to me)? (?:only )?in (?P<v>(?i:{_LANGUAGES}))\b"
        ),
        _answer_language,
    ),
    _row(
        "answer reply respond please",
        (
            rf"(?:please )?(?:answer|reply|respond|write|speak)(?: to me)? (?:only )?in (?P<v>(?i:{_LANGUAGES})) "
            r"(?:from now on|always|please from now on)"
        ),
        _answer_language,
    ),
    _row(
        "always never please",
        rf"(?P<how>(?:please )?(?:always|never)) (?P<v>(?:{_INSTRUCTION})\b[^;()]{{2,100}})",
        _rule_order,
    ),
    _row(
        "do please",
        (
            r"(?P<how>(?:please )?do not) (?P<v>(?:use|add|include|call|start|end|apologi[sz]e|address|mention|"
            r"make assumptions|explain)\b[^,;()]{2,80})"
        ),
        lambda m, s: iter(()) if re.search(r"\b(?:here|this|that|yet|it)\b", m["v"]) else _rule_order(m, s),
    ),
    _row("stop please avoid", r"(?P<how>(?:please )?(?:stop|avoid)) (?P<v>\w{3,15}ing\b[^,;()]{2,60})", _rule_order),
    _row(
        "please keep",
        (
            r"(?P<how>(?:please )?keep) (?P<v>(?:your|the|all) (?:answers|responses|replies|explanations|messages)"
            r"\b[^;()]{2,60})"
        ),
        _rule_order,
    ),
    _row(
        "when",
        r"when you [\w ]{2,40}, ?(?P<how>(?:please )?(?:do not|always|never)) (?P<v>[^;()]{3,80})",
        _rule_order,
    ),
    _row(
        "from",
        (
            rf"from now on,? (?P<how>(?:please )?(?:do not|always|never|)) ?(?P<v>(?:{_INSTRUCTION})"
            r"\b[^;()]{3,80})"
        ),
        _rule_order,
    ),
)

# Other languages: the commonest sentences, anchored like the English ones. The statement is English, the value as said.


@dataclass(frozen=True, slots=True)
class _Foreign:
    pattern: re.Pattern[str]
    slot: str
    statement: str
    category: Category = FACTUAL
    polarity: int = 1
    is_correction: bool = False


_F = r"(?P<v>[^\s,;.()][^,;.()\n]{0,60})"
_FOREIGN: Final = tuple(
    _Foreign(re.compile(pattern), name, statement, category, polarity, correction)
    for pattern, name, statement, category, polarity, correction in (
        (rf"(?:ich )?wohne nicht mehr in {_F}", "home", "no longer lives in {}", FACTUAL, -1, True),
        (rf"(?:ich )?(?:wohne|lebe) (?:jetzt )?in {_F}", "home", "lives in {}", FACTUAL, 1, False),
        (rf"(?:ich )?arbeite (?:bei|für)(?: de[rmn])? {_F}", "employer", "works at {}", FACTUAL, 1, False),
        (rf"(?:ich )?bin allergisch gegen {_F}", "allergy", "is allergic to {}", FACTUAL, 1, False),
        (rf"mein [Nn]ame ist {_F}", "name", "is called {}", FACTUAL, 1, False),
        (r"(?:ich )?(?:heiße) (?P<v>[A-ZÄÖÜ]\w+)", "name", "is called {}", FACTUAL, 1, False),
        (
            r"(?:ich )?bin (?P<v>[A-ZÄÖÜ]\w+(?:in|er|arzt|ärztin|lehrer|entwickler|ingenieur))$",
            "role",
            "is a {}",
            FACTUAL,
            1,
            False,
        ),
        (r"(?:ich )?bin (?P<v>[Vv]egetarier(?:in)?|[Vv]egan(?:er(?:in)?)?)$", "diet", "is {}", FACTUAL, 1, False),
        (rf"(?:ich )?mag kein(?:e|en)? {_F}", "like", "does not like {}", PREFERENCE, -1, False),
        (rf"(?:ich )?mag (?!es|das|dich|nicht|lieber){_F}", "like", "likes {}", PREFERENCE, 1, False),
        (rf"(?:ich )?(?:trinke|esse|nehme|mag) lieber {_F}", "prefer", "prefers {}", PREFERENCE, 1, False),
        (rf"j'habite (?:à|en|au) {_F}", "home", "lives in {}", FACTUAL, 1, False),
        (rf"(?:je )?travaille (?:chez|à|pour) {_F}", "employer", "works at {}", FACTUAL, 1, False),
        (r"(?:je )?m'appelle (?P<v>[A-ZÀ-Þ][\w-]+(?: [A-ZÀ-Þ][\w-]+)?)", "name", "is called {}", FACTUAL, 1, False),
        (rf"(?:je )?suis allergique (?:aux?|à la|à l'|à) ?{_F}", "allergy", "is allergic to {}", FACTUAL, 1, False),
        (rf"(?:je )?n'aime pas (?:les?|la|l') ?{_F}", "like", "does not like {}", PREFERENCE, -1, False),
        (rf"j'(?:aime|adore) (?:les?|la|l') ?{_F}", "like", "likes {}", PREFERENCE, 1, False),
        (r"(?:je )?suis (?P<v>végétarienn?e?|végane?)$", "diet", "is {}", FACTUAL, 1, False),
        (rf"(?:yo )?vivo en {_F}", "home", "lives in {}", FACTUAL, 1, False),
        (rf"(?:yo )?trabajo (?:en|para) {_F}", "employer", "works at {}", FACTUAL, 1, False),
        (r"me llamo (?P<v>[A-ZÀ-Þ][\w-]+(?: [A-ZÀ-Þ][\w-]+)?)", "name", "is called {}", FACTUAL, 1, False),
        (rf"(?:yo )?soy alérgic[oa] (?:a (?:los|las|la) |al? ){_F}", "allergy", "is allergic to {}", FACTUAL, 1, False),
        (rf"no me gustan? (?:el|la|los|las) ?{_F}", "like", "does not like {}", PREFERENCE, -1, False),
        (rf"me gustan? (?:el|la|los|las) ?{_F}", "like", "likes {}", PREFERENCE, 1, False),
        (r"(?:yo )?soy (?P<v>vegetarian[oa]|vegan[oa])$", "diet", "is {}", FACTUAL, 1, False),
    )
)
_FOREIGN_HEADS: Final = frozenset(
    [
        "ich",
        "wohne",
        "lebe",
        "arbeite",
        "bin",
        "heiße",
        "mag",
        "trinke",
        "esse",
        "nehme",
        "mein",
        "je",
        "j'habite",
        "j'aime",
        "j'adore",
        "m'appelle",
        "suis",
        "travaille",
        "n'aime",
        "vivo",
        "trabajo",
        "soy",
        "me",
        "no",
        "yo",
    ]
)


def _foreign(clause: Clause) -> Iterator[Fact]:
    first = clause.said.split(" ", 1)[0].lower()
    if clause.subject != USER or first not in _FOREIGN_HEADS:
        return
    for row in _FOREIGN:
        if match := row.pattern.match(clause.said[:1].lower() + clause.said[1:]):
            value = re.split(r" (?:als|und|et|y|pero|mais|aber|que|weil|seit|desde|depuis) ", match["v"] or "")[
                0
            ].strip()
            if value:
                statement = f"The user {row.statement.format(value)}"
                yield Fact(
                    USER,
                    row.slot,
                    value,
                    statement,
                    row.category,
                    row.polarity,
                    row.is_correction or clause.is_correction,
                )
                return
