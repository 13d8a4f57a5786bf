import pytest

from extproc.context.budget import memory_budget


@pytest.mark.parametrize(
    ("most", "available", "expected"), [(1024, 0, 1024), (1024, 300, 300), (1024, 5000, 1024), (1024, -1, 0), (0, 0, 0)]
)
def test_the_smaller_of_setting_and_cap(most: int, available: int, expected: int) -> None:
    assert memory_budget(most, available) == expected
