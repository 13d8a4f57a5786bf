"""Offsets are exact, and what is no part of the body is refused."""

from __future__ import annotations

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from extproc.chat._request import UnreadableBody
from extproc.chat._span import locate
from tests.unit.chat.odd_json import any_value, render

raws = msgspec.json.Decoder(list[Raw])
members = msgspec.json.Decoder(dict[str, Raw])


@given(st.integers(0, 2**32))
def test_every_element_lies_where_its_offset_says(seed: int) -> None:
    random = Random(seed)
    spelled = [render(any_value(random), random) for _ in range(random.randint(1, 6))]
    body = b"[" + b",".join(spelled) + b"]"
    at = 1
    for raw, spelling in zip(raws.decode(body), spelled, strict=True):
        assert locate(body, raw) == at + len(spelling) - len(spelling.lstrip(b" \t\r\n"))
        at += len(spelling) + 1


def test_equal_values_have_offsets_of_their_own() -> None:
    body = b'["same","same","same"]'
    assert [locate(body, raw) for raw in raws.decode(body)] == [1, 8, 15]


def test_of_duplicate_keys_the_last_is_found() -> None:
    body = b'{"a":"same","a":"same"}'
    assert locate(body, members.decode(body)["a"]) == 16


def test_a_piece_of_a_piece_is_found() -> None:
    body = b'[0,["x",["y"]]]'
    inner = raws.decode(raws.decode(body)[1])
    assert locate(body, raws.decode(inner[1])[0]) == body.index(b'"y"')


def test_a_long_value_is_found() -> None:
    body = b'["%b","%b"]' % (b"a" * 5000, b"a" * 5000)
    assert [locate(body, raw) for raw in raws.decode(body)] == [1, 5004]


def test_what_is_not_of_the_body_is_refused() -> None:
    body = b'["x"]'
    equal = bytes(bytearray(body))
    copied = raws.decode(body)[0].copy()
    for raw in (Raw(b'"x"'), Raw(), raws.decode(equal)[0], copied):
        with pytest.raises(UnreadableBody, match="not_located"):
            locate(body, raw)


@pytest.mark.parametrize("size", [3, 5000])
def test_a_wrong_address_is_refused(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    body = b'["%b","%b"]' % (b"a" * size, b"b" * size)
    first, second = raws.decode(body)
    here = locate(body, second) - locate(body, first)
    address = locate.__globals__["_raw_address"]
    for wrong in (-here, here, 1, -1):
        monkeypatch.setitem(locate.__globals__, "_raw_address", lambda raw, wrong=wrong: address(raw) + wrong)
        with pytest.raises(UnreadableBody, match="not_located"):
            locate(body, second)


def test_an_address_before_the_body_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python counts a negative offset from the end, where the same bytes may stand."""
    body = b'["x"]'
    raw = raws.decode(body)[0]
    address = locate.__globals__["_raw_address"]
    monkeypatch.setitem(locate.__globals__, "_raw_address", lambda raw: address(raw) - len(body))
    with pytest.raises(UnreadableBody, match="not_located"):
        locate(body, raw)
