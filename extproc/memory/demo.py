"""Who the requests of a one-machine installation (`extproc up`) belong to, kept beside its memories."""

from __future__ import annotations

import json
import secrets
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
        """Raises DemoError, and OSError when the directory cannot be written."""
        if (demo := cls.find(data)) is None:
            demo = cls(str(uuid.uuid4()), str(uuid.uuid4()), secrets.token_hex(16))
            file = data / "demo.json"
            file.touch(mode=0o600)
            file.write_text(json.dumps(asdict(demo)), encoding="utf-8")
        return demo
