"""Relative dates of a text, resolved against the day it was said. Pure, and the same answer on every machine.

English, with the commonest words of German, French and Spanish. Only what names a day, a month or a season is read: a
time of day says nothing about the date. Rules of our own: a library that guesses (`dateparser`) reads days into `may`
and `sat`, and a wrong date beside true words is worse than none.
"""

from __future__ import annotations

import calendar
import re
from collections import deque
from dataclasses import dataclass
from datetime import date, timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["DateMention", "annotated", "find_dates", "first_date", "may_name_date"]

_MOST_CHARACTERS = 20_000
"""That are read; no memory is longer."""
_MOST_MENTIONS = 32
"""In one text: more is a calendar."""

_MONTHS: Final = {
    name: number
    for number, names in enumerate(
        (
            "january jan januar janvier enero",
            "february feb februar février febrero",
            "march mar märz mars marzo",
            "april apr avril abril",
            "may mai mayo",
            "june jun juni juin junio",
            "july jul juli juillet julio",
            "august aug août agosto",
            "september sep sept septembre septiembre",
            "october oct oktober octobre octubre",
            "november nov novembre noviembre",
            "december dec dezember décembre diciembre",
        ),
        start=1,
    )
    for name in names.split()
}
_WEEKDAYS: Final = {
    name: number
    for number, names in enumerate(
        (
            "monday montag lundi lunes",
            "tuesday dienstag mardi martes",
            "wednesday mittwoch mercredi miércoles",
            "thursday donnerstag jeudi jueves",
            "friday freitag vendredi viernes",
            "saturday samstag samedi sábado",
            "sunday sonntag dimanche domingo",
        )
    )
    for name in names.split()
}
_DAYS: Final = {
    "the day before yesterday": -2, "vorgestern": -2, "avant-hier": -2, "anteayer": -2,
    "yesterday": -1, "last night": -1, "gestern": -1, "ayer": -1,
    "today": 0, "tonight": 0, "heute": 0, "aujourd'hui": 0, "hoy": 0,
    "tomorrow": 1, "morgen": 1, "demain": 1, "mañana": 1,
    "the day after tomorrow": 2, "übermorgen": 2, "après-demain": 2, "pasado mañana": 2,
}  # fmt: skip
_NUMBERS: Final = {
    word: number
    for number, word in enumerate(
        "a one two three four five six seven eight nine ten eleven twelve".split()  # noqa: SIM905 (a table of words)
    )
} | {"a": 1, "an": 1, "couple of": 2, "a couple of": 2}
_SEASONS: Final = {"spring": 3, "summer": 6, "autumn": 9, "fall": 9, "winter": 12}
"""First month, of the northern half of the world, where no other is known."""


def _any(words: dict[str, int]) -> str:
    return "|".join(sorted(map(re.escape, words), key=len, reverse=True))


