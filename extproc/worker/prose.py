"""The words of a turn that are its author's own: without code, logs, quotations and pasted text. Pure.

Every step is linear in the text, and reads no more than MOST_CHARACTERS of it.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from extproc.memory.tokens import estimate_tokens

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MOST_CHARACTERS",
    "QUOTE_MARK",
    "is_pleasantry",
    "is_question",
    "own_words",
    "pieces",
    "sentences",
    "without_quotations",
    "words_of",
]

MOST_CHARACTERS = 64 * 1024
"""Of one turn: the text of about 16,000 tokens. What is longer was pasted, and its beginning says what it is."""
MOST_SENTENCES = 400
PIECE_TOKENS = 120
"""Of one episode: about the longest turn of a conversation, and eight of them fill the default budget."""
_LONGEST_SENTENCE = 2_000
"""Characters. Longer is no sentence: a list, a minified file, a key."""

_FENCE = re.compile(r"^ {0,3}(```+|~~~+)")
_CODE_LINE: Final = re.compile(
    r"""\s*(?:
      (?:Traceback\ \(most\ recent|File\ "[^"]+",\ line\ \d|at\ [\w$.<>]+\(|Caused\ by:|\w*(?:Error|Exception):\ )
    | (?:def|class|import|from|return|elif|except|const|let|var|function|public|private|static|void|async|await|package
        |\#include|using|namespace|struct|impl|fn|func)\ [^.!?]*[(){};=:"'<>]
    | (?:SELECT|INSERT|UPDATE|DELETE|CREATE|ALTER|DROP|FROM|WHERE)\ [^.!?]*[;=*(]
    | \d{4}-\d\d-\d\d[T ]\d\d:\d\d | \[?\d\d:\d\d:\d\d | \[?(?:DEBUG|INFO|WARN(?:ING)?|ERROR|FATAL|TRACE)\b
    | \.\.\.\ {3} | [{}\]<|] | \[(?!redacted:\ ) | [\w.-]+\ *[:=]\ *["'{\[\d] | [\w.\[\]"']+\ ?[-+*/|&]?=[^=]
    | \w[\w.]*\([^)]*\)[;:{]?\s*$ | //|/\*|\*/ | --- | \+\+\+ | @@
    )""",
    re.VERBOSE,
)
_PASTED_LINE = re.compile(r"\s*>|(?:On .{4,80} wrote:|-----Original Message-----|From: .*@)")
_PROMPT = re.compile(r"\s*(?:\$|>>>|[\w@~:/.-]{1,40}[$#]) \S")
"""A command line: what follows, up to an empty line, is what it printed."""
_INDENTED = re.compile(r"(?: {4}|\t)\S")
_QUOTED: Final = re.compile(
    r"\"[^\"\n]{1,400}\"|“[^”\n]{1,400}”|„[^“”\n]{1,400}[“”]|«[^»\n]{1,400}»|(?<!\w)'[^'\n]{3,400}'(?!\w)|"
    r"`[^`\n]{1,200}`"
)
QUOTE_MARK = "\N{REFERENCE MARK}"
"""Stands where a quotation was; a clause with it says something about other words."""

_SENTENCE_END = re.compile(
    r"(?<=[.!?…])(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|Ms|St|vs)\.)(?<!\b(?:Mrs|e\.g|i\.e|etc)\.)[\"')\]]*\s+|\n+|(?<=[。！？])"
)
_ASKING: Final = frozenset(
    """what what's whats who who's whom whose where where's when when's why how how's which wer wo wann warum wie welche
    welcher welches wieso woher wohin kannst où quand pourquoi comment quel quelle combien qué quién dónde cuándo cómo
    cuál cuánto""".split()  # noqa: SIM905 (a table of words)
)
_AUXILIARIES: Final = frozenset(
    """can could do does did am is are was were should would will shall may has have had isn't aren't doesn't didn't
    can't couldn't wouldn't""".split()  # noqa: SIM905
)
_GREETING = re.compile(
    r"(?:hi|hello|hey|hiya|good (?:morning|afternoon|evening)|hallo|guten tag|bonjour|salut|hola)"
    r"(?: there| again| all| everyone)?(?:,? [A-ZÀ-Þ][\w'-]{1,20}(?=[,!]))?[,.!]* +",
    re.IGNORECASE,
)
_LEADS_ON = re.compile(
    r"(?:(?:ok|okay|so|and|but|well|oh|then)[,.!]* +){1,2}"
    r"(?=(?:what|where|when|who|whose|why|how|which)(?:'?s)? (?:is|are|was|were|do|does|did|can|could|should|would|"
    r"will|to|many|much|old|long|about)\b|(?:what|where|who|when|how)'?s\b"
    r"|(?:can|could|should|would|will|does|did) (?:you|it|they|he|she|there)\b)",
    re.IGNORECASE,
)
"""`So am I` says something."""
_TELLS = re.compile(
    r"what an? |(?:when|where|what|how|why|who) (?:i|i'm|i've|we|my|our|he|she|they)\b(?=(?:\W+\w+){3})"
    r"(?!.*\b(?:is|are|am|was|were|be)\W*$)",
    re.IGNORECASE,
)
"""`When I was twelve we moved to Oslo`; not `what my name is`."""
_SUBJECT = re.compile(
    r"\S+ (?:(?i:i|you|we|he|she|it|they|there|this|that|these|those|my|your|his|her|its|our|their|the|an?|any|some|"
    r"anyone|anybody|someone|somebody|everyone|everybody|one|both|all|so|ist|sind|war|kann|soll|mag|macht|ich|du|wir)\b"
    r"|[A-ZÀ-Þ])"
)
"""Behind an auxiliary that asks. Without one nobody is asked: `Will be in Paris`, `Can't eat gluten`."""
_STATING_AUXILIARY = re.compile(r"(?:have|do|is|was|are|will|had|am) (?:been|not|to|a|an|the|my)\b", re.IGNORECASE)
_PLEASANT: Final = frozenset(
    """hi hello hey hiya yo greetings good morning afternoon evening night there everyone all thanks thank you thx ty
    cheers so much very a lot again ok okay k kk alright right sure yes yep yeah yup no nope nah please great perfect
    nice cool awesome excellent wonderful amazing fantastic lovely sounds looks works fine got it i see understood
    indeed exactly agreed that's that this is works worked fine im i'm well lol haha hahaha wow hm hmm oh ah bye goodbye
    see later welcome you're correct interesting done continue go on ahead next more not bad fair enough makes sense my
    pleasure no problem never mind nevermind for the your help and to now just me too love dear friend
    hallo guten tag morgen abend danke bitte ja nein super genau gut merci bonjour salut oui non bien d'accord gracias
    hola sí si vale buenos días muchas""".split()  # noqa: SIM905
)
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_LETTER = re.compile(r"[^\W\d_]")
_RUN = re.compile(r"\w+")
_QUOTES: Final = re.compile("[\"'“„«`]")
_MOST_PLEASANT_WORDS = 8


def own_words(text: str) -> str:
    """The prose of a turn, line by line, quotations included; code, logs, tables and pasted mail are left out."""
    text = text[:MOST_CHARACTERS].replace("\r\n", "\n").replace("\r", "\n")
    if "\n" not in text:
        return "" if _CODE_LINE.match(text) or _PROMPT.match(text) else text.strip()
    kept, fence, after_code, in_console = [], "", False, False
    for line in text.split("\n"):
        if match := _FENCE.match(line):
            mark = match[1][:3]
            fence = "" if fence == mark else fence or mark
            after_code = True
        elif fence:
            continue
        elif not line.strip():
            in_console = False
        elif in_console or _PROMPT.match(line):
            in_console = True
        elif _CODE_LINE.match(line) or _PASTED_LINE.match(line) or (after_code and _INDENTED.match(line)):
            after_code = True
        else:
            after_code = False
            kept.append(line.strip())
    return "\n".join(kept)


def words_of(text: str) -> frozenset[str]:
    """In lower case. A search for many words costs ten times as much as to see that none of them is here."""
    return frozenset(_RUN.findall(text.lower()))


def without_quotations(text: str) -> str:
    return _QUOTED.sub(QUOTE_MARK, text) if _QUOTES.search(text) else text


def sentences(prose: str) -> list[str]:
    """At most MOST_SENTENCES; what is too long to be one is left out."""
    found = []
    for part in _SENTENCE_END.split(prose, maxsplit=MOST_SENTENCES)[:MOST_SENTENCES]:
        stripped = part.strip()
        if stripped and len(stripped) <= _LONGEST_SENTENCE:
            found.append(stripped)
    return found


def is_question(sentence: str) -> bool:
    """By its mark, or by how it begins, behind a greeting."""
    if sentence.rstrip("\"')” ").endswith(("?", "？", "؟")):
        return True
    begins = _GREETING.match(sentence)
    begins = _LEADS_ON.match(sentence, begins.end() if begins else 0) or begins
    first = _WORD.search(sentence, begins.end() if begins else 0)
    if first is None:
        return False
    word = first[0].lower().replace("’", "'")
    if word in _ASKING:
        return _TELLS.match(sentence, first.start()) is None
    return (
        word in _AUXILIARIES
        and _SUBJECT.match(sentence, first.start()) is not None
        and not _STATING_AUXILIARY.match(sentence, first.start())
    )


def is_pleasantry(sentence: str) -> bool:
    """A greeting, thanks, an acknowledgement, or no words at all: nothing to remember."""
    for number, word in enumerate(_WORD.finditer(sentence, 0, 200), start=1):
        if number > _MOST_PLEASANT_WORDS or word[0].lower().replace("’", "'") not in _PLEASANT:
            return False
    return True


def pieces(parts: list[str]) -> Iterator[str]:
    """The sentences, joined in order to texts of about PIECE_TOKENS each; a longer sentence is cut between words."""
    if sum(map(len, parts)) <= PIECE_TOKENS and all(map(str.isascii, parts)):  # no token is shorter than a letter
        if parts:
            yield " ".join(parts)
        return
    piece: list[str] = []
    size = 0
    for sentence in parts:
        for text in _cut(sentence):
            tokens = estimate_tokens(text)
            if piece and size + tokens > PIECE_TOKENS:
                yield " ".join(piece)
                piece, size = [], 0
            piece.append(text)
            size += tokens
    if piece:
        yield " ".join(piece)


def _cut(text: str) -> list[str]:
    if len(text) <= PIECE_TOKENS * 4:
        return [text]
    cut, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) >= PIECE_TOKENS * 4:
            cut.append(line)
            line = ""
        line = f"{line} {word}" if line else word
    return [*cut, line]
