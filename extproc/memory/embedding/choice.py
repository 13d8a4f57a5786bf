"""Which embedder, by the operator's choice."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Literal

from pydantic import SecretStr

from extproc.memory.embedding.embedder import ModelUnusable
from extproc.memory.embedding.table import StaticTable

if TYPE_CHECKING:
    from pathlib import Path

    from extproc.memory.embedding.embedder import Embedder
    from extproc.settings import EmbeddingSettings

__all__ = ["EmbeddingChoice", "embedding_choice", "open_embedder"]

_DOCUMENTS_TIMEOUT_MS: Final = 30_000.0
"""Services answer a full batch within a few seconds."""


@dataclass(frozen=True, slots=True)
class EmbeddingChoice:
    kind: Literal["static", "minilm", "openai"] = "static"
    directory: Path | None = None
    """minilm: where its files are."""
    threads: int = 1
    """minilm: that work on one text together."""
    url: str = ""
    """openai: base of the API, such as `https://api.openai.com/v1`."""
    key: SecretStr = field(default_factory=lambda: SecretStr(""))
    """openai: empty where the service wants none."""
    model: str = ""
    """openai"""
    dimension: int = 0
    """openai: of the model's vectors."""
    timeout_ms: float = 20.0
    """openai: for one call, of which the answer to a request waits for one."""

    def for_documents(self) -> EmbeddingChoice:
        """The same vectors where nobody waits: a call may carry many memories and take its time."""
        return replace(self, timeout_ms=_DOCUMENTS_TIMEOUT_MS)


def embedding_choice(settings: EmbeddingSettings) -> EmbeddingChoice:
    return EmbeddingChoice(
        kind=settings.embedding,
        directory=settings.embedding_dir,
        threads=settings.embedding_threads,
        url=settings.embedding_url,
        key=settings.embedding_key,
        model=settings.embedding_model,
        dimension=settings.embedding_dimension,
        timeout_ms=settings.embedding_timeout_ms,
    )


def open_embedder(choice: EmbeddingChoice, table: StaticTable | None = None) -> Embedder:
    """`table`: one that is open already. Raises ModelUnusable, and ModuleNotFoundError without the extra it needs."""
    match choice.kind:
        case "static":
            return table or StaticTable.load()
        case "minilm":
            if choice.directory is None:
                raise ModelUnusable(
                    "no directory for minilm; set IBEX_EMBEDDING_DIR to that of `extproc embedding build`"
                )
            from extproc.memory.embedding.minilm import MiniLM

            return MiniLM(choice.directory, threads=choice.threads)
        case "openai":
            if not (choice.url.startswith(("http://", "https://")) and choice.model and choice.dimension > 0):
                raise ModelUnusable(
                    "an openai embedder needs IBEX_EMBEDDING_URL (http or https), IBEX_EMBEDDING_MODEL and "
                    "IBEX_EMBEDDING_DIMENSION"
                )
            from extproc.memory.embedding.remote import RemoteEmbedder

            return RemoteEmbedder(
                choice.url, choice.model, choice.dimension, choice.key, timeout_s=choice.timeout_ms / 1000
            )
