"""What a memtable keeps of what was replaced: no more than its readers need."""

from __future__ import annotations

import kvwal
from kvwal.engine.memtable import Memtable
from kvwal.engine.readers import Reader
from kvwal.engine.value import MISSING
from kvwal.keys import Seqno
from kvwal.testing import SimulatedDisk


def read_at(table: Memtable, seqno: int) -> Reader:
    """A registered reader of the table."""
    reader = Reader(None, Seqno(seqno), "test", 0, None)  # type: ignore[arg-type]  # no version is looked at
    reader.register(table.older.readers)
    return reader


def put(table: Memtable, seqno: int, key: bytes, value: bytes) -> None:
    table.write(Seqno(seqno), {key: value}, 1)


def test_older_values_that_no_reader_needs_any_more_are_swept() -> None:
    table = Memtable(Seqno(0))
    readers: list[Reader] = []
    for seqno in range(1, 5000):
        # Readers that move along: what is older than they are must not pile up.
        readers.append(read_at(table, seqno - 1))
        del readers[:-10]
        put(table, seqno, b"k%d" % seqno, b"")
    assert len(table.older._by_key) < 2200
    used = table.bytes_used
    readers.clear()
    put(table, 5000, b"k", b"")
    assert table.older._by_key == {}
    assert table.bytes_used < used
    table._check()


def test_older_values_of_a_hot_key_do_not_pile_up_while_readers_come_and_go() -> None:
    table = Memtable(Seqno(0))
    readers: list[Reader] = []
    for seqno in range(1, 5000):
        readers.append(read_at(table, seqno - 1))
        del readers[:-10]
        put(table, seqno, b"hot", b"%d" % seqno)
        assert len(table.older._by_key[b"hot"]) <= 11
    assert [table.get_at(b"hot", reader.seqno) for reader in readers] == [b"%d" % reader.seqno for reader in readers]


def test_only_what_a_registered_reader_can_see_is_kept() -> None:
    """Between two readers a key may be written a thousand times."""
    table = Memtable(Seqno(0))
    reader = read_at(table, 0)
    for seqno in range(1, 1001):
        put(table, seqno, b"k", b"%d" % seqno)
    assert len(table.older._by_key[b"k"]) == 1
    assert table.get_at(b"k", Seqno(0)) is MISSING
    assert table.get(b"k") == b"1000"
    reader.release()


def test_older_values_of_a_hot_key_are_bounded_by_its_readers() -> None:
    """A reader at each end: only what one of them reads stays."""
    table = Memtable(Seqno(0))
    kept = read_at(table, 0)
    for number in range(1, 20_000):
        put(table, number, b"hot", b"%d" % number)
    assert len(table.older._by_key[b"hot"]) == 1
    assert table.get_at(b"hot", Seqno(0)) is MISSING
    kept.release()
    for number in range(20_000, 22_000):
        reader = read_at(table, number - 1)
        put(table, number, b"hot", b"%d" % number)
        reader.release()
    # Each was the only one when it was there.
    assert len(table.older._by_key[b"hot"]) <= 3


def test_older_values_of_many_keys_are_swept_when_their_readers_have_left() -> None:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, durability="os") as db:
        for number in range(10_000):
            # A transaction is a reader of the moment before its own commit.
            with db.transaction() as txn:
                txn[b"%06d" % number] = b"x"
        assert len(db.engine.state.version.memtable.older._by_key) <= 4096
