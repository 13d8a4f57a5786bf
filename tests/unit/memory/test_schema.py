from __future__ import annotations

import numpy as np

from extproc.memory.schema import halfvec_text


def test_every_float16_survives_its_text() -> None:
    numbers = np.arange(2**16, dtype="<u2").view("<f2")
    finite = numbers[np.isfinite(numbers)]
    read = np.array(halfvec_text(finite.tobytes())[1:-1].split(","), np.float32).astype("<f2")
    assert np.array_equal(read.view("<u2"), finite.view("<u2"))
