"""Secrets and personal identifiers in texts that are about to be stored. Pure.

Each kind has a shape of its own, and where the shape is not enough a checksum (cards, IBAN) or the words around it
(`password:`). Entropy alone is no sign: it takes UUIDs, hashes and order numbers with it. Rules of our own, because the
kept libraries (`detect-secrets`) scan files of code line by line, want PyYAML and requests, and know no card or IBAN.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

__all__ = [
    "ALWAYS",
    "PII",
    "Kind",
    "Redacted",
    "Secret",
    "find_secrets",
    "is_empty",
    "may_hold_secret",
    "redact",
    "without_marks",
]

SECRET_TEXT_LIMIT = 256 * 1024
"""Characters that are looked at; a longer text is cut by `redact`, as nobody can say what the rest holds."""


class Kind(StrEnum):
    """What was found; its value stands in the text in its place."""

    PRIVATE_KEY = "private key"
    TOKEN = "token"  # noqa: S105 (the name of a kind)
    PASSWORD = "password"  # noqa: S105
    CONNECTION = "connection string"
    CARD = "card number"
    IBAN = "IBAN"
    SOCIAL_SECURITY = "social security number"
    EMAIL = "e-mail"
    PHONE = "phone number"


ALWAYS: Final = frozenset(Kind) - {Kind.EMAIL, Kind.PHONE}
"""Never stored, whatever the settings say."""
PII: Final = frozenset({Kind.EMAIL, Kind.PHONE})
"""Taken out where the operator wants it; a person's address book is also worth remembering."""


@dataclass(frozen=True, slots=True)
class Secret:
    start: int
    end: int
    kind: Kind


@dataclass(frozen=True, slots=True)
class Redacted:
    text: str
    kinds: tuple[Kind, ...]
    """One for each place, in order; empty: the text is as it was."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing worth storing is left beside what was taken out."""
        return is_empty(without_marks(self.text))


_TWO_LETTERS = re.compile(r"[^\W\d_]{2}")
_MARK = re.compile(r"\[redacted: [^\]]{1,30}\]")
_KEYWORD = (
    r"pass(?:word|code|phrase|wd)?|pwd?|passwort|mot de passe|contraseña|"
    r"pin(?: code)?|secret|api[ _-]?key|token|cvv|cvc"
)


def is_empty(text: str) -> bool:
    """Whether it has no word of two letters."""
    return _TWO_LETTERS.search(text) is None


def without_marks(text: str, instead: str = "") -> str:
    """`instead` where something was taken out."""
    return _MARK.sub(instead, text) if "[redacted: " in text else text


def _rule(pattern: str, kind: Kind, hint: str, check: Callable[[str], bool] | None = None) -> _Rule:
    return _Rule(re.compile(pattern), kind, hint, check)


@dataclass(frozen=True, slots=True)
class _Rule:
    pattern: re.Pattern[str]
    """Group 1, where there is one, is the secret; else the whole match."""
    kind: Kind
    hint: str
    """A text without it has no match; in lower case."""
    check: Callable[[str], bool] | None


