from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from extproc.memory.demo import Demo, DemoError


def test_it_is_made_once_and_found_again(tmp_path: Path) -> None:
    assert Demo.find(tmp_path) is None
    made = Demo.find_or_make(tmp_path)
    assert Demo.find_or_make(tmp_path) == Demo.find(tmp_path) == made
    assert stat.S_IMODE((tmp_path / "demo.json").stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["demo.json"]


def test_many_at_once_get_the_same(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        for number in range(20):
            directory = tmp_path / str(number)
            directory.mkdir()
            assert len(set(threads.map(Demo.find_or_make, [directory] * 8))) == 1


def test_a_file_that_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text("{")
    with pytest.raises(DemoError, match=r"demo\.json"):
        Demo.find_or_make(tmp_path)
