"""Single intents of a commit of many, at any place in it, without the others."""

from __future__ import annotations

from array import array
from typing import Final

from kvwal.log.columns import value_of
from kvwal.log.record import Record

__all__ = ["Cut"]

# What a commit takes that is cut, and each of its intents.
_CUT_BYTES: Final = 400
_INTENT_BYTES: Final = 13


class Cut:
    """Where the intents of a commit that was verified are in its body."""

    __slots__ = ("_keys", "_n_ranges", "_ops", "_tables", "_values", "seqno", "size")

    def __init__(self, record: Record) -> None:
        """Raises as `Record.columns`."""
        columns = record.columns()
        self.seqno = record.seqno
        self._ops = columns.ops
        self._n_ranges = len(columns.ranges)
        self._tables = None if columns.tables is None else array("I", columns.tables)
        self._keys, self._values = columns.places()
        n = len(self._ops)
        #: Bytes that it takes, roughly; 0 if it is small and made again in no time.
        self.size = _CUT_BYTES + _INTENT_BYTES * n if n > 1 else 0

    def intent(self, data: bytes, at: int, table: int, number: int) -> tuple[bytes, bytes | None] | None:
        """Key and value of this put or delete (then None), if it is one and of this table. The body begins at `at`."""
        if not self._n_ranges <= number < len(self._ops):
            return None
        if table != (0 if self._tables is None else self._tables[number]):
            return None
        keys, values = self._keys, self._values
        key = data[at + keys[number] : at + keys[number + 1]]
        return key, value_of(self._ops[number], data[at + values[number] : at + values[number + 1]])
