"""Stems as numbers, by which memories are found without loading their namespace. Pure."""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from extproc.memory.model import Namespace

__all__ = ["terms"]


def terms(partition: Namespace, stems: Iterable[str]) -> list[int]:
    """A signed 64-bit number for each different stem, in no order.

    The number holds the partition as well: how often a word occurs elsewhere neither shows nor costs anything here. Two
    stems with one number would only bring a candidate too many.
    """
    whose = blake2b(f"{partition.org_id}\n{partition.agent_id}\n{partition.user_id or ''}\n".encode(), digest_size=8)
    numbers = []
    for stem in set(stems):
        its = whose.copy()
        its.update(stem.encode("utf-8", "surrogatepass"))
        numbers.append(int.from_bytes(its.digest(), "little", signed=True))
    return numbers