_FULL_MONTH = "|".join(sorted((name for name in _MONTHS if len(name) > 3 or name == "mai"), key=len, reverse=True))
_PATTERN: Final = re.compile(
    rf"""\b(?:
      (?P<iso>(?:19|20)\d\d-[01]\d-[0-3]\d)
    | (?P<day_word>{_any(_DAYS)})
    | (?P<which>last|this[ ]past|this[ ]coming|this|next|on|since|by|until|till|before|every|am|nächsten|letzten|el)[ ]
      (?P<weekday>{_any(_WEEKDAYS)})(?P<plural>s?)
    | (?P<ordinal>\d{{1,2}})(?:st|nd|rd|th|\.)?[ ](?:of[ ]|de[ ])?(?P<dm_month>{_any(_MONTHS)})\b\.?
      (?:,?[ ](?P<dm_year>(?:19|20)\d\d))?
    | (?P<md_month>{_any(_MONTHS)})\b\.?[ ](?P<md_day>\d{{1,2}})(?:st|nd|rd|th)?(?!\d|:\d|[ ]?[ap]m)
      (?:,?[ ](?P<md_year>(?:19|20)\d\d))?
    | (?P<fr_weekday>lundi|mardi|mercredi|jeudi|vendredi|samedi|dimanche)[ ](?P<fr>prochain|dernier)
    | (?P<month_which>last|this|next|in|since|until|im|en|seit|desde|depuis|early|late|mid)[ ]
      (?P<month>{_FULL_MONTH}|may)\b(?:,?[ ](?:of[ ])?(?P<month_year>(?:19|20)\d\d))?
    | (?P<period_which>last|this|next)[ ](?P<period>week|month|year|weekend|spring|summer|autumn|fall|winter)
    | (?P<period_de>nächste[nrs]?|letzte[nrs]?)[ ](?P<unit_de>Woche|Monat|Jahr)
    | (?P<ago>\d{{1,3}}|{_any(_NUMBERS)})[ ](?P<ago_unit>day|week|month|year)s?[ ]ago
    | in[ ](?P<ahead>\d{{1,3}}|{_any(_NUMBERS)})[ ](?P<ahead_unit>day|week|month|year)s?\b(?![ ]of)
    | (?P<year_which>in|since)[ ](?P<year>(?:19|20)\d\d)(?![\d,.-]\d)
    )\b""",
    re.VERBOSE | re.IGNORECASE,
)
_WORD: Final = re.compile(r"[^\W_]+")
_YEAR: Final = re.compile(r"(?:19|20)\d\d")
_TRIGGERS: Final = frozenset(
    {
        *_MONTHS,
        *_WEEKDAYS,
        *_SEASONS,
        *(f"{day}s" for day in _WEEKDAYS),
        *(re.split(r"\W", words)[-1] for words in _DAYS),
    }
    | set("day days week weeks weekend month months year years woche monat jahr".split())  # noqa: SIM905 (as above)
)
"""Words without which a text names no date but a year."""
_FIRST_WORDS: Final = frozenset(
    {*_MONTHS, *(re.split(r"\W", words)[0] for words in (*_DAYS, *_NUMBERS))}
    | set("last this next on since by until till before every am el in im en seit desde depuis early late mid".split())  # noqa: SIM905
    | {f"{word}te{end}" for word in ("nächs", "letz") for end in ("", "n", "r", "s")}
    | {day for day in _WEEKDAYS if day.endswith("di")}
)
_ORDINARY: Final = {"may", "mar", "march", "mai", "mars", "sept", "dec", "jan", "jun", "sat"}
"""Months only with a capital, before a number: `may 5 people come`."""


@dataclass(frozen=True, slots=True)
class DateMention:
    """Words of a text that name one day, or the days of a week, a month, a season or a year."""

    start: int
    """First character of the words in the text."""
    end: int
    first: date
    last: date
    """The same day, where one day is named."""

    @property
    def iso(self) -> str:
        """`2026-11-20`, `2026-11`, `2026`, or first and last day with a slash, as ISO 8601 writes an interval."""
        if self.first == self.last:
            return self.first.isoformat()
        if (self.first.month, self.first.day, self.last.month, self.last.day) == (1, 1, 12, 31):
            return f"{self.first.year:04}"
        month = (self.first.year, self.first.month)
        if self.first.day == 1 and self.last == _last_of_month(*month):
            return f"{self.first.year:04}-{self.first.month:02}"
        return f"{self.first.isoformat()}/{self.last.isoformat()}"


def find_dates(text: str, said: date, *, is_past: bool | None = None) -> list[DateMention]:
    """In order. `is_past`: how a day without a direction (`on Friday`, `in March`) is meant; None: by the words before.

    A day that no calendar has (31 June) is no mention.
    """
    mentions: list[DateMention] = []
    for match in _candidates(text):
        before = text[max(0, match.start() - 80) : match.start()]
        if _BORN.search(before) and not (match["dm_year"] or match["md_year"] or match["month_year"] or match["year"]):
            continue
        past = _reads_past(before) if is_past is None else is_past
        try:
            days = _resolve(match, said, past)
        except (ValueError, OverflowError):
            continue
        is_recurring = bool(match["plural"]) or (match["which"] or "").lower() == "every"
        if days is not None and not is_recurring:
            mentions.append(DateMention(match.start(), match.end(), *days))
        if len(mentions) == _MOST_MENTIONS:
            break
    return mentions


def _candidates(text: str) -> Iterator[re.Match[str]]:
    """Matches of the pattern that do not overlap, tried only around words that a date has."""
    if not may_name_date(text):
        return
    starts: deque[int] = deque(maxlen=4)
    done = 0
    for word in _WORD.finditer(text, 0, _MOST_CHARACTERS):
        spelled = word[0].lower()
        if spelled in _FIRST_WORDS or spelled[0].isdigit():
            starts.append(word.start())
        if word.start() < done or not (spelled in _TRIGGERS or _YEAR.fullmatch(spelled)):
            continue
        for start in starts:
            if start >= done and (match := _PATTERN.match(text, start)) and match.end() > word.start():
                done = match.end()
                yield match
                break


