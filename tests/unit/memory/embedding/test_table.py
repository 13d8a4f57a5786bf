from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from extproc.memory.embedding import ModelUnusable, StaticTable
from extproc.memory.embedding.table import TABLE_PATH, table_bytes


@pytest.fixture(scope="module")
def table() -> StaticTable:
    return StaticTable.load()


def read(table: StaticTable, text: str) -> list[str]:
    return [table.word(int(number)) for number in table.words(text)]


def cosine(table: StaticTable, one: str, other: str) -> float:
    first, second = table.embed([one, other])
    return float(first @ second)


def test_the_file_is_the_one_that_was_made(table: StaticTable) -> None:
    assert table.is_intact()
    assert table.vectors.shape == (len(table.scales), 256)
    assert table.vectors.any(axis=1).all()
    assert np.isfinite(table.scales).all()
    assert 20_000 < table.whole_words < len(table.scales)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The user's DAUGHTER", ["the", "user", "daughter"]),
        ("she isn’t allergic", ["she", "is", "allergic"]),
        ("Café, naïve", ["cafe", "naive"]),
        ("babysitters", ["babysitter"]),
        ("useEffect in snake_case", ["use", "effect", "in", "snake", "case"]),
        ("kubernetes invoice", ["kubernetes", "invoices"]),
        ("xqzvw 7f3a9b2c 東京 \ud800 …", []),
        ("", []),
    ],
)
def test_words_of_a_text(table: StaticTable, text: str, expected: list[str]) -> None:
    assert read(table, text) == expected


def test_one_word_has_the_id_that_it_has_in_a_text(table: StaticTable) -> None:
    assert table.word_id("Daughters") == table.words("daughters")[0]
    assert table.word_id("xqzvw") is None


def test_words_of_one_meaning_are_near_and_others_are_not(table: StaticTable) -> None:
    dog, puppy, invoice = table.unit(table.words("dog puppy invoice"))
    assert dog @ dog == pytest.approx(1)
    assert dog @ puppy > 0.5 > 0.3 > dog @ invoice


def test_texts_of_one_meaning_are_near(table: StaticTable) -> None:
    question = "Where does the user's daughter go to school?"
    assert cosine(table, question, "My girl attends kindergarten") > cosine(
        table, question, "Deploy the new invoice API"
    )


def test_a_rare_word_outweighs_common_ones(table: StaticTable) -> None:
    assert cosine(table, "what is it that you have about the allergy", "allergy") > 0.7


def test_an_unknown_word_still_tells_texts_apart_by_its_pieces(table: StaticTable) -> None:
    assert table.embed(["shrubbery"]).any()
    assert read(table, "shrubbery") == []


@given(st.text(max_size=300))
def test_any_text_has_a_vector_of_length_one_or_none(table: StaticTable, text: str) -> None:
    (vector,) = table.embed([text])
    assert vector.dtype == np.float32
    assert not vector.any() or float(np.linalg.norm(vector)) == pytest.approx(1, abs=1e-5)
    assert (table.words(text) < table.whole_words).all()


def test_a_text_has_the_same_vector_in_any_company(table: StaticTable) -> None:
    texts = ["tea", "", "the user prefers coffee", "xqzvw"]
    together = table.embed(texts)
    assert all((table.embed([text])[0] == row).all() for text, row in zip(texts, together, strict=True))
    assert not together[1].any()
    assert table.embed([]).shape == (0, 256)


@pytest.mark.parametrize(
    "text", ["qzxj" * 2500, "qzxj " * 2000, "aB" * 5000, "'s" * 5000, "e\u0301\u0315" * 3000, "Zq " * 3333, "a1" * 5000]
)
def test_a_hostile_memory_takes_time_in_proportion(table: StaticTable, text: str) -> None:
    began = time.thread_time()
    table.embed([text])
    table.words(text)
    assert time.thread_time() - began < 0.5


def test_threads_share_a_table(table: StaticTable) -> None:
    expected, seen = table.embed(["a quiet dog"]), []
    threads = [threading.Thread(target=lambda: seen.append(table.embed(["a quiet dog"]))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(seen) == 8
    assert all((each == expected).all() for each in seen)


@pytest.mark.parametrize("damage", [lambda file: file[:1000], lambda file: b"X" + file[1:], lambda file: b""])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    (tmp_path / "table").write_bytes(damage(TABLE_PATH.read_bytes()))
    with pytest.raises(ModelUnusable, match="install the package again"):
        StaticTable.load(tmp_path / "table")


def test_a_changed_byte_is_noticed() -> None:
    file = bytearray(table_bytes(["the", "tea", "##s"], 2, np.eye(3, 4, dtype=np.float32)))
    assert StaticTable(memoryview(file)).is_intact()
    file[-1] ^= 1
    assert not StaticTable(memoryview(file)).is_intact()


def test_a_table_reads_back_what_was_written() -> None:
    vectors = np.array([[1, -0.5], [0.25, 0.01], [-3, 3]], np.float32)
    table = StaticTable(memoryview(table_bytes(["the", "tea", "##s"], 2, vectors)))
    assert np.abs(table.vectors * table.scales[:, None] - vectors).max() <= 3 / 127
    assert (table.whole_words, table.word(1), table.dimension) == (2, "tea", 2)
