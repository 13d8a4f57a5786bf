"""Whether two samples of times are of one distribution: by ranks, which a busy machine's outliers do not move."""

from __future__ import annotations

import math
from collections.abc import Sequence


def rank_test(ones: Sequence[float], others: Sequence[float]) -> float:
    """Mann and Whitney's U, two-sided, normal approximation: how likely such ranks are if both are one distribution."""
    marked = sorted([(value, 0) for value in ones] + [(value, 1) for value in others])
    rank_sum = sum(rank for rank, (_, kind) in enumerate(marked, start=1) if kind == 0)
    n, m = len(ones), len(others)
    u = rank_sum - n * (n + 1) / 2
    z = (u - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)
    return math.erfc(abs(z) / math.sqrt(2))
