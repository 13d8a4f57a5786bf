"""Who the requests of a one-machine installation (`extproc up`) belong to, kept beside its memories."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import tempfile
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Demo", "DemoError"]


class DemoError(Exception):
    """The file is there and cannot be used; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Demo:
    org_id: str
    agent_id: str
    nonce_key: str
    """Secret of this installation's memory blocks."""

    @classmethod
    def find(cls, data: Path) -> Demo | None:
        """None when `extproc up` has not run in this directory. Raises DemoError."""
        file = data / "demo.json"
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise DemoError(f"{file} cannot be read ({error}); remove it to get a new demo org") from None

    @classmethod
    def find_or_make(cls, data: Path) -> Demo:
        """Of several processes that make one at once, all get the same. Raises DemoError, and OSError."""
        if (demo := cls.find(data)) is not None:
            return demo
        made = cls(str(uuid.uuid4()), str(uuid.uuid4()), secrets.token_hex(16))
        with tempfile.NamedTemporaryFile("w", dir=data, prefix="demo.", encoding="utf-8") as file:  # 0600, as made
            file.write(json.dumps(asdict(made)))
            file.flush()
            with contextlib.suppress(FileExistsError):
                os.link(file.name, data / "demo.json")
        found = cls.find(data)
        if found is None:
            raise DemoError(f"{data / 'demo.json'} was removed while it was being made; run the command again")
        return found
