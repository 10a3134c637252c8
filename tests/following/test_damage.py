"""Damage in the newest segment: a follower says what `kvwal.open` says of the same bytes, at a bounded cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from following_fixtures import PATH, all_durable, offset_of

import kvwal
from kvwal.files.names import segment_name
from kvwal.log.record import encode_record
from kvwal.log.segment import HEADER_PAGE_BYTES, SLOT_OFFSET, SegmentHeader, decode_header, list_segments
from kvwal.testing import SimulatedDisk

Content = dict[bytes, bytes]


@dataclass
class Built:
    """A store, when its newest segment had its first records and now, and its content after each commit."""

    early: SimulatedDisk
    disk: SimulatedDisk
    name: str
    states: list[Content]
    #: Where the first records end, and all of them.
    begin: int
    end: int

    @property
    def segment(self) -> bytes:
        return self.disk.read(self.name)

    def now(self, data: bytes) -> SimulatedDisk:
        """The store with this as its newest segment."""
        disk = self.disk.copy()
        put(disk, self.name, data)
        return disk


def put(disk: SimulatedDisk, name: str, data: bytes) -> None:
    disk.damage(name, 0, data)
    if len(data) < len(disk.read(name)):
        disk.cut(name, len(data))


@cache
def built(how: str) -> Built:
    """Every kind of record: puts, a batch, a range, a table, marks, and how a writer ended."""
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    options: dict[str, Any] = {"files": disk, "background": False}
    db = kvwal.open(PATH, **options)
    states: list[Content] = [{}]

    def commit(action: Callable[[kvwal.Store], object]) -> None:
        action(db)
        states.append(dict(db))

    if how == "closed":
        # Of a segment that is large enough a clean close gives the rest back.
        for _ in range(2):
            commit(lambda db: db.put(b"large", b"x" * 200_000))
    commit(lambda db: db.put(b"first", b"1"))
    commit(lambda db: db.put(b"second", b"2"))
    all_durable(db)
    early, begin = disk.copy(), offset_of(db)
    commit(lambda db: db.put(b"key", b"value" * 5))
    commit(lambda db: db.update({b"%d" % n: b"in a batch" for n in range(4)}))
    all_durable(db)
    commit(lambda db: db.table("users", str, int).put("ada", 1))
    commit(lambda db: db.delete_range(b"1", b"3"))
    if how != "closed":
        db.close()
        db = kvwal.open(PATH, **options)
    commit(lambda db: db.put(b"again", b"behind a pause", meta={"who": "ada"}))
    commit(lambda db: db.delete(b"first"))
    all_durable(db)
    commit(lambda db: db.put(b"last", b"but one"))
    commit(lambda db: db.put(b"last", b"one"))
    if how == "idle":
        all_durable(db)
    # So long after the last checkpoint that a close makes one.
    disk.pass_time(2)
    if how in ("paused", "closed"):
        db.close()
    found, end = disk.copy(), offset_of(db)
    db.engine.abandon()
    newest = f"{PATH}/{segment_name(list_segments(disk.open_directory(PATH))[-1])}"
    return Built(early, found, newest, states, begin, end)


def refused(call: Callable[[], object]) -> str:
    """What it says of damage; "" if it says nothing."""
    try:
        call()
    except (kvwal.CorruptionError, kvwal.FormatError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def opened(disk: SimulatedDisk) -> tuple[str, int, int]:
    """What opening says, the last commit there is, and the last one that the log says is on disk."""
    try:
        with kvwal.open(PATH, "r", files=disk) as db:
            return "", db.last_seqno, db.recovery.durable_seqno
    except (kvwal.CorruptionError, kvwal.FormatError) as error:
        return f"{type(error).__name__}: {error}", 0, 0


def check(built: Built, data: bytes, *, looks: int = 1) -> str:
    """Compare opening, a follower that begins, and one that saw the first records; returns what opening says."""
    begins(built, built.now(data))
    disk = built.early.copy()
    with kvwal.follow(PATH, files=disk) as live:
        put(disk, built.name, data)
        says, last, durable = opened(disk)
        calls = [live.refresh, live.lag, lambda: live.wait(live.seqno + 1, 0)]
        if not says:
            for _ in range(looks):
                live.refresh()
            shows(built, live, last, durable)
        else:
            assert says in [refused(live.refresh) for _ in range(looks)]
            assert [refused(call) for call in calls] == [says] * 3
            assert dict(live) == built.states[live.seqno]
            if len(data) == len(built.segment):
                # What the medium gives back is read on.
                put(disk, built.name, built.segment)
                assert live.refresh() == opened(disk)[2]
                return says
    begins(built, disk)
    return says


def begins(built: Built, disk: SimulatedDisk) -> None:
    says, last, durable = opened(disk)
    if says:
        assert refused(lambda: kvwal.follow(PATH, files=disk).close()) == says
    else:
        with kvwal.follow(PATH, files=disk) as live:
            shows(built, live, last, durable)


def shows(built: Built, live: kvwal.Follower, last: int, durable: int) -> None:
    assert live.refresh() == durable
    assert live.lag().commits == last - durable
    assert dict(live) == built.states[durable]


def places(data: bytes) -> Iterator[int]:
    """Bytes of the header and the slot, and all from a segment's records on to a little behind them."""
    yield from range(0, 256, 3)
    yield from range(SLOT_OFFSET, SLOT_OFFSET + 20)
    end = len(data.rstrip(b"\0"))
    yield from range(HEADER_PAGE_BYTES, min(end + 50, len(data)))


