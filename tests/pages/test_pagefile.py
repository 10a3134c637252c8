"""The page file as a whole: limits, pins, reuse of pages, shrinking, budgets, closing."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import pytest
from pages_fixtures import STORE_ID, Scratch, WatchedFiles, columns, contents, entries, pin, unpin

from kvwal.errors import ClosedError, InternalError, ReadOnlyError
from kvwal.files import system_files
from kvwal.keys import MAX_KEY_BYTES, Seqno
from kvwal.pages import Keep, Salvaged, check, salvage_pages
from kvwal.pages.node import LEAF, OVERFLOW_THRESHOLD, PAGE_SIZE
from kvwal.pages.pager import Pager
from kvwal.pages.space import read_free_list
from kvwal.pages.writer import PageWriter


@pytest.fixture
def scratch(tmp_path: Path) -> Any:
    made = Scratch(str(tmp_path))
    yield made
    made.pages.close()


def size_of(scratch: Scratch) -> int:
    return Path(scratch.path).stat().st_size


# Making and opening.


def test_new_file_is_empty_and_sound(scratch: Scratch) -> None:
    assert (scratch.pages.meta.generation, scratch.pages.meta.count, scratch.pages.meta.store_id) == (1, 0, STORE_ID)
    assert scratch.pages.older is not None
    assert scratch.pages.tree().get(b"") is None
    assert scratch.pages.tree().count(b"a", b"b") == 0
    scratch.verify()
    assert size_of(scratch) == 2 * PAGE_SIZE


def test_meta_survives_a_reopen(scratch: Scratch) -> None:
    meta = scratch.pages.checkpoint(columns([(b"k", b"v")]), (), seqno=Seqno(42), time_us=4200)
    scratch.reopen()
    assert scratch.pages.meta == meta
    assert (meta.seqno, meta.time_us, meta.created_us, meta.page_size) == (42, 4200, 1, PAGE_SIZE)


def test_read_only_file_takes_no_checkpoint(scratch: Scratch) -> None:
    scratch.checkpoint({b"k": b"v"})
    pages = scratch.open(writable=False)
    assert pages.tree().get(b"k") == b"v"
    with pytest.raises(ReadOnlyError):
        pages.checkpoint([], (), seqno=Seqno(2), time_us=2)
    pages.close()


def test_closed_file_says_so(scratch: Scratch) -> None:
    scratch.checkpoint({b"%d" % index: b"v" * 100 for index in range(500)})
    tree = scratch.pages.tree()
    scratch.pages.close()
    scratch.pages.close()
    with pytest.raises(ClosedError):
        tree.get(b"1")
    with pytest.raises(ClosedError):
        entries(tree)


# Limits.


def test_longest_and_shortest_keys(scratch: Scratch) -> None:
    long = b"k" * MAX_KEY_BYTES
    scratch.checkpoint({b"": b"empty key", long: b"long key", long[:-1]: b"", b"\xff" * MAX_KEY_BYTES: b"last"})
    scratch.verify()
    tree = scratch.pages.tree()
    assert tree.get(b"") == b"empty key"
    assert tree.get(long) == b"long key"
    assert tree.get(long[:-1]) == b""
    assert tree.get(long[:-2]) is None
    assert entries(tree, b"\xff") == [(b"\xff" * MAX_KEY_BYTES, b"last")]


def test_long_keys_that_differ_only_at_the_end_make_inner_nodes_of_several_pages(scratch: Scratch) -> None:
    head = b"k" * (MAX_KEY_BYTES - 2)
    scratch.checkpoint({head + b"%02d" % index: b"%d" % index for index in range(40)})
    scratch.verify()
    assert scratch.pages.tree().get(head + b"17") == b"17"
    assert scratch.pages.meta.height <= 4
    scratch.checkpoint({head + b"%02d" % index: None for index in range(0, 40, 2)})
    scratch.verify()


@pytest.mark.parametrize(
    "size", [0, OVERFLOW_THRESHOLD - 1, OVERFLOW_THRESHOLD, OVERFLOW_THRESHOLD + 1, 4095, 4096, 4097, 3 << 20]
)
def test_values_around_the_overflow_threshold_and_page_sizes(scratch: Scratch, size: int) -> None:
    value = random.Random(size).randbytes(size)
    scratch.checkpoint({b"a": b"1", b"k": value, b"z": b"2"})
    scratch.verify()
    assert bool(scratch.pages.meta.root[10] & 1) == (size > OVERFLOW_THRESHOLD)
    scratch.reopen()
    assert scratch.pages.tree().get(b"k") == value
    scratch.checkpoint({b"b": b"the leaf changes, the large value stays where it is"})
    scratch.verify()
    scratch.checkpoint({b"k": None})
    scratch.verify()
    assert not scratch.pages.meta.root[10]


@pytest.mark.parametrize("run", [1000, 16, 7])
@pytest.mark.parametrize("stored", [False, True], ids=["into an empty tree", "over what is there"])
def test_large_values_at_the_bounds_of_batches_are_where_they_belong(tmp_path: Path, stored: bool, run: int) -> None:
    """Updates are taken 16, then 64, then 256 at a time, and a batch says whether it holds large values."""
    keys = [b"%04d" % index for index in range(400)]
    for number, large in enumerate([(0,), (15,), (16,), (15, 16), (79,), (80,), (79, 80), (335, 336), (399,)]):
        directory = tmp_path / str(number)
        directory.mkdir()
        scratch = Scratch(str(directory))
        if stored:
            scratch.checkpoint(dict.fromkeys(keys, b"old"))
        model = {key: bytes(3000) if index in large else b"small" for index, key in enumerate(keys)}
        scratch.pages.checkpoint(columns(model.items(), run), seqno=Seqno(2), time_us=2)
        scratch.model = model
        scratch.verify()
        scratch.pages.close()


@pytest.mark.slow
def test_value_of_the_largest_size(scratch: Scratch) -> None:
    value = bytes(1 << 30)
    scratch.checkpoint({b"k": value})
    assert scratch.pages.tree().get(b"k") == value
    assert list(check(scratch.pages)) == []


def test_scan_of_large_values_holds_two_or_three_of_them_at_a_time(scratch: Scratch) -> None:
    scratch.checkpoint({b"%02d" % index: bytes([index]) * (1 << 20) for index in range(20)})
    for reverse in (False, True):
        sizes = [sum(map(len, values)) for _, values in scratch.pages.tree().chunks(reverse=reverse)]
        assert len(sizes) > 3
        assert max(sizes) <= 6 << 20
    scratch.verify()
    assert [key for key, _ in entries(scratch.pages.tree(), b"03", b"05")] == [b"03", b"04"]


def test_updates_that_are_not_sorted_are_our_own_bug(scratch: Scratch) -> None:
    scratch.checkpoint({b"k": b"v"})
    for updates in ([(b"b", b""), (b"a", b"")], [(b"a", b""), (b"a", b"")]):
        with pytest.raises(InternalError):
            scratch.pages.checkpoint(columns(updates), (), seqno=Seqno(2), time_us=2)
    scratch.verify()


def test_updates_are_read_as_a_stream(scratch: Scratch) -> None:
    """A copy of a store larger than memory is a checkpoint too."""
    ahead = 0
    written = 0

    def updates() -> Any:
        nonlocal ahead
        for index in range(200_000):
            ahead = max(ahead, index - written)
            yield b"%08d" % index, b"v"

    def yield_to_writers() -> None:
        nonlocal written
        written += 900

    scratch.pages.checkpoint(columns(updates(), 50), (), seqno=Seqno(1), time_us=1, yield_to_writers=yield_to_writers)
    assert ahead < 50_000
    assert scratch.pages.meta.count == 200_000


@pytest.mark.parametrize("stored", [0, 20_000], ids=["into an empty tree", "over what is there"])
def test_at_most_600_updates_are_taken_between_two_yields(scratch: Scratch, stored: int) -> None:
    """No other thread runs meanwhile, so it is not leaf by leaf where leaves hold many entries."""
    if stored:
        scratch.checkpoint({b"%06d" % index: b"v" for index in range(stored)})
    taken = most = 0

    def updates() -> Any:
        nonlocal taken, most
        for index in range(20_000):
            taken += 1
            most = max(most, taken)
            yield b"%06d" % index, b"w"

    def yield_to_writers() -> None:
        nonlocal taken
        taken = 0

    scratch.pages.checkpoint(columns(updates(), 50), (), seqno=Seqno(9), time_us=9, yield_to_writers=yield_to_writers)
    assert most <= 600


def test_yielding_happens_at_least_once_a_leaf(scratch: Scratch) -> None:
    calls: list[int] = []
    scratch.checkpoint({b"%06d" % index: b"v" * 100 for index in range(10_000)})
    scratch.pages.checkpoint(
        columns((b"%06d" % index, b"w" * 100) for index in range(10_000)),
        (),
        seqno=Seqno(9),
        time_us=9,
        yield_to_writers=lambda: calls.append(1),
    )
    assert len(calls) >= 10_000 * 107 // 8192


def test_no_two_leaves_are_written_between_two_yields(scratch: Scratch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large entries a batch holds many leaves, and each takes a while."""
    written = most = 0
    original = PageWriter.node

    def node(self: PageWriter, data: bytes, flags: int, count: int) -> bytes:
        nonlocal written, most
        written += data[0] == LEAF
        most = max(most, written)
        return original(self, data, flags, count)

    def yield_to_writers() -> None:
        nonlocal written
        written = 0

    monkeypatch.setattr(PageWriter, "node", node)
    updates = columns((b"%06d" % index, b"v" * 2500) for index in range(2000))
    scratch.pages.checkpoint(updates, seqno=Seqno(1), time_us=1, yield_to_writers=yield_to_writers)
    assert most == 1


