"""Words of texts: stems and stop words; what a query asks for. Pure.

Memories and queries pass the same tokeniser, so that equal words give equal stems; queries lose question words as well.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, cast

import Stemmer  # type: ignore[import-not-found]  # PyStemmer ships no types

__all__ = ["Moment", "Query", "Subject", "WrittenDate", "content_words", "parse_query", "stems"]


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_STOP_WORDS = _set(
    """a about above after again against all also am an and any are aren as at be because been before being below
    between both but by can cannot could couldn d did didn do does doesn doing don down during each either few for from
    further had hadn has hasn have haven having he her here hers herself him himself his i if in into is isn it its
    itself just let ll m may me might mine more most must my myself no nor not now of off on once only or other our ours
    ourselves out over own re s same shall she should shouldn so some such t than that the their theirs them themselves
    then there these they this those through to too under until up upon us ve very was wasn we were weren what when
    where which while who whom whose why will with won would wouldn yes you your yours yourself yourselves

    das dem der dein deine deinen deiner doch ein eine einem einen einer eines haben hatte hatten ich ihm ihn ihr
    ist kann kannst kein keine keinen konnen mein meine meinem meinen meiner mich muss nach nicht noch nur oder
    schon sein seine seinen seit sich sie sind soll sollte uber und uns unser unsere unseren vom von wann warum
    waren welche welchem welchen welcher welches wem wen wenn wer werden wie wieso wird wir wurde wurden zum zur

    aux avait avec avez avons cet cette chez combien dans du elles est et etaient etait faut il ils je le les leur
    leurs mes nos notre nous pourquoi quand que quel quelle quelles quels qui quoi sommes sont suis tres tu une
    votre vous

    cual cuales cuando cuanta cuantas cuanto cuantos del donde el eran esas ese esos estaba estan este estos fueron
    las los mis muy nuestra nuestras nuestro nuestros para pero porque quien sus tengo tiene una unas unos

    aos das dos esse essa estao estava eu foi foram isso meu meus minha minhas muito nao nossa nosso onde os pela
    pelo quais qual quanta quantas quanto quantos quem sao seu seus sua suas um uma"""
)
"""Words that carry no subject, in no index and in no query; halves of contractions (`don`, `ll`) are among them. Those
of German, French, Spanish and Portuguese are without accents, and only where English has no such word (`die`)."""

_QUESTION_WORDS = _set(
    """how kind type sort many much ever please tell remind remember recall know called exactly ok okay hey hi hello
    thanks thank"""
)
"""Words that ask. In a memory they may carry a subject, in a query they only dilute it (LoCoMo, R@10: +6 points)."""

_PERSONAL = _set(
    """i my mine myself we our ours ourselves ich mein meine meinem meinen meiner meines wir unser unsere unserem
    unseren unserer unseres je mes notre nos nous yo mi mis conmigo nuestra nuestras nuestro nuestros eu meu meus minha
    minhas comigo nossa nossas nosso nossos ik mijn wij onze moj moja moje jag benim"""
)
"""Words by which a query speaks of its author, about whom most memories are."""
_PERSONAL_UNSPACED = re.compile("(?<![帮幫给給教诉訴])我|私|僕|俺")
"""In scripts without spaces; \"explain to me\" says nothing of its author."""
_HOW_TO = re.compile(
    r"\bhow (?:do|can|could|would|should|might) (?:i|we)\b|\blike i['’]?m\b|\bwie (?:kann|könnte|soll|mache) ich\b",
    re.IGNORECASE,
)
"""\"How do I centre a div": the author is in it and not what it is about."""
_TO_ME = re.compile(r"\b(?:ask|find|get|give|help|let|make|send|show|teach|tell|for|to|tu|vous) me\b", re.IGNORECASE)
"""Who asks is the one who is served, and not what it is about."""
_OF_ME = re.compile(
    r"(?<=\w )me\b[^.!?]{0,300}\?|\b(?:bei|mit|von|über) mir\b|\b(?:an|über|gegen) mich\b|\b(?:avec|chez|sur) moi\b"
    r"|\bm(?:on|a) [^\W\d]",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.!?:;\n]")
_MOST_SENTENCES = 8
_LETTER = re.compile(r"[^\W\d_]")
_CAPITAL_AFTER_WORD = re.compile(r"[^\W_] [\"'(]?[A-Z][a-z]")

_IDIOMS = tuple(
    (re.compile(phrase, re.IGNORECASE), meant.split())
    for phrase, meant in (
        (r"\bwho am i\b", "name"),
        (r"\bfor a living\b", "job work"),
        (r"\bhow old\b", "age"),
        (r"\bhow tall\b", "height"),
        (r"\bwhere (?:am|was) i (?:born|from)\b", "town country grew"),
        (r"\bhome ?town\b", "grew"),
        (r"\bmust (?:i|we) avoid\b|\bcan(?:no|'|’)?t (?:i|we) eat\b", "allergy"),
        (r"\bam i (?:married|single)\b", "wife husband"),
    )
)
"""Ways to ask for something without naming it, and the words a memory has for it."""