def _is_card(digits: str) -> bool:
    """Luhn, ISO/IEC 7812-1 annex B; one digit repeated is a placeholder."""
    numbers = [int(digit) for digit in digits if digit.isdigit()]
    if not 13 <= len(numbers) <= 19 or len(set(numbers)) == 1:
        return False
    doubled = [sum(divmod(2 * number, 10)) for number in numbers[-2::-2]]
    return (sum(numbers[-1::-2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """ISO 13616: the check digits make the number 1 modulo 97."""
    compact = re.sub(r"[ -]", "", text).upper()
    if not 15 <= len(compact) <= 34:
        return False
    return int("".join(str(int(sign, 36)) for sign in compact[4:] + compact[:4])) % 97 == 1


def _is_password(text: str) -> bool:
    """Not a word (`my password is wrong`): it has a digit, a mark or a capital inside, or is several words."""
    return len(text) >= 4 and not re.fullmatch(r"[A-Z]?[a-zà-ÿ'’]+(?:-[a-z]+)?|\[redacted\b.*", text)


def _is_mixed(text: str) -> bool:
    return any(map(str.isdigit, text)) and any(map(str.isalpha, text))


_NAMED = re.compile(r"[A-Za-z_]+[-.]?\d+(?:\.\d+)*|[\d.]+[A-Za-z]+|\w+\.[a-z]{1,4}|\w+-[a-z]+")
"""`python3.11`, `user_id2`, `8192tokens`, `main2.py`, `base64-encoded`."""


def _is_made_up(text: str) -> bool:
    """Letters and digits in turns, or with marks: no word, number, name with a version, or file."""
    return _is_mixed(text) and _NAMED.fullmatch(text) is None


def _is_basic(text: str) -> bool:
    """RFC 7617: `user:password` in base64."""
    try:
        return b":" in b64decode(text, validate=True)
    except ValueError:
        return False


_RULES: Final = (
    _rule(
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----))*(?:-----END [A-Z0-9 ]{0,40}-----)?",
        Kind.PRIVATE_KEY, "-----begin",
    ),
    # Prefixes as their issuers document them: GitHub, GitLab, OpenAI and Anthropic, Slack, AWS, Google, Stripe, npm,
    # PyPI, Hugging Face, SendGrid, DigitalOcean, this project's own.
    _rule(
        r"\b(?:gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_\w{22,255}|glpat-[\w-]{20,64}|xox[abeprs]-[\w-]{10,255}"
        r"|(?:AKIA|ASIA)[0-9A-Z]{16}\b|AIza[\w-]{35}|ya29\.[\w-]{20,512}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,512}"
        r"|hf_[A-Za-z0-9]{30,64}|SG\.[\w-]{16,64}\.[\w-]{16,64}|dop_v1_[0-9a-f]{64}|ibex_pat_\w{16,128})",
        Kind.TOKEN, "",
    ),
    _rule(r"\b(?:sk|pk|rk)[-_](?:[a-z]{2,12}[-_]){0,3}[\w-]{16,255}", Kind.TOKEN, "k", _is_mixed),
    _rule(r"\beyJ[\w-]{8,4096}\.[\w-]{8,8192}(?:\.[\w-]{0,4096})?", Kind.TOKEN, "eyj"),
    _rule(r"(?i)\bbearer\s{1,3}([\w.~+/=-]{16,4096})", Kind.TOKEN, "bearer", _is_mixed),
    _rule(r"\b[a-zA-Z][a-zA-Z0-9+.-]{1,30}://[^\s:/@]{0,128}:[^\s/@]{1,256}@[^\s\"'<>]{1,512}", Kind.CONNECTION, "://"),
    _rule(
        r"(?i)\b(?:AccountKey|SharedAccessKey|aws_secret_access_key|client_secret)\s{0,2}[=:]\s{0,2}[\"']?([\w+/=~.-]{12,512})",
        Kind.TOKEN, "",
    ),
    _rule(
        rf"(?i)\b(?:{_KEYWORD})\b[\"']?(?:\s{{1,3}}[\w-]{{2,20}}){{0,4}}?"
        r"\s{0,3}(?:=|:|\bis\b|\bist\b|\blautet\b|\best\b|\bes\b)\s{0,3}[\"'`]?([^\s\"'`]{2,255}[^\s\"'`.,;:!?)])",
        Kind.PASSWORD, "", _is_password,
    ),
    # Named without a word between: only what no word looks like.
    _rule(rf"(?i)\b(?:{_KEYWORD})\s{{1,3}}[\"'`]?([\w+/=!#$%&*@~.-]{{8,255}})", Kind.PASSWORD, "", _is_made_up),
    _rule(r"(?i)\b(?:pin(?: code)?|passcode)\s{1,3}(\d{4,8})(?![\w-]|\.\d)", Kind.PASSWORD, ""),
    _rule(r"(?i)\b(?:cvv|cvc)\s{1,3}(\d{3,4})(?![\w-]|\.\d)", Kind.PASSWORD, "cv"),
    _rule(r"(?i)\bbasic\s{1,3}([A-Za-z0-9+/]{8,1024}={0,2})", Kind.PASSWORD, "basic", _is_basic),
    _rule(
        r"(?i)[?&](?:key|sig|signature|auth|code|credential|x-amz-[a-z-]{3,24})=([\w%.~+/-]{12,1024})",
        Kind.TOKEN, "=", _is_mixed,
    ),
    _rule(r"(?<![\w.-])\d(?:[ -]?\d){12,18}(?![\w-]|\.\d)", Kind.CARD, "", _is_card),
    # In the groups that are printed on it, whatever stands between them.
    _rule(
        r"(?<![\w.-])\d{4}(?:[\s._/–-]{1,3}\d{4}){3}(?:[\s._/–-]{1,3}\d{1,3})?(?![\w-]|\.\d)",
        Kind.CARD, "", _is_card,
    ),
    _rule(r"\b[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{2,4}){3,8}\b", Kind.IBAN, "", _is_iban),
    # In lower case, and before a word in capitals, which could be a part of it: digits, after a bank's letters.
    _rule(r"(?i)\b[A-Z]{2}\d{2}(?:[ -]?[A-Z]{4})?(?:[ -]?\d{2,4}){2,8}\b", Kind.IBAN, "", _is_iban),
    _rule(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])", Kind.SOCIAL_SECURITY, "-"),
    _rule(
        r"(?i)\b(?:ssn|social security(?: number| no\.?)?)(?:\s{0,3}[:=#]|\s{1,3}is)?\s{1,3}"
        r"(\d{3}[ .-]?\d{2}[ .-]?\d{4})(?![\w-]|\.\d)",
        Kind.SOCIAL_SECURITY, "s",
    ),
    _rule(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5}\b", Kind.EMAIL, "@"),
    _rule(
        r"(?<![\w.+/-])(?:\+\d{1,3}[ .-]?(?:\(0?\d{1,4}\)[ .-]?)?\d{1,5}(?:[ .-]?\d{2,5}){1,4}"
        r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}[.-]\d{3}[.-]\d{4}|0\d{2,4}[ /-]\d{3,4}[ -]?\d{3,5})(?![\w/-]|\.\d)",
        Kind.PHONE, "",
    ),
)  # fmt: skip
_ANY_SIGN = re.compile(r"\d{3}|[@_=]|://|-----|: |:\d")
_ANY_WORD: Final = (
    "pass", "pw", "contrase", "pin", "secret", "key", "token", "cvv", "cvc", "bearer", "basic", "akia", "asia",
    "aiza", "eyj", "sg.", "sk-", "pk-", "rk-", "glpat", "xox", "pypi-", "ya29",
)  # fmt: skip
"""A text with none of these words and signs holds nothing of these rules, which saves most texts the searches."""


