from __future__ import annotations

import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.memory import tokens
from extproc.memory.tokens import count_tokens, estimate_tokens

TEXTS = [
    "The user is allergic to peanuts and prefers short answers; she works as an SRE at ACME since 2021.",
    "Die Benutzerin wohnt seit drei Jahren in Lissabon und möchte Antworten immer auf Deutsch bekommen.",
    "用户的名字是艾达，她住在里斯本，喜欢喝绿茶，不喜欢咖啡。",
    'def add(left: int, right: int) -> int:\n    """Sum of both."""\n    return left + right\n',
    '{"name": "Ada", "city": "Lisbon", "scores": [12, 7, 99], "active": true}',
    "2026-11-22 14:05:33 192.168.0.17 4711 0.25 12 1000000 3.14159",
]


@pytest.mark.parametrize("text", TEXTS)
def test_an_estimate_is_seldom_far_below_and_never_far_above(text: str) -> None:
    pytest.importorskip("bpe_openai")
    assert 0.9 <= estimate_tokens(text) / count_tokens(text) <= 1.7


def test_the_vocabulary_counts_exactly() -> None:
    pytest.importorskip("bpe_openai")
    assert count_tokens("The user's name is Ada and she lives in Lisbon.") == 11
    assert count_tokens("用户的名字是艾达，她住在里斯本。", "cl100k_base") == 19
    assert count_tokens("<|endoftext|>") > 1


@given(st.text(max_size=80))
def test_any_text_can_be_counted(text: str) -> None:
    assert (count_tokens(text) > 0) == bool(text)


def test_without_a_vocabulary_the_estimate_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bpe_openai", None)
    monkeypatch.setattr(tokens, "find_spec", lambda _: None)
    tokens._counter.cache_clear()
    try:
        assert [count_tokens(text) for text in TEXTS] == [estimate_tokens(text) for text in TEXTS]
    finally:
        tokens._counter.cache_clear()


@pytest.mark.parametrize(
    "text", ["a" * 65_536, "ab " * 21_845, " " * 65_536, "\n" * 65_536, "é1" * 32_768, "=" * 65_536]
)
def test_a_hostile_text_takes_time_in_proportion(text: str) -> None:
    began = time.thread_time()
    estimate_tokens(text)
    assert time.thread_time() - began < 0.5
