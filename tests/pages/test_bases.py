"""Bases: generations that stay readable, whatever later checkpoints, crashes and reopenings do, until they go."""

from __future__ import annotations

import errno
import random
import struct
from dataclasses import dataclass, field
from typing import Any

import pytest
from crc32c import crc32c
from pages_fixtures import STORE_ID, Model, Updates, applied, columns, contents, tables_after

from kvwal.errors import CorruptionError, DiskFullError, InternalError
from kvwal.keys import KeyRange, Seqno
from kvwal.pages import Base, Changes, Keep, Meta, PageFile, Salvaged, check, create_page_file, salvage_pages
from kvwal.pages.bases import Ledger, decode_base, encode_base
from kvwal.pages.catalogue import roots
from kvwal.pages.deadlist import ListRef, read_dead_list
from kvwal.pages.freelist import Freed
from kvwal.pages.node import HAS_OVERFLOW, OVERFLOW_REF, PAGE_SIZE, POINTER, OverflowRef, decode_leaf
from kvwal.testing import SimulatedDisk, crash_every

Ranges = list[tuple[bytes, bytes | None]]


def new_disk(seed: int = 0) -> SimulatedDisk:
    disk = SimulatedDisk(seed=seed)
    disk.make_directory("/kv")
    disk.open_directory("/").sync()
    create_page_file(disk.open_directory("/kv"), STORE_ID, time_us=1)
    return disk


def opened(disk: SimulatedDisk, *, cache_bytes: int = 1 << 16) -> PageFile:
    return PageFile(disk.open_directory("/kv"), cache_bytes=cache_bytes, writable=True)