# Packing.


def leaves_fill(scratch: Scratch) -> float:
    """Bytes of keys and values to bytes of pages that are in use."""
    data = sum(len(key) + len(value) for key, value in scratch.model.items())
    meta = scratch.pages.meta
    free = read_free_list(scratch.pages.pager, meta)
    used = meta.page_count - free.free_pages() - free.held_pages()
    return data / (used * PAGE_SIZE)


def test_sorted_and_random_loads_fill_their_leaves(tmp_path: Path, rng: random.Random) -> None:
    everything = [b"%016d" % index for index in range(20_000)]
    for name, batches in (("sorted", 1), ("random", 8), ("small", 40)):
        directory = tmp_path / name
        directory.mkdir()
        scratch = Scratch(str(directory))
        if batches > 1:
            rng.shuffle(everything)
        for batch in range(batches):
            scratch.checkpoint(dict.fromkeys(everything[batch::batches], b"v" * 100))
        scratch.verify()
        assert leaves_fill(scratch) > 0.85, name
        scratch.pages.close()


def test_sparse_inserts_keep_leaves_two_thirds_full(scratch: Scratch, rng: random.Random) -> None:
    scratch.checkpoint({b"%010d" % (index * 1000): b"v" * 100 for index in range(10_000)})
    for _ in range(30):
        scratch.checkpoint({b"%010d" % rng.randrange(10_000_000): b"v" * 100 for _ in range(60)})
    scratch.verify()
    assert leaves_fill(scratch) > 0.70


