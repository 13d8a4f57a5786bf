"""Which process an outbox file belongs to: `outbox-0.db` to the one that holds `flock` on `outbox-0.lock`, and so on.

The kernel lets go of the lock when its process ends, however it ends, so a file that was left behind can be claimed by
anybody. The lock is a file of its own: closing any descriptor of a SQLite file would drop SQLite's locks on it.
"""

from __future__ import annotations

import fcntl
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Slot", "claim_left_behind", "claim_new", "is_held", "outbox_files"]

_FILE = re.compile(r"outbox-(\d+)\.db")
_COMPANIONS = ("", "-wal", "-shm")
"""What SQLite keeps beside a file, by the end of its name."""
_RESERVE_BYTES = 1024**2
"""On a disk without a free byte a file cannot even be opened: SQLite makes its log and index first, 64 kB or so."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One outbox file, claimed. `release` or the end of the process gives it up."""

    file: Path
    descriptor: int
    """Of the lock file, open as long as the claim stands."""

    def keep_reserve(self, headroom_bytes: int) -> None:
        """See to a piece of the disk that can be given up; nothing where less than `headroom_bytes` would be left."""
        reserve = _reserve(self.file)
        with suppress(OSError):
            if reserve.exists() and reserve.stat().st_size == _RESERVE_BYTES:
                return
            if shutil.disk_usage(self.file.parent).free < headroom_bytes + _RESERVE_BYTES:
                return
            descriptor = os.open(reserve, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as opened:
                opened.write(bytes(_RESERVE_BYTES))

    def give_up_reserve(self) -> bool:
        """False: there was none."""
        try:
            _reserve(self.file).unlink()
        except OSError:
            return False
        return True

    def release(self) -> None:
        os.close(self.descriptor)

    def remove(self) -> None:
        """The lock file too, and the claim with it. For a file that is closed or that nobody will write again."""
        for end in _COMPANIONS:
            self.file.with_name(self.file.name + end).unlink(missing_ok=True)
        _reserve(self.file).unlink(missing_ok=True)
        _lock_file(self.file).unlink(missing_ok=True)
        self.release()


def claim_new(directory: Path) -> Slot:
    """A file that is not there yet, under the lowest free number. Raises OSError."""
    for number in itertools.count():
        file = directory / f"outbox-{number}.db"
        if not file.exists() and (slot := _claim(file)) is not None:
            return slot
    raise AssertionError


def claim_left_behind(directory: Path) -> Iterator[Slot]:
    """Files whose process has ended, each claimed when it is asked for."""
    for file in outbox_files(directory):
        with suppress(OSError):
            slot = _claim(file)
            if slot is not None and file.exists():
                yield slot
            elif slot is not None:
                slot.remove()


def outbox_files(directory: Path) -> list[Path]:
    """In the order of their numbers."""
    found = [(int(match[1]), path) for path in directory.iterdir() if (match := _FILE.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def is_held(file: Path) -> bool:
    """Whether a process has the file in use. For a moment this holds its lock, shared."""
    try:
        descriptor = os.open(_lock_file(file), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _claim(file: Path) -> Slot | None:
    """None: another process has it, or is about to remove it."""
    lock = _lock_file(file)
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A lock file that was removed meanwhile excludes nobody: the next process makes another.
        is_ours = lock.exists() and lock.stat().st_ino == os.fstat(descriptor).st_ino
    except BlockingIOError:
        is_ours = False
    except BaseException:
        os.close(descriptor)
        raise
    if not is_ours:
        os.close(descriptor)
        return None
    return Slot(file, descriptor)


def _lock_file(file: Path) -> Path:
    return file.with_suffix(".lock")


def _reserve(file: Path) -> Path:
    return file.with_suffix(".reserve")
