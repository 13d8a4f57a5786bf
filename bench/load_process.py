"""A load process and its parent: lines of text over standard input and output, each wait with a limit."""

from __future__ import annotations

import asyncio
import os
import sys
from types import TracebackType
from typing import Self

from extproc.stack.child import die_with_parent

__all__ = ["LoadError", "LoadProcess", "lines_of_standard_input", "say"]

_LINE_LIMIT_BYTES = 32 * 1024 * 1024


class LoadError(Exception):
    """A load process did not answer in time, said something else, or ended."""


class LoadProcess:
    """The parent's side. Use it as an asynchronous context; at its end the process is killed."""

    def __init__(self, module: str, environment: dict[str, str] | None = None) -> None:
        self._module = module
        self._environment = environment or {}
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self._module,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, **self._environment},
            limit=_LINE_LIMIT_BYTES,
            preexec_fn=die_with_parent,
        )
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        process = self._process
        if process is not None and process.returncode is None:
            process.kill()
            await process.wait()

    @property
    def pid(self) -> int:
        assert self._process is not None, "used outside its context"
        return self._process.pid

    def tell(self, line: str) -> None:
        assert self._process is not None and self._process.stdin is not None, "used outside its context"  # noqa: PT018
        self._process.stdin.write(line.encode() + b"\n")

    async def hear(self, limit_s: float) -> str:
        """The next line. Raises LoadError."""
        assert self._process is not None and self._process.stdout is not None, "used outside its context"  # noqa: PT018
        try:
            line = await asyncio.wait_for(self._process.stdout.readline(), limit_s)
        except TimeoutError:
            raise LoadError(f"{self._module} did not answer within {limit_s:.0f} s") from None
        if not line:
            raise LoadError(f"{self._module} ended")
        return line.decode().strip()

    async def expect(self, word: str, limit_s: float) -> None:
        """Raises LoadError when the next line is another."""
        if (line := await self.hear(limit_s)) != word:
            raise LoadError(f"{self._module} said {line[:200]!r} where {word!r} was expected")


async def lines_of_standard_input() -> asyncio.StreamReader:
    """For the load process."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
