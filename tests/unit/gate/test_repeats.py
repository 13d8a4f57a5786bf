from __future__ import annotations

from extproc.gate import repeats
from extproc.gate.passage import Admitted
from extproc.gate.repeats import Repeat, Repeats, repeat_key
from extproc.gate.verdict import CHAT_PERMISSIONS, Claims

REPEAT = Repeat(b"digest", Admitted(Claims("org", CHAT_PERMISSIONS, None, None, "t1", None), "agent", None, True))


def test_the_least_recently_put_make_room() -> None:
    kept = Repeats()
    for number in range(repeats._KEPT):
        kept.put(b"%d" % number, REPEAT)
    kept.put(b"0", REPEAT)
    kept.put(b"new", REPEAT)
    assert len(kept) == repeats._KEPT
    assert kept.get(b"1") is None
    assert kept.get(b"0") is kept.get(b"new") is REPEAT


def test_a_key_is_no_token() -> None:
    key = repeat_key(b"ibex_pat_0123456789abcdef")
    assert len(key) == 32
    assert key != repeat_key(b"ibex_pat_0123456789abcdeg")
