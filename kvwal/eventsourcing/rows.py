"""The rows of a table of events, as bytes.

On disk: never change. The keys are of the type `Key`, and the values bytes.

| key | value |
|---|---|
| ("last",) | the id that was given last |
| ("event", id) | an event |
| ("version", originator, version) | the id of the event that made this version |
| ("tracking", application) | the id up to which events of this application were processed |
| ("tag", tag, id), ("type", type, id) | nothing: the event has this tag, or this type |

An id is a tuple of one int, as `kvwal.codecs.pack` packs it.

A stored event:

| size | field |
|---|---|
| u8 | 01 if its originator is a UUID, 02 if it is a str |
| i64 | version |
| u32 | bytes of the originator: 16 of a UUID |
| u32 | bytes of the topic |
| | the originator; the topic; the state |

A DCB event:

| size | field |
|---|---|
| u8 | 03 |
| u32 | bytes of the tuple |
| | a tuple of its type and then its tags, packed; its data |

Numbers are little-endian, and a str is UTF-8. What bytes are valid: each field has its value, and the lengths end
within the value.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from struct import Struct
from struct import error as struct_error
from typing import Final, TypeAlias
from uuid import UUID

from kvwal.codecs import key_codec, pack, unpack
from kvwal.errors import CodecError
from kvwal.eventsourcing.failures import encoding
from kvwal.keys import MAX_KEY_BYTES, BytesLike, as_value

__all__ = [
    "EVENT",
    "LAST",
    "Key",
    "dcb_event_of",
    "encode_dcb_event",
    "encode_id",
    "encode_stored_event",
    "event_key",
    "id_of",
    "last_of",
    "prefix",
    "stored_event_of",
]

Key: TypeAlias = tuple[int | str | UUID, ...]

_CODEC: Final = key_codec(Key)
_BY_UUID: Final = 1
_BY_STR: Final = 2
_WITH_TAGS: Final = 3
_STORED: Final = Struct("<BqII")
_DCB: Final = Struct("<BI")
_UUID_BYTES: Final = 16
# The code of an int of no bytes: of n bytes it is so much more.
_INT: Final = 0x14
_MAX_LAST: Final = 1 << 63
# Of an id below 2**64.
_MAX_ID_BYTES: Final = 9


@encoding
def prefix(*parts: int | str | UUID) -> bytes:
    """The bytes that keys with these leading parts begin with; with an id behind them, a key. DataError, TypeError."""
    data = _CODEC.encode(parts)
    if len(data) > MAX_KEY_BYTES - _MAX_ID_BYTES:
        raise ValueError(f"{len(data)} bytes are too long for a key: {MAX_KEY_BYTES - _MAX_ID_BYTES} are the most")
    return data


LAST: Final = prefix("last")
EVENT: Final = prefix("event")


def encode_id(number: int) -> bytes:
    """An id, as the end of a key or as a value. DataError, TypeError."""
    # Hot: what `pack` makes, in a third of the time.
    if type(number) is int and 0 < number < 1 << 64:
        size = (number.bit_length() + 7) >> 3
        return ((_INT + size << (size << 3)) + number).to_bytes(size + 1, "big")
    return _encode_any_id(number)


@encoding
def _encode_any_id(number: int) -> bytes:
    return pack((index(number),))


def id_of(data: bytes | None) -> int:
    """What `encode_id` was given; 0 for no value. CodecError."""
    if data is None:
        return 0
    # Hot, as above.
    size = len(data) - 1
    if 0 < size <= 8 and data[0] == _INT + size and data[1]:
        return int.from_bytes(data[1:], "big")
    match unpack(data):
        case (int(number),) if type(number) is int:
            return number
    raise CodecError("id", data, "they are not one int")


def last_of(data: bytes | None) -> int:
    """The value of the row `LAST`; 0 if there is none. CodecError."""
    last = id_of(data)
    if not 0 <= last < _MAX_LAST:
        assert data is not None
        raise CodecError("id", data, "they are no id of an event")
    return last


def event_key(number: int) -> bytes:
    """The key of an event."""
    return EVENT + encode_id(number)


@encoding
def encode_stored_event(originator: object, version: int, topic: object, state: BytesLike) -> bytes:
    """The value of a stored event. TypeError; DataError for a version of more than 64 bits, and what UTF-8 has not."""
    if isinstance(originator, UUID):
        form, by = _BY_UUID, originator.bytes
    elif isinstance(originator, str):
        form, by = _BY_STR, originator.encode()
    else:
        raise TypeError(f"the originator of an event is a UUID or a str, not {type(originator).__name__}")
    if not isinstance(topic, str):
        raise TypeError(f"the topic of an event is a str, not {type(topic).__name__}")
    named = topic.encode()
    try:
        head = _STORED.pack(form, index(version), len(by), len(named))
    except struct_error:
        raise ValueError(f"version {version} has more than 64 bits") from None
    return as_value(b"".join((head, by, named, as_value(state))))


def stored_event_of(value: bytes) -> tuple[UUID | str, int, str, bytes]:
    """Originator, version, topic and state. CodecError."""
    try:
        form, version, of_originator, of_topic = _STORED.unpack_from(value)
        topic_at = _STORED.size + of_originator
        end = topic_at + of_topic
        by = value[_STORED.size : topic_at]
        if end > len(value):
            raise ValueError
        topic = value[topic_at:end].decode()
        if form == _BY_UUID and of_originator == _UUID_BYTES:
            return UUID(bytes=by), version, topic, value[end:]
        if form == _BY_STR:
            return by.decode(), version, topic, value[end:]
    except (ValueError, struct_error):
        pass
    raise CodecError("event", value, "they are no stored event")


@encoding
def encode_dcb_event(kind: object, tags: Sequence[object], data: BytesLike) -> bytes:
    """The value of a DCB event. TypeError, DataError."""
    if not all(isinstance(each, str) for each in (kind, *tags)):
        raise TypeError("the type of an event is a str, and so is each of its tags")
    names = pack((kind, *tags))
    return as_value(b"".join((_DCB.pack(_WITH_TAGS, len(names)), names, as_value(data))))


def dcb_event_of(value: bytes) -> tuple[str, list[str], bytes]:
    """Type, tags and data. CodecError."""
    if len(value) >= _DCB.size:
        form, size = _DCB.unpack_from(value)
        end = _DCB.size + size
        if form == _WITH_TAGS and end <= len(value):
            match unpack(value[_DCB.size : end]):
                case (str(kind), *tags) if all(isinstance(tag, str) for tag in tags):
                    return kind, tags, value[end:]
    raise CodecError("event", value, "they are no DCB event")
