from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.memory.model import InvalidValue, Memory, Namespace, content_hash, parse_category, parse_uuid

MakeMemory = Callable[..., Memory]
ORG, AGENT = str(uuid.UUID(int=10)), str(uuid.UUID(int=11))


@pytest.mark.parametrize(
    "text", ["", "abc", "{" + ORG + "}", ORG.replace("-", ""), ORG + "\n", " " + ORG, ORG[:-1] + "g", ORG[:-1] + "٣"]
)
def test_only_a_uuid_with_hyphens_is_one(text: str) -> None:
    with pytest.raises(InvalidValue, match="org_id is not a UUID"):
        parse_uuid(text, "org_id")


def test_two_spellings_of_an_id_are_one_namespace() -> None:
    upper = str(uuid.UUID(int=0xABCDEF)).upper()
    assert Namespace.parse(upper, AGENT) == Namespace.parse(upper.lower(), AGENT)


@pytest.mark.parametrize("user", ["x" * 129, "a\nb", "\x00", "\ud800"])
def test_a_user_id_is_short_and_printable(user: str) -> None:
    with pytest.raises(InvalidValue, match="user_id"):
        Namespace.parse(ORG, AGENT, user)


def test_no_user_is_never_the_empty_user() -> None:
    assert Namespace.parse(ORG, AGENT, "").user_id is None


owners = st.tuples(st.sampled_from("ab"), st.sampled_from("ab"), st.sampled_from([None, "u", "v"]))


@given(one=owners, other=owners)
def test_what_is_seen_lies_in_a_partition_and_only_there(
    make: MakeMemory, one: tuple[str, str, str | None], other: tuple[str, str, str | None]
) -> None:
    reader, writer = Namespace(*one), Namespace(*other)
    memory = replace(make("x"), org_id=writer.org_id, agent_id=writer.agent_id, user_id=writer.user_id)
    assert reader.can_see(memory) == any(partition.owns(memory) for partition in reader.partitions())
    same_agent = (reader.org_id, reader.agent_id) == (writer.org_id, writer.agent_id)
    assert reader.can_see(memory) == (same_agent and writer.user_id in (None, reader.user_id))


@pytest.mark.parametrize("content", ["x" * 10_000, "é" * 5_000, "  x  "])
def test_content_of_1_to_10000_bytes_is_kept(make: MakeMemory, content: str) -> None:
    assert make(content).content == content.strip()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "empty"),
        (" \n ", "empty"),
        ("x" * 10_001, "10,001"),
        ("é" * 5_001, "10,002"),
        ("\ud800", "surrogate"),
    ],
)
def test_other_content_is_refused_with_the_reason(make: MakeMemory, content: str, reason: str) -> None:
    with pytest.raises(InvalidValue, match=reason):
        make(content)


@pytest.mark.parametrize("confidence", [-0.1, 1.1, float("nan")])
def test_confidence_lies_between_0_and_1(make: MakeMemory, confidence: float) -> None:
    with pytest.raises(InvalidValue, match="confidence"):
        make("x", confidence=confidence)


def test_an_unknown_category_names_the_known_ones() -> None:
    with pytest.raises(InvalidValue, match="factual, preference"):
        parse_category("fact")


def test_white_space_and_composition_do_not_make_another_memory() -> None:
    assert content_hash("caf\u00e9  au\nlait") == content_hash(" cafe\u0301 au lait ")
    assert content_hash("Ada") != content_hash("ada")


def test_a_memory_is_valid_from_its_start_until_before_its_end(make: MakeMemory) -> None:
    memory = make("x")
    hour, start = timedelta(hours=1), memory.created_at
    limited = make("x", valid_from=start, valid_until=start + hour)
    assert [limited.is_valid(start + n * hour) for n in (-1, 0, 1)] == [False, True, False]
    assert memory.is_valid(start - 1000 * hour)


def test_metadata_beyond_what_a_request_can_read_is_refused(make: MakeMemory) -> None:
    assert make("tea", metadata={"n": "x" * 16_000}).metadata
    with pytest.raises(InvalidValue, match=r"metadata is 17,009 bytes as JSON; at most 16,384"):
        make("tea", metadata={"n": "x" * 17_000})