def may_name_date(text: str) -> bool:
    """False: neither the text nor any part of it names one."""
    return not _TRIGGERS.isdisjoint(_WORD.findall(text.lower())) or _YEAR.search(text) is not None


def first_date(text: str, said: date, *, is_past: bool | None = None) -> DateMention | None:
    return next(iter(find_dates(text, said, is_past=is_past)), None)


def annotated(text: str, said: date, *, is_past: bool | None = None) -> str:
    """The text with the date in brackets after words that only meant something on the day they were said."""
    pieces, done = [], 0
    for mention in find_dates(text, said, is_past=is_past):
        words = text[mention.start : mention.end]
        if str(mention.first.year) not in words:
            pieces.append(f"{text[done : mention.end]} ({mention.iso})")
            done = mention.end
    return "".join(pieces) + text[done:]


_BORN = re.compile(r"\bborn (?:on )?(?:the )?$", re.IGNORECASE)
"""`Born on 5 May` is of no year that the day of the turn could tell."""
_PAST = re.compile(
    r"\b(?:was|were|had|did|went|left|quit|bought|got|broke|lost|met|since|came|took|saw|made|gave|began|fell|found|told|"
    r"said|sent|spent|grew|ran|flew|drove|wrote|won|became|held|kept|felt|thought|paid|sold|stood|taught|woke|wore|ate|"
    r"slept|built|caught|chose|slid|swam|rode|spoke|stole|threw|\w{2,20}ed|been|habe|hatte|war)\b",
    re.IGNORECASE,
)


_TO_COME = re.compile(
    r"\b(?:will|shall|going to|(?:am|is|are|be|'m|'re|'s) (?:\w+ )?(?:\w+ing|\w+ed)|getting|being)\b(?: \w+ed\b)?",
    re.IGNORECASE,
)
"""With the participle that it governs: `are getting married`, `is planned`."""
_SENTENCE_END = re.compile(r"[.!?]\s|\n")


def _reads_past(before: str) -> bool:
    """By the last verb of the same sentence that says when."""
    words = _SENTENCE_END.split(before.replace("’", "'"))[-1]
    past = max((match.end() for match in _PAST.finditer(words)), default=0)
    return past > max((match.end() for match in _TO_COME.finditer(words)), default=0)


def _resolve(match: re.Match[str], said: date, is_past: bool) -> tuple[date, date] | None:  # noqa: FBT001
    if match["iso"]:
        return _day(date.fromisoformat(match["iso"]))
    if word := match["day_word"]:
        if word == "Morgen" or match.string[: match.start()].endswith("la "):
            return None  # the morning: `Guten Morgen`, `por la mañana`
        return _day(said + timedelta(days=_DAYS[word.lower()]))
    if weekday := match["weekday"]:
        return _day(_weekday(match["which"].lower(), _WEEKDAYS[weekday.lower()], said, is_past))
    if weekday := match["fr_weekday"]:
        which = "on" if match["fr"].lower() == "prochain" else "last"
        return _day(_weekday(which, _WEEKDAYS[weekday.lower()], said, is_past))
    if month := match["dm_month"]:
        return _day(_of_year(int(match["ordinal"]), _MONTHS[month.lower()], match["dm_year"], said, is_past))
    if month := match["md_month"]:
        if month in _ORDINARY:
            return None
        return _day(_of_year(int(match["md_day"]), _MONTHS[month.lower()], match["md_year"], said, is_past))
    if month := match["month"]:
        return _month(match["month_which"].lower(), _MONTHS[month.lower()], match["month_year"], said, is_past)
    if period := match["period"]:
        return _period(match["period_which"].lower(), period.lower(), said)
    if unit := match["unit_de"]:
        which = "next" if match["period_de"].lower().startswith("n") else "last"
        return _period(which, {"woche": "week", "monat": "month", "jahr": "year"}[unit.lower()], said)
    if unit := match["ago_unit"]:
        return _away(-_number(match["ago"]), unit.lower(), said)
    if unit := match["ahead_unit"]:
        return _away(_number(match["ahead"]), unit.lower(), said)
    return date(int(match["year"]), 1, 1), date(int(match["year"]), 12, 31)


