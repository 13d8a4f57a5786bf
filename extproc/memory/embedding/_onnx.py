"""A writer of ONNX files, as far as one model needs it. Field numbers: onnx.proto of ONNX 1.12, IR version 8."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["OUR_DOMAIN", "Graph", "model_bytes"]

OUR_DOMAIN: Final = "com.microsoft"
"""Operators that onnxruntime has beyond the standard ones."""
_IR_VERSION: Final = 8
_STANDARD_OPSET: Final = 17
"""The first with LayerNormalization."""

_TENSOR_TYPES = {np.dtype(np.float32): 1, np.dtype(np.int8): 3, np.dtype(np.int32): 6, np.dtype(np.int64): 7}
_ATTRIBUTE_FLOAT, _ATTRIBUTE_INT, _ATTRIBUTE_INTS = 1, 2, 7


@dataclass(slots=True)
class Graph:
    """Grows node by node, in the order in which they run."""

    nodes: list[bytes] = field(default_factory=list)
    constants: dict[str, bytes] = field(default_factory=dict)

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        """Its name. One name, one constant."""
        if name not in self.constants:
            values = np.ascontiguousarray(values)
            self.constants[name] = b"".join(
                [
                    *(_number(1, size) for size in values.shape),
                    _number(2, _TENSOR_TYPES[values.dtype]),
                    _text(8, name),
                    _bytes(9, values.tobytes()),
                ]
            )
        return name

    def add(
        self,
        operator: str,
        *inputs: str,
        output: str = "",
        outputs: int = 1,
        domain: str = "",
        attributes: Mapping[str, float | list[int]] | None = None,
    ) -> str:
        """The name of the first output; others have `_1`, `_2` … after it. An empty input is one left out."""
        name = output or f"{operator}_{len(self.nodes)}"
        names = [name, *(f"{name}_{n}" for n in range(1, outputs))]
        self.nodes.append(
            b"".join(
                [
                    *(_text(1, each) for each in inputs),
                    *(_text(2, each) for each in names),
                    _text(3, name),
                    _text(4, operator),
                    *(_bytes(5, _attribute(key, value)) for key, value in (attributes or {}).items()),
                    _text(7, domain) if domain else b"",
                ]
            )
        )
        return name


def model_bytes(
    graph: Graph,
    inputs: Mapping[str, list[str]],
    outputs: Mapping[str, list[str | int]],
    metadata: Mapping[str, str],
) -> bytes:
    """The file. Inputs are int64, outputs float32; each with its shape, where a string is a free dimension."""
    body = b"".join(
        [
            *(_bytes(1, node) for node in graph.nodes),
            _text(2, "model"),
            *(_bytes(5, constant) for constant in graph.constants.values()),
            *(_bytes(11, _value(name, np.dtype(np.int64), shape)) for name, shape in inputs.items()),
            *(_bytes(12, _value(name, np.dtype(np.float32), shape)) for name, shape in outputs.items()),
        ]
    )
    return b"".join(
        [
            _number(1, _IR_VERSION),
            _bytes(7, body),
            _bytes(8, _text(1, "") + _number(2, _STANDARD_OPSET)),
            _bytes(8, _text(1, OUR_DOMAIN) + _number(2, 1)),
            *(_bytes(14, _text(1, key) + _text(2, value)) for key, value in metadata.items()),
        ]
    )


def _attribute(name: str, value: float | list[int]) -> bytes:
    if isinstance(value, list):
        return _text(1, name) + b"".join(_number(8, each) for each in value) + _number(20, _ATTRIBUTE_INTS)
    if isinstance(value, int):
        return _text(1, name) + _number(3, value) + _number(20, _ATTRIBUTE_INT)
    return _text(1, name) + b"\x15" + np.float32(value).tobytes() + _number(20, _ATTRIBUTE_FLOAT)


def _value(name: str, kind: np.dtype[np.generic], shape: list[str] | list[str | int]) -> bytes:
    sizes = b"".join(_bytes(1, _text(2, size) if isinstance(size, str) else _number(1, size)) for size in shape)
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, _TENSOR_TYPES[kind]) + _bytes(2, sizes)))


def _number(key: int, value: int) -> bytes:
    return _varint(key << 3) + _varint(value & (1 << 64) - 1)


def _text(key: int, value: str) -> bytes:
    return _bytes(key, value.encode())


def _bytes(key: int, value: bytes) -> bytes:
    return _varint(key << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
