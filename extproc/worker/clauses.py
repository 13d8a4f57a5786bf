"""Sentences taken apart into clauses that say one thing of one subject, and what must not be believed. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from extproc.worker.extract import USER
from extproc.worker.prose import QUOTE_MARK, is_question, without_quotations, words_of

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "RELATIONS",
    "Clause",
    "clauses",
    "ends_own_words",
    "gives_reason",
    "is_doubtful",
    "is_in_earnest",
    "is_text_work",
    "spelled_out",
]

_LONGEST = 400
"""Characters of a sentence that states a fact."""
_MOST_CLAUSES = 12
"""Of one sentence: more is a list."""

RELATIONS: Final = (
    "sister|brother|mother|father|mum|mom|dad|wife|husband|partner|girlfriend|boyfriend|fiancée?|son|"
    "daughter|child|kid|baby|"
    "cousin|uncle|aunt|niece|nephew|grandmother|grandfather|grandma|grandpa|boss|manager|colleague|"
    "coworker|co-worker|friend|"
    "best friend|roommate|flatmate|housemate|neighbou?r|dog|cat|horse|rabbit|landlord|doctor|dentist|therapist|teacher|"
    "ex-wife|ex-husband|ex|twin|stepson|stepdaughter|mother-in-law|father-in-law|in-laws|parents|kids|"
    "children|assistant|"
    "company|team|startup|start-up|business|employer|band|school"
)

# `I'm` and `I am` must read alike. The apostrophes of possessives stay.
_CONTRACTED: Final = re.compile(
    r"\b(?:(can)'?t|(won)'t|(shan)'t|(\w{2,7})n't|(i)'?m|(we|you|they)'re|(i|we|you|they)'ve|(i|we|you|"
    r"they|he|she|it)'d"
    r"|(i|we|you|they|he|she|it)'ll|(name|that|it|he|she|what|who|here|there)'s)\b(?!')",
    re.IGNORECASE,
)
_BARE: Final = frozenset({"cant", "wont", "im"})
"""What is contracted without an apostrophe."""
_EXPANDED: Final = (
    "cannot",
    "will not",
    "shall not",
    "{} not",
    "{} am",
    "{} are",
    "{} have",
    "{} would",
    "{} will",
    "{} is",
)

_JOKES = re.compile(
    r"\b(?:lol|lmao|rofl|haha\w*|hehe\w*|jk|j/k|just kidding|kidding|joking|as a joke|sarcasm)\b"
    r"|(?:^|\s)/s\b|[😂🤣😜🙃😉😛]|\b(?:oh sure|yeah right|oh great|oh, great|as if)\b"
    r"|\bsure,? because\b|\boh,? (?:joy|wonderful|brilliant|lovely|fantastic|perfect)\b|[.!…] not[.!]*$"
    r"|(?:^|[.!?…\n] ?)(?:wow|brilliant|terrific|fantastic|wonderful)[,!]+ i\b|, (?:clearly|obviously|naturally)[.!]*$",
    re.IGNORECASE,
)
_PLAY = re.compile(
    r"\b(?:role-?play\w*|pretend\w*|act as|you are now|you're now|imagin\w+|hypothetical\w*|suppos(?:e|ing)"
    r"|assum(?:e|ing)"
    r"|let'?s say|let us say|say that|for example|for instance|e\.g\.|what if|in the (?:song|film|movie|"
    r"book|story|novel)"
    r"|in character|my character|once upon a time|stell dir vor|imaginons|supongamos)\b",
    re.IGNORECASE,
)
_TEXT_WORK = re.compile(
    r"^(?:please |can you |could you |kindly |now )*(?:translate|rewrite|rephrase|paraphrase|proofread|"
    r"proof-read|correct (?:this|my|the)|check (?:my|the) (?:english|grammar|spelling|translation)|"
    r"summari[sz]e|fix the (?:grammar|spelling|text)|improve (?:this|the)|edit this|shorten|simplify|"
    r"analy[sz]e (?:this|the)|"
    r"classify|übersetze|traduis|traduce)\b",
    re.IGNORECASE,
)
_DOUBTFUL = re.compile(
    r"\b(?:if|unless|whether|in case|maybe|perhaps|possibly|probably|apparently|supposedly|allegedly|might|could|"
    r"would(?! (?:rather|prefer|like (?:you|all|my|the|short|long)))"
    r"|should|wish|wonder|hope|not sure|doubt|think about|thinking of|feel like|as though|basically|practically|"
    r"not true that|never said|said that|told me|nobody|no one|wenn|falls|vielleicht|würde|wäre|hätte|"
    r"peut-être|quizás|tal vez|ojalá)\b"
    r"|\bdo not think\b|\bsi (?:je|j'|yo)\b",
    re.IGNORECASE,
)
_OF_OTHERS = re.compile(
    r"\b(?:said|says|wrote|writes) (?:my|our|the|a|he|she|they)\b[^,;]{0,40}$"
    r"|,\s+(?:he|she|they|(?:my|our) \w+) (?:said|says|wrote|writes|told \w+)$|,\s+(?:says|said) \w+$"
    r"|^as (?:they|people|we) say\b",
    re.IGNORECASE,
)
"""Words that say at the end, or first, that all of the sentence is somebody else's."""
_TEMPLATE = re.compile(r"[{}\[\]]|<[A-Za-z]|\$\{")
"""`I live in <city>`: not yet said."""
_OF_JOKES: Final = frozenset(
    """lol lmao rofl jk k kidding joking joke sarcasm s sure right great if joy wonderful brilliant lovely fantastic
    perfect terrific wow not clearly obviously naturally""".split()  # noqa: SIM905 (a table of words)
)
_OF_PLAY: Final = frozenset(
    """play act now suppose supposing assume assuming say example instance g if song film movie book story novel
    character upon stell imaginons supongamos""".split()  # noqa: SIM905 (a table of words)
)
"""A word of each alternative of `_JOKES` and `_PLAY`, but for what only begins like one and has no letters."""
_BEGUN_IN_PLAY: Final = re.compile(r"haha|hehe|[😂🤣😜🙃😉😛]|roleplay|pretend|imagin|hypothetical")
_OF_DOUBT: Final = frozenset(
    """if unless whether case maybe perhaps possibly probably apparently supposedly allegedly might could would should
    wish wonder hope sure doubt think thinking feel though basically practically true said told nobody one wenn falls
    vielleicht würde wäre hätte peut quizás tal ojalá si""".split()  # noqa: SIM905 (a table of words)
)
"""A word of each alternative of `_DOUBTFUL`."""
_LEAD = re.compile(
    r"(?P<word>well|oh|also|so|and|but|fyi|hi|hello|hey|hi there|hello there|thanks|thank you|sorry|okay|"
    r"ok|yes|yeah|no(?=[,:!.–-]| (?:i|we|my|our|it)\b)|note|note that|just so you know|"
    r"for context|for the record|honestly|great|btw|by the way|remember that|remember|please note|please "
    r"note that|please remember that|to be clear|"
    r"as you know|as i said|anyway|context|background|about me|update|edit|reminder|me|then|because|since|"
    r"though|although|while|"
    r"i think|i guess|i believe|of course|"
    r"(?P<correction>actually|correction|in fact|i changed my mind|i have changed my mind|i misspoke|"
    r"scratch that|wait|wrong|that is wrong|that was wrong)|turns out|it turns out|"
    r"turns out that|i meant(?= i\b| my\b))(?P<colon>[,:!. –-]+)",
    re.IGNORECASE,
)
_COLON = re.compile(r":(?=\s|$)")
_BREAK = re.compile(
    r"\s*;\s*|\s+[–—-]\s+|[,.!]?\s+(?:and|but|so|because|while|although|though|whereas|since|und|aber|et|"
    r"mais|y|pero)\s+"
    r"(?=(?:i|we|my|our|please|never|always|call|do|he|she|they|it|ich|wir|mein|meine|je|nous|mon|ma|the)"
    r"\b|j'|(?:soy|vivo|trabajo|tengo|me|no)\b)"
    r"|,\s+(?=(?:i|we|my|our|please|never|call|he|she|they|ich|je|it)\b|so\b|but\b|because\b)",
    re.IGNORECASE,
)
_SHARED_SUBJECT = re.compile(
    r"(?<=\w),?\s+(?:and|but|und|et|y)\s+(?=(?:also |now |always |never |then |really )?"
    r"(?:work|live|love|hate|like|prefer|studied|study|use|speak|have|has|drink|eat|am|is|are|do not|does "
    r"not|moved|run|own|enjoy|"
    r"dislike|cannot|teach|play|go|bin|arbeite|wohne|habe|mag|trabajo|vivo|tengo|soy)s?\b)",
    re.IGNORECASE,
)
_FIRST_PERSON: Final = frozenset({"i", "we", "ich", "wir", "je"})
_REASON = re.compile(
    r"(?:since|because|given that|considering(?: that)?|as) (?=i |we |my |our |an? )(?P<fact>[^,?]{3,120}),",
    re.IGNORECASE,
)
_OF_RELATION = re.compile(
    r"(?:[Mm]y|[Oo]ur) (?:(?:older|younger|eldest|oldest|youngest|little|big|late|new|old) )"
    rf"?(?P<relation>(?i:{RELATIONS}))"
    r"(?:,? (?P<name>[A-ZÀ-Þ][\w'-]{1,30})(?=,? [a-z]),?)? (?P<rest>.+)"
)
_NAMED = re.compile(r"(?P<name>[A-ZÀ-Þ][a-zà-ÿ]{1,20}(?: [A-ZÀ-Þ][a-zà-ÿ]{1,20})?) (?P<rest>[a-z].+)")
_NO_NAME: Final = frozenset(
    """the this that these those it he she they you we who what which there here everyone everybody someone somebody
    nobody nothing everything something one people my our your his her its their a an no not some many most all
    both each every any other another such please never always call stop keep use do let make write tell give show
    add want need just also then now today tomorrow yesterday code python life time work home school god""".split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Clause:
    subject: str
    """USER, `user's sister`, `user's friend Luca`, a name."""
    said: str
    """What is said of the subject, from its verb on, contractions spelled out. For `my shoe size is 43`: the whole."""
    person: str
    """`i`, `we`, `my` (the clause begins with a thing of the user's), `other`, or empty for an order."""
    is_correction: bool
    tail: str = ""
    """What followed after a comma, up to the end of the clause."""
    after_greeting: bool = False


def is_in_earnest(text: str) -> bool:
    """Whether the turn speaks for itself: no joke, no play, no text that is to be worked on."""
    words = words_of(text)
    may_be = not (_OF_JOKES.isdisjoint(words) and _OF_PLAY.isdisjoint(words)) or _BEGUN_IN_PLAY.search(text.lower())
    return not (may_be and (_JOKES.search(text) or _PLAY.search(text)))


def is_text_work(sentence: str) -> bool:
    """Whether the sentence hands over a text: what follows it is that text."""
    return _TEXT_WORK.match(sentence) is not None


def is_doubtful(text: str) -> bool:
    """Whether it is said under a condition, with a doubt, or as somebody else's words."""
    return _DOUBTFUL.search(spelled_out(text)) is not None


def spelled_out(text: str) -> str:
    text = text.replace("’", "'")
    return _CONTRACTED.sub(_expand, text) if "'" in text or not _BARE.isdisjoint(words_of(text)) else text


def _expand(match: re.Match[str]) -> str:
    number = match.lastindex or 1
    return _EXPANDED[number - 1].format(match[number])


def clauses(sentence: str) -> Iterator[Clause]:
    """The clauses that state something outright; of questions and conditions only the reason given before them."""
    if len(sentence) > _LONGEST:
        return
    text = spelled_out(sentence)
    if is_question(sentence):
        if match := _REASON.match(text):
            fact = match["fact"]
            yield from _stated(f"I am {fact}" if re.match("an? ", fact) else fact)
        return
    text = without_quotations(text)
    yield from _stated(text)


def gives_reason(sentence: str) -> bool:
    """Whether a question says first what is so: `As a vegan, what can I eat?`"""
    return _REASON.match(sentence) is not None


def ends_own_words(sentence: str) -> bool:
    """Whether the sentence has a colon after which somebody else's words come."""
    rest, _, _ = _without_leads(sentence)
    return _COLON.search(rest) is not None


def _stated(text: str) -> Iterator[Clause]:
    text, is_correction, after_greeting = _without_leads(text.strip())
    if ":" in text:
        text = _COLON.split(text, maxsplit=1)[0]
    text = text.rstrip(" .!…。)")
    if _OF_OTHERS.search(text) or _TEMPLATE.search(text):
        return
    may_doubt = not _OF_DOUBT.isdisjoint(words_of(text))
    if match := re.match(r"(?:since|because|as) (?=i |we |an? |the )", text, re.IGNORECASE):
        text = text[match.end() :]
    for part in _BREAK.split(text, maxsplit=_MOST_CLAUSES):
        part, corrects, greeted = _without_leads(part.strip())  # noqa: PLW2901
        is_correction |= corrects
        if QUOTE_MARK in part or (may_doubt and _DOUBTFUL.search(part)):
            if re.search(r"\b(?:if|unless|whether|in case|would|wenn|falls)\b", part, re.IGNORECASE):
                return  # the main clause beside a condition is as uncertain
            continue
        yield from _with_subject(part, is_correction=is_correction, after_greeting=after_greeting or greeted)


def _without_leads(text: str) -> tuple[str, bool, bool]:
    """The text from its subject on; whether a word before it says that something was wrong; whether one greeted."""
    is_correction = greets = False
    for _ in range(4):
        match = _LEAD.match(text)
        if match is None:
            break
        is_correction |= match["correction"] is not None
        greets |= match["word"].lower()[:2] in {"hi", "he"}
        text = text[match.end() :]
    return text, is_correction, greets


def _with_subject(text: str, *, is_correction: bool, after_greeting: bool) -> Iterator[Clause]:
    first, _, rest = text.partition(" ")
    lowered = first.lower()
    if lowered in _FIRST_PERSON and rest:
        clause = Clause(
            USER, rest, "we" if lowered in {"we", "wir"} else "i", is_correction, after_greeting=after_greeting
        )
    elif match := _OF_RELATION.match(text):
        who = f"{match['relation'].lower()} {match['name'] or ''}".strip()
        clause = Clause(f"user's {who}", match["rest"], "other", is_correction)
        if match["rest"].startswith(("is ", "are ", "has ", "was ")):
            yield Clause(USER, text, "my", is_correction)
    elif lowered in {"my", "our", "the"} or lowered.endswith("'s"):
        yield Clause(USER, text, "my", is_correction)
        return
    elif (match := _NAMED.match(text)) and match["name"].split()[0].lower() not in _NO_NAME:
        clause = Clause(match["name"], match["rest"], "other", is_correction)
        yield Clause(USER, text, "", is_correction)
    else:
        yield Clause(USER, text, "", is_correction)
        return
    for said in _SHARED_SUBJECT.split(clause.said, maxsplit=_MOST_CLAUSES):
        head, _, tail = said.strip().partition(",")
        yield replace(clause, said=head, tail=tail.strip())
