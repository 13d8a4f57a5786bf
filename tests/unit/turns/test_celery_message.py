"""One JSON object, readable as kombu's envelope and as plain fields."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from extproc.turns.celery_message import encode_message
from extproc.turns.sinks import ExtractionTask

TASK_ID = "0d0ff6cc-3bd6-5c5d-8b2b-6a4ce0a4a4ad"
SESSION = "5b6f3a52-6f0e-5a4e-9a7a-0d6f4a2b9c11"
ORG = "0b0e7a52-6c1c-4b3e-9f0e-5d0c2a1b3c4d"
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
KWARGS = {"session_id": SESSION, "org_id": ORG}
NAME = "worker.tasks.extraction.extract_session_memories"


def message(traceparent: str = TRACEPARENT, delivery_tag: str = "tag-1") -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(
        encode_message(ExtractionTask(TASK_ID, SESSION, ORG, traceparent), delivery_tag)
    )
    return decoded


def test_the_plain_fields_stand_at_top_level() -> None:
    names = ("id", "task", "args", "kwargs", "retries", "eta")
    assert [message()[name] for name in names] == [TASK_ID, NAME, [], KWARGS, 0, None]


def test_the_body_is_base64_of_arguments_and_embedded_calls() -> None:
    envelope = message()
    embed = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
    assert json.loads(base64.b64decode(envelope["body"])) == [[], KWARGS, embed]
    assert (envelope["content-type"], envelope["content-encoding"]) == ("application/json", "utf-8")
    assert envelope["properties"]["body_encoding"] == "base64"


def test_the_headers_are_those_of_protocol_2() -> None:
    assert message()["headers"] == {
        "lang": "py",
        "task": NAME,
        "id": TASK_ID,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": TASK_ID,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": repr(KWARGS),
        "origin": "ibex-extproc",
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
        "traceparent": TRACEPARENT,
    }


def test_the_properties_route_it_to_the_queue() -> None:
    assert message()["properties"] == {
        "correlation_id": TASK_ID,
        "reply_to": "",
        "delivery_mode": 2,
        "delivery_info": {"exchange": "", "routing_key": "extraction"},
        "priority": 0,
        "body_encoding": "base64",
        "delivery_tag": "tag-1",
    }


def test_without_a_trace_there_is_no_traceparent() -> None:
    assert "traceparent" not in message(traceparent="")["headers"]


@pytest.mark.parametrize("part", ["headers", "body", "kwargs", "id"])
def test_the_same_task_under_another_tag_differs_in_the_tag_alone(part: str) -> None:
    assert message(delivery_tag="one")[part] == message(delivery_tag="two")[part]
