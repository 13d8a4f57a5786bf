"""What turns texts into vectors, whatever it is made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Embedder", "EmbedderUnavailable", "ModelUnusable"]


class ModelUnusable(Exception):
    """The files of a model are absent, damaged or of another kind. The message says which, and what to do."""


class EmbedderUnavailable(Exception):
    """No vectors this time: a remote embedder did not answer, or not with what was asked. Never holds a text."""


class Embedder(Protocol):
    """Thread-safe. Two embedders of one name give the same vectors for the same text."""

    @property
    def name(self) -> str:
        """Of model and version, such as `static-minilm-256-v1`: vectors of another name are not comparable."""
        ...

    @property
    def dimension(self) -> int: ...

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """One row a text, of length 1; a text in which the model knows nothing has the zero vector.

        Blocks. Raises EmbedderUnavailable (only one that asks another process does).
        """
        ...
