"""Text out of long strings: the beginning and the end, cut between two characters."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from extproc.chat._request import UnreadableBody
from extproc.chat._text import is_text, read_text
from tests.unit.chat.odd_json import spell, texts


def raw_of(text: str, seed: int = 0) -> Raw:
    return Raw(spell(text, Random(seed)))


@pytest.mark.parametrize("spelled", [b'"a"', b'"\\u0041"', b'" a "', b'"\\\\n"', b'"\xff"', b'"%b"' % (b" " * 2000)])
def test_a_string_with_something_in_it_is_text(spelled: bytes) -> None:
    assert is_text(Raw(spelled))


@pytest.mark.parametrize("spelled", [b"", b"null", b"5", b"[]", b'""', b'" "', b'" \\n\\t\\u0020\\u000B "'])
def test_blanks_and_other_values_are_not(spelled: bytes) -> None:
    assert not is_text(Raw(spelled))


def test_strings_within_the_limit_are_whole_and_joined_by_line_breaks() -> None:
    assert read_text([Raw(b'"ab"'), Raw(b'"c\\u0064"')], 4096) == "ab\ncd"
    assert read_text([Raw(b'"abcd"')], 4) == "abcd"


def test_longer_text_gives_its_beginning_and_its_end() -> None:
    text = "Why is this? " + "log line " * 1000 + "What is wrong?"
    cut = read_text([raw_of(text)], 60)
    assert cut.startswith("Why is this? log line")
    assert cut.endswith("line What is wrong?")


def test_several_long_texts_give_the_beginning_of_the_first_and_the_end_of_the_last() -> None:
    strings = [Raw(b'"first"'), Raw(b'"%b"' % (b"a" * 100)), Raw(b'"%b"' % (b"b" * 100)), Raw(b'"last"')]
    assert read_text(strings, 40) == "first\n" + "a" * 13 + "\n" + "b" * 15 + "\nlast"


@given(st.lists(texts(), min_size=1, max_size=4), st.integers(0, 80), st.integers(0, 2**32))
def test_a_cut_is_clean(strings: list[str], limit: int, seed: int) -> None:
    """Each piece is a beginning or an end of a string, no character is broken, and the limit holds."""
    raws = [raw_of(text, seed) for text in strings]
    cut = read_text(raws, limit)
    if sum(map(len, raws)) - 2 <= limit:
        assert cut == "\n".join(strings)
        return
    assert len(cut.encode()) <= max(limit, 0)
    whole = "\n".join(text for text in strings if text)
    assert any(
        whole.startswith(cut[:at]) and whole.endswith(cut[at:].removeprefix("\n")) for at in range(len(cut) + 1)
    ), (cut, whole)


@given(st.text(st.sampled_from('a中😀\\"\n'), min_size=60, max_size=80), st.integers(10, 80), st.integers(0, 2**32))
def test_no_half_of_an_escape_is_left(text: str, limit: int, seed: int) -> None:
    cut = read_text([raw_of(text, seed)], limit)
    assert set(cut) <= set(text) | {"\n"}


@pytest.mark.parametrize("spelled", [b"\\\\" * 5000, b"\\n" * 5000, b'\\"x' * 5000, b"\\ud83d\\ude00" * 5000])
def test_text_of_nothing_but_escapes_is_read(spelled: bytes) -> None:
    assert read_text([Raw(b'"%b"' % spelled)], 1000)


@pytest.mark.parametrize("limit", range(8, 40))
def test_an_escaped_backslash_before_a_u_is_no_surrogate(limit: int) -> None:
    cut = read_text([Raw(b'"%b"' % (rb"\\ud83d" * 20))], limit)
    assert set(cut) <= set("\\ud83\n")


def test_what_is_read_must_be_utf8_and_the_rest_need_not() -> None:
    with pytest.raises(UnreadableBody, match="not_utf8"):
        read_text([Raw(b'"\xff%b"' % (b"a" * 100))], 20)
    assert read_text([Raw(b'"%b\xff%b"' % (b"a" * 100, b"a" * 100))], 20) == "a" * 9 + "\n" + "a" * 10
