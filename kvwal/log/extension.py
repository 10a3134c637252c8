"""The extension block: what a commit says of itself beside its writes. With kind bit 8 the record has it before them.

Little-endian, without padding: a u16 with the length of what follows, then items of type u8, length u16, content. It is
valid when
1. its items fill it exactly, and their types ascend,
2. the length of each item of a known type is within its limits,
3. items of unknown types are of type 128 or more; they are skipped. A lower one was written by a newer version.

Item 1, the user's pairs: for each pair key length u16, value length u16, key, value. It is valid when keys and values
are UTF-8, the keys ascend as bytes, and the pairs fill it exactly.

Item 2, the cause: one byte that says why the store itself made the commit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final, TypeAlias

__all__ = [
    "CAUSE",
    "CONSUMER",
    "EXPIRE",
    "MAX_META_BYTES",
    "META",
    "MIGRATE",
    "Extension",
    "UnknownToUs",
    "cause_of",
    "decode_extension",
    "encode_extension",
    "extension_of",
    "meta_of",
]

Extension: TypeAlias = Mapping[int, bytes]
"""Items of an extension block, by type."""

# On disk: never change.
#: The user's pairs.
META: Final = 1
#: Why the store itself made the commit: one of these.
CAUSE: Final = 2
#: What it deletes has expired.
EXPIRE: Final = b"\x01"
MIGRATE: Final = b"\x03"
_CAUSES: Final = {1: "expire", 2: "redact", 3: "migrate", 4: "index", 5: "revert", 6: "restore"}
#: The name of the consumer that committed, UTF-8.
CONSUMER: Final = 5
#: What the pairs may take in the log.
MAX_META_BYTES: Final = 4096
# Types of items, with the least and the most bytes of their content.
_ITEMS: Final = {META: (1, MAX_META_BYTES), CAUSE: (1, 1), 3: (1, 64), CONSUMER: (1, 255)}
_FIRST_SKIPPED_ITEM: Final = 128

_BLOCK = struct.Struct("<H")
_ITEM = struct.Struct("<BH")
_PAIR = struct.Struct("<HH")


class UnknownToUs(ValueError):
    """The body is of a newer format: it holds an operation or an extension item that this version does not know."""


def extension_of(meta: Mapping[str, str] | None) -> Extension | None:
    """The extension of a commit with these pairs; None without any.

    TypeError if they are no mapping of str to str, ValueError if they take more than 4 KiB, or are not Unicode.
    """
    if meta is None:
        return None
    if not isinstance(meta, Mapping):
        raise TypeError(f"meta is a mapping of str to str, not {type(meta).__name__}")
    pairs = []
    items: Iterable[tuple[object, object]] = meta.items()
    for key, value in items:
        if not isinstance(key, str) or not isinstance(value, str):
            raise TypeError(f"meta maps str to str, not {type(key).__name__} to {type(value).__name__}")
        try:
            pairs.append((key.encode(), value.encode()))
        except UnicodeEncodeError:
            raise ValueError("meta cannot be encoded in UTF-8: it has half of a surrogate pair in it") from None
    size = sum(_PAIR.size + len(key) + len(value) for key, value in pairs)
    if size > MAX_META_BYTES:
        raise ValueError(f"meta takes {size} bytes (UTF-8, and 4 for each pair); the limit is {MAX_META_BYTES}")
    if not pairs:
        return None
    pairs.sort()
    return {META: b"".join(_PAIR.pack(len(key), len(value)) + key + value for key, value in pairs)}


def meta_of(extension: Extension | None) -> dict[str, str]:
    """The pairs that `extension_of` was given; of one that was read, ValueError if they are not valid."""
    content = b"" if extension is None else extension.get(META, b"")
    pairs: dict[str, str] = {}
    last: bytes | None = None
    at = 0
    while at < len(content):
        if len(content) - at < _PAIR.size:
            raise ValueError("the user's pairs in the commit are cut short")
        key_length, value_length = _PAIR.unpack_from(content, at)
        at += _PAIR.size
        split, end = at + key_length, at + key_length + value_length
        if end > len(content):
            raise ValueError("the user's pairs in the commit are cut short")
        key = content[at:split]
        if last is not None and key <= last:
            raise ValueError("the user's pairs in the commit are out of order")
        # UnicodeDecodeError is a ValueError.
        pairs[key.decode()] = content[split:end].decode()
        last, at = key, end
    return pairs


def cause_of(extension: Extension) -> str | None:
    """Why the store itself made the commit, as "migrate"; None if a user did. A cause that is not known is a number."""
    cause = extension.get(CAUSE)
    return None if cause is None else _CAUSES.get(cause[0], str(cause[0]))


def encode_extension(items: Mapping[int, bytes]) -> bytes:
    """The extension block. ValueError for an item that is not known, or is too short or too long."""
    parts = []
    for kind, content in sorted(items.items()):
        least, most = _ITEMS.get(kind, (1, 0))
        if not least <= len(content) <= most:
            raise ValueError(f"extension item {kind} with {len(content)} bytes is not known, too short or too long")
        parts.append(_ITEM.pack(kind, len(content)) + content)
    block = b"".join(parts)
    return _BLOCK.pack(len(block)) + block


def decode_extension(body: bytes) -> tuple[dict[int, bytes], int]:
    """The items of the extension block that a body begins with, by type, and where the block ends.

    Items of types from 128 on are left out. ValueError as `intents.decode_intents`.
    """
    if len(body) < _BLOCK.size:
        raise ValueError("the commit's extension block is cut short")
    at = _BLOCK.size
    end = at + _BLOCK.unpack_from(body)[0]
    items: dict[int, bytes] = {}
    last = 0
    while at + _ITEM.size <= end <= len(body):
        kind, length = _ITEM.unpack_from(body, at)
        at += _ITEM.size + length
        if kind <= last:
            raise ValueError("the items of the commit's extension block are out of order")
        last = kind
        if kind >= _FIRST_SKIPPED_ITEM:
            continue
        if kind not in _ITEMS:
            raise UnknownToUs(f"the commit has an extension item of type {kind}")
        least, most = _ITEMS[kind]
        if not least <= length <= most:
            raise ValueError(f"an extension item of type {kind} with {length} bytes is too short or too long")
        items[kind] = body[at - length : at]
    if at != end:
        raise ValueError("the items of the commit's extension block do not fill it")
    return items, end
