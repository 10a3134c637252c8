"""What the part `past` compares: what a store tells of its past, with the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from random import Random
from typing import Any, Final

import kvwal
from crashtests.history import Violation
from crashtests.past_model import FILTERS, KEYS, OTHER_TABLE, SUM, TABLES, Model, State, Told, ToldOf, in_commit, is_in
from kvwal.times import time_of

# Of the feed from one position, that many changes are compared; from every 16th position all of them.
_FIRST: Final = 24


class Looks:
    """A store and its model."""

    def __init__(self, store: Any, *, keeps_all: bool) -> None:
        self.store = store
        self.model = Model()
        #: Whether the log is to be kept from its beginning.
        self.keeps_all = keeps_all
        #: How often something was compared.
        self.compared = 0

    def told(self, after: int, prefixes: Any, tables: Any) -> list[ToldOf]:
        """What a feed tells behind a position."""
        return self.model.told(after, self.store.durable_seqno, prefixes, tables)

    def look(self, random: Random, *, few: bool) -> None:
        """Compare all that the store tells of its past. `few`: only of some positions and keys."""
        oldest = self.store.changes().position
        if self.keeps_all and oldest:
            raise Violation(f"the log begins behind commit {oldest}, and all of it was to be kept")
        for prefixes, tables in random.sample(FILTERS, 3) if few else FILTERS:
            positions = list(range(oldest, self.store.durable_seqno + 1))
            if few or (prefixes, tables) != FILTERS[0]:
                positions = random.sample(positions, min(3, len(positions)))
            self._compare_changes(prefixes, tables, oldest, positions)
        for position in {oldest - 1, 0, self.store.last_seqno + 1} - {*range(oldest, self.store.last_seqno + 1), -1}:
            raises(kvwal.FeedGap, partial(self.store.changes, position), f"changes({position})")
        self._compare_commits(random, oldest)
        for table in TABLES:
            for key in random.sample([*KEYS, SUM], 3) if few else [*KEYS, SUM]:
                self._compare_versions(random, oldest, table, key)
        with self.store.snapshot() as now:
            compare_moment(now, self.model.state, random)
        self._compare_table(OTHER_TABLE)
        self._compare_moments(random, few=few)
        self._compare_previous(random, oldest)

    def _compare_changes(self, prefixes: Any, tables: Any, oldest: int, positions: Any) -> None:
        """The feed after each of these positions."""
        expected = self.told(oldest, prefixes, tables)
        first = 0
        for position in sorted(positions):
            while first < len(expected) and expected[first][0] <= position:
                first += 1
            with self.store.changes(position, prefix=prefixes, tables=tables) as feed:
                equal("the position of a feed at its beginning", feed.position, position)
                whole = position % 16 == 0 or len(positions) < 4
                found: list[tuple[int, Told]] = []
                last = True
                for change in feed:
                    found.append((change.seqno, plain(change)))
                    last = change.last
                    equal("the position in a commit", feed.position == change.seqno, last)
                    if last:
                        written = self.model.commits[change.seqno - 1]
                        equal("what a change says of its commit", change.meta, written and written.meta)
                        if len(found) >= _FIRST and not whole:
                            break
                else:
                    equal("the position at the end", feed.position, self.store.durable_seqno)
                    whole = True
                commits = by_commit(found)
                equal_told(
                    f"the feed of {prefixes} after {position}",
                    commits,
                    expected[first:] if whole else expected[first : first + len(commits)],
                )
                equal("a commit told to its end", last, True)
            self.compared += 1

    def _compare_commits(self, random: Random, oldest: int) -> None:
        """The list of the commits."""
        durable = self.store.durable_seqno
        expected = [
            (seqno, written.meta, written.count)
            for seqno, written in enumerate(self.model.commits[oldest:durable], oldest + 1)
            if written is not None
        ]
        found = list(self.store.commits())
        equal("the commits", [(each.seqno, dict(each.meta), each.changes) for each in found], expected)
        times = [each.time_us for each in found]
        equal("the times of the commits", times, sorted(times))
        after, until = sorted(random.randint(oldest, self.store.last_seqno) for _ in range(2))
        part = [each for each in found if after < each.seqno <= until]
        equal(f"the commits from {after} to {until}", list(self.store.commits(after, until=until)), part)
        for who in ("one", "batch", "txn", "project"):
            said = [each for each in found if each.meta.get("who") == who]
            equal(f"the commits of {who}", list(self.store.commits(meta={"who": who})), said)
        if found:
            one, other = sorted((random.choice(found), random.choice(found)), key=lambda each: each.seqno)
            timely = [each for each in found if one.time_us <= each.time_us <= other.time_us]
            if self.keeps_all:
                equal("the commits of a time", list(self.store.commits(since=one.time, until=other.time)), timely)
            late = [each for each in found if each.time_us <= other.time_us]
            equal("the commits until a time", list(self.store.commits(until=other.time)), late)
        self.compared += 1

    def _compare_versions(self, random: Random, oldest: int, table: int, key: bytes) -> None:
        """The versions of a key: all of them, some of the newest, and those of a part."""
        last = self.store.last_seqno

        def found(**options: Any) -> list[tuple[int, str, bytes | None]]:
            versions = self.store.versions(key, table=table, **options)
            return [(each.seqno, each.kind, each.value) for each in versions]

        expected = self.model.versions(table, key, oldest + 1, last)
        name = f"the versions of {key[:9]!r} in table {table}"
        equal(name, found(reverse=False), expected)
        equal(f"{name}, newest first", found(), expected[::-1])
        limit = random.randrange(4)
        equal(f"the newest {limit} of {name}", found(limit=limit), expected[::-1][:limit])
        since, until = sorted(random.randint(min(oldest + 1, last), last) for _ in range(2))
        equal(
            f"{name} from {since} to {until}",
            found(since=since, until=until, reverse=False),
            self.model.versions(table, key, since, until),
        )
        if oldest:
            raises(kvwal.SnapshotTooOld, partial(self.store.versions, key, table=table, since=oldest), name)
        self.compared += 1

    def _compare_moments(self, random: Random, *, few: bool) -> None:
        """Each moment of the window, and the one before it."""
        oldest, newest = self.store.window.oldest, self.store.last_seqno
        window = range(oldest, newest + 1)
        chosen = set(random.sample(window, min(9, len(window)))) if few else window
        # Of some of them what is different between two.
        some = {seqno: State() for seqno in random.sample(window, min(4, len(window)))}
        for seqno, state in self.model.states(oldest):
            if seqno in some:
                some[seqno] = state.copy()
            if seqno in chosen:
                with self.store.snapshot(at=seqno) as then:
                    equal("the moment of a snapshot", then.seqno, seqno)
                    whole = random.random() < 0.1
                    compare_moment(then, state, random, whole=whole)
                    if whole:
                        found = self._table(then.reader)
                        equal(f"table {OTHER_TABLE} of a moment", found, pairs_of(state, OTHER_TABLE))
                self.compared += 1
        for one, other in product(some, some):
            self._compare_difference(random, (one, other), some[one], some[other])
        for record in random.sample(list(self.store.history(oldest)), min(3, newest - oldest)):
            timely = [each.seqno for each in self.store.history(oldest) if each.time_us <= record.time_us]
            with self.store.snapshot(at=time_of(record.time_us)) as then:
                equal(f"the moment of a time, {record.time_us} us", then.seqno, max(timely))
        if oldest:
            raises(kvwal.SnapshotTooOld, partial(self.store.snapshot, at=oldest - 1), f"snapshot(at={oldest - 1})")
        raises(ValueError, partial(self.store.snapshot, at=newest + 1), f"snapshot(at={newest + 1})")

    def _compare_difference(self, random: Random, moments: tuple[int, int], one: State, other: State) -> None:
        """What is different between two moments, either of which may be the later one."""
        table, reverse = random.choice(TABLES), random.random() < 0.5
        start, stop = (random.choice([None, *KEYS]) for _ in range(2))
        asked = self.store.diff(*moments, start=start, stop=stop, table=table, reverse=reverse)
        found = [tuple(each) for each in asked]
        expected = [
            (key, one.get((table, key)), other.get((table, key)))
            for key in [*KEYS, SUM]
            if (start is None or start <= key) and (stop is None or key < stop)
            if one.get((table, key)) != other.get((table, key))
        ]
        equal(f"the difference of {moments} in table {table}", found, expected[::-1] if reverse else expected)
        self.compared += 1

    def _compare_previous(self, random: Random, oldest: int) -> None:
        """The feed with what there was before each change, with ranges as they are and as the keys that they held."""
        oldest = max(oldest, self.store.window.oldest)
        if oldest > self.store.durable_seqno:
            return
        after = random.randint(oldest, self.store.durable_seqno)
        for prefixes, tables in random.sample(FILTERS, 2):
            expand, previous = random.random() < 0.5, random.random() < 0.8
            told = dict(self.told(after, prefixes, tables))
            expected: list[Any] = []
            before = State()
            for seqno, state in self.model.states(after):
                # Each key once: what the commit did to it itself, or that a range held it.
                once = {(table, key) for table, kind, key, *_ in told.get(seqno, ()) if kind != "delete_range"}
                for table, kind, key, stop, value in told.get(seqno, ()):
                    if kind == "delete_range" and expand:
                        for at in [at for at in before if at[0] == table and is_in(at[1], key, stop)]:
                            if at not in once:
                                expected.append((seqno, (table, "delete", at[1], None, None), before[at]))
                            once.add(at)
                    else:
                        expected.append((seqno, (table, kind, key, stop, value), before.get((table, key))))
                        if kind == "delete_range":
                            expected[-1] = (*expected[-1][:2], None)
                before = state.copy()
            feed = self.store.changes(after, prefix=prefixes, tables=tables, previous=previous, expand=expand)
            found = [(change.seqno, plain(change), change.previous) for change in feed]
            order = partial(sorted, key=lambda each: (each[0], in_commit(each[1])))
            if not previous and not expand:
                expected = [(*each[:2], None) for each in expected]
            elif not previous:
                found, expected = ([each[:2] for each in some] for some in (found, expected))
            equal(f"what was before, {previous=}, {expand=}", order(found), order(expected))
        self.compared += 1

    def _compare_table(self, table: int) -> None:
        """What the newest commit left in a table that has no methods of its own yet."""
        reader = self.store.engine.reads.moments.reader("scan")
        equal(f"table {table}", self._table(reader, table), pairs_of(self.model.state, table))

    def _table(self, reader: Any, table: int = OTHER_TABLE) -> list[tuple[bytes, bytes]]:
        reads = self.store.engine.reads
        reader = reads.moments.again(reader, "scan")
        chunks = reads.chunks(reader, None, None, reverse=False, table=table)
        return [pair for keys, values in chunks for pair in zip(keys, values, strict=True)]


def compare_moment(then: Any, state: State, random: Random, *, whole: bool = True) -> None:
    """Hold an opened snapshot against the state of its moment: scanned, and (`whole`) in every way to read."""
    pairs = pairs_of(state, 0)
    reverse = random.random() < 0.5
    equal("a moment", list(then.scan(reverse=reverse)), pairs[::-1] if reverse else pairs)
    for key in KEYS if whole else random.sample(KEYS, 2):
        equal(f"{key[:9]!r} in a moment", then.get(key), state.get((0, key)))
    if whole:
        equal("a moment, the other way", list(then.scan(reverse=not reverse)), pairs if reverse else pairs[::-1])
        equal("the length of a moment", len(then), len(pairs))
        start, stop = (random.choice([None, *KEYS]) for _ in range(2))
        part = [item for item in pairs if (start is None or start <= item[0]) and (stop is None or item[0] < stop)]
        equal("a part of a moment", list(then.items(start, stop)), part)
        equal("a part of a moment, in reverse", list(then.scan(start, stop, reverse=True, limit=3)), part[::-1][:3])
        equal("the number of a part", len(then.keys(start, stop)), len(part))


def pairs_of(state: State, table: int) -> list[tuple[bytes, bytes]]:
    return sorted((key, value) for (where, key), value in state.items() if where == table)


def plain(change: Any) -> Told:
    return change.table, change.kind, change.key, change.stop, change.value


def by_commit(told: Any) -> list[ToldOf]:
    """Changes, each with its seqno, as lists for each commit."""
    commits: list[ToldOf] = []
    for seqno, change in told:
        if not commits or commits[-1][0] != seqno:
            commits.append((seqno, []))
        commits[-1][1].append(change)
    return commits


def equal_told(what: str, found: list[ToldOf], expected: list[ToldOf]) -> None:
    """Within a commit only ranges have their place, which is before the others."""
    if found == expected:
        return
    for seqno, changes in found:
        kinds = [kind == "delete_range" for _, kind, *_ in changes]
        if kinds != sorted(kinds, reverse=True):
            raise Violation(f"{what}: commit {seqno} is not told with its ranges first")
    equal(what, [(seqno, sorted(changes, key=in_commit)) for seqno, changes in found], expected)


def equal(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        if isinstance(found, list) and isinstance(expected, list):
            differ = (n for n, (one, other) in enumerate(zip(found, expected, strict=False)) if one != other)
            same = next(differ, min(len(found), len(expected)))
            what += f", {len(found)} of {len(expected)}, from number {same}"
            found, expected = found[same : same + 2], expected[same : same + 2]
        raise Violation(f"{what}: {str(found)[:400]} instead of {str(expected)[:400]}")


def raises(error: type[Exception], act: Callable[[], object], what: str) -> None:
    try:
        act()
    except error:
        return
    raise Violation(f"{what} does not raise {error.__name__}")