def test_leaves_emptied_by_deletes_join_their_neighbours(scratch: Scratch, rng: random.Random) -> None:
    scratch.checkpoint({b"%06d" % index: b"v" * 100 for index in range(10_000)})
    survivors = set(rng.sample(sorted(scratch.model), 1000))
    scratch.checkpoint({key: None for key in scratch.model if key not in survivors})
    scratch.verify()
    assert leaves_fill(scratch) > 0.80


def test_small_change_rewrites_one_path(scratch: Scratch) -> None:
    scratch.checkpoint({b"%06d" % index: b"v" * 100 for index in range(20_000)})
    before = scratch.pages.meta.page_count
    scratch.checkpoint({b"%06d" % 777: b"w" * 100})
    # A leaf, two levels above it at most, the free list.
    assert scratch.pages.meta.page_count - before <= 2 + 2 * 2 + 1


def test_checkpoint_of_nothing_writes_no_node(scratch: Scratch) -> None:
    scratch.checkpoint({b"%06d" % index: b"v" for index in range(1000)})
    root = scratch.pages.meta.root
    scratch.checkpoint({})
    assert scratch.pages.meta.root == root
    scratch.verify()


def test_deleted_range_is_dropped_without_reading_its_leaves(scratch: Scratch) -> None:
    scratch.checkpoint({b"%06d" % index: b"v" * 100 for index in range(20_000)})
    reads: list[int] = []
    original = Pager.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pager, "read", lambda self, *call: (reads.append(1), original(self, *call))[1])
        scratch.checkpoint({}, [(b"001000", b"019000")])
    assert len(reads) < 20
    scratch.verify()


