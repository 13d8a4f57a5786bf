"""What a reader takes from a block of memories."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

__all__ = ["texts"]


def texts(block: str) -> list[str]:
    """Of the memories, without marks and speakers, in order. Raises ParseError when the block is not one element."""
    if not block:
        return []
    root = ET.fromstring(block)
    assert not root.attrib
    assert not len(root)
    text = (root.text or "").removesuffix("\n").replace("\n> ", "\0")
    lines = [line for line in text.split("\n")[2:] if not re.fullmatch(r"\d{4}-\d\d-\d\d", line)]
    assert all(re.match(r"\d{3,}[: ]", line) for line in lines)
    return [line.partition(": ")[2].replace("\0", "\n") for line in lines]
