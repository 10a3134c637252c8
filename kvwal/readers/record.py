"""A pin: what a follower needs to stay, as it stands in its file.

    at   type   field
     0   8 B    magic "kvwalpin"
     8   u16    version, 1
    10   u16    size, 140
    12   u32    flags, zero
    16   16 B   store id
    32   8 B    line
    40   u64    generation that is needed; 0: none
    48   u64    seqno beyond which the log is needed; 2^64 - 1: none of it
    56   u32    process id
    60   u32    length of the name
    64   u64    made at, wall clock, microseconds since 1970 UTC
    72   64 B   name, UTF-8, filled with zeros
   136   u32    CRC-32C of the bytes before

It is written once, before the file gets its name, and never changed. On disk: never change.
"""

from __future__ import annotations

from struct import Struct
from typing import Final, NamedTuple

from crc32c import crc32c

__all__ = ["NAME_BYTES", "NO_LOG", "PIN_BYTES", "PinRecord", "decode_pin", "encode_pin"]

PIN: Final = Struct("<8sHHI16s8sQQIIQ64s")
CRC: Final = Struct("<I")
PIN_BYTES: Final = PIN.size + CRC.size
assert PIN_BYTES == 140, "the size of a pin"

_MAGIC: Final = b"kvwalpin"
_VERSION: Final = 1
#: A name has at most this many bytes.
NAME_BYTES: Final = 64
# The last microsecond that a date can be, the end of the year 9999.
_LAST_US: Final = 253_402_300_799_999_999
#: The seqno of a pin that needs no log.
NO_LOG: Final = (1 << 64) - 1


class PinRecord(NamedTuple):
    """Who needs what.

    Attributes:
        store_id, line: of the store that it follows. generation: 0 if it needs no pages.
        after: the log beyond this commit is needed; `NO_LOG` if it needs none.
        pid: of its process, as that sees it. made_us: wall clock. name: what the follower is called.
    """

    store_id: bytes
    line: bytes
    generation: int
    after: int
    pid: int
    made_us: int
    name: str


def encode_pin(pin: PinRecord) -> bytes:
    """The bytes of the file. Requires: a name of at most `NAME_BYTES` bytes."""
    name = pin.name.encode()
    head = _MAGIC, _VERSION, PIN_BYTES, 0, pin.store_id, pin.line, pin.generation, pin.after
    raw = PIN.pack(*head, pin.pid, len(name), pin.made_us, name)
    return raw + CRC.pack(crc32c(raw))


def decode_pin(raw: bytes) -> PinRecord | None:
    """The pin in these bytes; None if they are none that this version knows."""
    if len(raw) != PIN_BYTES or CRC.unpack_from(raw, PIN.size)[0] != crc32c(raw[: PIN.size]):
        return None
    magic, version, size, flags, store_id, line, generation, after, pid, length, made_us, name = PIN.unpack_from(raw)
    if (magic, version, size, flags) != (_MAGIC, _VERSION, PIN_BYTES, 0) or length > NAME_BYTES:
        return None
    if made_us > _LAST_US:
        return None
    return PinRecord(store_id, line, generation, after, pid, made_us, name[:length].decode("utf-8", "replace"))
