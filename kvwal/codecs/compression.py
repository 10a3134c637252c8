"""Compression of single values: zlib, and zstd where Python has it or backports.zstd is installed.

What is decompressed is one whole stream and no more than a value may have, whatever its bytes say.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from importlib import import_module
from typing import Any

from kvwal.keys import MAX_VALUE_BYTES

__all__ = ["compression"]


def compression(
    method: str, level: int | None, most: int = MAX_VALUE_BYTES
) -> tuple[Callable[[bytes], bytes], Callable[[memoryview], bytes]]:
    """The functions of a method. What is to be decompressed is refused with ValueError if it is not valid."""
    failure: type[Exception]
    new_decompressor: Callable[[], Any]
    if method == "zlib":
        compress: Callable[[bytes, int], bytes] = zlib.compress
        default, failure, new_decompressor = -1, zlib.error, zlib.decompressobj
    elif method == "zstd":
        zstd = _zstd()
        compress, default, failure, new_decompressor = zstd.compress, 3, zstd.ZstdError, zstd.ZstdDecompressor
    else:
        raise ValueError(f'{method!r} is no method; they are "zlib" and "zstd"')
    taken = default if level is None else level

    def decompress(data: memoryview) -> bytes:
        stream = new_decompressor()
        try:
            found: bytes = stream.decompress(data, most + 1)
        except failure as error:
            raise ValueError(f"they are not of {method}: {error}") from None
        if len(found) > most:
            raise ValueError(f"they are more than {most} bytes when decompressed")
        if not stream.eof or stream.unused_data:
            raise ValueError(f"they are not one whole stream of {method}")
        return found

    try:
        compress(b"", taken)
    except (failure, ValueError):
        raise ValueError(f"{method} has no level {level}") from None
    return lambda data: compress(data, taken), decompress


def _zstd() -> Any:
    for module in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(module)
        except ImportError:
            continue
    raise ImportError("Python has zstd from 3.14 on; for this one, install it with: pip install backports.zstd")