HOW = ["running", "idle", "paused", "closed"]


def flips(how: str, bits: Callable[[int], range]) -> None:
    store = built(how)
    data = store.segment
    answers = set()
    for offset in places(data):
        if HEADER_PAGE_BYTES <= offset < store.begin:
            # A follower that has read on does not read this again.
            continue
        for bit in bits(offset):
            changed = bytearray(data)
            changed[offset] ^= 1 << bit
            answers.add(check(store, bytes(changed)))
    # Where it was of no account, and where it was damage.
    assert "" in answers
    assert len(answers) > 5


@pytest.mark.parametrize("how", HOW)
def test_a_flipped_bit_is_to_a_follower_what_it_is_to_an_open(how: str) -> None:
    flips(how, lambda offset: range(offset % 8, offset % 8 + 1) if offset % 16 == 0 else range(0))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("how", HOW)
def test_each_flipped_byte_is_to_a_follower_what_it_is_to_an_open(how: str) -> None:
    flips(how, lambda offset: range(offset % 3, 8, 3))


@pytest.mark.parametrize("size", [20, 512, 4096, 20_000])
def test_zeros_in_place_of_records_are_what_they_are_to_an_open(size: int) -> None:
    store = built("idle")
    data = store.segment
    end = len(data.rstrip(b"\0"))
    answers = set()
    for offset in range(store.begin, end, 20 if size < 512 else 100):
        changed = bytearray(data)
        changed[offset : offset + size] = bytes(len(changed[offset : offset + size]))
        answers.add(check(store, bytes(changed)))
    assert "" in answers
    assert size > 20 or len(answers) > 5


@pytest.mark.parametrize("how", ["idle", "closed"])
def test_a_segment_that_was_cut_is_what_it_is_to_an_open(how: str) -> None:
    store = built(how)
    data, begin = store.segment, store.begin
    sizes = (*range(begin, begin + 700, 51), len(data) - 100, len(data) - 1)
    # The look that finds new records does not look far behind them.
    answers = {check(store, data[:size], looks=2) for size in sizes}
    # Nothing is lost to one that is told of it: each is damage.
    assert "" not in answers


def test_what_is_far_behind_zeros_is_found_after_some_looks() -> None:
    """A hole of any size. Each look goes through another part of what is left of the segment."""
    disk = SimulatedDisk()
    disk.make_directory(PATH)
    with kvwal.open(PATH, files=disk, background=False, segment_bytes=4 << 20) as db:
        db.put(b"large", b"x" * (1 << 20))
        db.put(b"first", b"1")
        all_durable(db)
        name = f"{PATH}/{segment_name(list_segments(disk.open_directory(PATH))[-1])}"
        with kvwal.follow(PATH, files=disk) as live:
            begin = len(disk.read(name).rstrip(b"\0"))
            size = len(disk.read(name)) - begin
            assert size > 500_000
            for n in range(100):
                db.put(b"%d" % n, b"y" * 5000)
            end = len(disk.read(name).rstrip(b"\0"))
            disk.damage(name, begin, bytes(end - 5200 - begin))
            assert size // 20 > _answer(live, disk) > 2


def _answer(live: kvwal.Follower, disk: SimulatedDisk) -> int:
    """How many looks it takes to say what an open says."""
    says = opened(disk.copy())[0]
    assert says
    return next(n for n in range(1000) if refused(live.refresh) == says)


def test_a_record_of_a_newer_format_is_said_to_be_one() -> None:
    store = built("running")
    data = bytearray(store.segment)
    header = decode_header(bytes(data[:HEADER_PAGE_BYTES]), 1, None)
    assert isinstance(header, SegmentHeader)
    begin = store.end
    newer = encode_record(header.marker, header.salt + begin, 77, len(store.states), 0, 1 << 50)
    data[begin : begin + len(newer)] = newer
    assert "FormatError" in check(store, bytes(data))
    # And one that is out of its order, as no sound writer makes it.
    other = encode_record(header.marker, header.salt + begin, 1, len(store.states) + 5, 0, 1 << 50, b"\0" * 30)
    data[begin : begin + len(other)] = other
    assert "does not follow" in check(store, bytes(data))