def _day(day: date) -> tuple[date, date]:
    return day, day


def _number(words: str) -> int:
    return int(words) if words.isdigit() else _NUMBERS[words.lower()]


def _weekday(which: str, weekday: int, said: date, is_past: bool) -> date:  # noqa: FBT001
    """`next Tuesday` said on a Wednesday is that of next week; said on a Monday it is not tomorrow, but a week later.

    English leaves `next` open; the reading here is the day in the week that follows, which is wrong least often.
    """
    ahead = (weekday - said.weekday()) % 7
    back = -((said.weekday() - weekday) % 7 or 7)
    if which in {"next", "nächsten"}:
        return said + timedelta(days=7 - said.weekday() + weekday)
    if which in {"last", "this past", "letzten", "since"} or (is_past and which in {"on", "am", "el"}):
        return said + timedelta(days=back)
    return said + timedelta(days=ahead)


def _of_year(day: int, month: int, year: str | None, said: date, is_past: bool) -> date:  # noqa: FBT001
    """Without a year: the nearest one in the direction that is meant. Raises ValueError for no such day."""
    if year:
        return date(int(year), month, day)
    if (month, day) == (2, 29) and not calendar.isleap(said.year):
        return date(said.year + (-1 if is_past else 1), month, day)
    this_year = date(said.year, month, day)
    if is_past:
        return this_year if this_year <= said else date(said.year - 1, month, day)
    return this_year if this_year >= said else date(said.year + 1, month, day)


def _month(which: str, month: int, year: str | None, said: date, is_past: bool) -> tuple[date, date]:  # noqa: FBT001
    if which == "until" and is_past and not year:
        raise ValueError("`lived there until March` is over, and `was told to wait until March` is not")
    if year:
        chosen = int(year)
    elif which in {"last", "since", "seit", "desde", "depuis"} or (is_past and which not in {"next", "this"}):
        chosen = said.year if month < said.month or (which != "last" and month == said.month) else said.year - 1
    elif which == "this":
        chosen = said.year
    else:
        chosen = said.year if (month >= said.month and which != "next") or month > said.month else said.year + 1
    return date(chosen, month, 1), _last_of_month(chosen, month)


def _period(which: str, period: str, said: date) -> tuple[date, date]:
    step = {"last": -1, "this": 0, "next": 1}[which]
    if period == "week":
        monday = said - timedelta(days=said.weekday()) + timedelta(weeks=step)
        return monday, monday + timedelta(days=6)
    if period == "weekend":
        saturday = said - timedelta(days=said.weekday()) + timedelta(weeks=step, days=5)
        return saturday, saturday + timedelta(days=1)
    if period == "month":
        first = _shifted(said.replace(day=1), step)
        return first, _last_of_month(first.year, first.month)
    if period == "year":
        return date(said.year + step, 1, 1), date(said.year + step, 12, 31)
    return _season(step, _SEASONS[period], said)


def _season(step: int, first_month: int, said: date) -> tuple[date, date]:
    start = date(said.year, first_month, 1)
    if step < 0:
        while _season_end(start) >= said:  # twice in January, in the middle of a winter
            start = date(start.year - 1, first_month, 1)
    elif step > 0 and start <= said:
        start = date(said.year + 1, first_month, 1)
    elif step == 0 and first_month == 12 and said.month <= 2:
        start = date(said.year - 1, first_month, 1)
    return start, _season_end(start)


def _season_end(start: date) -> date:
    last = _shifted(start, 2)
    return _last_of_month(last.year, last.month)


def _away(count: int, unit: str, said: date) -> tuple[date, date] | None:
    if unit == "day":
        return _day(said + timedelta(days=count))
    if unit == "week":
        return _day(said + timedelta(weeks=count))
    if unit == "month":
        first = _shifted(said.replace(day=1), count)
        return first, _last_of_month(first.year, first.month)
    return date(said.year + count, 1, 1), date(said.year + count, 12, 31)


def _shifted(first: date, months: int) -> date:
    """The first of the month so many months on. Raises ValueError outside the calendar."""
    years, month = divmod(first.month - 1 + months, 12)
    return date(first.year + years, month + 1, 1)


def _last_of_month(year: int, month: int) -> date:
    return date(year, month, calendar.monthrange(year, month)[1])
