"""What the tests of backups share: a store and a destination on one simulated disk, and a model of its commits."""

from __future__ import annotations

from bisect import bisect_right
from random import Random
from typing import Any

from store_fixtures import TINY

import kvwal
from kvwal.backup.bases import check_base
from kvwal.backup.chain import held_lines, list_held
from kvwal.backup.names import BaseName, parse_name
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.units import decode_unit
from kvwal.testing import SimulatedDisk

OPTIONS: dict[str, Any] = {**TINY, "background": False, "keep_history_bytes": 1 << 20, "history_base_bytes": 8 << 10}
Content = dict[bytes, bytes]


class Lived:
    """A store that lives through random commits, and what it held after each of them: table 0, and a table "t"."""

    def __init__(self, seed: int, disk: SimulatedDisk | None = None, **options: Any) -> None:
        self._options = {**OPTIONS, **options}
        self.random = Random(seed)
        self.disk = SimulatedDisk(seed=seed) if disk is None else disk
        self.destination = DirectoryDestination("/b", files=self.disk)
        self.db = self.open()
        self.states: list[tuple[int, Content, Content]] = [(0, {}, {})]

    def open(self) -> kvwal.Store:
        return kvwal.open("/s", files=self.disk, **self._options)

    def reopen(self) -> None:
        self.db.close()
        self.db = self.open()

    def _note(self, plain: Content, table: Content) -> None:
        self.states.append((self.db.last_seqno, plain, table))

    def commit(self) -> None:
        """One commit, or two: the first use of a table makes it."""
        random, db = self.random, self.db
        _, plain, table = self.states[-1]
        plain, table = dict(plain), dict(table)
        key = b"%03d" % random.randrange(120)
        what = random.randrange(12)
        if what == 0:
            plain.pop(key, None)
            db.delete(key)
        elif what == 1:
            stop = key + b"\xff" if random.random() < 0.7 else b"%03d" % (int(key) + 30)
            plain = {each: value for each, value in plain.items() if not key <= each < stop}
            db.delete_range(key, stop)
        elif what == 2:
            plain[key] = random.randbytes(random.choice((3000, 9000, 20000)))
            db.put(key, plain[key])
        elif what == 3:
            plain[key] = random.randbytes(10)
            db.put(key, plain[key], expire_s=1e9)
        elif what in (4, 5):
            table[key] = random.randbytes(30)
            typed = db.table("t")
            with db.batch() as batch:
                typed.within(batch).put(key, table[key])
                plain[key] = table[key]
                batch.put(key, plain[key])
        else:
            plain[key] = random.randbytes(random.randrange(400))
            db.put(key, plain[key])
        self._note(plain, table)

    def live(self, commits: int) -> None:
        """Make commits, with checkpoints and reopenings between."""
        for _ in range(commits):
            self.commit()
            what = self.random.random()
            if what < 0.06:
                self.db.checkpoint()
            elif what < 0.07:
                self.reopen()
            elif what < 0.075:
                self.db.compact()

    def at(self, seqno: int) -> tuple[Content, Content]:
        """What it held after a commit."""
        i = bisect_right(self.states, seqno, key=lambda state: state[0]) - 1
        return self.states[i][1:]

    def check(self, db: kvwal.Store, seqno: int) -> None:
        """A restored store holds what this one did after a commit."""
        assert content(db) == self.at(seqno), f"not the state after commit {seqno}"


def content(db: kvwal.Store) -> tuple[Content, Content]:
    """What a store holds: table 0, and the table "t"."""
    with db.snapshot() as snapshot:
        names = [info.name for info in db.tables()]
        table = dict(db.table("t").within(snapshot).items()) if "t" in names else {}
        return dict(snapshot.items()), table


def restored(lived: Lived, at: Any = "latest", into: str = "/r", disk: SimulatedDisk | None = None) -> kvwal.Store:
    """A store restored from the destination, open."""
    disk = lived.disk if disk is None else disk
    report = kvwal.restore(DirectoryDestination("/b", files=disk), into, at=at, files=disk)
    db = kvwal.open(into, files=disk, **OPTIONS)
    lived.check(db, report.restored)
    return db


def check_destination(destination: DirectoryDestination) -> None:
    """Each object that is there is whole, and each base has what it builds on."""
    for name, _ in destination.list_after(""):
        parsed = parse_name(name)
        if isinstance(parsed, BaseName):
            check_base(destination, name)
        elif parsed is not None:
            decode_unit(name, destination.get(name))
    for line in held_lines(destination):
        held = list_held(destination, line)
        assert all(held.lineage(base) is not None for base in held.bases)


def objects(destination: DirectoryDestination) -> dict[str, bytes]:
    """All objects."""
    return {name: destination.get(name) for name, _ in destination.list_after("")}
