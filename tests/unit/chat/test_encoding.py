"""Content codings, as the bytes come."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from itertools import pairwise
from random import Random

import brotli
import pytest
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st

from extproc.chat import ContentDecoder, content_decoder

PLENTY = 10**9
TEXT = b"".join(b'data: {"n":%d}\n\n' % at for at in range(200))


def raw_deflate(body: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(body) + compressor.flush()


CODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "identity": ("identity", bytes),
    "gzip": ("gzip", gzip.compress),
    "zlib": ("deflate", zlib.compress),
    "raw deflate": ("deflate", raw_deflate),
    "br": ("br", brotli.compress),
    "zstd": ("zstd", zstd.compress),
    "gzip twice": ("gzip, gzip", lambda body: gzip.compress(gzip.compress(body))),
    "all three": ("gzip, br, zstd", lambda body: zstd.compress(brotli.compress(gzip.compress(body)))),
}
every_coding = pytest.mark.parametrize("coding", CODINGS)


def decode(name: str, *chunks: bytes, max_bytes: int = PLENTY) -> tuple[bytes, ContentDecoder]:
    decoder = content_decoder(name, max_bytes)
    return b"".join([decoder.feed(chunk) for chunk in chunks]), decoder


@every_coding
@given(body=st.binary(max_size=300) | st.just(TEXT), places=st.lists(st.integers(0, 2000), max_size=8))
def test_what_was_encoded_comes_back_however_it_is_cut(coding: str, body: bytes, places: list[int]) -> None:
    name, encode = CODINGS[coding]
    encoded = encode(body)
    edges = [0, *sorted(min(place, len(encoded)) for place in places), len(encoded)]
    decoded, decoder = decode(name, *(encoded[start:end] for start, end in pairwise(edges)))
    assert decoded == body
    assert not decoder.failed
    assert not decoder.is_cut


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("GZIP", gzip.compress),
        ("x-gzip", gzip.compress),
        (" gzip ", gzip.compress),
        ("identity, gzip,", gzip.compress),
        ("X-Gzip,Br", lambda body: brotli.compress(gzip.compress(body))),
        ("", bytes),
        ("Identity", bytes),
    ],
)
def test_names_are_read_as_http_has_them(name: str, encode: Callable[[bytes], bytes]) -> None:
    assert decode(name, encode(TEXT))[0] == TEXT


@pytest.mark.parametrize("name", ["compress", "gzip;q=1", "*", "gzip, aes"])
def test_an_unknown_coding_gives_nothing_and_says_so(name: str) -> None:
    decoded, decoder = decode(name, gzip.compress(TEXT))
    assert decoded == b""
    assert decoder.failed


def test_more_than_three_codings_are_not_undone() -> None:
    encoded = TEXT
    for count in range(1, 5):
        encoded = gzip.compress(encoded)
        decoded, decoder = decode(", ".join(["gzip"] * count), encoded)
        assert (decoded, decoder.failed) == ((TEXT, False) if count < 4 else (b"", True))


@pytest.mark.parametrize("name", ["br", "zstd"])
def test_without_its_package_a_coding_is_unknown(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> object:
        raise ModuleNotFoundError(package)

    monkeypatch.setattr("importlib.import_module", missing)
    assert content_decoder(name, PLENTY).failed
    assert not content_decoder("gzip", PLENTY).failed


@every_coding
def test_an_empty_body_is_no_failure(coding: str) -> None:
    name, _ = CODINGS[coding]
    assert not decode(name)[1].failed
    assert not decode(name, b"", b"")[1].failed


@every_coding
def test_a_body_that_broke_off_gives_what_came(coding: str) -> None:
    name, encode = CODINGS[coding]
    encoded = encode(TEXT * 20)
    decoded, decoder = decode(name, encoded[: len(encoded) // 2])
    assert decoded + (TEXT * 20)[len(decoded) :] == TEXT * 20
    assert not decoder.failed


@pytest.mark.parametrize("name", ["gzip", "deflate", "br", "zstd", "gzip, br"])
@given(chunks=st.lists(st.binary(max_size=60), max_size=4))
def test_no_bytes_raise(name: str, chunks: list[bytes]) -> None:
    decode(name, *chunks)


@pytest.mark.parametrize("coding", [name for name in CODINGS if name != "identity"])
@given(at=st.integers(0, 2**16), byte=st.integers(0, 255))
def test_a_damaged_body_does_not_raise(coding: str, at: int, byte: int) -> None:
    name, encode = CODINGS[coding]
    encoded = bytearray(encode(TEXT))
    encoded[at % len(encoded)] = byte
    decoded, _ = decode(name, bytes(encoded), b"more")
    assert len(decoded) <= 100 * len(TEXT)


@pytest.mark.parametrize("name", ["gzip", "br", "zstd"])
def test_what_is_not_of_the_coding_fails_for_good(name: str) -> None:
    decoder = content_decoder(name, PLENTY)
    assert decoder.feed(b'{"choices": []}' * 10) == b""
    assert decoder.failed
    encoded = {"gzip": gzip.compress, "br": brotli.compress, "zstd": zstd.compress}[name](TEXT)
    assert decoder.feed(encoded) == b""


def test_several_members_and_frames_are_one_body() -> None:
    assert decode("gzip", gzip.compress(b"a") + gzip.compress(b"") + gzip.compress(b"b"))[0] == b"ab"
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    assert decode("zstd", zstd.compress(b"a"), skippable + zstd.compress(b"b"))[0] == b"ab"


def test_a_deflated_body_without_header_is_known_though_it_passes_for_the_headers_checksum() -> None:
    bodies = (b"%d" % at for at in range(1000))
    body = next(body for body in bodies if int.from_bytes(raw_deflate(body)[:2], "big") % 31 == 0)
    assert decode("deflate", raw_deflate(body))[0] == body


@pytest.mark.parametrize("coding", ["gzip", "zlib", "raw deflate", "br"])
def test_what_follows_the_end_is_passed_over(coding: str) -> None:
    name, encode = CODINGS[coding]
    decoded, decoder = decode(name, encode(TEXT), b"\0\0garbage", encode(TEXT))
    assert decoded == TEXT
    assert not decoder.failed


BOMBS = {
    "identity": bytes(30_000_000),
    "gzip": gzip.compress(bytes(30_000_000)),
    "zlib": zlib.compress(bytes(30_000_000)),
    "raw deflate": raw_deflate(bytes(30_000_000)),
    "br": brotli.compress(bytes(30_000_000), quality=5),
    "zstd": zstd.compress(bytes(30_000_000)),
}


@pytest.mark.parametrize("coding", BOMBS)
@pytest.mark.parametrize("max_bytes", [0, 1, 65535, 65536, 65537, 1_000_000])
def test_a_bomb_gives_no_more_than_the_limit(coding: str, max_bytes: int) -> None:
    decoded, decoder = decode(CODINGS[coding][0], BOMBS[coding], BOMBS[coding], max_bytes=max_bytes)
    assert len(decoded) == max_bytes
    assert decoder.is_cut or decoder.failed
    assert decoder.feed(b"more") == b""


@pytest.mark.parametrize("coding", [name for name in BOMBS if name != "identity"])
def test_a_bomb_comes_in_small_pieces(coding: str) -> None:
    sizes = [len(piece) for piece in content_decoder(CODINGS[coding][0], PLENTY).pieces(BOMBS[coding])]
    assert max(sizes) <= 100_000
    assert sum(sizes) == 30_000_000


@pytest.mark.parametrize("coding", ["gzip", "zlib", "br", "zstd"])
def test_what_was_not_taken_comes_with_the_next_chunk(coding: str) -> None:
    name, encode = CODINGS[coding]
    decoder = content_decoder(name, PLENTY)
    body = Random(0).randbytes(1000) * 300
    encoded = encode(body)
    first = next(decoder.pieces(encoded[:-4]))
    assert first + decoder.feed(encoded[-4:]) == body


@every_coding
def test_exactly_the_limit_is_not_cut(coding: str) -> None:
    name, encode = CODINGS[coding]
    body = bytes(range(256)) * 400
    decoded, decoder = decode(name, encode(body), max_bytes=len(body))
    assert decoded == body
    assert not decoder.is_cut
    decoded, decoder = decode(name, encode(body), max_bytes=len(body) - 1)
    assert decoded == body[:-1]
    assert decoder.is_cut or decoder.failed


def test_what_lies_between_two_codings_is_bounded_too() -> None:
    """The outer one stands for gigabytes of an inner one that decodes to nothing."""
    nothing = gzip.compress(gzip.compress(b"") * 1_000_000)
    decoded, decoder = decode("gzip, gzip", nothing, max_bytes=1_000_000)
    assert decoded == b""
    assert decoder.is_cut or decoder.failed


@pytest.mark.parametrize(("coding", "empty"), [("zstd", zstd.compress(b"")), ("gzip", gzip.compress(b"", mtime=0))])
def test_endless_empty_frames_fail(coding: str, empty: bytes) -> None:
    _, decoder = decode(coding, *[empty * 100] * 200)
    assert decoder.failed


def test_a_frame_that_needs_a_larger_window_than_http_allows_fails() -> None:
    options = {int(zstd.CompressionParameter.window_log): 24}
    _, decoder = decode("zstd", zstd.compress(bytes(30_000_000), options=options))
    assert decoder.failed
