"""What clients of the benchmark received is the body, not its framing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.observer.viewer import dechunk


@given(st.lists(st.binary(min_size=1, max_size=40)))
def test_chunks_join_to_the_body(pieces: list[bytes]) -> None:
    sent = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    assert dechunk(sent) == b"".join(pieces)


@pytest.mark.parametrize("sent", [b"", b"5\r\nabcde\r\n", b"g\r\n"])
def test_a_body_without_its_end_is_refused(sent: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        dechunk(sent)
