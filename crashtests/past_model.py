"""The plain model of the part `past`: what each commit wrote, in a list, and everything that follows from it.

A write is `[table, what, key, other]`, with keys as numbers: "put" (`other`: size of the value), "del", and "range"
(`other`: number of the key that it ends before; None: to the end). Nothing here knows how the store keeps a commit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

#: In order; neighbours, prefixes of each other, both ends, and one that fills a page.
KEYS = [b"", b"\0", b"a", b"a\0", b"a1", b"a2", b"a\xff", b"b", b"b1", b"c" * 5000, b"d", b"\xff", b"\xff\xff"]
#: A user's, beside table 0.
OTHER_TABLE = 16
TABLES = (0, OTHER_TABLE)

#: What a feed is asked for: prefixes and tables.
FILTERS: list[tuple[Any, list[int] | None]] = [
    (b"", None),
    (b"a", None),
    ([b"b1", b"a1", b"\xff"], None),
    ([b"a", b"a\xff"], [0]),
    (b"\xff", [OTHER_TABLE]),
    (b"", [0]),
    (b"", [OTHER_TABLE]),
    (b"none", None),
]

#: What each consumer is told, and where it begins: None: behind the newest commit, by its seqno.
CONSUMERS: list[tuple[tuple[Any, list[int] | None], str | None]] = [
    (FILTERS[2], "oldest"),
    (FILTERS[1], "now"),
    (FILTERS[0], None),
]
#: The one that projects, and would be told of itself.
PROJECTS = 2
#: The row of the projection, behind all keys. A program in which it projects deletes no range to the end.
SUM = b"\xff\xff\xff"

State = dict[tuple[int, bytes], bytes]
#: Table, kind, key, stop, value.
Told = tuple[int, str, bytes, bytes | None, bytes | None]
#: A commit and what is told of it.
ToldOf = tuple[int, list[Told]]


@dataclass(slots=True)
class Written:
    """What a commit wrote, and said of itself."""

    meta: dict[str, str]
    #: The consumer that made it.
    consumer: str = ""
    ranges: list[tuple[int, bytes, bytes | None]] = field(default_factory=list)
    writes: dict[tuple[int, bytes], bytes | None] = field(default_factory=dict)

    def put(self, table: int, key: bytes, value: bytes | None) -> None:
        """Put a key; None: delete it."""
        self.writes[table, key] = value

    def delete_range(self, table: int, start: bytes, stop: bytes | None) -> None:
        """Delete a range, and what the commit has put into it before."""
        if stop is None or start < stop:
            self.ranges.append((table, start, stop))
            kept = [at for at in self.writes if at[0] != table or not is_in(at[1], start, stop)]
            self.writes = {at: self.writes[at] for at in kept}

    @property
    def count(self) -> int:
        """How many keys and ranges."""
        return len(self.ranges) + len(self.writes)

    def told(self, prefixes: Any, tables: Iterable[int] | None) -> list[Told]:
        """What a feed tells of it, in the order of `in_commit`."""
        wanted = [prefixes] if isinstance(prefixes, bytes) else sorted(prefixes)
        # One that begins with another adds nothing.
        wanted = [one for one in wanted if not any(one != other and one.startswith(other) for other in wanted)]
        there = TABLES if tables is None else tuple(tables)
        found: list[Told] = []
        for table, start, stop in self.ranges:
            for one in wanted if table in there else ():
                low, high = max(start, one), _least(stop, _after(one))
                if high is None or low < high:
                    found.append((table, "delete_range", low, high, None))
        for (table, key), value in self.writes.items():
            if table in there and key.startswith(tuple(wanted)):
                found.append((table, "delete" if value is None else "put", key, None, value))
        return sorted(found, key=in_commit)

    def of_key(self, table: int, key: bytes) -> tuple[str, bytes | None] | None:
        """What it made of a key; None: nothing."""
        if (table, key) in self.writes:
            value = self.writes[table, key]
            return "delete" if value is None else "put", value
        if any(table == other and is_in(key, start, stop) for other, start, stop in self.ranges):
            return "range", None
        return None

    def apply(self, state: State) -> None:
        """Bring a state from the commit before to this one."""
        for table, start, stop in self.ranges:
            for at in [at for at in state if at[0] == table and is_in(at[1], start, stop)]:
                del state[at]
        for at, value in self.writes.items():
            if value is None:
                state.pop(at, None)
            else:
                state[at] = value


def in_commit(told: Told) -> Any:
    """Ranges first; that is all of the order within a commit that is promised."""
    return told[1] != "delete_range", told[0], told[2], told[3] or b""


def is_in(key: bytes, start: bytes, stop: bytes | None) -> bool:
    return start <= key and (stop is None or key < stop)


def _least(one: bytes | None, other: bytes | None) -> bytes | None:
    return other if one is None else one if other is None else min(one, other)


def _after(prefix: bytes) -> bytes | None:
    """The key behind all that begin with a prefix; None: there is none."""
    short = prefix.rstrip(b"\xff")
    return short[:-1] + bytes([short[-1] + 1]) if short else None


class Model:
    """The commits, by seqno from 1 on; None for one of the store's own."""

    def __init__(self) -> None:
        self.commits: list[Written | None] = []
        #: The state after all of them.
        self.state: State = {}

    @property
    def last(self) -> int:
        """Seqno of the last commit."""
        return len(self.commits)

    def add(self, written: Written) -> None:
        """A commit was made."""
        self.commits.append(written)
        written.apply(self.state)

    def add_own(self, last: int) -> None:
        """All further commits up to this one are the store's own."""
        self.commits += [None] * (last - self.last)

    def cut(self, last: int) -> None:
        """The commits beyond this one were lost."""
        del self.commits[last:]
        for _, state in self.states(last):
            self.state = state

    def states(self, first: int = 0) -> Iterator[tuple[int, State]]:
        """The state at each seqno from `first` on. It is the same dict each time, changed."""
        state: State = {}
        for seqno in range(self.last + 1):
            written = self.commits[seqno - 1] if seqno else None
            if written is not None:
                written.apply(state)
            if seqno >= first:
                yield seqno, state

    def told(self, after: int, until: int, prefixes: Any, tables: Any, *, but: str = "-") -> list[ToldOf]:
        """Seqno and changes of each commit in (after, until] of which a feed tells something.

        `but`: the consumer whose own commits are left out.
        """
        return [
            (seqno, changes)
            for seqno, written in enumerate(self.commits[after:until], after + 1)
            if written is not None and written.consumer != but and (changes := written.told(prefixes, tables))
        ]

    def versions(self, table: int, key: bytes, since: int, until: int) -> list[tuple[int, str, bytes | None]]:
        """Seqno, kind and value of each commit in [since, until] that changed a key, oldest first."""
        return [
            (seqno, *made)
            for seqno, written in enumerate(self.commits[max(since - 1, 0) : until], max(since, 1))
            if written is not None and (made := written.of_key(table, key)) is not None
        ]
