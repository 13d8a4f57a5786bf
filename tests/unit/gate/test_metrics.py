from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest

from extproc.gate.metrics import CheckMetrics


def samples(checks: CheckMetrics) -> dict[str, float]:
    registry = CollectorRegistry()
    registry.register(checks)
    lines = [line for line in generate_latest(registry).decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_checks_are_counted_by_what_was_said() -> None:
    checks = CheckMetrics()
    for code, is_cached in (("allowed", True), ("allowed", True), ("allowed", False), ("RATE_LIMITED", False)):
        checks.add(code, is_cached, 1.0)
    counted = {name: value for name, value in samples(checks).items() if name.startswith("ibex_gate_checks") and value}
    assert counted == {
        'ibex_gate_checks_total{cached="true",code="allowed"}': 2,
        'ibex_gate_checks_total{cached="false",code="allowed"}': 1,
        'ibex_gate_checks_total{cached="false",code="RATE_LIMITED"}': 1,
    }


def test_what_never_happened_is_a_zero() -> None:
    assert samples(CheckMetrics())['ibex_gate_checks_total{cached="false",code="INVALID_TOKEN"}'] == 0


def test_seconds_are_a_histogram_whose_bounds_belong_to_the_bucket_below() -> None:
    checks = CheckMetrics()
    for elapsed_ms in (0.1, 0.2, 0.3, 20, 9000):
        checks.add("allowed", True, elapsed_ms)
    found = samples(checks)
    assert found['ibex_gate_seconds_bucket{le="0.0002"}'] == 2
    assert found['ibex_gate_seconds_bucket{le="0.0005"}'] == 3
    assert found['ibex_gate_seconds_bucket{le="0.01"}'] == 3
    assert found['ibex_gate_seconds_bucket{le="0.02"}'] == 4
    assert found['ibex_gate_seconds_bucket{le="0.5"}'] == 4
    assert found['ibex_gate_seconds_bucket{le="+Inf"}'] == found["ibex_gate_seconds_count"] == 5
    assert abs(found["ibex_gate_seconds_sum"] - 9.0206) < 1e-9
