"""Compression: what is packed comes back, and nothing expands beyond the limit."""

from __future__ import annotations

import gzip
import subprocess
import sys
import tracemalloc
import zlib
from contextlib import suppress

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from holdfast.errors import CannotDecode, InvalidInput
from holdfast.messaging import compression
from holdfast.messaging.compression import Algorithm, compressed, expanded
from tests.unit.given import steady

MEBIBYTE = 1024 * 1024
BOTH: list[Algorithm] = ["gzip", "zstd"]


def refusal(body: bytes, encoding: str, bytes_max: int = MEBIBYTE) -> str:
    with pytest.raises(CannotDecode) as caught:
        expanded(body, encoding, bytes_max)
    assert caught.value.__cause__ is None
    return caught.value.detail


def of_unsaid_size(body: bytes) -> bytes:
    """A zstd frame that does not say how large it will be, as streaming writers make them."""
    stream = zstandard.ZstdCompressor().compressobj()
    packed: bytes = stream.compress(body) + stream.flush()
    assert zstandard.frame_content_size(packed) == (-1 if body else 0)
    return packed


@steady
@given(body=st.binary(max_size=2_000))
@pytest.mark.parametrize("algorithm", BOTH)
def test_what_is_packed_comes_back(algorithm: Algorithm, body: bytes) -> None:
    packed = compressed(body, algorithm)
    assert expanded(packed, algorithm, len(body)) == body
    assert packed == compressed(body, algorithm), "the same bytes for the same body"


@pytest.mark.parametrize("algorithm", BOTH)
@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 300_000])
def test_every_length_of_the_packed_form_is_read(algorithm: Algorithm, size: int) -> None:
    body = bytes(number * number % 251 for number in range(size))
    assert expanded(compressed(body, algorithm), algorithm, size) == body
    assert expanded(of_unsaid_size(body), "zstd", size) == body


def test_the_words_of_others_are_understood() -> None:
    packed = gzip.compress(b"hello")
    for encoding in ("gzip", "gzip, UTF-8", "gzip:UTF-8", "GZIP", " gzip ,utf-8", "UTF-8, gzip"):
        assert expanded(packed, encoding, 100) == b"hello"
    for encoding in ("", "UTF-8", "utf-8", "identity"):
        assert expanded(b"hello", encoding, 100) == b"hello"


@pytest.mark.parametrize("encoding", ["br", "deflate", "gzip, gzip", "gzip, zstd", "ISO-8859-1", "x" * 10_000])
def test_another_encoding_is_refused(encoding: str) -> None:
    assert refusal(b"hello", encoding) == f"content encoding {encoding[:80]!r} is not gzip or zstd"


@pytest.mark.parametrize("algorithm", BOTH)
def test_the_limit_is_exact(algorithm: Algorithm) -> None:
    packed = compressed(b"a" * 1_000, algorithm)
    assert expanded(packed, algorithm, 1_000) == b"a" * 1_000
    assert refusal(packed, algorithm, 999) == "the body expands beyond the limit of 999 bytes"


BOMB = bytes(256 * MEBIBYTE)
BOMBS = {
    "gzip": ("gzip", zlib.compress(BOMB, wbits=31)),
    "zstd": ("zstd", zstandard.ZstdCompressor().compress(BOMB)),
    "zstd of unsaid size": ("zstd", of_unsaid_size(BOMB)),
}
del BOMB


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_while_it_expands(name: str) -> None:
    encoding, packed = BOMBS[name]
    assert len(packed) < MEBIBYTE
    tracemalloc.start()
    try:
        assert refusal(packed, encoding, 16 * MEBIBYTE) == "the body expands beyond the limit of 16777216 bytes"
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 64 * MEBIBYTE, "it was expanded further than the limit asks"


@pytest.mark.parametrize("algorithm", BOTH)
def test_damage_is_refused(algorithm: Algorithm) -> None:
    packed = compressed(b"correct-horse-battery " * 100, algorithm)
    assert refusal(packed[:-1], algorithm) == f"the body is {algorithm} that breaks off"
    assert refusal(b"", algorithm) == f"the body is {algorithm} that breaks off"
    assert refusal(b"correct-horse-battery", algorithm) == f"the body is damaged {algorithm}"
    assert refusal(packed + b"x", algorithm) == f"the body has bytes behind the end of its {algorithm}"
    assert refusal(packed + packed, algorithm) == f"the body has bytes behind the end of its {algorithm}"
    assert refusal(packed + b"x" * 5_000, algorithm) == f"the body has bytes behind the end of its {algorithm}"


@steady
@given(body=st.binary(max_size=200), at=st.integers(0, 300), byte=st.integers(0, 255))
@pytest.mark.parametrize("algorithm", BOTH)
def test_any_bytes_expand_or_are_refused(algorithm: Algorithm, body: bytes, at: int, byte: int) -> None:
    with suppress(CannotDecode):
        assert len(expanded(body, algorithm, 1_000)) <= 1_000
    damaged = bytearray(compressed(body, algorithm))
    damaged[at % len(damaged)] = byte
    with suppress(CannotDecode):
        assert len(expanded(bytes(damaged), algorithm, 1_000)) <= 1_000


def test_without_the_library_zstd_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = compressed(b"hello", "zstd")
    monkeypatch.setattr(compression, "zstandard", None)
    assert refusal(packed, "zstd") == "the body is compressed with zstd; to read it install holdfast[zstd]"
    with pytest.raises(InvalidInput, match=r"needs the package zstandard: install holdfast\[zstd\]"):
        compression.require("zstd")
    compression.require("gzip")


def test_the_bare_install_imports_neither_zstandard_nor_pydantic() -> None:
    program = """
import sys
sys.modules["zstandard"] = None  # as if it were not installed
import holdfast
from dataclasses import dataclass
@dataclass
class Note:
    text: str
codec = holdfast.Codec({"note": Note}, compress="gzip", compress_over=0)
assert codec.encode(Note("a" * 100))[0].headers == {"content-encoding": "gzip"}
assert not any(name.split(".")[0].startswith("pydantic") for name in sys.modules), "pydantic was imported"
try:
    holdfast.Codec({}, compress="zstd")
except holdfast.HoldfastError as error:
    print(error.detail)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "install holdfast[zstd]" in done.stdout
