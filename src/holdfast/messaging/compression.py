"""Compression of bodies, named in the header `content-encoding`; what expands too far is refused while it expands."""

from __future__ import annotations

import re
import zlib
from typing import Any, Literal

from holdfast.errors import CannotDecode, InvalidInput

# Of the `zstd` extra. Imported at once or not at all: who installed it wants it.
zstandard: Any
try:
    import zstandard
except ImportError:
    zstandard = None

CONTENT_ENCODING = "content-encoding"

Algorithm = Literal["gzip", "zstd"]

GZIP_WBITS = 31  # zlib's word for the gzip container
# zstd has no limit on what one call makes. A block of 4 bytes may stand for 128 KiB, so a slice makes at most 8 MiB.
ZSTD_SLICE = 256
NO_COMPRESSION = frozenset({"", "identity", "utf-8", "utf8", "us-ascii"})  # Spring writes the charset in this header


def require(algorithm: str) -> None:
    """Raise `InvalidInput` for an algorithm that is unknown or whose library is not installed."""
    if algorithm not in ("gzip", "zstd"):
        raise InvalidInput(f"compress must be 'gzip', 'zstd' or None, not {algorithm!r}")
    if algorithm == "zstd" and zstandard is None:
        raise InvalidInput("compress='zstd' needs the package zstandard: install holdfast[zstd], or use 'gzip'")


def compressed(body: bytes, algorithm: Algorithm) -> bytes:
    """The body made smaller; the same bytes for the same body."""
    if algorithm == "gzip":
        return zlib.compress(body, wbits=GZIP_WBITS)
    packed: bytes = zstandard.ZstdCompressor().compress(body)
    return packed


def expanded(body: bytes, encoding: str, bytes_max: int) -> bytes:
    """Undo a `content-encoding`; also one in Spring's forms, `gzip, UTF-8` and `gzip:UTF-8`.

    Stops when it has made more than `bytes_max` bytes. Raises `CannotDecode` for more, for damaged data and for an
    encoding that is unknown or whose library is not installed.
    """
    words = [word.strip() for word in re.split("[,:]", encoding.lower())]
    layers = [word for word in words if word not in NO_COMPRESSION]
    if not layers:
        return body
    if layers == ["gzip"]:
        return _from_gzip(body, bytes_max)
    if layers == ["zstd"]:
        return _from_zstd(body, bytes_max)
    raise CannotDecode(f"content encoding {encoding[:80]!r} is not gzip or zstd")


def _from_gzip(body: bytes, bytes_max: int) -> bytes:
    stream = zlib.decompressobj(wbits=GZIP_WBITS)
    try:
        found = stream.decompress(body, bytes_max + 1)
    except zlib.error:
        raise CannotDecode("the body is damaged gzip") from None
    if len(found) > bytes_max:
        raise CannotDecode(f"the body expands beyond the limit of {bytes_max} bytes")
    if not stream.eof:
        raise CannotDecode("the body is gzip that breaks off")
    if stream.unused_data:  # one member is one body: a million empty ones behind it would cost minutes
        raise CannotDecode("the body has bytes behind the end of its gzip")
    return found


def _from_zstd(body: bytes, bytes_max: int) -> bytes:
    if zstandard is None:
        raise CannotDecode("the body is compressed with zstd; to read it install holdfast[zstd]")
    stream = zstandard.ZstdDecompressor().decompressobj()
    parts: list[bytes] = []
    bytes_left = bytes_max
    try:
        for start in range(0, len(body), ZSTD_SLICE):
            if stream.eof:
                break
            parts.append(stream.decompress(body[start : start + ZSTD_SLICE]))
            bytes_left -= len(parts[-1])
            if bytes_left < 0:
                raise CannotDecode(f"the body expands beyond the limit of {bytes_max} bytes")
    except (zstandard.ZstdError, MemoryError):
        raise CannotDecode("the body is damaged zstd") from None
    if not stream.eof:
        raise CannotDecode("the body is zstd that breaks off")
    if stream.unused_data or start + ZSTD_SLICE < len(body):
        raise CannotDecode("the body has bytes behind the end of its zstd")
    return b"".join(parts)
