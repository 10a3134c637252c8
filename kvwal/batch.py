"""Writes that belong together: the keys, values and ranges of one commit, and their limits.

A `WriteBatch` is kept in a canonical form that the log, the memtable and the pages all rely on:

Invariant: `ranges` are applied first, then `writes`. A `delete_range` therefore takes the writes it
covers out of `writes`, and a later put of such a key goes in again and wins.
Invariant: keys and values are exactly `bytes` (never a subclass, never a view of the caller's memory).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, NewType, TypeAlias

__all__ = [
    "MAX_BATCH_BYTES",
    "MAX_KEY_BYTES",
    "MAX_VALUE_BYTES",
    "BytesLike",
    "KeyRange",
    "Seqno",
    "WriteBatch",
    "as_key",
    "as_value",
    "prefix_stop",
]

# On disk: never raise without a new format version; lengths are stored in 2 and 4 bytes.
MAX_KEY_BYTES: Final = 65_535
MAX_VALUE_BYTES: Final = 1 << 30
# All keys and values of one commit. A record's length is stored in 4 bytes; the rest is room for columns.
MAX_BATCH_BYTES: Final = 3 << 30

BytesLike: TypeAlias = bytes | bytearray | memoryview

Seqno = NewType("Seqno", int)
"""Number of a commit: contiguous, from 1. 0 means "before the first commit"."""

KeyRange: TypeAlias = tuple[bytes, bytes | None]
"""Half-open: from the first key on, up to but without the second; None means to the end."""


def as_key(key: object) -> bytes:
    """The key as `bytes`. TypeError if it is not bytes-like, ValueError if it is too long."""
    data = _as_bytes(key, "key")
    if len(data) > MAX_KEY_BYTES:
        raise ValueError(f"the key has {len(data)} bytes; the limit is {MAX_KEY_BYTES}")
    return data


def as_value(value: object) -> bytes:
    """The value as `bytes`. TypeError if it is not bytes-like, ValueError if it is too long."""
    data = _as_bytes(value, "value")
    if len(data) > MAX_VALUE_BYTES:
        raise ValueError(f"the value has {len(data)} bytes; the limit is {MAX_VALUE_BYTES}")
    return data


def _as_bytes(data: object, what: str) -> bytes:
    if type(data) is bytes:
        return data
    if isinstance(data, str):
        raise TypeError(f"a {what} is bytes, not str; encode it first, as in text.encode()")
    # bytes(5) would be five zero bytes: only what has a buffer is let through.
    try:
        view = memoryview(data)  # type: ignore[arg-type]  # the TypeError is the check
    except TypeError:
        raise TypeError(f"a {what} is bytes or bytes-like, not {type(data).__name__}") from None
    return view.tobytes()


def prefix_stop(prefix: bytes) -> bytes | None:
    """The first key after all keys that start with `prefix`; None if there is none."""
    trimmed = prefix.rstrip(b"\xff")
    if not trimmed:
        return None
    return trimmed[:-1] + bytes((trimmed[-1] + 1,))


class WriteBatch:
    """An ordered set of puts and deletes that is committed whole or not at all.

    It reads nothing, so committing it never conflicts. Later calls win over earlier ones. Not
    thread-safe; may be committed more than once.
    """

    __slots__ = ("ranges", "writes")

    def __init__(self) -> None:
        #: The newest value of each key written; None stands for a delete.
        self.writes: dict[bytes, bytes | None] = {}
        #: Ranges deleted before `writes` take effect.
        self.ranges: list[KeyRange] = []

    def put(self, key: BytesLike, value: BytesLike) -> None:
        """Set `key` to `value`. TypeError or ValueError if either cannot be stored."""
        if type(key) is not bytes or len(key) > MAX_KEY_BYTES:
            key = as_key(key)
        if type(value) is not bytes or len(value) > MAX_VALUE_BYTES:
            value = as_value(value)
        self.writes[key] = value

    __setitem__ = put

    def delete(self, key: BytesLike) -> None:
        """Remove `key` if it is there."""
        self.writes[as_key(key)] = None

    def delete_range(self, start: BytesLike | None = None, stop: BytesLike | None = None) -> None:
        """Remove every key from `start` on (None: the first) up to but without `stop` (None: the end)."""
        first = b"" if start is None else as_key(start)
        end = None if stop is None else as_key(stop)
        if end is not None and end <= first:
            return
        if self.writes:
            self.writes = {k: v for k, v in self.writes.items() if k < first or (end is not None and k >= end)}
        self.ranges.append((first, end))

    def update(self, items: Mapping[bytes, bytes] | Iterable[tuple[BytesLike, BytesLike]]) -> None:
        """Put every pair; none of them if one cannot be stored."""
        pairs = items.items() if isinstance(items, Mapping) else items
        checked = {
            (k if type(k) is bytes and len(k) <= MAX_KEY_BYTES else as_key(k)): (
                v if type(v) is bytes and len(v) <= MAX_VALUE_BYTES else as_value(v)
            )
            for k, v in pairs
        }
        self.writes.update(checked)

    def clear(self) -> None:
        """Forget everything."""
        self.writes = {}
        self.ranges = []

    def __len__(self) -> int:
        """Number of keys and ranges in the batch."""
        return len(self.writes) + len(self.ranges)

    def __repr__(self) -> str:
        return f"<WriteBatch of {len(self.writes)} keys and {len(self.ranges)} ranges>"