_LATEST = re.compile(
    r"\b(?:now|nowadays|current(?:ly)?|latest|newest|most recent(?:ly)?|still|these days|today"
    r"|jetzt|aktuell\w*|derzeit|momentan|inzwischen|mittlerweile|heute"
    r"|maintenant|actuel\w*|aujourd['’]hui|désormais"
    r"|ahora|actual(?:es|mente)?|todavía|hoy|agora|atual(?:mente)?|ainda|hoje)\b"
    r"|现在|目前|如今|最新|現在|今は|今の|いま",
    re.IGNORECASE,
)
_PAST = re.compile(
    r"\b(?:used to|before|previous(?:ly)?|former(?:ly)?|earlier|in the past|back then|no longer"
    r"|original(?:ly)?|at first|initial(?:ly)?|the (?:old|first)"
    r"|früher\w*|vorher\w*|ehemal\w*|damals|zuvor|anfangs|zuerst|ursprünglich\w*|bisher\w*"
    r"|avant|auparavant|autrefois|ancien\w*|d['’]abord|au début"
    r"|antes|anterior(?:mente)?|al principio|antigu[ao]s?|no começo|no início|antig[ao]s?)\b"
    r"|以前|之前|原来|当初|最初|かつて|前は|前の|元の",
    re.IGNORECASE,
)
_ASKS = re.compile("[?？]")
_EVENT = re.compile(
    r"\b(?:did|was|were|had|has|have|will|hat|haben|hatte|war|waren|wurden?|a-t|ont|(?:\w{3,20}|av)ai(?:en)?t"
    r"|(?:a|est|sont) \w{1,20}ée?s?|fue|fueron|era|eran|hubo|foi|foram|eram"
    r"|\w{3,20}(?:aron|ieron|avam?|aban?|aram|ió|ou))\b[^.!?]{0,300}\?"
    r"|\b(?:ist|sind|bin) [^.!?]{0,99}\b(?:\w{0,4}ge\w{2,20}(?:en|t)|(?:be|ent|er|ver)\w{2,20}en) ?\?"
    r"|(?:了|过|た|たの|ましたか|ですか)[?？]",
    re.IGNORECASE,
)
"""A question about what was done or decided: few prompts that stand on their own are in the past tense."""

_MONTHS = {
    name: number
    for number, name in enumerate("jan feb mar apr may jun jul aug sep oct nov dec".split(), start=1)  # noqa: SIM905
}
_MONTH = (
    "(?P<{0}>[Jj]an(?:uary)?|[Ff]eb(?:ruary)?|March|Mar|[Aa]pril|Apr|May|[Jj]une?|[Jj]uly?|[Aa]ug(?:ust)?|"
    "[Ss]ept?(?:ember)?|[Oo]ct(?:ober)?|[Nn]ov(?:ember)?|[Dd]ec(?:ember)?)"
)
_DATE = re.compile(
    rf"\b(?:(?P<day_1>\d{{1,2}})(?:st|nd|rd|th)?(?: of)? {_MONTH.format('month_1')}\b(?:,? (?P<year_1>\d{{4}})\b)?"
    rf"|{_MONTH.format('month_2')} (?P<day_2>\d{{1,2}})(?:st|nd|rd|th)?\b(?:,? (?P<year_2>\d{{4}})\b)?"
    rf"|{_MONTH.format('month_3')}\b(?:,? (?P<year_3>\d{{4}})\b)?"
    r"|(?P<iso_year>\d{4})-(?P<iso_month>0[1-9]|1[0-2])(?:-(?P<iso_day>\d\d))?\b)"
)
"""Written dates with a month. \"may\" and \"march\" in lower case are more often verbs."""

_MOST_DATES = 8
"""Of a query, the last ones: a log or a table that was pasted asks about none of its own."""

