"""What one commit writes, and the body of its record: a batch, or one put alone.

A batch is encoded as it is made, which is outside of any lock. A put alone needs no batch, and the log encodes it: it
is made in a sixth of the time. Neither changes after that. What a commit says of itself beside its writes (the
extension block of its record) makes a put a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

from kvwal.batch import WriteBatch
from kvwal.engine.expiry import with_queue
from kvwal.engine.row_cache import Row
from kvwal.engine.value import Value
from kvwal.files import Buffer
from kvwal.keys import MAX_BATCH_BYTES
from kvwal.log import CAUSE, EXPIRE, Extension, encode_intents, encode_put, is_of_users, size_of_writes, writes_body

__all__ = ["NOTHING", "EncodedBatch", "IndexKeys", "IndexedPut", "LonePut", "Writes", "as_lone_put"]


IndexKeys: TypeAlias = Mapping[int, Mapping[bytes, Value]]
"""As `WriteBatch.index_keys`."""


class LonePut:
    """One put; key and value have passed `as_key` and `as_value`. `names`: as `WriteBatch.names`."""

    __slots__ = ("key", "names", "size", "table", "value")

    is_empty: Final = False
    is_expiry: Final = False
    only_deletes: Final = False
    has_stamped: Final = False
    is_indexed: Final = False

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


def as_lone_put(batch: WriteBatch) -> LonePut | None:
    """The batch as a put alone, if it is one into a table of users, and says no more of its key."""
    table, part = 0, batch
    if batch.others:
        if len(batch.others) > 1 or batch.writes or batch.ranges:
            return None
        [(table, part)] = batch.others.items()
    if len(part.writes) != 1 or part.ranges or not is_of_users(table):
        return None
    if part.stamped is not None or part.index_keys is not None or (part.queue and any(part.queue.values())):
        return None
    [(key, value)] = part.writes.items()
    return LonePut(key, value, table) if type(value) is bytes else None


class IndexedPut:
    """One put into a table with indexes, and all that it changes there, as long as the reverse rows are the same.

    Attributes:
        was: what the reverse rows are found by in the row cache, and the objects that they have to be.
        writes: the table, key and value of each write, by table ascending: the put, and that to indexes.
        rows: the rows that they make.
        whole: what `encode_writes` made of them.
    """

    __slots__ = ("_index_keys", "_names", "rows", "was", "whole", "writes")

    is_empty: Final = False
    is_expiry: Final = False
    only_deletes: Final = False
    has_stamped: Final = False
    is_indexed: Final = False

    def __init__(
        self,
        was: list[tuple[Row, Value]],
        writes: list[tuple[int, bytes, Value]],
        rows: dict[Row, Value],
        whole: bytes,
        names: object,
        index_keys: IndexKeys,
    ) -> None:
        """`names`, `index_keys`: as `WriteBatch` has them."""
        self.was = was
        self.writes = writes
        self.rows = rows
        self.whole = whole
        self._names = names
        self._index_keys = index_keys

    @property
    def size(self) -> int:
        """Of its keys and values."""
        return size_of_writes(self.whole, len(self.writes))

    @property
    def batch(self) -> WriteBatch:
        """The same as a batch."""
        batch = WriteBatch()
        for table, key, value in self.writes:
            batch.table(table).writes[key] = value
        return batch

    @property
    def body(self) -> list[Buffer]:
        """Of its record."""
        return writes_body(self.whole)

    @property
    def general(self) -> EncodedBatch:
        """The put as a batch that the leader completes, whatever the reverse rows are then."""
        batch = WriteBatch()
        batch.names = self._names
        table, key, value = self.writes[0]
        part = batch.table(table)
        part.writes[key], part.index_keys = value, self._index_keys
        return EncodedBatch(batch)


class EncodedBatch:
    """A batch with its rows of the expiry queue, and what its commit says of itself.

    ValueError if it is too much for one commit.
    """

    __slots__ = ("_extension", "_template", "batch", "body", "has_stamped", "is_empty", "is_indexed", "size")

    def __init__(self, batch: WriteBatch, extension: Extension | None = None) -> None:
        others = () if batch.others is None else batch.others.values()
        #: Whether keys are to be filled in when the seqno is known: see `filled`.
        self.has_stamped = batch.stamped is not None
        #: Whether the leader is to add what it changes in indexes.
        self.is_indexed = False
        for part in others:
            self.has_stamped = self.has_stamped or part.stamped is not None
            self.is_indexed = self.is_indexed or part.index_keys is not None
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
        if not (self.is_empty or self.has_stamped or self.is_indexed):
            self.body = encode_intents(batch, extension)

    def filled(self, seqno: int, complete: Callable[[WriteBatch], WriteBatch] | None = None) -> EncodedBatch:
        """The same for the commit of this number, with its keys filled in, and completed. May be asked again."""
        batch = self._template.filled(seqno) if self.has_stamped else self._template
        made = EncodedBatch(batch if complete is None else complete(batch), self._extension)
        made._template, made.has_stamped, made.is_indexed = self._template, self.has_stamped, complete is not None
        return made

    @property
    def template(self) -> WriteBatch:
        """What it was made of: without what only the leader knows."""
        return self._template

    @property
    def is_expiry(self) -> bool:
        """Whether it removes what has expired, and nothing else."""
        return self._extension is not None and self._extension.get(CAUSE) == EXPIRE

    @property
    def only_deletes(self) -> bool:
        """Whether it puts nothing, so that it may use what is kept for a full disk; what indexes need aside."""
        batches = [self._template, *(part for _, part in self._template.parts())]
        return not any(value is not None for batch in batches for value in batch.writes.values())


Writes: TypeAlias = LonePut | IndexedPut | EncodedBatch
NOTHING: Final = EncodedBatch(WriteBatch())
