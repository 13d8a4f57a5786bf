"""What commands share that tell running processes of a change through Redis."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Protocol, TypeVar

import typer

from extproc.redis.writer import NotWritten
from extproc.settings import SettingsError, SharedRedisSettings, load

__all__ = ["announce"]

_ATTEMPTS = 3


class _Announcer(Protocol):
    def close(self) -> None: ...


A = TypeVar("A", bound=_Announcer)


def announce(open_announcer: Callable[[str], A], tell: Callable[[A], None], otherwise: str) -> bool:
    """Whether it was told; if not, why and what follows (`otherwise`) is a warning on standard error.

    `open_announcer` gets IBEX_REDIS_URL and may raise SettingsError, `tell` NotWritten.
    """
    problem = "IBEX_REDIS_URL is not set"
    try:
        url = load(SharedRedisSettings).redis_url.get_secret_value()
        if url:
            with closing(open_announcer(url)) as announcer:
                for _ in range(_ATTEMPTS):
                    try:
                        tell(announcer)
                    except NotWritten as error:
                        problem = str(error)
                    else:
                        return True
    except SettingsError as error:
        problem = str(error)
    typer.echo(f"warning: {problem}: {otherwise}", err=True)
    return False
