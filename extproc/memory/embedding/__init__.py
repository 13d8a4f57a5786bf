"""Texts as vectors: the word table that comes with the package, and what an operator may put in its place."""

from extproc.memory.embedding.choice import EmbeddingChoice, embedding_choice, open_embedder
from extproc.memory.embedding.embedder import Embedder, EmbedderUnavailable, ModelUnusable
from extproc.memory.embedding.table import StaticTable

__all__ = [
    "Embedder",
    "EmbedderUnavailable",
    "EmbeddingChoice",
    "ModelUnusable",
    "StaticTable",
    "embedding_choice",
    "open_embedder",
]