_IRREGULAR = {
    "allergic": "allergy", "ate": "eat", "eaten": "eat", "birthdate": "birthday", "born": "birth", "bought": "buy",
    "brought": "bring", "built": "build", "children": "child", "chose": "choose", "chosen": "choose", "colour": "color",
    "colours": "color", "drank": "drink", "driven": "drive", "drove": "drive", "employer": "work", "employers": "work",
    "favourite": "favorite",
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
_SPACED_END = "\u0dff"
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


_KNOWN = re.compile(
    r"\bthe (?!answer|best|capital|code|difference|error|following|last|meaning|previous|same|sentence|text|word"
    r"|earth|internet|moon|ocean|sea|sky|sun|universe|weather|world)"
    r"[\w'’-]+\b(?! (?:of|between|that|which)\b)",
    re.IGNORECASE,
)
"""\"Who has the key?": which key goes without saying between those who know each other. \"The colour of the sea" is not
of that kind."""


class Subject(Enum):
    """What a query speaks of, by its form: the less a memory could be about it, the more it must match."""

    AUTHOR = auto()
    """`my`, `we`: most memories are about who asks."""
    NAMED = auto()
    """Somebody or something with a name."""
    EVENT = auto()
    """Something that happened or was settled."""
    KNOWN = auto()
    """Something that is spoken of as known."""
    ANYTHING = auto()
    """Most often a task that stands on its own."""


class Moment(Enum):
    """Which time a query asks about."""

    ANY = auto()
    LATEST = auto()
    """What holds now: of several answers the newest."""
    PAST = auto()
    """What held before: what is no longer valid may answer too."""


class WrittenDate(NamedTuple):
    """A date as far as a query writes it; None: not said."""

    year: int | None
    month: int
    day: int | None


@dataclass(frozen=True, slots=True)
class Query:
    stems: tuple[str, ...]
    """Each once, in order of appearance; empty when the text holds nothing to look for."""
    words: tuple[str, ...]
    """Of each stem the word that had it first, as a table of words knows it."""
    subject: Subject
    moment: Moment = Moment.ANY
    own: tuple[frozenset[str], ...] = ()
    """Of several sentences the stems of each that speaks of its author, the last ones: what stands beside them need not
    be known to answer them."""
    is_unspaced: bool = False
    """Most stems are pairs of characters, of a script that puts no spaces between words."""
    dates: tuple[WrittenDate, ...] = ()


def stems(text: str) -> list[str]:
    """Stems of the words that carry a subject, in order, with repetitions."""
    return _stem(content_words(text))


def content_words(text: str) -> list[str]:
    """The words that carry a subject, folded, in order, with repetitions."""
    return [word for word in _words(text) if word not in _STOP_WORDS]


def parse_query(text: str) -> Query:
    words = [word for word in content_words(text) if word not in _QUESTION_WORDS]
    words += [word for phrase, meant in _IDIOMS if phrase.search(text) for word in meant]
    first: dict[str, str] = {}
    for stem, word in zip(_stem(words), words, strict=True):
        first.setdefault(stem, word)
    subject = _subject(text)
    own = _own_sentences(text) if subject is Subject.AUTHOR else ()
    is_unspaced = 2 * sum(stem[0] > _SPACED_END for stem in first) > len(first)
    return Query(tuple(first), tuple(first.values()), subject, _moment(text), own, is_unspaced, _dates(text))


def _own_sentences(text: str) -> tuple[frozenset[str], ...]:
    sentences = [sentence for sentence in _SENTENCE_END.split(text) if _LETTER.search(sentence)]
    if len(sentences) < 2:
        return ()
    own = []
    for sentence in sentences[-_MOST_SENTENCES:]:
        if _subject(sentence) is Subject.AUTHOR:
            its = frozenset(_stem([word for word in content_words(sentence) if word not in _QUESTION_WORDS]))
            own += [its] if its else []
    return tuple(own)


def _moment(text: str) -> Moment:
    if _PAST.search(text):
        return Moment.PAST
    return Moment.LATEST if _LATEST.search(text) else Moment.ANY


def _dates(text: str) -> tuple[WrittenDate, ...]:
    found = []
    for match in _DATE.finditer(text):
        part = match.groupdict()
        name = part["month_1"] or part["month_2"] or part["month_3"]
        month = _MONTHS[name[:3].lower()] if name else int(part["iso_month"])
        day = part["day_1"] or part["day_2"] or part["iso_day"]
        year = part["year_1"] or part["year_2"] or part["year_3"] or part["iso_year"]
        found.append(WrittenDate(int(year) if year else None, month, int(day) if day else None))
    return tuple(dict.fromkeys(found))[-_MOST_DATES:]


def _subject(text: str) -> Subject:
    bare = _HOW_TO.sub(" ", _TO_ME.sub(" ", text))
    if not _PERSONAL.isdisjoint(_words(bare)) or _OF_ME.search(bare) or _PERSONAL_UNSPACED.search(text):
        return Subject.AUTHOR
    if (_ASKS.search(text) and _EVENT.search(text)) or _PAST.search(text):
        return Subject.EVENT
    if any(map(_is_naming, _SENTENCE_END.split(text))):
        return Subject.NAMED
    return Subject.KNOWN if _KNOWN.search(text) else Subject.ANYTHING


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
        if word[0] > _SPACED_END and re.match(f"[{_UNSPACED}]", word):
            words += [word[i : i + 2] for i in range(max(1, len(word) - 1))]  # character pairs
        else:
            words.append(word)
    return words
