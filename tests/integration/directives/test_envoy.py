"""Through a real Envoy, with the configuration of drop-in mode: what the provider gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import grpc
import pytest

from tests.integration.conftest import AGENT, ORG, Gateway, StandIn, started
from tests.integration.directives.directive_side import Side, eventually
from tests.integration.whole.engine_side import BLOCK

MESSAGES = [{"role": "system", "content": "Own."}, {"role": "user", "content": "Who am I?"}]


@pytest.fixture(scope="session")
def shared_envoy(
    envoy_binary: Any, provider_process: StandIn, shared_side: Side, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Gateway]:
    directory = tmp_path_factory.mktemp("envoy")
    where = provider_process.address
    filters = [shared_side.filter_address]
    with started(envoy_binary, "dropin.yaml", directory, filters, where) as gateway:
        yield gateway


@pytest.fixture
def envoy(shared_envoy: Gateway, side: Side, provider: StandIn) -> Gateway:
    return shared_envoy


def chat(envoy: Gateway, headers: dict[str, str] | None = None) -> Any:
    body = {"model": "gpt-4o-mini", "messages": MESSAGES}
    own = {"x-ibex-agent-id": AGENT, **(headers or {})}
    return envoy.post("/v1/chat/completions", json=body, headers=own)


def reached(provider: StandIn) -> list[str]:
    """The contents that the provider got last."""
    return [message["content"] for message in json.loads(provider.last().body)["messages"]]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("system_first", ["Be brief.", "Own.", f"{BLOCK}\n\nWho am I?"]),
        ("system_append", ["Own.", "Be brief.", f"{BLOCK}\n\nWho am I?"]),
        # Where both go into one message the directive stands first.
        ("user_prepend", ["Own.", f"[DIRECTIVE]: Be brief.\n\n{BLOCK}\n\nWho am I?"]),
    ],
)
def test_each_mode_reaches_the_provider(
    envoy: Gateway, side: Side, provider: StandIn, mode: str, expected: list[str]
) -> None:
    made = side.directive(ORG, AGENT, "set", "Be brief.", "--mode", mode)

    def is_there() -> bool:
        answer = chat(envoy)
        assert answer.status_code == 200
        return reached(provider) == expected

    eventually(is_there)
    answer = chat(envoy)
    assert answer.headers["x-ibex-context-fallback"] == "false"
    assert int(answer.headers["x-ibex-context-tokens"]) > 9
    assert provider.last().names.isdisjoint({"x-ibex-agent-id", "x-ibex-directive-version-id"})
    assert made["version_id"] not in provider.last().body.decode()


def test_an_engine_that_fails_leaves_the_directive(envoy: Gateway, side: Side, provider: StandIn) -> None:
    side.directive(ORG, AGENT, "set", "Be brief.", "--mode", "system_first")
    eventually(lambda: chat(envoy).status_code == 200 and reached(provider)[0] == "Be brief.")

    def fail(_request: object, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.UNAVAILABLE, "told to")
        raise AssertionError

    side.engine.behaviour = fail
    answer = chat(envoy)
    assert reached(provider) == ["Be brief.", "Own.", "Who am I?"]
    assert answer.headers["x-ibex-context-fallback"] == "true"
    assert answer.headers["x-ibex-memories-injected"] == "0"


def test_another_organisations_directive_of_the_same_agent_is_not_there(
    envoy: Gateway, side: Side, provider: StandIn
) -> None:
    other, agent = str(uuid4()), str(uuid4())
    side.directive(other, agent, "set", "Not for you.")
    answer = chat(envoy, {"x-ibex-agent-id": agent, "x-ibex-org-id": other})
    assert answer.status_code == 200
    assert "Not for you." not in provider.last().body.decode()


def test_a_client_that_skips_memory_sends_its_own_bytes(envoy: Gateway, side: Side, provider: StandIn) -> None:
    side.directive(ORG, AGENT, "set", "Be brief.", "--mode", "system_first")
    chat(envoy, {"x-ibex-skip-memory": "1"})
    assert reached(provider) == ["Own.", "Who am I?"]
