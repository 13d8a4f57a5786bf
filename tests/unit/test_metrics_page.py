"""docs/metrics.md names every metric of ours, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
DECLARED = re.compile(r'\b(Counter|Gauge|Histogram)(?:MetricFamily)?\(\s*"(ibex_\w+)"')


def declared_names() -> set[str]:
    found: set[str] = set()
    for file in (ROOT / "extproc").rglob("*.py"):
        for kind, name in DECLARED.findall(file.read_text(encoding="utf-8")):
            found.add(f"{name}_total" if kind == "Counter" else name)
    return found


def test_the_page_has_all_metrics_and_no_other() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert declared_names() == set(re.findall(r"ibex_\w+", page))
