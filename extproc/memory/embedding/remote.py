"""Vectors from any service that speaks OpenAI's `POST /v1/embeddings`. Only where an operator has chosen it: texts of
memories and questions leave the process, and each question waits for a network.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Final

import numpy as np
import urllib3
from pydantic import SecretStr

from extproc.memory.embedding.embedder import EmbedderUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["RemoteEmbedder"]

_BATCH: Final = 64
"""Texts a call; services take 100 to 2,048."""
_MAX_CHARACTERS: Final = 8_000
"""Of one text: under the 8,191 tokens of OpenAI's models in every language."""
_BYTES_A_NUMBER: Final = 32
"""Of an answer in JSON, with room to spare: 17 digits, sign, exponent, comma."""
_BYTES_AROUND: Final = 65_536
_PIECE_BYTES: Final = 65_536


@dataclass(frozen=True, slots=True)
class RemoteEmbedder:
    url: str
    """Of the API: `/embeddings` is put behind it, such as `https://api.openai.com/v1`."""
    model: str
    dimension: int
    key: SecretStr = field(default_factory=lambda: SecretStr(""))
    """Empty: no `Authorization` header."""
    timeout_s: float = 0.02
    """For the whole of one call, connecting included."""
    pool: urllib3.PoolManager = field(default_factory=lambda: urllib3.PoolManager(maxsize=8, retries=False))

    @property
    def name(self) -> str:
        return f"openai:{self.model}:{self.dimension}"

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        sent = [row for row, text in enumerate(texts) if text.strip()]  # services refuse an empty text
        for start in range(0, len(sent), _BATCH):
            rows = sent[start : start + _BATCH]
            vectors[rows] = self._asked([texts[row][:_MAX_CHARACTERS] for row in rows])
        return vectors

    def _asked(self, texts: list[str]) -> NDArray[np.float32]:
        body = json.dumps({"model": self.model, "input": texts, "encoding_format": "float"}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := self.key.get_secret_value():
            headers["Authorization"] = f"Bearer {key}"
        limit = _BYTES_AROUND + len(texts) * self.dimension * _BYTES_A_NUMBER
        try:
            status, content = self._posted(body, headers, limit)
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise EmbedderUnavailable(f"the embedder did not answer: {type(error).__name__}") from None
        if status != 200:
            raise EmbedderUnavailable(f"the embedder answered with status {status}")
        if len(content) > limit:
            raise EmbedderUnavailable(f"the embedder's answer is longer than {limit} bytes")
        return self._read(content, len(texts))

    def _posted(self, body: bytes, headers: dict[str, str], limit: int) -> tuple[int, bytes]:
        """Status and at most one piece more than `limit` bytes of the answer."""
        deadline = monotonic() + self.timeout_s
        answer = self.pool.request(
            "POST",
            f"{self.url.rstrip('/')}/embeddings",
            body=body,
            headers=headers,
            timeout=urllib3.Timeout(total=self.timeout_s),
            preload_content=False,
            redirect=False,
        )
        try:
            content = _read_until(answer, limit, deadline)
        except BaseException:
            answer.close()
            raise
        if len(content) > limit:
            answer.close()
        else:
            answer.release_conn()
        return answer.status, content

    def _read(self, content: bytes, count: int) -> NDArray[np.float32]:
        try:
            items = sorted(json.loads(content)["data"], key=lambda item: item["index"])
            if [item["index"] for item in items] != list(range(count)):
                raise EmbedderUnavailable("the embedder's answer has another number of vectors than were asked for")
            with np.errstate(over="ignore"):  # what no float32 holds becomes infinite, and is refused below
                vectors = np.array([item["embedding"] for item in items], np.float32)
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            raise EmbedderUnavailable("the embedder's answer is not a list of embeddings") from None
        if vectors.shape != (count, self.dimension):
            raise EmbedderUnavailable(
                f"the embedder's vectors have the shape {vectors.shape}, not {count} times {self.dimension}; "
                "set IBEX_EMBEDDING_DIMENSION to what the model gives"
            )
        lengths = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
        if not np.isfinite(lengths).all():
            raise EmbedderUnavailable("the embedder's answer holds numbers that are not finite")
        vectors /= np.where(lengths > 0, lengths, np.float32(1))[:, None]
        return vectors


def _read_until(answer: urllib3.BaseHTTPResponse, limit: int, deadline: float) -> bytes:
    """The library's limit is for each read alone; an answer that comes in drops has to meet the deadline too."""
    content = bytearray()
    while len(content) <= limit and (piece := answer.read1(_PIECE_BYTES)):
        content += piece
        if monotonic() > deadline:
            raise TimeoutError
    return bytes(content)