def reached(pages: PageFile, meta: Meta) -> set[int]:
    """The pages of a generation's trees, found without any of the code that accounts for them."""
    reader = pages.pager.uncached()
    found: set[int] = set()

    def walk(pointer: bytes, level: int) -> None:
        page, _, size, flags, _ = POINTER.unpack(pointer)
        found.update(range(page, page + size))
        node = reader.node(pointer, 0, level, keep=False)
        if level:
            for at in range(0, len(node[1]), POINTER.size):
                walk(node[1][at : at + POINTER.size], level - 1)
        elif flags & HAS_OVERFLOW:
            for value in decode_leaf(node)[1]:
                if type(value) is OverflowRef:
                    page, _, length, _ = OVERFLOW_REF.unpack(value)
                    found.update(range(page, page + -(-length // PAGE_SIZE)))

    for _, root in roots(reader, meta):
        walk(root.pointer, root.height - 1)
    if meta.catalogue_height:
        walk(meta.catalogue, meta.catalogue_height - 1)
    return found


@dataclass
class Rig:
    """A page file on a simulated disk, and a model of its newest generation, its bases and what is pinned."""

    disk: SimulatedDisk
    cache_bytes: int = 1 << 16
    model: Model = field(default_factory=dict)
    tables: dict[int, Model] = field(default_factory=dict)
    #: By generation: table 0 and the others.
    bases: dict[int, tuple[Model, dict[int, Model]]] = field(default_factory=dict)
    pinned: list[tuple[Meta, Model]] = field(default_factory=list)
    #: Whether a range was deleted: births of leaves that go with one are not known.
    imprecise: bool = False

    def __post_init__(self) -> None:
        self.pages = opened(self.disk, cache_bytes=self.cache_bytes)

    def reopen(self) -> None:
        self.pages.close()
        self.pinned.clear()
        self.pages = opened(self.disk, cache_bytes=self.cache_bytes)

    def checkpoint(
        self,
        updates: Updates,
        ranges: Ranges = [],  # noqa: B006  # never changed
        *,
        tables: dict[int, Updates] | None = None,
        keep: Keep | None = None,
        drop: Any = (),
        **more: Any,
    ) -> Meta:
        """A checkpoint, which must write nothing that a generation needs; then the model knows of it."""
        pages = self.pages
        tables = tables or {}
        needed = set().union(*(reached(pages, meta) for meta in self.needed()))
        self.disk.trace = trace = []
        try:
            meta = pages.checkpoint(
                columns(sorted(updates.items())),
                [KeyRange(*bounds) for bounds in ranges],
                tables={table: Changes(columns(sorted(each.items()))) for table, each in tables.items()},
                seqno=Seqno(pages.meta.seqno + 1),
                time_us=pages.meta.seqno + 1,
                wall_us=1000 + pages.meta.seqno,
                keep=keep,
                drop=drop,
                **more,
            )
        finally:
            self.disk.trace = None
            for operation in trace:
                if operation.name.startswith("pwrite"):
                    first, end = operation.offset // PAGE_SIZE, -(-(operation.offset + operation.size) // PAGE_SIZE)
                    assert not needed & set(range(first, end)), operation
        self.imprecise = self.imprecise or bool(ranges)
        self.model = applied(self.model, updates, ranges)
        self.tables = tables_after(self.tables, {table: (each, ()) for table, each in tables.items()})
        for generation in drop:
            del self.bases[generation]
        if keep is not None:
            self.bases[meta.generation] = (self.model, self.tables)
        return meta

    def needed(self) -> list[Meta]:
        """All generations that must stay as they are: bases that the next checkpoint drops included."""
        pages = self.pages
        return [*pages.readable(), *(meta for meta, _ in self.pinned), *map(pages.bases.meta, self.bases)]

    def verify(self) -> None:
        pages = self.pages
        assert list(check(pages)) == []
        assert contents(pages.tree()) == self.model
        assert pages.bases.generations() == sorted(self.bases)
        assert bool(pages.meta.required & 1 << 6) == bool(self.bases)
        for generation, (model, tables) in self.bases.items():
            meta = pages.bases.meta(generation)
            assert contents(pages.tree(meta)) == model
            for table, each in tables.items():
                assert contents(pages.tree(meta, table)) == each
            assert list(check(pages, meta, whole=False)) == []
        for meta, model in self.pinned:
            assert contents(pages.tree(meta)) == model
        dead = set().union(*(reached(pages, pages.bases.meta(each)) for each in self.bases), ())
        dead -= reached(pages, pages.meta)
        held = pages.bases.held_bytes()
        assert held % PAGE_SIZE == 0
        if self.imprecise:
            assert held >= len(dead) * PAGE_SIZE
        else:
            # What bases hold is exactly what they reach and the newest generation does not.
            assert held == len(dead) * PAGE_SIZE


def some_updates(rng: random.Random, keys: int = 400) -> Updates:
    updates: Updates = {
        b"%05d" % rng.randrange(keys): None if rng.random() < 0.2 else rng.randbytes(rng.choice([3, 90, 200]))
        for _ in range(rng.choice([0, 1, 10, 150]))
    }
    if rng.random() < 0.3:
        updates[b"large%d" % rng.randrange(4)] = rng.choice([None, rng.randbytes(rng.choice([3000, 9000]))])
    return updates


class Stop(Exception):  # not an error
    """What a caller raises before the flip."""


def stop() -> None:
    raise Stop


@pytest.mark.parametrize("with_ranges", [False, True])
@pytest.mark.parametrize("number", range(4))
def test_every_base_reads_as_its_model_whatever_happens(rng: random.Random, number: int, with_ranges: bool) -> None:
    rig = Rig(new_disk(number), cache_bytes=[0, 1 << 16][number % 2])
    for _ in range(40):
        ranges: Ranges = []
        if with_ranges and rng.random() < 0.2:
            start = rng.randrange(400)
            ranges = [(b"%05d" % start, b"%05d" % (start + rng.randrange(200)))]
        drop = [each for each in rig.bases if rng.random() < 0.15]
        if rig.bases and rng.random() < 0.05:
            drop = list(rig.bases)
        what: dict[str, Any] = {
            "tables": {16 + rng.randrange(3): some_updates(rng, 30)} if rng.random() < 0.3 else {},
            "keep": Keep(rng.choice([1, 2, 33]), rng.choice(["", "before the deployment"]))
            if rng.random() < 0.4
            else None,
            "drop": drop,
            "compact": rng.random() < 0.1,
        }
        kind = rng.random()
        if kind < 0.15:
            with pytest.raises(Stop):
                rig.checkpoint(some_updates(rng), ranges, before_flip=stop, **what)
        elif kind < 0.3:
            rig.disk.fail("pwrite", rng.randrange(1, 9), errno.ENOSPC)
            try:
                rig.checkpoint(some_updates(rng), ranges, **what)
            except DiskFullError:
                pass
            except OSError:
                # The meta slot is no new space, so a failure there is not taken for a full disk.
                rig.disk.heal()
                rig.reopen()
            rig.disk.heal()
        else:
            rig.checkpoint(some_updates(rng), ranges, **what)
        if rng.random() < 0.2:
            rig.reopen()
        if rng.random() < 0.2:
            metas = [(rig.pages.meta, rig.model)]
            metas += [(rig.pages.bases.meta(each), model) for each, (model, _) in rig.bases.items()]
            rig.pinned = [each for each in [*rig.pinned, rng.choice(metas)] if rng.random() < 0.8]
            rig.pages.pins.hold("a test", {meta.generation for meta, _ in rig.pinned})
        rig.verify()
    # With all bases gone, so is what they held.
    rig.pages.pins.hold("a test", ())
    rig.pinned.clear()
    rig.checkpoint({}, drop=list(rig.bases))
    assert rig.pages.bases.held_bytes() == 0
    for _ in range(3):
        rig.checkpoint({})
    rig.verify()
    meta = rig.pages.meta
    assert (meta.bases_height, meta.dead_page) == (0, 0)
    assert meta.page_count - rig.pages.space.free_pages() <= len(reached(rig.pages, meta)) + 2 + 3 * 2
    rig.pages.close()


def test_a_base_is_listed_with_what_it_is_and_why_it_is_kept() -> None:
    disk = new_disk()
    rig = Rig(disk)
    rig.checkpoint({b"a": b"1"})
    assert rig.pages.bases.all() == ()
    first = rig.checkpoint({b"a": b"2"}, tables={16: {b"t": b"1"}}, keep=Keep(33, "before: ä"))
    rig.checkpoint({b"a": b"3"})
    second = rig.checkpoint({b"a": b"4"}, keep=Keep())
    for _ in range(2):
        one, two = rig.pages.bases.all()
        assert (one.generation, one.seqno, one.time_us, one.wall_us) == (first.generation, 2, 2, 1001)
        assert (one.flags, one.name, two.flags, two.name) == (33, "before: ä", 1, "")
        assert (one.root, one.height, one.catalogue, one.catalogue_height) == (
            first.root, first.height, first.catalogue, first.catalogue_height,
        )  # fmt: skip
        assert (one.held_bytes, two.held_bytes) == (0, PAGE_SIZE)
        # The first base alone holds a leaf; so does the second one none that the newest generation does not reach.
        assert rig.pages.bases.held_bytes() == PAGE_SIZE
        assert rig.pages.bases.meta(second.generation).root == second.root
        rig.verify()
        rig.reopen()
    with pytest.raises(ValueError, match="is not a base"):
        rig.pages.bases.meta(first.generation + 1)


def test_a_page_file_without_bases_is_as_before_and_gets_them_and_loses_them() -> None:
    rig = Rig(new_disk())
    rig.checkpoint({b"a": b"1"})
    meta = rig.pages.meta
    assert (meta.bases, meta.bases_height, meta.dead_page, meta.dead_crc, meta.dead_pages) == (bytes(20), 0, 0, 0, 0)
    rig.verify()
    rig.reopen()
    base = rig.checkpoint({b"a": b"2"}, keep=Keep())
    rig.checkpoint({b"a": b"3"})
    rig.verify()
    rig.checkpoint({}, drop=[base.generation])
    rig.verify()
    rig.reopen()
    rig.verify()


@pytest.mark.parametrize(
    ("keep", "drop"),
    [(None, [1]), (None, [7]), (Keep(0), ()), (Keep(1 << 6), ()), (Keep(-1), ()), (Keep(32, "ä" * 32 + "b"), ())],
)
def test_what_cannot_be_kept_or_dropped_changes_nothing(keep: Keep | None, drop: list[int]) -> None:
    rig = Rig(new_disk())
    base = rig.checkpoint({b"a": b"1"}, keep=Keep(32, "ä" * 32))
    with pytest.raises(ValueError, match="base"):
        rig.checkpoint({b"a": b"2"}, keep=keep, drop=drop)
    assert rig.pages.meta == base
    rig.verify()
    # Kept for a reason of a later version.
    table = rig.pages.bases.table
    rig.pages.bases.table = table._replace(bases=(table.bases[0]._replace(flags=1 << 20 | 1),))
    with pytest.raises(ValueError, match="does not know"):
        rig.checkpoint({}, drop=[base.generation])


def test_a_part_of_a_checkpoint_is_no_base() -> None:
    rig = Rig(new_disk())
    with pytest.raises(InternalError, match="replay"):
        rig.checkpoint({b"a": b"1"}, keep=Keep(), replay_through=Seqno(9))
    rig.verify()
    rig.checkpoint({b"a": b"1"}, keep=Keep())
    rig.verify()


def test_a_base_can_be_pinned_and_a_dropped_one_stays_for_its_pins_alone() -> None:
    rig = Rig(new_disk(), cache_bytes=0)
    base = rig.checkpoint({b"%03d" % key: b"v" * 90 for key in range(200)}, keep=Keep())
    before = rig.model
    for _ in range(4):
        rig.checkpoint({b"%03d" % key: b"w" * 90 for key in range(200)})
    rig.reopen()
    rig.pages.pins.hold("a test", {base.generation})
    rig.pinned = [(base, before)]
    rig.checkpoint({}, drop=[base.generation])
    for step in range(4):
        rig.checkpoint({b"%03d" % key: b"%d" % step * 90 for key in range(200)})
        rig.verify()
    free = rig.pages.space.free_pages()
    rig.pages.pins.hold("a test", ())
    rig.pinned.clear()
    rig.checkpoint({})
    assert rig.pages.space.free_pages() >= free + 5
    with pytest.raises(ValueError, match="no longer kept"):
        rig.pages.pins.hold("a test", {base.generation})


def test_nothing_is_cached_of_a_page_that_a_base_held_and_that_is_written_again() -> None:
    """Dead lists do not say under which address the cache knows what lies there."""
    rig = Rig(new_disk(), cache_bytes=1 << 22)
    base = rig.checkpoint({b"%03d" % key: b"v" * 90 for key in range(200)}, keep=Keep())
    rig.checkpoint({b"%03d" % key: b"w" * 90 for key in range(200)})
    rig.reopen()
    contents(rig.pages.tree(rig.pages.bases.meta(base.generation)))
    gone = reached(rig.pages, rig.pages.bases.meta(base.generation)) - reached(rig.pages, rig.pages.meta)
    cache = rig.pages.pager.cache
    assert gone & {address & 0xFFFFFFFF for address in {**cache.young, **cache.old}}
    rig.checkpoint({}, drop=[base.generation])
    for _ in range(2):
        rig.checkpoint({})
    assert not gone & {address & 0xFFFFFFFF for address in {**cache.young, **cache.old}}
    assert cache.used_bytes() >= 0


# What a checkpoint costs.


def cost(rig: Rig, **what: Any) -> tuple[int, int]:
    """Pages read and pages written by a checkpoint of three keys in three leaves."""
    rig.disk.trace = trace = []
    updates = [(b"%05d" % (240 * key), rig.pages.meta.generation.to_bytes(90, "big")) for key in range(3)]
    rig.pages.checkpoint(columns(updates), seqno=Seqno(rig.pages.meta.seqno + 1), time_us=1, **what)
    rig.disk.trace = None
    pages = {"pread": 0, "pwrite": 0}
    for operation in trace:
        if operation.name in pages:
            pages[operation.name] += -(-operation.size // PAGE_SIZE)
    return pages["pread"], pages["pwrite"]


def test_a_checkpoint_costs_the_same_with_1_100_and_1000_bases() -> None:
    costs = {}
    for count in (1, 100, 1000):
        rig = Rig(new_disk(), cache_bytes=0)
        rig.checkpoint({b"%05d" % key: b"v" * 90 for key in range(500)})
        for _ in range(count):
            cost(rig, keep=Keep())
        generations = rig.pages.bases.generations()
        plain = [cost(rig) for _ in range(4)]
        kept = cost(rig, keep=Keep())
        dropped = cost(rig, drop=[generations[0]])
        costs[count] = (plain, kept, dropped)
    assert costs[1][0] == costs[100][0] == costs[1000][0]
    # One more level of the base tree, each of its nodes of two pages, and the dead list of a base that is not the last.
    for one, many in zip(costs[1][1:], costs[1000][1:], strict=True):
        assert many[0] - one[0] <= 7
        assert many[1] - one[1] <= 5
    assert costs[1000][1] <= (12, 12)
    assert costs[1000][2] <= (15, 13)


# Power cuts.


@pytest.mark.parametrize("number", range(3))
def test_power_cut_anywhere_leaves_the_bases_of_a_whole_generation(number: int) -> None:
    rng = random.Random(number)
    # By generation: its content, and the content of each of its bases.
    history: dict[int, tuple[Model, dict[int, Model]]] = {0: ({}, {}), 1: ({}, {})}

    def step(pages: PageFile, rng: random.Random) -> None:
        model, bases = history[pages.meta.generation]
        updates = some_updates(rng, 120)
        drop = [each for each in bases if rng.random() < 0.3]
        keep = Keep() if rng.random() < 0.6 else None
        generation = pages.meta.generation + 1
        after = applied(model, updates, ())
        rest = {each: content for each, content in bases.items() if each not in drop}
        history[generation] = (after, rest | ({generation: after} if keep else {}))
        pages.checkpoint(columns(sorted(updates.items())), seqno=Seqno(generation), time_us=1, keep=keep, drop=drop)

    def whole(pages: PageFile) -> None:
        model, bases = history[pages.meta.generation]
        assert list(check(pages)) == []
        assert contents(pages.tree()) == model
        assert pages.bases.generations() == sorted(bases)
        for generation, content in bases.items():
            assert contents(pages.tree(pages.bases.meta(generation))) == content

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        pages = opened(disk)
        for _ in range(10):
            step(pages, rng)
            acknowledged.append(pages.meta.generation)
            if len(acknowledged) % 4 == 0:
                pages.close()
                pages = opened(disk)

    def found(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        pages = opened(disk)
        assert pages.meta.generation >= (acknowledged[-1] if acknowledged else 1)
        whole(pages)
        saved = dict(history)
        for _ in range(2):
            step(pages, random.Random(pages.meta.generation))
            whole(pages)
        history.clear()
        history.update(saved)
        pages.close()

    report = crash_every(program, found, seed=number, states_per_point=5, disk=new_disk(number))
    assert report.points > 30


@pytest.mark.parametrize("nth", [1, 2])
def test_a_flip_that_was_interrupted_keeps_and_drops_with_the_next_checkpoint(nth: int) -> None:
    rig = Rig(new_disk())
    first = rig.checkpoint({b"a": b"1"}, keep=Keep())
    second = rig.checkpoint({b"a": b"2"}, keep=Keep())
    left = nth

    def interrupt(operation: Any) -> None:
        nonlocal left
        if operation.name in ("pwrite", "datasync"):
            left -= 1
            if not left:
                raise KeyboardInterrupt

    def from_now_on() -> None:
        rig.disk.watcher = interrupt

    with pytest.raises(KeyboardInterrupt):
        rig.checkpoint({b"a": b"3"}, keep=Keep(), drop=[first.generation], before_flip=from_now_on)
    rig.disk.watcher = None
    # Not done yet, so nothing that either generation needs is gone.
    assert list(check(rig.pages)) == []
    assert contents(rig.pages.tree(first)) == {b"a": b"1"}
    rig.bases = {second.generation: ({b"a": b"2"}, {}), second.generation + 1: ({b"a": b"3"}, {})}
    rig.pages.checkpoint(columns([(b"a", b"4")]), seqno=Seqno(4), time_us=4)
    rig.model = {b"a": b"4"}
    rig.verify()
    rig.reopen()
    rig.verify()


# Damage.


def damaged(disk: SimulatedDisk, page: int) -> SimulatedDisk:
    copy = disk.crash(-1)
    copy.flip("/kv/data", page * PAGE_SIZE + 9, 1)
    return copy


def life_with_bases() -> Rig:
    rng = random.Random(5)
    rig = Rig(new_disk())
    for step in range(14):
        rig.checkpoint(
            {b"%03d" % rng.randrange(150): rng.randbytes(80) for _ in range(25)} | {b"large": rng.randbytes(5000)},
            tables={16: {b"t": b"%d" % step}},
            keep=Keep() if step % 3 == 1 else None,
            drop=[min(rig.bases)] if step == 9 else [],
        )
    rig.verify()
    return rig


def test_damage_of_any_page_costs_at_most_what_lies_there(caplog: pytest.LogCaptureFixture) -> None:
    rig = life_with_bases()
    pages = rig.pages
    newest = reached(pages, pages.meta)
    of_bases = {each: reached(pages, pages.bases.meta(each)) for each in rig.bases}
    lists = {page for base in pages.bases.all() for page in range(base.dead_page, base.dead_page + base.dead_pages)}
    kinds = {"newest": 0, "base": 0, "made anew": 0, "free": 0}
    for page in range(2, pages.meta.page_count):
        caplog.clear()
        try:
            found = opened(damaged(rig.disk, page))
        except CorruptionError:
            assert page in newest
            continue
        if found.meta.generation != pages.meta.generation:
            assert page in newest
            continue
        findings = [*map(str, check(found, found.meta))]
        if page in newest:
            kinds["newest"] += 1
            assert findings
            continue
        assert contents(found.tree()) == rig.model
        suffer = [each for each, reach in of_bases.items() if page in reach]
        assert bool(suffer) <= bool(findings)
        all_bases = found.bases.generations()
        found.checkpoint([], seqno=Seqno(99), time_us=99)
        if "made anew" in caplog.text:
            kinds["made anew"] += 1
        for each, (model, _) in rig.bases.items():
            if each in found.bases.generations():
                try:
                    assert contents(found.tree(found.bases.meta(each))) == model
                except CorruptionError:
                    assert each in suffer
            else:
                # Its row could not be read, or an inner node of it.
                assert each in suffer or each not in all_bases
        if suffer:
            kinds["base"] += 1
            assert all(f"base {suffer[-1]}" in finding for finding in findings[:1])
        else:
            kinds["free"] += 1
            # The dead list of a base is read when the base before it goes, and then made anew.
            assert list(check(found, found.meta)) == [] or (page in lists and "made anew" not in caplog.text)
        found.checkpoint([], seqno=Seqno(100), time_us=100, drop=found.bases.generations())
        found.checkpoint([], seqno=Seqno(101), time_us=101)
        assert list(check(found)) == []
        assert found.bases.held_bytes() == 0
        found.close()
    assert all(kinds.values()), kinds


def test_nothing_is_said_of_dead_lists_that_only_the_base_tree_tells_where_it_cannot_be_read() -> None:
    rig = Rig(new_disk())
    for step in range(9):
        keep = Keep() if step < 6 else None
        rig.checkpoint({b"%03d" % key: b"%d" % step * 30 for key in range(step % 7, 90, 7)}, keep=keep)
    meta = rig.pages.meta
    assert meta.dead_page
    assert list(check(rig.pages, meta)) == []
    rig.disk.flip("/kv/data", POINTER.unpack(meta.bases)[0] * PAGE_SIZE + 100, 1)
    findings = [*map(str, check(rig.pages, meta))]
    assert any("bases cannot be read" in each for each in findings)
    assert not any("no base" in each or "oldest base" in each or "does not reach" in each for each in findings)


def test_a_damaged_leaf_of_the_base_tree_costs_the_bases_in_it(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(new_disk())
    for step in range(150):
        rig.checkpoint({b"%03d" % key: b"%d" % step * 30 for key in range(step % 7, 90, 7)}, keep=Keep())
    meta = rig.pages.meta
    assert meta.bases_height == 2
    _, children, _ = rig.pages.pager.node(meta.bases, 0, 1)
    page, _, _, _, entries = POINTER.unpack_from(children, POINTER.size)
    lost = set(sorted(rig.bases)[POINTER.unpack_from(children)[4] :][:entries])
    rig.disk.flip("/kv/data", page * PAGE_SIZE + 100, 1)
    rig.reopen()
    assert contents(rig.pages.tree()) == rig.model
    findings = [*map(str, check(rig.pages, rig.pages.meta))]
    assert any(f"{entries} bases cannot be read" in each for each in findings)
    for generation in lost:
        del rig.bases[generation]
    assert rig.pages.bases.generations() == sorted(rig.bases)
    # A disk that is full just then changes nothing; the next checkpoint does it.
    rig.disk.fail("pwrite", 2, errno.ENOSPC)
    with pytest.raises(DiskFullError):
        rig.checkpoint({b"x": b"y"})
    rig.disk.heal()
    rig.checkpoint({b"x": b"y"})
    assert "bases cannot be read; which pages are free is made anew" in caplog.text
    rig.checkpoint({b"x": b"z"})
    rig.verify()
    rig.reopen()
    rig.verify()
    rig.checkpoint({}, drop=sorted(rig.bases)[10:60])
    rig.verify()


def test_a_dead_list_that_does_not_verify_when_its_base_goes_is_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    rig = life_with_bases()
    rig.checkpoint({b"x": b"y"})
    _, second, third, *_ = rig.pages.bases.all()
    rig.disk.flip("/kv/data", third.dead_page * PAGE_SIZE + 20, 1)
    assert "the checksum" in " ".join(map(str, check(rig.pages)))
    rig.checkpoint({b"x": b"z"}, drop=[second.generation])
    assert "made anew" in caplog.text
    # The former generation's list is as damaged as it was.
    assert list(check(rig.pages, rig.pages.meta)) == []
    rig.checkpoint({})
    rig.verify()
    rig.checkpoint({}, drop=list(rig.bases))
    rig.verify()


def test_salvage_reads_the_newest_generation_beside_damaged_bases() -> None:
    rig = life_with_bases()
    page = POINTER.unpack(rig.pages.meta.bases)[0]
    rig.disk.flip("/kv/data", page * PAGE_SIZE + 100, 1)
    rig.reopen()
    parts = [part for part in salvage_pages(rig.pages) if isinstance(part, Salvaged)]
    assert {
        key: value for part in parts if part.table == 0 for key, value in zip(part.keys, part.values, strict=True)
    } == rig.model


def test_a_base_tree_that_cannot_be_read_just_now_stays() -> None:
    rig = life_with_bases()
    page = POINTER.unpack(rig.pages.meta.bases)[0]
    rig.pages.close()

    class Failing:
        """The page file, of which one page cannot be read."""

        def __init__(self, file: Any) -> None:
            self.file, self.on = file, True

        def pread(self, size: int, offset: int) -> bytes:
            if self.on and offset == page * PAGE_SIZE:
                raise OSError(errno.EIO, "just now")
            return bytes(self.file.pread(size, offset))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    file: Any = None

    class Directory:
        def open(self, *names: str, **options: Any) -> Any:
            nonlocal file
            file = Failing(rig.disk.open_directory("/kv").open(*names, **options))
            return file

    directory: Any = Directory()
    rig.pages = PageFile(directory, cache_bytes=1 << 16, writable=True)
    assert contents(rig.pages.tree()) == rig.model
    assert rig.pages.bases.all() == ()
    with pytest.raises(OSError, match="just now"):
        rig.pages.checkpoint([], seqno=Seqno(99), time_us=99)
    file.on = False
    rig.pages.checkpoint([], seqno=Seqno(99), time_us=99)
    rig.verify()


def test_any_number_of_checkpoints_may_follow_a_base() -> None:
    rig = Rig(new_disk())
    base = rig.checkpoint({b"%04d" % key: b"v" * 3000 for key in range(1200)}, keep=Keep())
    for key in range(1200):
        rig.pages.checkpoint(columns([(b"%04d" % key, b"w")]), seqno=Seqno(2), time_us=2)
    rig.model = {b"%04d" % key: b"w" for key in range(1200)}
    rig.verify()
    rig.checkpoint({}, drop=[base.generation])
    rig.verify()


def test_a_base_with_an_unreadable_inner_node_goes_when_all_is_made_anew(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(new_disk())
    for step in range(4):
        rig.checkpoint({b"%04d" % key: b"%d" % step * 80 for key in range(0, 400, 1 + step)}, keep=Keep())
    rig.checkpoint({b"%04d" % key: b"new" for key in range(0, 400, 50)})
    lost = sorted(rig.bases)[1]
    for page in (POINTER.unpack(rig.pages.bases.meta(lost).root)[0], rig.pages.meta.free_page):
        rig.disk.flip("/kv/data", page * PAGE_SIZE + 40, 1)
    rig.reopen()
    assert any(f"base {lost}: " in str(finding) for finding in check(rig.pages, rig.pages.meta))
    assert lost in rig.pages.bases.generations()
    del rig.bases[lost]
    rig.checkpoint({})
    assert f"base {lost} is dropped" in caplog.text
    rig.checkpoint({})
    rig.verify()


def test_what_is_made_anew_leaves_the_generation_before_whole_until_the_flip_after() -> None:
    rig = life_with_bases()
    _, second, third, *_ = rig.pages.bases.all()
    rig.disk.flip("/kv/data", third.dead_page * PAGE_SIZE + 20, 1)
    rig.checkpoint({}, drop=[second.generation])
    older = rig.pages.older
    assert older is not None
    before = [str(finding) for finding in check(rig.pages, older)]
    with pytest.raises(Stop):
        rig.checkpoint({b"%03d" % key: b"x" * 500 for key in range(150)}, before_flip=stop)
    assert [str(finding) for finding in check(rig.pages, older)] == before


def test_dropping_a_base_reads_no_list_of_what_older_bases_reach() -> None:
    rig = Rig(new_disk(), cache_bytes=0)
    rig.checkpoint({b"%05d" % key: b"v" * 90 for key in range(500)}, keep=Keep())
    second = rig.checkpoint({}, keep=Keep())
    heads = []
    for key in range(0, 500, 100):
        rig.checkpoint({b"%05d" % key: b"w"})
        heads.append(rig.pages.meta.dead_page)
    assert len(set(heads)) == 5
    rig.disk.trace = trace = []
    rig.pages.checkpoint([], seqno=Seqno(99), time_us=99, drop=[second.generation])
    assert not {operation.offset // PAGE_SIZE for operation in trace if operation.name == "pread"} & set(heads)
    del rig.bases[second.generation]
    rig.disk.trace = None
    rig.verify()


def test_after_a_failed_flip_bases_can_be_read_and_pinned() -> None:
    rig = Rig(new_disk())
    base = rig.checkpoint({b"a": b"1"}, keep=Keep())
    for value in (b"2", b"3"):
        rig.checkpoint({b"a": value})
    with pytest.raises(OSError, match="EIO"):
        rig.checkpoint({b"a": b"4"}, drop=[base.generation], before_flip=lambda: rig.disk.fail("pwrite"))
    assert rig.pages.poisoned
    rig.pages.pins.hold("a test", {base.generation})
    rig.verify()


def test_the_end_of_the_file_is_emptied_when_the_last_base_has_gone() -> None:
    rig = Rig(new_disk())
    base = rig.checkpoint({b"a": b"1"}, keep=Keep())
    rig.checkpoint({b"%05d" % key: b"v" * 200 for key in range(5000)})
    # One by one: of leaves that go with a range the birth is not known, so that they stay for the base.
    rig.checkpoint({b"%05d" % key: None for key in range(100, 4900)})
    before = rig.pages.meta
    for _ in range(4):
        rig.checkpoint({})
    assert rig.pages.space.free_pages() > before.page_count / 2
    assert rig.pages.meta.root == before.root
    rig.checkpoint({}, drop=[base.generation])
    for _ in range(4):
        rig.checkpoint({})
    assert rig.pages.meta.page_count < before.page_count / 2
    rig.verify()


def test_a_base_that_is_newer_than_its_page_file_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(new_disk())
    base = rig.checkpoint({b"a": b"1"}, keep=Keep())
    write_rows = Ledger._write_rows

    def forged(ledger: Ledger, writer: Any) -> tuple[bytes, int]:
        ledger._bases[99] = ledger._bases[base.generation]._replace(generation=99)
        ledger._changed.add(99)
        return write_rows(ledger, writer)

    with monkeypatch.context() as patched:
        patched.setattr(Ledger, "_write_rows", forged)
        rig.checkpoint({})
    rig.reopen()
    assert any("newer than" in str(finding) for finding in check(rig.pages, rig.pages.meta))
    assert rig.pages.bases.generations() == [base.generation]
    rig.checkpoint({})
    rig.checkpoint({})
    rig.verify()


def test_check_notices_a_dead_list_that_names_what_no_base_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(new_disk())
    rig.checkpoint({b"a": b"1"}, keep=Keep())
    rig.checkpoint({b"a": b"2"})
    parted = Freed.parted

    def all_held(freed: Freed, needed: Any) -> tuple[Freed, Freed]:
        return (freed, Freed(freed.generation)) if len(needed) == 1 else parted(freed, needed)

    monkeypatch.setattr(Freed, "parted", all_held)
    rig.checkpoint({b"a": b"3"})
    assert any("does not reach" in str(finding) for finding in check(rig.pages))


def test_check_notices_a_dead_list_of_the_wrong_base(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(new_disk())
    rig.checkpoint({b"a": b"1"}, keep=Keep())
    rig.checkpoint({}, keep=Keep())
    rig.checkpoint({b"a": b"2"}, keep=Keep())
    _, second, third = rig.pages.bases.all()
    assert (second.dead_page, bool(third.dead_page)) == (0, True)
    write_rows = Ledger._write_rows

    def swapped(ledger: Ledger, writer: Any) -> tuple[bytes, int]:
        ledger._bases[second.generation] = third._replace(generation=second.generation, root=second.root)
        ledger._bases[third.generation] = third._replace(dead_page=0, dead_crc=0, dead_pages=0, held_bytes=0)
        ledger._changed |= {second.generation, third.generation}
        return write_rows(ledger, writer)

    monkeypatch.setattr(Ledger, "_write_rows", swapped)
    rig.checkpoint({})
    findings = [str(finding) for finding in check(rig.pages, rig.pages.meta)]
    assert len(findings) == 1
    assert f"base {second.generation}: a node of level 0 of 1 pages is not kept for it" in findings[0]


# What a base tree and a dead list may say.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (bytes(7), bytes(134)),
        (bytes(9), bytes(134)),
        (bytes(8), bytes(133)),
        (bytes(8), bytes(135)),
        (bytes(8), bytes(132) + b"\x02\0a"),
        (bytes(8), bytes(132) + b"\x41\0" + b"a" * 65),
        (bytes(8), bytes(132) + b"\x01\0\xff"),
        (bytes(8), bytes(24) + b"\1" + bytes(109)),
        (bytes(8), bytes(44) + b"\1" + bytes(89)),
        (bytes(8), bytes(48) + b"\1" + bytes(85)),
        (bytes(8), bytes(68) + b"\1" + bytes(65)),
    ],
)
def test_an_entry_that_is_no_base_is_damage(key: bytes, value: bytes) -> None:
    assert decode_base(bytes(8), bytes(134), 5).generation == 0
    with pytest.raises(CorruptionError, match="no base"):
        decode_base(key, value, 5)


def test_a_base_has_these_bytes() -> None:
    base = Base(
        1, Seqno(2), 3, 4, POINTER.pack(5, 6, 7, 0, 8), 9, POINTER.pack(10, 11, 12, 0, 13), 14, 15, 16, 17, 18, 19, 32,
        bytes(range(32)), "ä",
    )  # fmt: skip
    key, value = encode_base(base)
    assert key.hex() == "0000000000000001"
    assert value[:100].hex(" ", -4) == (
        "02000000 00000000 03000000 00000000 04000000 00000000 05000000 06000000 07000000 08000000 00000000 09000000 "
        "0a000000 0b000000 0c000000 0d000000 00000000 0e000000 0f000000 10000000 11000000 12000000 13000000 00000000 "
        "20000000"
    )
    assert value[100:] == bytes(range(32)) + b"\x02\0\xc3\xa4"
    assert decode_base(key, value, 5) == base


def forged_list(rig: Rig, raw: bytes) -> ListRef:
    """A reference to bytes that verify."""
    raw = raw.ljust(PAGE_SIZE, b"\0")
    file = rig.pages.pager.file
    file.pwrite(raw, 4 * PAGE_SIZE)
    return ListRef(4, crc32c(raw, 4), 1, 0, 0)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (struct.pack("<QII", 5, 0, 0), "below 5"),
        (struct.pack("<QII", 3, 200, 0), "counts"),
        (struct.pack("<QII", 3, 0xFFFFFFFF, 0), "counts"),
        (struct.pack("<QII", 3, 0, 400), "counts"),
        (struct.pack("<QIIQI", 3, 0, 1, 1, 0xFFFFFFFF), "counts"),
        (struct.pack("<QIIQI", 3, 0, 1, 1, 509), "counts"),
    ],
)
def test_a_dead_list_that_verifies_and_is_none_is_damage(raw: bytes, reason: str) -> None:
    rig = Rig(new_disk())
    ref = forged_list(rig, raw)
    with pytest.raises(CorruptionError, match=reason):
        read_dead_list(rig.pages.pager, ref, 5, 100)
    with pytest.raises(CorruptionError, match="outside"):
        read_dead_list(rig.pages.pager, ref, 9, 4)
    good = forged_list(rig, struct.pack("<QIIIIIQQQIII", 4, 1, 1, 9, 8, 7, 6, 5, 2, 1, 11, 3))
    generation, found = read_dead_list(rig.pages.pager, good, 5, 100)
    assert (generation, found.lists, [*found.freed.places], [*found.freed.born]) == (
        4, [ListRef(9, 8, 7, 6, 5)], [11 << 32 | 3], [2],
    )  # fmt: skip
