"""What a table is asked for with: its name, and the codecs of its keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Generic, TypeVar

from kvwal.batch import WriteBatch, pairs_of
from kvwal.codecs import SEQNO, KeyCodec, key_codec, value_codec
from kvwal.codecs.codec import Codec
from kvwal.codecs.tuples import TupleCodec
from kvwal.db.mapping import Bounds
from kvwal.engine.tables import Asked, CodecName, as_table_name
from kvwal.errors import CodecError
from kvwal.expiring import STAMP_BYTES, Expiring, expire_us
from kvwal.keys import END, MAX_KEY_BYTES, MAX_VALUE_BYTES, KeyRange, as_key, as_value, stop_of_prefix

__all__ = ["OfTable", "SubSpec", "TableSpec", "is_stamped"]

K = TypeVar("K")
V = TypeVar("V")


def is_stamped(codec: KeyCodec[Any], key: object) -> bool:
    """Whether the commit is to fill in the last part of a key."""
    return isinstance(key, tuple) and key[-1:] == (SEQNO,) and isinstance(codec, TupleCodec | _PrefixedTuples)


class TableSpec(Generic[K, V]):
    """The name and the codecs of a table.

    Attributes:
        name: of the table.
        key, value: codecs.
        pair: makes a pair of what was read.
        asked: what the table remembers of it.
        is_default: whether it is in the default table, which has no name and remembers nothing.
    """

    __slots__ = ("asked", "key", "name", "pair", "value")

    is_default: ClassVar[bool] = False

    def __init__(self, name: str, key: Any, value: Any, expire_s: float | None = None) -> None:
        """`key`, `value`: types or codecs. `expire_s`: the default expiry, infinity for none; None for what the table
        remembers. TypeError, ValueError.
        """
        self.name = as_table_name(name)
        self.key: KeyCodec[K] = key_codec(key)
        self.value: Codec[V] = value_codec(value)
        lasts_us = None if expire_s is None else 0 if expire_s == math.inf else expire_us(expire_s)
        self.asked = Asked(_name_of(self.key), _name_of(self.value), lasts_us)
        self.pair = _pair(self.key, self.value)

    def put_into(self, part: WriteBatch, key: K, value: V, expires_us: int | None = None) -> None:
        """Put a pair into a batch, so that it expires at that time. The last part of a tuple may be `SEQNO`."""
        codec = self.key
        encoded = self.value.encode(value)
        if expires_us is not None:
            encoded = Expiring.of(self.encode_value(value), expires_us)
        if is_stamped(codec, key):
            assert isinstance(codec, TupleCodec | _PrefixedTuples)
            place, offset = codec.place(key)
            part.put_stamped(place[:offset], encoded)
        elif expires_us is not None:
            part.put_until(self.encode_key(key), encoded[STAMP_BYTES:], expires_us)
        else:
            part.put(codec.encode(key), encoded)

    def puts(self, pairs: Mapping[K, V] | Iterable[tuple[K, V]]) -> WriteBatch:
        """Puts of what `dict.update` takes, for `into`."""
        made = WriteBatch()
        for key, value in pairs_of(pairs):
            self.put_into(made, key, value)
        return made

    def key_of(self, key: object) -> bytes | None:
        """The bytes of a key; None for what can be no key of this table."""
        try:
            return self.encode_key(key)  # type: ignore[arg-type]  # it raises
        except (TypeError, ValueError, OverflowError):
            return None

    def encode_key(self, key: K) -> bytes:
        """The key as bytes. TypeError and ValueError for what cannot be stored, whatever the codec made of it."""
        data = self.key.encode(key)
        return data if type(data) is bytes and len(data) <= MAX_KEY_BYTES else as_key(data)

    def encode_value(self, value: V) -> bytes:
        """The same of a value."""
        data = self.value.encode(value)
        return data if type(data) is bytes and len(data) <= MAX_VALUE_BYTES else as_value(data)

    def bounds(self, start: Any, stop: Any, prefix: Any, reverse: bool, limit: int | None) -> Bounds:
        """A range of keys as bytes. Of tuples, `start` and `stop` may be leading parts, and `prefix` is that.

        TypeError for a prefix of keys that have none.
        """
        first, end = self.range(start, stop)
        if prefix is not None:
            head = self.prefix(prefix)
            first = max(first, head.start)
            ends = [each for each in (end, head.stop) if each is not None]
            end = min(ends, default=None)
        if end is not None and len(end) > MAX_KEY_BYTES:
            # Longer than a key can be, as behind a prefix that is as long as one: below this are the same keys.
            end = stop_of_prefix(end[:MAX_KEY_BYTES])
        return Bounds(first, end, None, reverse, limit)

    def range(self, start: Any, stop: Any) -> KeyRange:
        """The keys from `start` on, below `stop`; None: to the end. Either may be `END`."""
        if stop is END:
            stop = None
        if start is END:
            self.range(None, stop)  # It may be no bound.
            return KeyRange(b"", b"")
        codec = self.key
        if isinstance(codec, TupleCodec):
            return codec.between(start, stop)
        # Checked: None from a codec that is at fault would be no bound.
        first = b"" if start is None else self.encode_key(start)
        return KeyRange(first, None if stop is None else self.encode_key(stop))

    def prefix(self, prefix: Any) -> KeyRange:
        """The keys that begin with this: a str, bytes, or the leading parts of a tuple (one part may stand alone)."""
        codec = self.key
        if isinstance(codec, TupleCodec):
            return codec.prefix(*(prefix if isinstance(prefix, tuple) else (prefix,)))
        if codec.name not in ("str", "bytes"):
            raise TypeError(f"keys of type {codec.name} have no prefixes; give start and stop")
        head = codec.encode(prefix)
        return KeyRange.of_prefix(head)

    def __repr__(self) -> str:
        key, value, _ = self.asked
        return f"{self.name!r}, {key}: {value}"


def _pair(key: KeyCodec[K], value: Codec[V]) -> Callable[[tuple[bytes, bytes]], tuple[K, V]]:
    # Hot: taken out of the codecs once.
    decode_key, decode_value = key.decode, value.decode

    def pair(pair: tuple[bytes, bytes]) -> tuple[K, V]:
        data, of = pair
        return decode_key(data), decode_value(of)

    return pair


class OfTable(Generic[K, V]):
    """What stands for a table, for threads or for tasks."""

    __slots__ = ()

    _spec: TableSpec[K, V]

    @property
    def name(self) -> str:
        """The table's name."""
        return self._spec.name

    @property
    def is_default(self) -> bool:
        """Whether it is a part of the default table, which has no name."""
        return self._spec.is_default


