"""Content codings of answers (RFC 9110, section 8.4), decoded as the bytes come, and never to more than a limit.

Brotli and Zstandard are packages of their own, which the filter's installation lacks: there, as with any coding nobody
knows, the decoder has failed from the start and gives nothing.
"""

from __future__ import annotations

import importlib
import sys
import zlib
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

__all__ = ["ContentDecoder", "content_decoder"]

_STEP_BYTES: Final = 65536
"""Decoded at a time, so that a few bytes that stand for gigabytes cost no more than the limit. About 10 µs."""
_MAX_CODINGS: Final = 3
"""Servers use one. Each more may blow up what the one before it blew up."""
_MAX_FRAMES: Final = 10_000
"""Frames of Zstandard, members of gzip. A server may begin one for each event; an empty frame costs 16 µs for 9 bytes,
all of them 0.2 s.
"""
_MAX_WINDOW_LOG: Final = 23
"""8 MiB, the most that Zstandard may need as a content coding (RFC 9659). By itself the library allows 128 MiB."""


class _Broken(Exception):
    """The bytes are not what the coding says. Holds nothing of them."""


class _Coding(Protocol):
    """Feed it, then read until it gives None."""

    def feed(self, piece: bytes) -> None: ...

    def read(self, size: int) -> bytes | None:
        """About `size` bytes at most, which is more than 0; maybe empty; None: it needs more. Raises _Broken."""
        ...


class _Pending:
    """Bytes that were fed and not yet looked at."""

    def __init__(self) -> None:
        self._pending = b""

    def feed(self, piece: bytes) -> None:
        self._pending += piece

    def _take(self) -> bytes:
        pending, self._pending = self._pending, b""
        return pending


class _Identity(_Pending):
    def read(self, size: int) -> bytes | None:  # noqa: ARG002 - cutting it up gains nothing
        return self._take() or None


class _Zlib(_Pending):
    """What zlib reads: gzip of one member or several, or one deflated stream. What follows them is passed over."""

    def __init__(self, wbits: Callable[[bytes, bool], int | None]) -> None:
        """`wbits` by the first bytes and whether they follow a member; 0: there is no more, None: not known yet."""
        super().__init__()
        self._wbits = wbits
        self._member: zlib._Decompress | None = None
        self._members = 0
        self._is_over = False

    def read(self, size: int) -> bytes | None:
        member = self._member or self._begin()
        if member is None:
            return None
        try:
            decoded = member.decompress(self._take(), size)
        except zlib.error:
            raise _Broken from None
        if member.eof:
            self._pending = member.unused_data
            self._member = None
            return decoded
        self._pending = member.unconsumed_tail
        return decoded or None

    def _begin(self) -> zlib._Decompress | None:
        """The next member; None: there is none, or none yet."""
        if self._is_over:
            self._take()
            return None
        wbits = self._wbits(self._pending, self._members > 0)
        if wbits is None:
            return None
        if not wbits:
            self._is_over = True
            return None
        self._members += 1
        if self._members > _MAX_FRAMES:
            raise _Broken
        self._member = zlib.decompressobj(wbits)
        return self._member


def _gzip_wbits(first: bytes, is_later: bool) -> int | None:  # noqa: FBT001 - as `_Zlib` calls it
    if not first:
        return None
    return 31 if not is_later or first.startswith(b"\x1f") else 0


def _deflate_wbits(first: bytes, is_later: bool) -> int | None:  # noqa: FBT001 - as `_Zlib` calls it
    """zlib's format, or what some servers send instead: the same without its header (RFC 1950, section 2.2)."""
    if is_later:
        return 0
    if len(first) < 2:
        return None
    return 15 if first[0] & 0x0F == 8 and (first[0] << 8 | first[1]) % 31 == 0 else -15


