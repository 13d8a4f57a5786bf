"""A JSON writer that spells the same value in every way the grammar allows, and a reader that keeps all of it.

Trees are of `Pairs` (objects as lists of `[key, value]`, so that order and duplicates stay), lists, strings, `Number`,
booleans and None.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

from hypothesis import strategies as st

Tree = Any
"""As `json.loads` gives it: no narrower type says more."""


class Pairs(list[list[Tree]]):
    """An object: its `[key, value]` entries as they stand."""

    def entry(self, key: str) -> list[Tree] | None:
        """The entry that counts: the last."""
        return next((pair for pair in reversed(self) if pair[0] == key), None)

    def get(self, key: str) -> Tree:
        pair = self.entry(key)
        return None if pair is None else pair[1]


class Number(str):
    """A number as it is spelled."""

    __slots__ = ()


def obj(**members: Tree) -> Pairs:
    return Pairs([key, value] for key, value in members.items())


def parse(body: bytes) -> Tree:
    return json.loads(
        body, parse_int=Number, parse_float=Number, object_pairs_hook=lambda found: Pairs(map(list, found))
    )


def render(tree: Tree, random: Random) -> bytes:
    """The tree as a whole document, white space around it included."""
    return _space(random) + _render(tree, random) + _space(random)


def _render(tree: Tree, random: Random) -> bytes:
    match tree:
        case Number():
            return tree.encode()
        case str():
            return spell(tree, random)
        case Pairs():
            members = [
                _space(random)
                + spell(key, random)
                + _space(random)
                + b":"
                + _space(random)
                + _render(value, random)
                + _space(random)
                for key, value in tree
            ]
            return b"{" + (b",".join(members) or _space(random)) + b"}"
        case list():
            elements = [_space(random) + _render(value, random) + _space(random) for value in tree]
            return b"[" + (b",".join(elements) or _space(random)) + b"]"
        case _:
            return json.dumps(tree).encode()


def _space(random: Random) -> bytes:
    return random.choice((b"", b"", b"", b" ", b"\n", b"\t\r\n  "))


_SHORT = {'"': b'\\"', "\\": b"\\\\", "/": b"\\/", "\b": b"\\b", "\f": b"\\f", "\n": b"\\n", "\r": b"\\r", "\t": b"\\t"}


def spell(text: str, random: Random) -> bytes:
    """A string with each character plain or escaped, as may be."""
    escaping = random.choice((0.0, 0.05, 0.5))
    return b'"' + b"".join(_spell_character(character, escaping, random) for character in text) + b'"'


def _spell_character(character: str, escaping: float, random: Random) -> bytes:
    must = character in '"\\' or character < " "
    if not must and random.random() >= escaping:
        return character.encode()
    if character in _SHORT and random.random() < 0.7:
        return _SHORT[character]
    units = character.encode("utf-16-be")
    hexadecimal = (units[at : at + 2].hex() for at in range(0, len(units), 2))
    return b"".join(b"\\u" + random.choice((digits, digits.upper())).encode() for digits in hexadecimal)


TELLING_TEXTS = (
    "",
    " ",
    "\n\t ",
    '{"role":"user","content":"',
    '","content":"',
    "}]",
    "\\",
    '"',
    "\\u",
    "user",
    "content",
    "\U0001f600" * 3,
)
"""Texts that look like structure, or are nearly nothing."""
_NUMBERS = tuple(map(Number, ("0", "-0", "1.0", "1e5", "1E+2", "1e999", "-1.5e-400", "9" * 80)))


def texts(max_size: int = 24) -> st.SearchStrategy[str]:
    plain = st.text(st.characters(codec="utf-8"), max_size=max_size)
    tricky = st.text(st.sampled_from('ab"\\/{}[]:,u0 \n\t\x00é中😀'), max_size=max_size)
    return plain | tricky | st.sampled_from(TELLING_TEXTS)


def numbers() -> st.SearchStrategy[Number]:
    return st.sampled_from(_NUMBERS)


def any_value(random: Random) -> Tree:
    """Anything at all, for keys nobody knows."""
    match random.randint(0, 6):
        case 0 | 1 | 2:
            return random.choice(TELLING_TEXTS)
        case 3:
            return random.choice(_NUMBERS)
        case 4:
            return random.choice((None, True, False))
        case 5:
            return [any_value(random) for _ in range(random.randint(0, 2))]
        case _:
            return Pairs([random.choice(TELLING_TEXTS), any_value(random)] for _ in range(random.randint(0, 2)))
