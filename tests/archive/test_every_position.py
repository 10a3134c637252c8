"""Each position of a store is restored, through differences, units of each level, and after thinning.

What must be there is known from the commits alone, which were drawn before they were made, and are replayed in plain
dicts. What is there is read as a user reads it, of a store that `kvwal.restore` has made.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
from archive_fixtures import OPTIONS, archiver_of

import kvwal
from kvwal.backup.chain import Held, held_lines, list_held
from kvwal.backup.keeping import Keep, plan_pruning, prune
from kvwal.backup.port import DirectoryDestination
from kvwal.testing import SimulatedDisk

KEYS = 80
Commit = list[tuple[str, str, bytes, bytes]]


class Lived(NamedTuple):
    """A destination, and the commits of the store that was archived there; commit n is the nth."""

    disk: SimulatedDisk
    commits: list[Commit]

    @property
    def place(self) -> DirectoryDestination:
        return DirectoryDestination("/b", files=self.disk)

    @property
    def held(self) -> Held:
        (line,) = held_lines(self.place)
        return list_held(self.place, line)


def drawn(draw: random.Random) -> Commit:
    """One to four writes to two tables."""
    found: Commit = []
    for _ in range(draw.choice([1, 1, 1, 4])):
        table, key = draw.choice(["", "", "t"]), b"%03d" % draw.randrange(KEYS)
        what = draw.choices(["put", "delete", "range"], [80, 15, 5])[0]
        if what == "put":
            found.append((what, table, key, draw.randbytes(5000 if draw.random() < 0.01 else draw.randrange(40))))
        elif what == "delete":
            found.append((what, table, key, b""))
        else:
            found.append((what, table, key, b"%03d" % (int(key) + draw.randint(1, 9))))
    return found


def replay(state: dict[str, dict[bytes, bytes]], commit: Commit) -> None:
    for what, table, key, value in commit:
        if what == "put":
            state[table][key] = value
        else:
            stop = value if what == "range" else key + b"\0"
            for each in [each for each in state[table] if key <= each < stop]:
                del state[table][each]


def make(db: Any, table: Any, commit: Commit) -> None:
    with db.batch() as batch:
        for what, name, key, value in commit:
            into = table.within(batch) if name else batch
            if what == "put":
                into.put(key, value)
            elif what == "delete":
                into.delete(key)
            else:
                into.delete_range(key, value)


def lived(commits: int, seed: int = 1) -> Lived:
    """A store that is archived and backed up as it goes, for hours."""
    draw, disk, now_s = random.Random(seed), SimulatedDisk(seed=seed), [0.0]
    found = Lived(SimulatedDisk(seed=seed), [])
    db: Any = kvwal.open("/kv", files=disk, **OPTIONS)
    table = db.table("t", bytes, bytes)
    more = {"base_bytes": 12 * commits, "keep": Keep(), "monotonic_s": lambda: now_s[0], "codec": "none"}
    archiver = archiver_of(db, found.place, **more)
    # Pages that no later base has anew.
    first: Commit = [("put", "", b"x%02d" % n, draw.randbytes(4000)) for n in range(8)]
    while db.last_seqno < commits:
        for _ in range(min(draw.randint(1, 8), commits - db.last_seqno)):
            commit = drawn(draw) if found.commits else first
            make(db, table, commit)
            # The first use of a table is a commit before it.
            found.commits.extend([[]] * (db.last_seqno - len(found.commits) - 1))
            found.commits.append(commit)
        seconds = draw.choice([0.1, 3, 40])
        disk.pass_time(seconds)
        now_s[0] += draw.choice([1, 1, 1, 31])
        if draw.random() < 0.03:
            db.checkpoint()
        if draw.random() < 0.01:
            db.backup(found.place)
        archiver.step(now=True)
    db.close()
    return found


def check(of: Lived, positions: Iterable[int]) -> None:
    """Restore each of them."""
    state: dict[str, dict[bytes, bytes]] = {"": {}, "t": {}}
    done = 0
    for at in sorted(positions):
        for commit in of.commits[done:at]:
            replay(state, commit)
        done, disk = at, SimulatedDisk(seed=at)
        assert kvwal.restore(of.place, "/r", at=at, files=disk).restored == at
        with kvwal.open("/r", "r", files=disk) as db:
            names = [info.name for info in db.tables()]
            found = dict(db.table("t", bytes, bytes)) if "t" in names else {}
            assert {"": dict(db), "t": found} == state, f"position {at}"
            assert list(db) == sorted(state[""])
            assert len(db) == len(state[""])


def edges(held: Held, last: int) -> set[int]:
    """Beside each end of a unit and beside each base."""
    ends = {end for unit in held.units for end in (unit.first, unit.last)} | {base.seqno for base in held.bases}
    return {at + step for at in ends for step in (-1, 0, 1)} & set(range(last + 1))


def check_thinned(of: Lived, keep: Keep) -> None:
    """After thinning: what is left is right, and what is gone is refused."""
    thinned = Lived(of.disk.copy(), of.commits)
    pruning = plan_pruning(thinned.place, thinned.held, keep, 1 << 60)
    assert pruning.kept
    assert any("/unit/" in name for name in pruning.delete)
    prune(thinned.place, pruning)
    last = len(of.commits)
    gone = {at for stretch in pruning.unreachable for at in range(stretch.first, stretch.last + 1)}
    left = set(range(last + 1)) - gone
    assert gone
    assert left >= {*range(pruning.keep_from, last + 1), *pruning.kept}
    looked_at = edges(of.held, last) | edges(thinned.held, last) | set(pruning.kept)
    check(thinned, looked_at & left)
    for at in looked_at & gone:
        with pytest.raises(kvwal.NotInBackup):
            kvwal.restore(thinned.place, "/r", at=at, dry_run=True, files=thinned.disk)


def test_every_position_of_a_store() -> None:
    of = lived(150)
    held = of.held
    assert any(base.parent for base in held.bases)
    assert len({unit.level for unit in held.units}) > 1
    check(of, range(151))
    check_thinned(of, Keep(pitr_s=60, daily=1, monthly=0))


@pytest.mark.slow
def test_positions_at_all_edges_of_ten_thousand() -> None:
    of = lived(10_000)
    held = of.held
    assert sum(1 for base in held.bases if base.parent) > 5
    assert {unit.level for unit in held.units} == {0, 1, 2, 3}
    assert held.gaps() == []
    check(of, edges(held, 10_000) | set(random.Random(4).sample(range(10_001), 100)))
    check_thinned(of, Keep(pitr_s=4 * 3600, daily=2, monthly=1))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [2])
def test_every_position_of_ten_thousand(seed: int) -> None:
    of = lived(10_000, seed)
    check(of, range(10_001))
    check_thinned(of, Keep(pitr_s=4 * 3600, daily=2, monthly=1))
