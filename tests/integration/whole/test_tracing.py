from __future__ import annotations

import httpx2

from tests.integration.otlp import ReceivedSpan
from tests.integration.whole.conftest import Stack
from tests.integration.whole.test_memory import settled

MEMORY = "The user's favourite instrument is the theremin."
QUESTION = "Which instrument is my favourite?"


def ask(stack: Stack, headers: dict[str, str]) -> tuple[httpx2.Headers, str]:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": QUESTION}]}
    with stack.client() as client:
        response = client.post("/v1/chat/completions", json=body, headers=headers)
        return response.headers, response.text


def test_the_memories_of_a_request_are_in_envoys_own_trace(stack: Stack, user: str) -> None:
    memory_id = stack.remember(MEMORY, user)
    answered, _ = settled(ask, stack, {"x-ibex-user-id": user, "x-ibex-session-id": "s9"}, memories=1)
    request_id = answered["x-request-id"]

    def is_ours(name: str) -> ReceivedSpan:
        return stack.spans.wait_for(
            lambda span: span.name == name and span.attributes.get("ibex.request.id") == request_id
        )

    assemble, retrieve = is_ours("context.assemble"), is_ours("context.retrieve")
    assert assemble.attributes["gen_ai.operation.name"] == "retrieval"
    assert assemble.attributes["gen_ai.conversation.id"] == "s9"
    assert assemble.attributes["ibex.context.outcome"] == "injected"
    assert assemble.attributes["ibex.memory.ids"] == [memory_id]
    assert retrieve.attributes["ibex.memory.ids"] == [memory_id]
    assert retrieve.parent_id == assemble.span_id
    assert retrieve.trace_id == assemble.trace_id

    envoys = stack.spans.wait_for(lambda span: span.service == "ibex-gateway" and span.span_id == assemble.parent_id)
    assert envoys.trace_id == assemble.trace_id

    everything = b"".join(stack.spans.raw)
    assert b"theremin" not in everything
    assert b"instrument" not in everything