def _name_of(codec: Codec[Any]) -> CodecName:
    # Of a codec with versions, which reads older ones.
    oldest = getattr(codec, "oldest", codec.version)
    return CodecName(codec.name, codec.version, oldest if isinstance(oldest, int) else codec.version)


class SubSpec(TableSpec[K, V]):
    """The part of the default table whose keys begin with some bytes, which the keys of the spec are without."""

    __slots__ = ("_inner", "_prefix")

    is_default = True

    def __init__(self, prefix: bytes, key: Any, value: Any) -> None:
        self._prefix = prefix
        self._inner: TableSpec[K, V] = TableSpec("-", key, value)
        self.name = repr(prefix)
        inner = self._inner.key
        self.key = _PrefixedTuples(prefix, inner) if isinstance(inner, TupleCodec) else _Prefixed(prefix, inner)
        self.value = self._inner.value
        self.asked = self._inner.asked
        self.pair = _pair(self.key, self.value)

    def range(self, start: Any, stop: Any) -> KeyRange:
        """As `TableSpec.range`, within the prefix."""
        return self._within(self._inner.range(start, stop))

    def prefix(self, prefix: Any) -> KeyRange:
        """As `TableSpec.prefix`, within the prefix."""
        return self._within(self._inner.prefix(prefix))

    def _within(self, bounds: KeyRange) -> KeyRange:
        prefix = self._prefix
        return KeyRange(prefix + bounds.start, stop_of_prefix(prefix) if bounds.stop is None else prefix + bounds.stop)


class _Prefixed(Generic[K]):
    """Keys of another codec behind a prefix."""

    ordered = True

    def __init__(self, prefix: bytes, codec: KeyCodec[K]) -> None:
        self.name, self.version = codec.name, codec.version
        self._prefix = prefix
        self._codec = codec

    def encode(self, value: K, /) -> bytes:
        """The whole key."""
        return self._prefix + self._codec.encode(value)

    def decode(self, data: bytes, /) -> K:
        """What is behind the prefix. CodecError if that is not there."""
        if not data.startswith(self._prefix):
            raise CodecError(self.name, data, f"they do not begin with {self._prefix!r}, as the keys of this part do")
        return self._codec.decode(data[len(self._prefix) :])


class _PrefixedTuples(_Prefixed[K]):
    """The same of tuples, whose last part may be one that the commit fills in."""

    _codec: TupleCodec[Any]

    def place(self, value: Any, /) -> tuple[bytes, int | None]:
        """See `TupleCodec.place`."""
        place, offset = self._codec.place(value)
        return self._prefix + place, None if offset is None else len(self._prefix) + offset
