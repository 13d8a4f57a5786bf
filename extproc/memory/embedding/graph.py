"""all-MiniLM-L6-v2 as an ONNX file for onnxruntime: in float32, or with int8 weights. Pure; the file is made once.

Weights are quantised symmetrically with one scale a column of a product's result (per channel), to 7 bits: on
processors without VNNI instructions two products of 8 bits would overflow their 16-bit sum. Activations are quantised
as they come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np

from extproc.memory.embedding._onnx import OUR_DOMAIN, Graph, model_bytes
from extproc.memory.embedding.source import HEADS, LAYERS, WIDTH

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

__all__ = ["MINILM_NAME", "float_model", "int8_model"]

MINILM_NAME: Final = "minilm-int8-384-v1"
_EPSILON: Final = 1e-12
_LEVELS: Final = 63
_EMBEDDING_LEVELS: Final = 127


def float_model(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    return _Builder(tensors, quantised=False).build("minilm-float32-384")


def int8_model(tensors: Mapping[str, NDArray[np.float32]]) -> bytes:
    """23 MB."""
    return _Builder(tensors, quantised=True).build(MINILM_NAME)


@dataclass(slots=True)
class _Builder:
    """Inputs `ids` and `mask` (n, s); outputs `hidden` (n, s, 384), and `vector` (n, 384), its mean."""

    tensors: Mapping[str, NDArray[np.float32]]
    quantised: bool
    graph: Graph = field(default_factory=Graph)

    def build(self, name: str) -> bytes:
        hidden = self._embeddings()
        padding = self.graph.add("Cast", "mask", attributes={"to": 6})
        for layer in range(LAYERS):
            hidden = self._layer(hidden, padding, f"encoder.layer.{layer}", last=layer == LAYERS - 1)
        self._pool(hidden)
        return model_bytes(
            self.graph,
            {"ids": ["n", "s"], "mask": ["n", "s"]},
            {"hidden": ["n", "s", WIDTH], "vector": ["n", WIDTH]},
            {"name": name, "license": "Apache-2.0", "source": "sentence-transformers/all-MiniLM-L6-v2"},
        )

    def _embeddings(self) -> str:
        add, constant = self.graph.add, self.graph.constant
        words = self.tensors["embeddings.word_embeddings.weight"]
        if self.quantised:
            levels, scales = _quantise(words.T, _EMBEDDING_LEVELS)
            levels_found = add("Gather", constant("words", levels.T), "ids")
            scales_found = add("Gather", constant("word_scales", scales[:, None]), "ids")
            found = add("Mul", add("Cast", levels_found, attributes={"to": 1}), scales_found)
        else:
            found = add("Gather", constant("words", words), "ids")
        # Every text is a first sentence, so the vector of that is part of each place.
        places = self.tensors["embeddings.position_embeddings.weight"]
        places = places + self.tensors["embeddings.token_type_embeddings.weight"][0]
        start, length = constant("zero", np.zeros(1, np.int64)), constant("one", np.ones(1, np.int64))
        size = add("Gather", add("Shape", "ids"), length)
        summed = add("Add", found, add("Slice", constant("places", places), start, size, start))
        return add(
            "LayerNormalization",
            summed,
            *self._norm("embeddings.LayerNorm"),
            attributes={"epsilon": _EPSILON, "axis": -1},
        )

    def _layer(self, hidden: str, padding: str, at: str, *, last: bool) -> str:
        three = self._product(hidden, *(f"{at}.attention.self.{part}" for part in ("query", "key", "value")))
        sizes = self.graph.constant("thirds", np.full(3, WIDTH, np.int64))
        query = self.graph.add("Split", three, sizes, outputs=3, attributes={"axis": -1})
        seen = self.graph.add(
            "MultiHeadAttention",
            *(query, f"{query}_1", f"{query}_2", "", padding),
            domain=OUR_DOMAIN,
            attributes={"num_heads": HEADS},
        )
        hidden = self._added(
            hidden, self._product(seen, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm"
        )
        wide = self.graph.add("Gelu", self._product(hidden, f"{at}.intermediate.dense"), domain=OUR_DOMAIN)
        narrow = self._product(wide, f"{at}.output.dense")
        return self._added(hidden, narrow, f"{at}.output.LayerNorm", output="hidden" if last else "")

    def _product(self, hidden: str, *names: str) -> str:
        """With the weights of `names` beside each other."""
        weights = np.concatenate([self.tensors[f"{name}.weight"] for name in names]).T
        bias = self.graph.constant(f"{names[0]}.bias", np.concatenate([self.tensors[f"{name}.bias"] for name in names]))
        if not self.quantised:
            return self.graph.add("Add", self.graph.add("MatMul", hidden, self.graph.constant(names[0], weights)), bias)
        levels, scales = _quantise(weights, _LEVELS)
        return self.graph.add(
            "DynamicQuantizeMatMul",
            *(
                hidden,
                self.graph.constant(names[0], levels),
                self.graph.constant(f"{names[0]}.scales", scales),
                "",
                bias,
            ),
            domain=OUR_DOMAIN,
        )

    def _added(self, hidden: str, more: str, norm: str, output: str = "") -> str:
        return self.graph.add(
            "SkipLayerNormalization",
            *(hidden, more, *self._norm(norm)),
            output=output,
            domain=OUR_DOMAIN,
            attributes={"epsilon": _EPSILON},
        )

    def _norm(self, name: str) -> tuple[str, str]:
        weight, bias = f"{name}.weight", f"{name}.bias"
        return self.graph.constant(weight, self.tensors[weight]), self.graph.constant(bias, self.tensors[bias])

    def _pool(self, hidden: str) -> None:
        add, one = self.graph.add, self.graph.constant("one", np.ones(1, np.int64))
        weights = add("Unsqueeze", add("Cast", "mask", attributes={"to": 1}), one)
        summed = add("Squeeze", add("MatMul", weights, hidden), one)
        add("LpNormalization", summed, output="vector", attributes={"axis": -1, "p": 2})


def _quantise(weights: NDArray[np.float32], levels: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Whole numbers from -levels to levels, and the scale of each column."""
    scales = np.abs(weights).max(axis=0) / np.float32(levels)
    scales = np.where(scales > 0, scales, np.float32(1))
    return np.rint(weights / scales).astype(np.int8), scales.astype(np.float32)
