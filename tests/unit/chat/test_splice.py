"""Where an object begins, found backwards from one of its values."""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Raw

from extproc.chat import Placement, ReadLimits, openai_chat
from extproc.chat._span import locate
from extproc.chat._splice import object_start
from tests.unit.chat.odd_json import TELLING_TEXTS, Pairs, any_value, parse, render

raws = msgspec.json.Decoder(list[Raw])
members = msgspec.json.Decoder(dict[str, Raw])


@given(st.integers(0, 2**32))
def test_a_start_that_is_found_is_the_right_one(seed: int) -> None:
    random = Random(seed)
    keys = [random.choice((*TELLING_TEXTS, "role", "a")) for _ in range(random.randint(0, 3))]
    values = [any_value(random) if random.random() < 0.3 else random.choice(TELLING_TEXTS) for _ in keys]
    message = Pairs([*map(list, zip(keys, values, strict=True)), ["target", any_value(random)]])
    body = render([any_value(random), message, any_value(random)], random)
    raw = raws.decode(body)[1]
    found = object_start(body, locate(body, members.decode(raw)["target"]))
    assert found in {-1, locate(body, raw)}


@pytest.mark.parametrize(
    "before", [b"", b'"role":"user",', b' "id" : "1" ,\n"role":"user", ', b'"role":"user","name":"{",']
)
def test_common_spellings_are_found_at_once(before: bytes) -> None:
    body = b'{"messages":[{"content":"x"},{' + before + b'"content":"y"}]}'
    assert object_start(body, body.index(b'"y"')) == body.rindex(b"{" + before + b'"content"')


@pytest.mark.parametrize("before", [b'"n":1,', b'"a":["{"],', b'"\\u0061":"\\"{\\"",', b'"long":"%b",' % (b"x" * 300)])
def test_others_are_found_by_reading_again(before: bytes) -> None:
    body = b'{"messages":[{%b"role":"user","content":"y"}]}' % before
    assert object_start(body, body.index(b'"y"')) == -1
    request = openai_chat.read_request(body, "/", ReadLimits())
    for placement in (Placement.SYSTEM_FIRST, Placement.BEFORE_LAST_USER):
        spliced: Any = parse(openai_chat.splice(body, request, "BLOCK", placement))
        assert spliced.get("messages")[0].get("content") == "BLOCK"
        assert spliced.get("messages")[1:] == parse(body).get("messages")
