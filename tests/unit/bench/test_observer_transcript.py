"""The answers of the observer's benchmark are what providers send, and what the observer reads."""

from __future__ import annotations

import json

import pytest

from bench.observer.transcript import Answer, chunks, question
from extproc.chat import AnswerLimits, recognise

OPENAI = Answer("openai", 1, 50, 10)
ANTHROPIC = Answer("anthropic", 1, 50, 10)


@pytest.mark.parametrize("answer", [OPENAI, ANTHROPIC])
def test_an_answer_reads_as_one_complete_text(answer: Answer) -> None:
    chat_format = recognise("POST", answer.path, "application/json")
    assert chat_format is not None
    reader = chat_format.read_answer(True, AnswerLimits())
    for chunk in chunks(answer):
        reader.feed(chunk)
    completion = reader.finish()
    assert len(completion.text.split()) == answer.chunks - 2
    assert completion.has_ended
    assert completion.finish_reason in {"stop", "end_turn"}
    assert not completion.was_cut
    assert completion.usage.output_tokens == 200


def test_a_chunk_of_openai_has_about_220_bytes() -> None:
    assert sum(map(len, chunks(OPENAI)[1:-1])) / (OPENAI.chunks - 2) == pytest.approx(220, rel=0.05)


def test_several_events_go_into_one_chunk() -> None:
    several = chunks(Answer("openai", 4, 10, 0))
    assert [chunk.count(b"data: ") for chunk in several[1:-1]] == [4] * 8


def test_the_same_bytes_each_time() -> None:
    first = chunks(OPENAI)
    chunks.cache_clear()
    assert chunks(OPENAI) == first


@pytest.mark.parametrize("answer", [OPENAI, ANTHROPIC])
def test_an_answer_survives_its_header(answer: Answer) -> None:
    assert Answer.from_header(answer.to_header()) == answer


@pytest.mark.parametrize("value", ["", "openai", "other 1 50 10", "openai 0 50 10", "openai 1 2 10", "openai 1 5 -1"])
def test_another_header_names_no_answer(value: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        Answer.from_header(value)


@pytest.mark.parametrize("answer", [OPENAI, ANTHROPIC])
def test_a_question_is_a_streaming_request_of_about_2_kb(answer: Answer) -> None:
    body = question(answer)
    assert len(body) == pytest.approx(2_000, rel=0.15)
    assert json.loads(body)["stream"] is True
