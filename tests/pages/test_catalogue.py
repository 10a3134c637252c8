"""Tables beside table 0: any sequence of checkpoints does to them what it does to dicts, cuts and damage included."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pages_fixtures import STORE_ID, Model, Scratch, Updates, columns, contents, pin, table_ids, tables_after

from kvwal.errors import CorruptionError, Finding
from kvwal.features import KEYSPACES
from kvwal.keys import KeyRange, Seqno
from kvwal.pages import Changes, PageFile, Salvaged, Tree, check, create_page_file, salvage_pages
from kvwal.pages.catalogue import EMPTY, ENTRY, Root, decode_entry
from kvwal.pages.node import NO_POINTER, PAGE_SIZE, POINTER, decode_leaf
from kvwal.testing import SimulatedDisk, crash_every

ALL: list[KeyRange] = [KeyRange(b"", None)]
POINTER_SOMEWHERE = POINTER.pack(5, 6, 7, 0, 8)


@pytest.fixture
def scratch(tmp_path: Path) -> Any:
    made = Scratch(str(tmp_path))
    yield made
    made.pages.close()


def test_entry_has_these_bytes() -> None:
    raw = ENTRY.pack(POINTER_SOMEWHERE, 2, 0)
    assert raw.hex(" ", -4) == "05000000 06000000 07000000 08000000 00000000 02000000 00000000"
    assert decode_entry(b"\0\0\1\2", raw) == (258, Root(POINTER_SOMEWHERE, 2))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (b"\0\0\0", ENTRY.pack(POINTER_SOMEWHERE, 2, 0)),
        (bytes(4), ENTRY.pack(POINTER_SOMEWHERE, 2, 0)),
        (b"\0\0\0\1", ENTRY.pack(POINTER_SOMEWHERE, 2, 0) + b"\0"),
        (b"\0\0\0\1", ENTRY.pack(NO_POINTER, 2, 0)),
        (b"\0\0\0\1", ENTRY.pack(POINTER_SOMEWHERE, 0, 0)),
    ],
    ids=["key size", "table 0", "value size", "nowhere", "no height"],
)
def test_entry_that_names_no_table_is_damage(key: bytes, value: bytes) -> None:
    with pytest.raises(CorruptionError, match="names no table"):
        decode_entry(key, value)


def test_table_0_alone_has_no_catalogue_and_writes_what_it_did(scratch: Scratch) -> None:
    scratch.checkpoint({b"a": b"1"})
    meta = scratch.pages.meta
    assert (meta.catalogue, meta.catalogue_height, meta.required) == (NO_POINTER, 0, 0)
    # The slots and a leaf; nothing was freed, so there is no free list.
    assert meta.page_count == 2 + 1


def test_tables_have_keys_of_their_own(scratch: Scratch) -> None:
    scratch.checkpoint({b"a": b"0"}, (), {1: ({b"a": b"1"}, ()), 4_000_000_000: ({b"a": bytes(5000)}, ())})
    scratch.verify()
    assert table_ids(scratch.pages) == [0, 1, 4_000_000_000]
    assert scratch.pages.meta.required == KEYSPACES
    assert scratch.pages.tree(table=2).get(b"a") is None
    assert scratch.pages.tree(table=2).count() == 0
    scratch.reopen()
    scratch.verify()


def test_dropped_table_leaves_the_catalogue_and_gives_its_pages_back(scratch: Scratch) -> None:
    scratch.checkpoint({b"a": b"0"})
    pages = scratch.pages.meta.page_count
    many: Updates = {b"%05d" % index: b"v" * 100 for index in range(5000)}
    scratch.checkpoint({}, (), {16: (many, ()), 17: ({b"large": bytes(100_000)}, ())})
    scratch.checkpoint({}, (), {16: ({}, ALL)})
    assert table_ids(scratch.pages) == [0, 17]
    scratch.checkpoint({}, (), {17: ({b"large": None}, ())})
    assert table_ids(scratch.pages) == [0]
    assert (scratch.pages.meta.catalogue, scratch.pages.meta.catalogue_height) == EMPTY
    for _ in range(4):
        scratch.checkpoint({})
        scratch.verify()
    assert scratch.pages.meta.page_count <= pages + 3


def test_table_that_is_not_mentioned_keeps_its_pages(scratch: Scratch) -> None:
    many: Updates = {b"%05d" % index: b"v" * 100 for index in range(2000)}
    scratch.checkpoint({}, (), {16: (many, ()), 17: (many, ())})
    entry = dict(contents(catalogue(scratch)))
    scratch.checkpoint({b"a": b"b"}, (), {17: ({b"00500": b"new"}, ())})
    after = dict(contents(catalogue(scratch)))
    assert after[(16).to_bytes(4, "big")] == entry[(16).to_bytes(4, "big")]
    assert after[(17).to_bytes(4, "big")] != entry[(17).to_bytes(4, "big")]
    root = scratch.pages.meta.catalogue
    scratch.checkpoint({b"a": b"c"})
    assert scratch.pages.meta.catalogue == root


def catalogue(scratch: Scratch) -> Any:
    meta = scratch.pages.meta
    return Tree(scratch.pages.pager.uncached(), meta, meta.catalogue, meta.catalogue_height)


def test_more_tables_than_a_node_holds(scratch: Scratch, rng: random.Random) -> None:
    scratch.checkpoint({}, (), {table: ({b"%d" % table: b"v"}, ()) for table in range(16, 3000)})
    assert scratch.pages.meta.catalogue_height > 1
    scratch.verify()
    scratch.checkpoint({}, (), {table: ({}, ALL) for table in rng.sample(range(16, 3000), 1500)})
    scratch.verify()


def test_compaction_moves_all_tables_and_the_catalogue(scratch: Scratch) -> None:
    """What is to stay was written last, so it lies behind everything that is deleted."""
    scratch.checkpoint(
        {b"%05d" % index: b"v" * 100 for index in range(10_000)}, (), {8: ({b"%05d" % 1: bytes(90_000)}, ())}
    )
    kept: Updates = {b"%05d" % index: b"v" * 100 for index in range(300)}
    scratch.checkpoint({}, (), {table: (dict(kept), ()) for table in (16, 20, 24)} | {18: ({b"l": bytes(50_000)}, ())})
    full = scratch.pages.meta.page_count
    scratch.checkpoint({}, ALL, {8: ({}, ALL), 20: ({}, ALL)})
    for _ in range(4):
        scratch.checkpoint({}, compact=True)
        scratch.verify()
    assert scratch.pages.meta.page_count < full / 8


def test_generation_before_has_its_own_tables(scratch: Scratch) -> None:
    scratch.checkpoint({}, (), {16: ({b"a": b"1"}, ()), 17: ({b"a": b"1"}, ())})
    before = scratch.pages.meta
    pin(scratch.pages, before.generation)
    for step in range(5):
        scratch.checkpoint({}, (), {16: ({}, ALL), 17: ({b"a": b"%d" % step}, ())})
    assert table_ids(scratch.pages, before) == [16, 17]
    assert scratch.pages.tree(before, 16).get(b"a") == b"1"
    assert scratch.pages.tree(before, 17).get(b"a") == b"1"
    assert list(check(scratch.pages, before, whole=False)) == []


short = st.binary(max_size=2)
value = st.builds(lambda fill, size: bytes([fill]) * size, st.integers(0, 255), st.sampled_from([0, 9, 700, 5000]))
updates = st.dictionaries(short, st.none() | value, max_size=8)
ranges = st.lists(st.tuples(short, st.none() | short), max_size=2)
step = st.tuples(
    st.dictionaries(st.sampled_from([0, 1, 16, 17]), st.tuples(updates, ranges), max_size=3), st.booleans()
)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(step, max_size=8))
def test_checkpoints_of_several_tables_leave_what_dicts_would_hold(tmp_path_factory: Any, steps: Any) -> None:
    scratch = Scratch(str(tmp_path_factory.mktemp("tables")), cache_bytes=20_000)
    for changes, compact in steps:
        first = changes.pop(0, ({}, []))
        scratch.checkpoint(*first, changes, compact=compact)
        scratch.verify()
    scratch.reopen()
    scratch.verify()
    scratch.pages.close()


def test_power_cut_anywhere_leaves_all_tables_of_one_generation() -> None:
    rng = random.Random(7)
    history: dict[int, dict[int, Model]] = {0: {}, 1: {}}
    plan: list[dict[int, tuple[Updates, list[KeyRange]]]] = []
    for number in range(7):
        tables: dict[int, tuple[Updates, list[KeyRange]]] = {}
        for table in (0, 16, 17):
            values = [None, b"v" * 50, bytes([number]) * 6000]
            updates = {b"%02d" % rng.randrange(40): rng.choice(values) for _ in range(9)}
            some = [KeyRange(b"10", b"30")] if number % 3 == 2 else []
            tables[table] = updates, ALL if number == table - 12 and not some else some
        tables.pop(rng.choice([1, 16, 17]), None)
        plan.append(tables)

    def run(pages: PageFile, tables: dict[int, tuple[Updates, list[KeyRange]]], *, compact: bool) -> None:
        changes = {table: Changes(columns(sorted(each.items())), gone) for table, (each, gone) in tables.items()}
        first = changes.pop(0, Changes())
        seqno = Seqno(pages.meta.seqno + 1)
        pages.checkpoint(*first[:2], tables=changes, seqno=seqno, time_us=1, compact=compact)

    def opened(disk: SimulatedDisk) -> PageFile:
        return PageFile(disk.open_directory("/kv"), cache_bytes=1 << 20, writable=True)

    def program(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        pages = opened(disk)
        model: dict[int, Model] = {}
        for number, tables in enumerate(plan):
            model = history[pages.meta.generation + 1] = tables_after(model, tables)
            run(pages, tables, compact=number % 2 == 1)
            acknowledged.append(pages.meta.generation)
            if number == 3:
                pages.close()
                pages = opened(disk)

    def verify(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        pages = opened(disk)
        assert pages.meta.generation >= (acknowledged[-1] if acknowledged else 1)
        for meta in filter(None, (pages.meta, pages.older)):
            found = {table: contents(pages.tree(meta, table)) for table in table_ids(pages, meta)}
            assert found == history[meta.generation]
        assert list(check(pages)) == []
        run(pages, {16: ({b"after": b"recovery"}, [])}, compact=True)
        assert list(check(pages)) == []
        pages.close()

    disk = SimulatedDisk(seed=7)
    disk.make_directory("/kv")
    disk.open_directory("/").sync()
    create_page_file(disk.open_directory("/kv"), STORE_ID, time_us=1)
    report = crash_every(program, verify, seed=7, states_per_point=5, disk=disk)
    assert report.points > 25


# Damage.


def damaged(scratch: Scratch, at: int) -> None:
    scratch.pages.close()
    with open(scratch.path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))
    scratch.pages = scratch.open()


def test_damage_in_a_table_is_found_and_costs_no_other_table(scratch: Scratch) -> None:
    scratch.checkpoint({b"a": b"0"}, (), {16: ({b"a": b"sixteen"}, ()), 17: ({b"a": b"seventeen"}, ())})
    damaged(scratch, Path(scratch.path).read_bytes().index(b"sixteen"))
    assert scratch.pages.tree().get(b"a") == b"0"
    assert scratch.pages.tree(table=17).get(b"a") == b"seventeen"
    with pytest.raises(CorruptionError):
        scratch.pages.tree(table=16).get(b"a")
    assert len(list(check(scratch.pages, scratch.pages.meta))) == 1
    parts = list(salvage_pages(scratch.pages))
    found = [part for part in parts if isinstance(part, Salvaged)]
    assert found == [(0, (b"a",), (b"0",)), (17, (b"a",), (b"seventeen",))]
    assert ["1 entries are lost" in part.reason for part in parts if isinstance(part, Finding)] == [True]


def test_damaged_catalogue_leaves_table_0_and_names_what_is_lost(scratch: Scratch) -> None:
    scratch.checkpoint({b"a": b"0"}, (), {16: ({b"a": b"1"}, ()), 17: ({b"a": b"1"}, ())})
    damaged(scratch, POINTER.unpack(scratch.pages.meta.catalogue)[0] * PAGE_SIZE + 40)
    assert scratch.pages.tree().get(b"a") == b"0"
    with pytest.raises(CorruptionError):
        scratch.pages.tree(table=16)
    with pytest.raises(CorruptionError):
        table_ids(scratch.pages)
    assert any("checksum" in problem.reason for problem in check(scratch.pages))
    parts = list(salvage_pages(scratch.pages))
    assert parts[-1] == Salvaged(0, (b"a",), (b"0",))
    assert isinstance(parts[0], Finding)
    assert "catalogue" in parts[0].reason
    # Table 0 does not need it.
    scratch.checkpoint({b"a": b"1"})
    assert scratch.pages.tree().get(b"a") == b"1"


def test_check_finds_an_entry_that_names_no_table_and_a_page_of_two_tables(scratch: Scratch) -> None:
    scratch.checkpoint({}, (), {16: ({b"a": b"1"}, ()), 17: ({b"a": b"1"}, ())})
    entries = contents(catalogue(scratch))
    sixteen, seventeen = sorted(entries)
    for second, reason in (((seventeen, entries[sixteen]), "overlaps"), ((b"\xffodd", b"entry"), "names no table")):
        wrong = dict([(sixteen, entries[sixteen]), second])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules["kvwal.pages.check"], "decode_leaf", with_entries(entries, wrong))
            assert any(reason in problem.reason for problem in check(scratch.pages, scratch.pages.meta))


def with_entries(entries: Model, wrong: Model) -> Any:
    """`decode_leaf`, but where these entries lie it finds others."""

    def decode(raw: Any) -> Any:
        keys, values = decode_leaf(raw)
        if dict(zip(keys, values, strict=True)) == entries:
            return list(wrong), list(wrong.values())
        return keys, values

    return decode
