from __future__ import annotations

import uuid

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.turns.turn import End, Turn, TurnText, checkpoint_id, session_id, task_id
from tests.unit.turns.outbox_side import AGENT, ORG, turn

_visible = st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), min_size=1, max_size=64)


def test_ids_stay_what_they_are_from_release_to_release() -> None:
    """Another value would give each session a second row."""
    assert session_id(ORG, AGENT, None, "s") == "7c1afb1c-4ebc-57f7-a498-f05126cbc777"
    assert checkpoint_id(ORG, "r") == "9a426c97-2024-5827-9d95-8c999d278ad5"
    assert task_id(ORG, session_id(ORG, AGENT, None, "s"), 3) == "bb9f4da8-fa7d-5c7f-ab79-2b74e9538426"


@given(_visible, _visible, _visible, _visible)
def test_sessions_of_different_owners_have_different_ids(user: str, name: str, user2: str, name2: str) -> None:
    same = (user, name) == (user2, name2)
    assert (session_id(ORG, AGENT, user, name) == session_id(ORG, AGENT, user2, name2)) is same
    assert session_id(ORG, AGENT, user, name) != session_id(ORG, AGENT, None, name)


def test_ids_of_different_kinds_are_never_the_same() -> None:
    ids = {session_id(ORG, AGENT, None, "1"), checkpoint_id(ORG, AGENT), task_id(ORG, AGENT, 1)}
    assert len(ids) == 3
    assert all(str(uuid.UUID(one)) == one for one in ids)


@pytest.mark.parametrize(
    ("end", "status", "has_checkpoint"),
    [
        (End.COMPLETE, 200, True),
        (End.COMPLETE, 299, True),
        (End.INCOMPLETE, 200, True),
        (End.CLIENT_GONE, 200, True),
        (End.CLIENT_GONE, 0, False),
        (End.COMPLETE, 302, False),
        (End.PROVIDER_ERROR, 500, False),
        (End.PROVIDER_ERROR, 200, False),
        (End.DENIED, 401, False),
    ],
)
def test_only_what_the_provider_answered_has_a_checkpoint(end: End, status: int, has_checkpoint: bool) -> None:
    assert turn(end=end, status_code=status).has_checkpoint is has_checkpoint


@given(_visible, st.integers(0, 2**31), st.floats(0, 1e6), st.sampled_from(End))
def test_a_turn_comes_back_from_json_as_it_was(model: str, tokens: int, ms: float, end: End) -> None:
    before = turn(model=model, input_tokens=tokens, total_ms=ms, end=end, user_id=None)
    assert msgspec.json.decode(msgspec.json.encode(before), type=Turn) == before


def test_a_turn_of_a_later_release_can_be_read() -> None:
    encoded = msgspec.json.encode({**msgspec.to_builtins(turn("r")), "something_new": 1})
    assert msgspec.json.decode(encoded, type=Turn).request_id == "r"


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_a_text_comes_back_from_json_as_it_was(user: str, assistant: str) -> None:
    before = TurnText(user, assistant)
    assert msgspec.json.decode(msgspec.json.encode(before), type=TurnText) == before
