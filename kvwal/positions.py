"""A position: the last commit that was handled, and on which line of commits that is."""

from __future__ import annotations

import re
from typing import Any, Final, TypeVar

from kvwal.keys import Seqno

__all__ = ["Position"]

_LINE_BYTES: Final = 8
_PRINTED: Final = re.compile(r"([0-9a-f]{16}):([0-9]{1,20})")

_P = TypeVar("_P", bound="Position")


class Position(int):
    """The last commit that was handled: its seqno, and the line that it is on. A feed goes on after it.

    Feeds, consumers and `Store.position` give it, always of a commit that is durable. It is printed as `LINE:SEQNO`
    (`str`), and read by `parse`. It is an int, the seqno, wherever one is asked for; a plain int means a commit of the
    store that is asked. Two positions on different lines are not equal, and have no order: ValueError.
    """

    def __new__(cls: type[_P], line: bytes, seqno: int) -> _P:
        """ValueError for what cannot be one. `line`: 8 bytes."""
        if len(line) != _LINE_BYTES or seqno < 0:
            raise ValueError(f"a position has a line of {_LINE_BYTES} bytes and a seqno of at least 0")
        made = super().__new__(cls, seqno)
        made._line = bytes(line)
        return made

    _line: bytes

    @classmethod
    def parse(cls: type[_P], text: str) -> _P:
        """What `str` made of a position. ValueError for another text."""
        found = _PRINTED.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is no position: that is 16 hexadecimal digits, a colon and a seqno")
        return cls(bytes.fromhex(found[1]), int(found[2]))

    @property
    def line(self) -> bytes:
        """The line of commits: 8 bytes, new when a store is created."""
        return self._line

    @property
    def seqno(self) -> Seqno:
        """The number of the commit, as a plain int."""
        return Seqno(int(self))

    def _refuse_other_line(self, other: object) -> None:
        if isinstance(other, Position) and other._line != self._line:
            raise ValueError(f"{self} and {other} are on different lines, so neither comes before the other")

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Position) and other._line != self._line:
            return False
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = int.__hash__

    def __lt__(self, other: int) -> bool:
        self._refuse_other_line(other)
        return super().__lt__(other)

    def __le__(self, other: int) -> bool:
        self._refuse_other_line(other)
        return super().__le__(other)

    def __gt__(self, other: int) -> bool:
        self._refuse_other_line(other)
        return super().__gt__(other)

    def __ge__(self, other: int) -> bool:
        self._refuse_other_line(other)
        return super().__ge__(other)

    def __str__(self) -> str:
        return f"{self._line.hex()}:{int(self)}"

    def __repr__(self) -> str:
        return f"Position.parse({str(self)!r})"

    def __getnewargs__(self) -> tuple[Any, ...]:
        return self._line, int(self)