class _Brotli(_Pending):
    def __init__(self, library: Any) -> None:
        super().__init__()
        self._error: type[Exception] = library.error
        self._stream = library.Decompressor()

    def read(self, size: int) -> bytes | None:
        if self._stream.is_finished():
            self._take()
            return None
        taken = self._take() if self._stream.can_accept_more_data() else b""
        try:
            decoded: bytes = self._stream.process(taken, output_buffer_limit=size)
        except self._error:
            raise _Broken from None
        return decoded or (b"" if self._pending else None)


class _Zstandard(_Pending):
    """One frame or several (RFC 8878, section 3)."""

    def __init__(self, library: Any) -> None:
        super().__init__()
        self._library = library
        self._options = {library.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
        self._frame: Any = None
        self._frames = 0

    def read(self, size: int) -> bytes | None:
        if self._frame is None:
            if not self._pending:
                return None
            self._begin()
        try:
            decoded: bytes = self._frame.decompress(self._take(), max_length=size)
        except self._library.ZstdError:
            raise _Broken from None
        if self._frame.eof:
            self._pending = self._frame.unused_data
            self._frame = None
            return decoded
        return decoded or None

    def _begin(self) -> None:
        self._frames += 1
        if self._frames > _MAX_FRAMES:
            raise _Broken
        self._frame = self._library.ZstdDecompressor(options=self._options)


class _Stage:
    """One coding with its own limit: what a coding below it decodes is bounded too."""

    def __init__(self, coding: _Coding, max_bytes: int) -> None:
        self.is_cut = False
        self._coding = coding
        self._room = max_bytes

    def run(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self._coding.feed(piece)
            while (decoded := self._coding.read(min(_STEP_BYTES, self._room + 1))) is not None:
                self._room -= len(decoded)
                if self._room < 0:
                    self.is_cut = True
                    yield decoded[: self._room]
                    return
                yield decoded


class ContentDecoder:
    """Decodes one body, and never raises."""

    def __init__(self, codings: list[_Coding] | None, max_bytes: int) -> None:
        """`codings` in the order in which they are undone; None: one of them is unknown."""
        self.failed = codings is None
        """The coding is unknown, or the bytes are not what it says: nothing more comes."""
        self.is_cut = False
        """There was more than the limit: nothing more comes."""
        self._stages = [_Stage(coding, max_bytes) for coding in codings or ()]

    def feed(self, chunk: bytes) -> bytes:
        """What the next bytes decode to; they may be cut anywhere."""
        return b"".join(self.pieces(chunk))

    def pieces(self, chunk: bytes) -> Iterator[bytes]:
        """The same in pieces of 100 KiB at most, some of them empty: for who must not take gigabytes at once.

        What is not taken of them comes with the next chunk.
        """
        if self.failed or self.is_cut:
            return
        pieces: Iterable[bytes] = (chunk,)
        for stage in self._stages:
            pieces = stage.run(pieces)
        try:
            yield from pieces
        except _Broken:
            self.failed = True
        self.is_cut = any(stage.is_cut for stage in self._stages)
        if self.failed or self.is_cut:
            self._stages.clear()  # with their windows, which may be megabytes


def content_decoder(content_encoding: str, max_bytes: int) -> ContentDecoder:
    """By the header's value; empty: there is none. `max_bytes` is what the whole body may decode to."""
    names = [name.strip().lower() for name in content_encoding.split(",")]
    names = [name for name in names if name not in {"", "identity"}]
    if len(names) > _MAX_CODINGS:
        return ContentDecoder(None, max_bytes)
    codings = [_coding(name) for name in reversed(names)] or [_Identity()]
    known = [coding for coding in codings if coding is not None]
    return ContentDecoder(known if len(known) == len(codings) else None, max_bytes)


def _coding(name: str) -> _Coding | None:
    match name:
        case "gzip" | "x-gzip":
            return _Zlib(_gzip_wbits)
        case "deflate":
            return _Zlib(_deflate_wbits)
        case "br":
            library = _load("brotli")
            return library and _Brotli(library)
        case "zstd":
            library = _load("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
            return library and _Zstandard(library)
        case _:
            return None


def _load(package: str) -> Any:
    """None: it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        return None
