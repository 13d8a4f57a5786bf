from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import Directive, InjectionMode
from extproc.directives.directive import (
    ActiveDirective,
    Change,
    Flaw,
    active_directive,
    change_message,
    channel_of,
    decode,
    encode,
    key_of,
    read_change,
)

ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
AGENT = "7f6d5c4b-3a29-4817-a6f5-e4d3c2b1a090"


def value(**changes: object) -> bytes:
    base: dict[str, object] = {"v": 1, "content": "Be brief.", "injection_mode": "user_prepend", "version_id": "v1"}
    return json.dumps({name: one for name, one in (base | changes).items() if one is not ...}).encode()


def test_the_key_and_the_channel_are_those_of_the_contract() -> None:
    assert key_of(ORG, AGENT) == f"{ORG}:directive:{AGENT}"
    assert channel_of(ORG) == f"directive_updates:{ORG}"


def test_what_is_written_is_the_contracts_object() -> None:
    assert json.loads(encode("v1", 'say "hi"', "system_append")) == {
        "v": 1,
        "content": 'say "hi"',
        "injection_mode": "system_append",
        "version_id": "v1",
    }


@given(
    st.text(min_size=1, max_size=300, alphabet=st.characters(exclude_categories=["Cs"])), st.sampled_from(InjectionMode)
)
def test_what_is_written_is_read(content: str, mode: InjectionMode) -> None:
    read = decode(encode("v1", content, mode))
    if content.strip():
        assert isinstance(read, ActiveDirective)
        assert (read.version_id, read.directive) == ("v1", Directive(content, mode))
        assert read.tokens >= 1
    else:
        assert read is Flaw.EMPTY


@pytest.mark.parametrize("mode", ["SYSTEM_FIRST", "", "later", 5, None, ["user_prepend"], ...])
def test_an_unknown_mode_is_system_first(mode: object) -> None:
    read = decode(value(injection_mode=mode))
    assert isinstance(read, ActiveDirective)
    assert read.directive.mode is InjectionMode.SYSTEM_FIRST


def test_fields_of_a_later_release_are_passed_over() -> None:
    assert isinstance(decode(value(v=1.0, priority=3, updated_at="x")), ActiveDirective)


@pytest.mark.parametrize(
    ("raw", "flaw"),
    [
        (b"", Flaw.NOT_JSON),
        (b"{", Flaw.NOT_JSON),
        (b"\xff\xfe", Flaw.NOT_JSON),
        (b'{"v":1,"content":"\\ud800","version_id":"x"}', Flaw.NOT_JSON),
        (b"[" * 100_000, Flaw.NOT_JSON),
        (b"[]", Flaw.WRONG_TYPE),
        (b"null", Flaw.WRONG_TYPE),
        (value(v=2), Flaw.UNKNOWN_VERSION),
        (value(v="1"), Flaw.WRONG_TYPE),
        (value(v=...), Flaw.WRONG_TYPE),
        (value(content=None), Flaw.WRONG_TYPE),
        (value(content=...), Flaw.WRONG_TYPE),
        (value(content=""), Flaw.EMPTY),
        (value(content=" \n\t"), Flaw.EMPTY),
        (value(content="x" * 32_769), Flaw.TOO_LONG),
        (value(content="ä" * 16_385), Flaw.TOO_LONG),
        (b" " * 300_000 + value(), Flaw.TOO_LONG),
        (value(version_id=""), Flaw.BAD_VERSION_ID),
        (value(version_id="a text"), Flaw.BAD_VERSION_ID),
        (value(version_id="x" * 65), Flaw.BAD_VERSION_ID),
        (value(version_id=7), Flaw.WRONG_TYPE),
    ],
)
def test_what_is_no_directive_has_a_reason(raw: bytes, flaw: Flaw) -> None:
    found = decode(raw)
    # The decoder reports nesting beyond its limit as it likes; what counts is that it is a flaw.
    assert found is flaw or (raw.startswith(b"[[") and isinstance(found, Flaw))


@pytest.mark.parametrize("content", ["x" * 32_768, "ä" * 16_384, '"' * 32_768, "\x01" * 32_768])
def test_the_longest_directive_is_read(content: str) -> None:
    assert isinstance(decode(encode("v1", content, "system_first")), ActiveDirective)


def test_lone_surrogates_are_no_directive() -> None:
    assert active_directive("v1", "a\ud800b", "system_first") is Flaw.WRONG_TYPE


@given(st.binary())
def test_any_bytes_are_a_directive_or_a_flaw(raw: bytes) -> None:
    assert isinstance(decode(raw), (ActiveDirective, Flaw))
    assert isinstance(read_change(channel_of(ORG).encode(), raw), Change)


@pytest.mark.parametrize(
    "message",
    [
        change_message(ORG, AGENT, "v1"),
        change_message(ORG, AGENT.upper(), None),
        b'{"agent_id": "%s"}' % AGENT.encode(),
        b'"%s"' % AGENT.encode(),
        AGENT.encode(),
        b" %s\n" % AGENT.encode(),
    ],
)
def test_a_message_names_the_agent_that_changed(message: bytes) -> None:
    assert read_change(channel_of(ORG).encode(), message) == Change(ORG, AGENT)


@pytest.mark.parametrize(
    "message", [b"", b"{}", b"[]", b"7", b'{"agent_id": 7}', b'{"agent_id": "all"}', b"\xff", b"*"]
)
def test_a_message_that_is_not_understood_may_mean_any_agent(message: bytes) -> None:
    assert read_change(channel_of(ORG).encode(), message) == Change(ORG, None)


def test_the_channel_says_whose_agent_it_is_and_not_the_message() -> None:
    other = "99999999-9999-4999-8999-999999999999"
    assert read_change(channel_of(ORG).encode(), change_message(other, AGENT, None)) == Change(ORG, AGENT)


@pytest.mark.parametrize("channel", [b"directive_updates:", b"directive_updates:all", b"other", b"\xff"])
def test_a_channel_of_nobody_is_passed_over(channel: bytes) -> None:
    assert read_change(channel, AGENT.encode()) is None
