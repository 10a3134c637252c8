"""A log of random changes, and a plain model of what each commit made of each key."""

from __future__ import annotations

from bisect import bisect_right
from random import Random
from typing import Any

from log_rig import STORE_ID, LogRig, simulated_disk

from kvwal.batch import WriteBatch
from kvwal.keys import KeyRange, Seqno
from kvwal.log import KeyHistory, LogReader, SegmentLog, encode_intents
from kvwal.log.retention import Hold

LONG = b"a" * 65_535
#: Some are prefixes of others, one is empty, and one as long as a key may be.
KEYS = [b"", b"a", b"a\0", b"aa", b"ab", b"b", b"b\xff", b"b\xff\xff", b"c", b"\xff"]
TABLES = [0, 16, 17]


class KeyLog:
    """A log that random commits are appended to."""

    def __init__(self, rng: Random, keys: list[bytes] = KEYS, **options: Any) -> None:
        self.disk = simulated_disk()
        self.rig = LogRig(self.disk, "/log")
        self.log: SegmentLog = self.rig.create(**options)
        self.rng = rng
        self.keys = sorted(keys)
        #: By commit: by table, the ranges, and the puts and deletes.
        self.commits: list[dict[int, tuple[list[KeyRange], dict[bytes, bytes | None]]]] = []

    def commit(self, most: int = 5) -> Seqno:
        """Append one commit with up to this many intents, some of a hot key; often just one put."""
        rng = self.rng
        batch = WriteBatch()
        for _ in range(rng.choice([1, 1, 1, most])):
            table = rng.choice([0, 0, *TABLES])
            part = batch.table(table) if table else batch
            key = rng.choice([*self.keys, self.keys[1], self.keys[1]])
            kind = rng.choice("ppppppddr")
            if kind == "p":
                part.put(key, b"%d:" % len(self.commits) + bytes(rng.choice([0, 10, 200, 700])))
            elif kind == "d":
                part.delete(key)
            else:
                part.delete_range(key, rng.choice([None, *(other for other in self.keys if other > key)]))
        return self.append(batch)

    def append(self, batch: WriteBatch) -> Seqno:
        """Append this commit."""
        parts = [(0, batch), *batch.parts()]
        self.commits.append({table: (list(part.ranges), dict(part.writes)) for table, part in parts if len(part)})
        return self.log.append([encode_intents(batch)])

    def fill(self, segments: int) -> None:
        """Commit until there are more segments than this."""
        while len(self.log.segments()) <= segments:
            self.commit()

    # -- asking -------------------------------------------------------------------------------

    @property
    def history(self) -> KeyHistory:
        return self.log.key_history

    def make_indexes(self) -> None:
        for _ in self.history.make_indexes():
            pass

    def read_only(self) -> KeyHistory:
        """What one asks that has no writer."""
        chain = LogReader(self.disk.open_directory("/log"), STORE_ID).chain
        return KeyHistory(chain, None, chain.names, lambda after: Hold({}, 0, after or Seqno(0)))

    def index_files(self) -> list[str]:
        return [name for name in self.rig.names() if name.endswith(".keys")]

    # -- the model ----------------------------------------------------------------------------

    def did(self, seqno: int, table: int, key: bytes) -> tuple[str, bytes | None] | None:
        """What a commit did to a key."""
        ranges, writes = self.commits[seqno - 1].get(table, ([], {}))
        if key in writes:
            return ("put", writes[key]) if writes[key] is not None else ("delete", None)
        return ("range", None) if any(bounds.contains(key) for bounds in ranges) else None

    def last(self, table: int, key: bytes, after: int, until: int) -> tuple[int, str, bytes | None] | None:
        """What `KeyHistory.last` is to say."""
        for seqno in range(until, after, -1):
            did = self.did(seqno, table, key)
            if did is not None:
                return seqno, *did
        return None

    def parts(self, after: int, until: int) -> list[tuple[int, int]]:
        """Which commits beyond `after` up to `until` each segment has: beyond which one, and up to which."""
        firsts = self.rig.segments()
        found = []
        for first, following in zip(firsts, [*firsts[1:], until + 1], strict=True):
            low, high = max(after, first - 1), min(until, following - 1)
            if low < high:
                found.append((low, high))
        return found

    def ranges(self, table: int, after: int, until: int) -> list[KeyRange]:
        """What these commits deleted as ranges."""
        commits = self.commits[after:until]
        return [bounds for commit in commits for bounds in commit.get(table, ([], {}))[0]]

    def pairs(
        self, table: int, after: int, until: int, bounds: tuple[bytes | None, bytes | None], *, reverse: bool
    ) -> list[tuple[bytes, bytes | None]]:
        """The keys in the bounds that these commits put or deleted, and what they were then."""
        known: dict[bytes, bytes | None] = {}
        for commit in self.commits[after:until]:
            ranges, writes = commit.get(table, ([], {}))
            for each in ranges:
                known.update((key, None) for key in known if each.contains(key))
            known.update(writes)
        start, stop = bounds
        keys = [key for key in known if (start is None or key >= start) and (stop is None or key < stop)]
        return [(key, known[key]) for key in sorted(keys, reverse=reverse)]

    def segment_of(self, seqno: int) -> int:
        """The first seqno of the segment that has this commit."""
        firsts = self.rig.segments()
        return firsts[bisect_right(firsts, seqno) - 1]
