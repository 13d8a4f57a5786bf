"""What happened in other processes is counted as they tell it."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from extproc.worker.extract import Accounting
from extproc.worker.metrics import (
    Began,
    Ended,
    Event,
    Outcome,
    Ready,
    Reason,
    SetAside,
    Stopping,
    WorkerMetrics,
    batch_of,
)
from extproc.worker.session import Done

DONE = Done(
    turns=3,
    memories=("a", "b", "c"),
    quarantined=1,
    merged=2,
    superseded=4,
    unwritable=5,
    accounting=Accounting(3, 100, 20, 0.5, 1, 6, 7),
)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def metrics(registry: CollectorRegistry) -> WorkerMetrics:
    return WorkerMetrics(registry)


def test_every_count_is_there_before_it_rises(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    shown = generate_latest(registry).decode()
    for outcome in Outcome:
        assert f'ibex_worker_tasks_total{{outcome="{outcome}"}} 0.0' in shown
    for reason in Reason:
        assert f'ibex_worker_set_aside_total{{reason="{reason}"}} 0.0' in shown
    assert 'ibex_worker_memories_total{change="superseded"} 0.0' in shown


@pytest.mark.parametrize(
    ("name", "labels", "expected"),
    [
        ("turns", {}, 3),
        ("memories", {"change": "added"}, 2),
        ("memories", {"change": "quarantined"}, 1),
        ("memories", {"change": "merged"}, 2),
        ("memories", {"change": "superseded"}, 4),
        ("dropped_memories", {"reason": "unwritable"}, 5),
        ("dropped_memories", {"reason": "unsupported"}, 6),
        ("redacted", {}, 7),
        ("llm_calls", {}, 1),
        ("llm_tokens", {"direction": "input"}, 100),
        ("llm_tokens", {"direction": "output"}, 20),
        ("llm_cost", {}, 0.5),
    ],
)
def test_a_batch_is_counted_by_its_parts(
    metrics: WorkerMetrics, registry: CollectorRegistry, name: str, labels: dict[str, str], expected: float
) -> None:
    metrics.count(batch_of(DONE))
    assert registry.get_sample_value(f"ibex_worker_{name}_total", labels) == expected


def test_a_success_leaves_its_time_and_a_failure_does_not(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    metrics.count(Ended(Outcome.DONE, 0.2, 1000.0))
    metrics.count(Ended(Outcome.AGAIN, 0.2, 2000.0))
    assert registry.get_sample_value("ibex_worker_last_success_timestamp_seconds") == 1000.0
    assert registry.get_sample_value("ibex_worker_task_seconds_count") == 2


def test_a_task_that_came_again_is_counted(metrics: WorkerMetrics, registry: CollectorRegistry) -> None:
    for is_redelivered in (False, True, True):
        metrics.count(Began(is_redelivered))
    assert registry.get_sample_value("ibex_worker_redelivered_tasks_total") == 2


EVENTS: list[Event] = [
    Ready(),
    Stopping(),
    Began(True),
    Ended(Outcome.DONE, 0.123456789, 1e9),
    SetAside(Reason.BUG),
    msgspec.structs.replace(batch_of(DONE), turns=10**12, input_tokens=10**12, output_tokens=10**12, cost=1e12 / 3),
]


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_fits_into_one_write_and_comes_back_as_it_was(event: Event) -> None:
    line = msgspec.json.encode(event)
    assert b"\n" not in line
    assert len(line) < 512  # PIPE_BUF is at least that anywhere
    assert msgspec.json.decode(line, type=Event) == event
