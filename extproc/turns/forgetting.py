"""Texts of one owner in the outboxes of a state directory: erased before anybody makes memories of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import msgspec

from extproc.turns._outside import erase_texts
from extproc.turns._slot import outbox_files
from extproc.turns._tables import FileTrouble, FileUnusable

if TYPE_CHECKING:
    from pathlib import Path

    from extproc.memory.model import Namespace

__all__ = ["Erased", "erase_outbox_texts"]


@dataclass(frozen=True, slots=True)
class Erased:
    outbox: str
    """Its name, such as `outbox-0`."""
    texts: int
    problem: str = ""
    """Why it could not be looked into; empty: it was."""


class _Said(msgspec.Struct):
    """As much of a turn as tells whose it is and when it was said."""

    org_id: str = ""
    agent_id: str = ""
    user_id: str | None = None
    requested_at: datetime = datetime.min.replace(tzinfo=UTC)


def erase_outbox_texts(directory: Path, owner: Namespace, until: datetime) -> list[Erased]:
    """For each outbox, while its process runs or not; none where there is no such directory.

    What is committed there. What a process has in memory at this moment, or is delivering, the workers pass over
    (`extproc.memory.forgetting`).
    """
    decode = msgspec.json.Decoder(_Said).decode

    def is_theirs(turn: bytes) -> bool:
        try:
            said = decode(turn)
        except msgspec.MsgspecError:
            return False
        whose = (said.org_id, said.agent_id, said.user_id)
        return whose == (owner.org_id, owner.agent_id, owner.user_id) and said.requested_at <= until

    try:
        files = outbox_files(directory)
    except FileNotFoundError:
        return []
    erased = []
    for file in files:
        try:
            erased.append(Erased(file.stem, erase_texts(file, is_theirs)))
        except (FileTrouble, FileUnusable, OSError) as error:
            erased.append(Erased(file.stem, 0, str(error)))
    return erased
