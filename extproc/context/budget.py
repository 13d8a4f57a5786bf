"""How many tokens memories may take. Pure."""

from __future__ import annotations

__all__ = ["memory_budget"]


def memory_budget(most: int, available: int) -> int:
    """Tokens for the whole block, its wrapper included. `most`: the setting; `available`: a cap, 0 for none.

    Below 0 there is no room at all.
    """
    return max(0, min(most, available)) if available else most
