"""The extraction task as bytes on the queue: one JSON object that a Celery worker and a plain consumer both can read.

It is the envelope of kombu's virtual transports around Celery's message protocol 2 (Celery documentation, "Message
Protocol"), and beside it, at top level, the plain fields `id`, `task`, `args`, `kwargs`, `retries` and `eta`, which
kombu ignores and keeps. Pure: no I/O, no clock.
"""

from __future__ import annotations

from base64 import b64encode

import msgspec

from extproc.turns.sinks import ExtractionTask

__all__ = ["QUEUE", "TASK", "encode_message"]

QUEUE = "extraction"
"""The Redis list, which is also Celery's queue of priority 0."""
TASK = "worker.tasks.extraction.extract_session_memories"

_ORIGIN = "ibex-extproc"
"""Celery puts `PID@HOST` here, for people to read; a host's name is nobody's business."""
_EMBED = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}
_encode = msgspec.json.Encoder().encode


def encode_message(task: ExtractionTask, delivery_tag: str) -> bytes:
    """`delivery_tag` must be new for every message, even for a task that is sent again.

    kombu keeps what a worker has taken but not acknowledged in one hash by this tag: of two messages with the same tag
    the second would replace the first there, and the acknowledgement of one would forget the other.
    """
    kwargs = {"session_id": task.session_id, "org_id": task.org_id}
    headers: dict[str, object] = {
        "lang": "py",
        "task": TASK,
        "id": task.id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": task.id,
        "parent_id": None,
        "argsrepr": "()",
        "kwargsrepr": repr(kwargs),
        "origin": _ORIGIN,
        # Nobody waits for the result: with False, a worker with a result backend would store one for every turn.
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
    if task.traceparent:
        headers["traceparent"] = task.traceparent
    return _encode(
        {
            "body": b64encode(_encode([[], kwargs, _EMBED])).decode(),
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": headers,
            "properties": {
                "correlation_id": task.id,
                "reply_to": "",  # nobody waits for an answer
                "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": QUEUE},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": delivery_tag,
            },
            "id": task.id,
            "task": TASK,
            "args": [],
            "kwargs": kwargs,
            "retries": 0,
            "eta": None,
        }
    )
