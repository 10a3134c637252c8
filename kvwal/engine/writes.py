"""What one commit writes, and the body of its record: a batch, or one put alone.

A batch is encoded as it is made, which is outside of any lock. A put alone needs no batch, and the log encodes it: it
is made in a sixth of the time. Neither changes after that. What a commit says of itself beside its writes (the
extension block of its record) makes a put a batch.
"""

from __future__ import annotations

from typing import Final, TypeAlias

from kvwal.batch import WriteBatch
from kvwal.engine.expiry import with_queue
from kvwal.files import Buffer
from kvwal.keys import MAX_BATCH_BYTES
from kvwal.log import CAUSE, EXPIRE, Extension, encode_intents, encode_put

__all__ = ["NOTHING", "EncodedBatch", "LonePut", "Writes"]


class LonePut:
    """One put; key and value have passed `as_key` and `as_value`. `names`: as `WriteBatch.names`."""

    __slots__ = ("key", "names", "size", "table", "value")

    is_empty: Final = False
    is_expiry: Final = False
    only_deletes: Final = False
    has_stamped: Final = False

    def __init__(self, key: bytes, value: bytes, table: int = 0, names: object = None) -> None:
        self.key = key
        self.value = value
        self.table = table
        self.names = names
        self.size = len(key) + len(value)

    @property
    def batch(self) -> WriteBatch:
        """The same as a batch."""
        batch = WriteBatch()
        batch.part(self.table).writes[self.key] = self.value
        return batch

    @property
    def body(self) -> bytes | list[Buffer]:
        """Of its record."""
        return encode_put(self.key, self.value, self.table)


class EncodedBatch:
    """A batch with its rows of the expiry queue, and what its commit says of itself.

    ValueError if it is too much for one commit.
    """

    __slots__ = ("_extension", "_template", "batch", "body", "has_stamped", "is_empty", "size")

    def __init__(self, batch: WriteBatch, extension: Extension | None = None) -> None:
        #: Whether keys are to be filled in when the seqno is known: see `filled`.
        self.has_stamped = batch.has_stamped()
        self._template = batch
        self._extension = extension
        batch = with_queue(batch)
        size = batch.size()
        if size > MAX_BATCH_BYTES:
            raise ValueError(
                f"the transaction has {size} bytes of keys and values; the limit is {MAX_BATCH_BYTES}; commit in parts"
            )
        self.batch = batch
        self.size = size
        #: Then it makes no record, whatever the extension, and has no body.
        self.is_empty = not len(batch)
        self.body: list[Buffer] = []
        if not (self.is_empty or self.has_stamped):
            self.body = encode_intents(batch, extension)

    def filled(self, seqno: int) -> EncodedBatch:
        """The same for the commit of this number. May be asked again, for another one."""
        made = EncodedBatch(self._template.filled(seqno), self._extension)
        made._template, made.has_stamped = self._template, True
        return made

    @property
    def is_expiry(self) -> bool:
        """Whether it removes what has expired, and nothing else."""
        return self._extension is not None and self._extension.get(CAUSE) == EXPIRE

    @property
    def only_deletes(self) -> bool:
        """Whether it puts nothing, so that it may use what is kept for a full disk."""
        batches = [self.batch, *(part for _, part in self.batch.parts())]
        return not any(value is not None for batch in batches for value in batch.writes.values())


Writes: TypeAlias = LonePut | EncodedBatch
NOTHING: Final = EncodedBatch(WriteBatch())