# Generations, pins and pages.


def test_tree_of_the_generation_before_stays_readable(scratch: Scratch) -> None:
    scratch.checkpoint({b"%04d" % index: b"old" for index in range(2000)})
    older, before = scratch.pages.tree(), scratch.model
    scratch.checkpoint({b"%04d" % index: b"new" for index in range(2000)})
    assert contents(older) == before
    scratch.verify()


def test_pin_keeps_a_generation_readable_while_checkpoints_go_on(scratch: Scratch, rng: random.Random) -> None:
    pinned = []
    for step in range(12):
        scratch.checkpoint({b"%04d" % rng.randrange(3000): b"%d" % step * 20 for _ in range(1000)})
        if step % 3 == 0:
            pin(scratch.pages, scratch.pages.meta.generation)
            pinned.append((scratch.pages.meta, scratch.model))
        for meta, model in pinned:
            assert list(check(scratch.pages, meta, whole=False)) == []
            assert contents(scratch.pages.tree(meta)) == model
    assert sorted(scratch.pages.pins.counts()) == [meta.generation for meta, _ in pinned]
    for meta, _ in pinned:
        unpin(scratch.pages, meta.generation)
    assert scratch.pages.pins.counts() == {}
    held = read_free_list(scratch.pages.pager, scratch.pages.meta).held_pages()
    scratch.checkpoint({})
    assert read_free_list(scratch.pages.pager, scratch.pages.meta).held_pages() < held / 2
    scratch.verify()


def test_old_pin_holds_only_what_it_reaches(scratch: Scratch) -> None:
    """Pages that were written and freed after the pinned generation are reused: a snapshot costs its own size."""
    scratch.checkpoint({b"%04d" % index: b"v" * 100 for index in range(3000)})
    pin(scratch.pages, scratch.pages.meta.generation)
    sizes = []
    for step in range(12):
        scratch.checkpoint({b"%04d" % index: b"%02d" % step * 50 for index in range(3000)})
        sizes.append(scratch.pages.meta.page_count)
    assert max(sizes[4:]) == max(sizes[:4])
    scratch.verify()


def test_generation_that_is_gone_cannot_be_pinned(scratch: Scratch) -> None:
    gone = scratch.pages.meta.generation
    scratch.checkpoint({b"a": b"1"})
    pin(scratch.pages, gone)
    unpin(scratch.pages, gone)
    scratch.checkpoint({b"a": b"2"})
    with pytest.raises(ValueError, match="no longer kept"):
        pin(scratch.pages, gone)


def test_generation_before_cannot_be_pinned_any_more_once_the_flip_is_prepared(scratch: Scratch) -> None:
    """Its pages may be about to be cut off the file."""
    scratch.checkpoint({b"a": b"1"})
    old, current = scratch.pages.older, scratch.pages.meta
    assert old is not None

    def before_flip() -> None:
        with pytest.raises(ValueError, match="no longer kept"):
            pin(scratch.pages, old.generation)
        pin(scratch.pages, current.generation)

    scratch.pages.checkpoint(columns([(b"b", b"2")]), (), seqno=Seqno(2), time_us=2, before_flip=before_flip)
    assert scratch.pages.pins.counts() == {current.generation: 1}


def test_freed_pages_are_used_again_two_checkpoints_later(scratch: Scratch) -> None:
    everything = {b"%04d" % index: b"v" * 100 for index in range(5000)}
    pages = []
    for _ in range(8):
        scratch.checkpoint(dict(everything))
        pages.append(scratch.pages.meta.page_count)
    one = pages[0]
    # The third load cannot use the first's pages yet, which the second generation before it still reaches.
    assert pages[1] > 1.9 * one
    assert max(pages) < 3.2 * one
    scratch.verify()


