"""The requests of the benchmark are what they claim to be."""

from __future__ import annotations

import json

import pytest

from bench.overhead.payload import BODY_SIZES, MEMORIES, BodySize, http_requests


def test_a_thousand_different_memories() -> None:
    assert len(set(MEMORIES)) == 1_000


@pytest.mark.parametrize("size", BODY_SIZES.values(), ids=BODY_SIZES)
def test_bodies_have_their_size_and_differ(size: BodySize) -> None:
    bodies = [request.partition(b"\r\n\r\n")[2] for request in http_requests(size)]
    assert len(set(bodies)) == size.variants
    for body in bodies:
        assert len(body) == pytest.approx(size.body_bytes, rel=0.01)


def test_every_body_ends_with_a_question_about_a_person_in_memory() -> None:
    people = {word.removesuffix("'s") for memory in MEMORIES for word in memory.replace(",", "").split()}
    for request in http_requests(BODY_SIZES["2 KB"]):
        last = json.loads(request.partition(b"\r\n\r\n")[2])["messages"][-1]
        assert last["role"] == "user"
        assert last["content"].endswith("?")
        assert any(word.strip("?,").removesuffix("'s") in people for word in last["content"].split()[1:])


def test_the_same_bytes_each_time() -> None:
    assert http_requests(BODY_SIZES["2 KB"]) == http_requests(BODY_SIZES["2 KB"])