def find_secrets(text: str, kinds: frozenset[Kind] = ALWAYS) -> list[Secret]:
    """Places that do not overlap, in order. Only the first 256 Ki characters are searched."""
    text = text[:SECRET_TEXT_LIMIT]
    if not may_hold_secret(text):
        return []
    lowered = text.lower()
    found = sorted(
        (secret for rule in _RULES if rule.kind in kinds and rule.hint in lowered for secret in _matches(rule, text)),
        key=lambda secret: (secret.start, -secret.end),
    )
    kept: list[Secret] = []
    for secret in found:
        if kept and secret.start < kept[-1].end:
            first = kept.pop()
            secret = Secret(first.start, max(first.end, secret.end), first.kind)  # noqa: PLW2901
        kept.append(secret)
    return kept


def may_hold_secret(text: str) -> bool:
    """False: neither the text nor any part of it holds one. A tenth of a search."""
    lowered = text.lower()
    return _ANY_SIGN.search(text) is not None or any(word in lowered for word in _ANY_WORD)


def redact(text: str, kinds: frozenset[Kind] = ALWAYS) -> Redacted:
    """The text with `[redacted: kind]` for each secret; what lies beyond the limit is left out.

    Redacting again changes nothing.
    """
    text = text[:SECRET_TEXT_LIMIT]
    pieces, done = [], 0
    secrets = find_secrets(text, kinds)
    for secret in secrets:
        pieces += [text[done : secret.start], f"[redacted: {secret.kind}]"]
        done = secret.end
    return Redacted("".join(pieces) + text[done:], tuple(secret.kind for secret in secrets))


def _matches(rule: _Rule, text: str) -> Iterator[Secret]:
    for match in rule.pattern.finditer(text):
        group = 1 if rule.pattern.groups else 0
        if rule.check is None or rule.check(match[group]):
            yield Secret(*match.span(group), rule.kind)
