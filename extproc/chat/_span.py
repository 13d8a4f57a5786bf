"""Where in the body a decoded piece lies.

msgspec does not tell offsets, but a `msgspec.Raw` taken from a `bytes` body is a view into that body, not a copy. So
its offset is the difference of two addresses, which CPython's C API gives (about 1.3 µs). That is exact where a
search for the same bytes is not: with equal strings in several messages, and with duplicate keys, where the last one
counts.

Were a msgspec release to copy instead, the copy would lie outside the body's memory: the bounds check refuses it, and
the bytes at the offset are compared as well. So a wrong answer ends in UnreadableBody, never in a damaged body.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from extproc.chat._request import UnreadableBody

if TYPE_CHECKING:
    from msgspec import Raw

__all__ = ["locate"]

_COMPARED_BYTES = 256
"""Compared at each end. A whole comparison would cost as much as the splice itself at 5 MB."""


class _Buffer(ctypes.Structure):
    """`Py_buffer`, field by field as in CPython's stable ABI (PEP 688, `Include/pybuffer.h`)."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = (ctypes.py_object, ctypes.POINTER(_Buffer), ctypes.c_int)
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = (ctypes.POINTER(_Buffer),)
_release_buffer.restype = None
_BYTES_AT = bytes.__basicsize__ - 1
"""Where the bytes of a `bytes` lie in the object, which ends with them and a zero (`PyBytes_AS_STRING`)."""


def _raw_address(raw: Raw) -> int:
    """Where its bytes lie. It stays true while `raw` lives, since a `Raw` never moves them."""
    buffer = _Buffer()
    reference = ctypes.byref(buffer)
    _get_buffer(raw, reference, 0)  # PyBUF_SIMPLE; a failure is raised as the exception CPython sets
    address: int = buffer.buf or 0
    _release_buffer(reference)
    return address


def locate(body: bytes, raw: Raw) -> int:
    """Offset of `raw`, which was decoded from `body`. Raises UnreadableBody("not_located") when it is no part of it."""
    at = _raw_address(raw) - id(body) - _BYTES_AT
    size = len(raw)
    if 0 <= at <= len(body) - size:
        if size <= 2 * _COMPARED_BYTES:
            if body.startswith(raw, at):
                return at
        else:
            view = memoryview(raw)
            ends = view[:_COMPARED_BYTES], view[-_COMPARED_BYTES:]
            if body.startswith(ends[0], at) and body.endswith(ends[1], at, at + size):
                return at
    raise UnreadableBody("not_located")
