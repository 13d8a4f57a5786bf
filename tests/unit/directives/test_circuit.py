from __future__ import annotations

from extproc.directives.circuit import Circuit


def test_one_failure_is_tolerated() -> None:
    circuit = Circuit()
    circuit.failed(0.0)
    assert not circuit.is_open(0.0)
    circuit.succeeded()
    circuit.failed(1.0)
    assert not circuit.is_open(1.0)


def test_each_further_failure_doubles_the_pause_up_to_five_seconds() -> None:
    circuit, now, pauses = Circuit(), 0.0, []
    circuit.failed(now)
    for _ in range(8):
        circuit.failed(now)
        begun = now
        while circuit.is_open(now):
            now += 0.125
        pauses.append(now - begun)
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0]


def test_what_was_asked_before_the_pause_does_not_lengthen_it() -> None:
    circuit = Circuit()
    for _ in range(50):
        circuit.failed(0.0)
    assert not circuit.is_open(0.25)


def test_an_answer_ends_the_pause() -> None:
    circuit = Circuit()
    circuit.failed(0.0)
    circuit.failed(0.0)
    assert circuit.is_failing
    circuit.succeeded()
    assert not circuit.is_open(0.0)
    assert not circuit.is_failing