@pytest.mark.parametrize(("parts", "most"), [(1, 3.2), (4, 1.7), (8, 1.5)])
def test_checkpoint_in_parts_needs_less_of_the_disk(scratch: Scratch, parts: int, most: float) -> None:
    """Every leaf changes, so in one part three generations lie side by side. Part k + 2 takes the pages of part k."""
    keys = [b"%05d" % index for index in range(5000)]
    scratch.checkpoint(dict.fromkeys(keys, b"v" * 100))
    one = scratch.pages.meta.page_count
    pages = 0
    for number in range(2, 6):
        for part in range(parts):
            some = keys[part * len(keys) // parts : (part + 1) * len(keys) // parts]
            last = part == parts - 1
            scratch.pages.checkpoint(
                [(some, [b"%d" % number * 100] * len(some))],
                seqno=Seqno(number if last else number - 1),
                time_us=1,
                replay_through=Seqno(number),
            )
            pages = max(pages, scratch.pages.meta.page_count)
        scratch.model = dict.fromkeys(keys, b"%d" % number * 100)
        scratch.verify()
    assert pages < most * one


def test_file_shrinks_after_deletes(scratch: Scratch) -> None:
    scratch.checkpoint({b"%06d" % index: b"v" * 100 for index in range(20_000)})
    full = size_of(scratch)
    # What is left lies at the very end of the file.
    scratch.checkpoint({}, [(b"", b"019000")])
    for _ in range(5):
        scratch.checkpoint({})
        scratch.verify()
    assert size_of(scratch) < full / 8
    scratch.checkpoint({}, [(b"", None)])
    for _ in range(3):
        scratch.checkpoint({})
    scratch.verify()
    assert size_of(scratch) <= 8 * PAGE_SIZE


def test_file_shrinks_below_large_values_at_its_end(scratch: Scratch) -> None:
    scratch.checkpoint({b"%03d" % index: bytes([index]) * 20_000 for index in range(200)})
    full = size_of(scratch)
    scratch.checkpoint({}, [(b"000", b"190")])
    for _ in range(5):
        scratch.checkpoint({})
        scratch.verify()
    assert size_of(scratch) < full / 5


def test_relocation_survives_updates_of_what_moves(scratch: Scratch, rng: random.Random) -> None:
    scratch.checkpoint({b"%03d" % index: bytes([index]) * 9000 for index in range(200)})
    scratch.checkpoint({}, [(b"000", b"150")])
    for step in range(6):
        scratch.checkpoint({b"%03d" % rng.randrange(150, 200): b"%d" % step * 3000 for _ in range(20)})
        scratch.verify()


def test_pinned_pages_at_the_end_are_not_cut_off(scratch: Scratch) -> None:
    scratch.checkpoint({b"%06d" % index: b"v" * 100 for index in range(5000)})
    meta, model = scratch.pages.meta, scratch.model
    pin(scratch.pages, meta.generation)
    scratch.checkpoint({}, [(b"", None)])
    for _ in range(4):
        scratch.checkpoint({})
        assert contents(scratch.pages.tree(meta)) == model
    unpin(scratch.pages, meta.generation)
    scratch.checkpoint({})
    scratch.checkpoint({})
    assert size_of(scratch) <= 8 * PAGE_SIZE
    scratch.verify()


@pytest.mark.parametrize("reopened", [False, True])
def test_checkpoints_that_only_append_write_over_nothing_and_cut_nothing(
    tmp_path: Path, rng: random.Random, reopened: bool
) -> None:
    files = WatchedFiles()
    scratch = Scratch(str(tmp_path), files=files)
    keys = [b"%05d" % number for number in range(3000)]
    for _ in range(4):
        scratch.checkpoint({key: rng.randbytes(200) for key in rng.sample(keys, 1500)})
    # Much is free, at the end of the file too.
    scratch.checkpoint({}, [(b"01000", None)], keep=Keep())
    scratch.checkpoint({b"00000": b""})
    before = Path(scratch.path).read_bytes()
    if reopened:
        scratch.reopen()
    free = scratch.pages.space.free_pages()

    def watch(operation: str, offset: int, size: int) -> None:
        if operation == "pwrite":
            assert offset >= len(before) or offset + size <= 2 * PAGE_SIZE
        assert operation != "truncate" or offset >= len(before)

    files.before = watch
    ranges: dict[int, list[tuple[bytes, bytes | None]]] = {4: [(b"00500", b"00700")], 8: [(b"", None)]}
    for turn in range(12):
        scratch.checkpoint(
            {key: rng.randbytes(100) for key in rng.sample(keys, 20 * (turn % 3))},
            ranges.get(turn, ()),
            compact=turn % 2 == 1,
            append=True,
            keep=Keep() if turn == 5 else None,
            drop=scratch.pages.bases.generations() if turn == 6 else [],
        )
        scratch.verify()
        if turn % 4 == 3 and reopened:
            scratch.reopen()
    assert Path(scratch.path).read_bytes()[2 * PAGE_SIZE : len(before)] == before[2 * PAGE_SIZE :]
    files.before = lambda operation, offset, size: None
    # All of it is free again.
    assert scratch.pages.space.free_pages() >= free
    for _ in range(3):
        scratch.checkpoint({}, compact=True)
    scratch.verify()
    assert size_of(scratch) < len(before)
    scratch.pages.close()


def test_readers_and_checkpoints_side_by_side(tmp_path: Path, rng: random.Random) -> None:
    """Each reader pins what it reads, and sees one generation whole, whatever is written meanwhile."""
    scratch = Scratch(str(tmp_path), cache_bytes=200_000)
    scratch.checkpoint({b"%05d" % index: b"0" for index in range(3000)})
    failures: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                meta = scratch.pages.meta
                try:
                    pin(scratch.pages, meta.generation)
                except ValueError:
                    continue
                tree = scratch.pages.tree(meta)
                found = {value for _, values in tree.chunks() for value in values}
                assert len(found) == 1
                assert tree.get(b"01234") in found
                unpin(scratch.pages, meta.generation)
        except BaseException as failure:  # noqa: BLE001  # whatever ends a thread fails the test
            failures.append(failure)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(1, 12):
        scratch.pages.checkpoint(
            columns((b"%05d" % index, b"%d" % step) for index in range(3000)),
            (),
            seqno=Seqno(step + 1),
            time_us=step,
            yield_to_writers=lambda: system_files().give_way(0),
        )
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert list(check(scratch.pages)) == []
    scratch.pages.close()


# Reports.


def test_check_tells_how_far_it_is(scratch: Scratch) -> None:
    scratch.checkpoint({b"%06d" % index: b"v" * 100 for index in range(2000)})
    steps: list[tuple[int, int]] = []
    assert list(check(scratch.pages, progress=lambda done, total: steps.append((done, total)))) == []
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]
    assert len({total for _, total in steps}) == 1


def test_salvage_gives_everything_of_a_sound_file(scratch: Scratch) -> None:
    scratch.checkpoint({b"%04d" % index: b"v" * (index * 3) for index in range(1500)})
    found: dict[bytes, bytes] = {}
    for part in salvage_pages(scratch.pages):
        assert isinstance(part, Salvaged)
        found.update(zip(part.keys, part.values, strict=True))
    assert found == scratch.model


def test_figures_add_up(scratch: Scratch) -> None:
    scratch.checkpoint({b"%04d" % index: b"v" for index in range(1500)})
    scratch.pages.tree().get(b"0001")
    scratch.pages.tree().get(b"0001")
    meta, cache = scratch.pages.meta, scratch.pages.pager.cache
    assert scratch.pages.space.file_bytes() == size_of(scratch) == meta.page_count * PAGE_SIZE
    assert (meta.count, scratch.pages.tree().height, meta.generation) == (1500, meta.height, 2)
    assert scratch.pages.space.free_pages() == read_free_list(scratch.pages.pager, meta).free_pages()
    assert cache.hits >= 1
    assert cache.misses >= 1
