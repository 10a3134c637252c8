"""Runs of records: decoded by columns, they are what a walk finds one by one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.batch import WriteBatch
from kvwal.keys import Seqno
from kvwal.log.columns import decode_put, decode_uniform
from kvwal.log.intents import ONE, encode_intents, encode_put
from kvwal.log.record import COMMIT, PAUSED, WATERMARK, Record, encode_record
from kvwal.log.run import LEAST_RECORDS, Run, read_run
from kvwal.log.segment import HEADER_PAGE_BYTES, SegmentHeader
from kvwal.log.walk import Place, Puts, Stop, walk, walk_parts

HEADER = SegmentHeader(bytes(16), Seqno(7), 1000, 0x01020304, 0x0A0B0C0D, 1 << 30, Seqno(3))


class Memory:
    """A file of bytes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def pread(self, size: int, offset: int) -> bytes:
        return self.data[offset : offset + size]


class Writing:
    """A segment that is written by hand."""

    def __init__(self, header: SegmentHeader = HEADER) -> None:
        self.header = header
        self.data = bytearray(HEADER_PAGE_BYTES)
        self.last = int(header.first_seqno) - 1

    def add(self, body: bytes, kind: int = COMMIT, *, seqno: int | None = None, watermark: int | None = None) -> None:
        self.last += kind == COMMIT
        seed = self.header.salt + len(self.data)
        marked = self.last - 1 if watermark is None else watermark
        seqno = self.last if seqno is None else seqno
        self.data += encode_record(self.header.marker, seed, kind, seqno, marked, 1000 + self.last, body)

    def puts(self, n: int, key_bytes: int = 3, value_bytes: int = 5) -> "Writing":
        for _ in range(n):
            number = self.last + 1
            self.add(encode_put((b"%d" % number)[-key_bytes:].zfill(key_bytes), bytes([number % 251]) * value_bytes))
        return self

    def record(self, seqno: int) -> int:
        """Where the record of a commit begins, if all before it are of one shape."""
        size = (len(self.data) - HEADER_PAGE_BYTES) // (self.last - self.header.first_seqno + 1)
        return HEADER_PAGE_BYTES + (seqno - self.header.first_seqno) * size

    def run(self, until: int | None = None) -> Run | None:
        """The run that it begins with."""
        return read_run(bytes(self.data), HEADER_PAGE_BYTES, self.header, 0, int(self.header.first_seqno) - 1, until)


def shown(record: Record) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in Record.__slots__)


def seen(writing: Writing, *, runs: bool, **options: int) -> tuple[list[tuple[object, ...]], tuple[object, ...], int]:
    """What a walk hands out, run by run if so, where it ends, and how often it handed out a run."""
    place = Place(HEADER_PAGE_BYTES, int(writing.header.first_seqno) - 1, 3, 0)
    found, n_runs = [], 0
    file, limit = Memory(bytes(writing.data)), len(writing.data)
    for part in walk_parts(file, writing.header, limit, place, runs=runs, **options):
        if isinstance(part, Run):
            n_runs += 1
            found += map(shown, part.records())
        else:
            found.append(shown(part))
    return found, tuple(getattr(place, name) for name in Place.__slots__), n_runs


@st.composite
def segments(draw: st.DrawFn) -> Writing:
    """Segments with long stretches of one shape, other records between, and damage of each kind."""
    writing = Writing(HEADER._replace(salt=draw(st.sampled_from([3, 0xFFFFFFFF, 0xFFFFFFFF - 5000]))))
    shapes = [(3, 5), (5, 3), (3, 5), (0, 8), (3, 0)]
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from(["puts", "puts", "puts", "mixed", "batch", "mark", "wrong"]))
        if kind == "puts":
            writing.puts(draw(st.integers(1, 300)), *draw(st.sampled_from(shapes)))
        elif kind == "mixed":
            for shape in draw(st.lists(st.sampled_from(shapes), max_size=30)):
                writing.puts(1, *shape)
        elif kind == "batch":
            batch = WriteBatch()
            batch.writes = {b"a": b"1", b"b": draw(st.sampled_from([None, b"1"]))}
            writing.add(b"".join(encode_intents(batch)))
        elif kind == "mark":
            writing.add(b"", draw(st.sampled_from([WATERMARK, PAUSED])))
        else:
            # A record that verifies and is not in order, or whose body is not valid.
            body = draw(st.sampled_from([encode_put(b"abc", b"12345"), ONE.pack(1, 1, 3, 6) + b"abc12345", bytes(19)]))
            off = draw(st.integers(-2, 2))
            writing.add(body, seqno=writing.last + 1 + off, watermark=writing.last + draw(st.integers(-2, 2)))
        writing.puts(draw(st.integers(1, 20)))
    for at in draw(st.lists(st.integers(HEADER_PAGE_BYTES, len(writing.data) - 1), max_size=2)):
        writing.data[at] ^= draw(st.integers(1, 255))
    del writing.data[draw(st.one_of(st.just(len(writing.data)), st.integers(HEADER_PAGE_BYTES, len(writing.data)))) :]
    return writing


@given(segments(), st.data())
def test_a_walk_by_runs_sees_what_one_by_records_sees_of_damaged_segments_too(writing: Writing, data: st.DataObject):
    options = {"chunk_bytes": data.draw(st.sampled_from([1 << 20, 4096, 700]))}
    if data.draw(st.booleans()):
        options["after"] = data.draw(st.integers(0, writing.last + 1))
    if data.draw(st.booleans()):
        options["until"] = data.draw(st.integers(7, writing.last + 1))
    assert seen(writing, runs=True, **options)[:2] == seen(writing, runs=False, **options)[:2]


@given(segments())
def test_puts_that_are_left_by_runs_are_those_of_the_records(writing: Writing):
    file, limit = Memory(bytes(writing.data)), len(writing.data)
    puts, place = Puts({}), Place(HEADER_PAGE_BYTES, 6, 3, 0)
    found: list[object] = []
    for record in walk(file, writing.header, limit, place, puts=puts):
        found.append((shown(record), list(puts.content.items())))
        puts.content.clear()
    found.append(list(puts.content.items()))
    expected: list[object] = []
    content: dict[bytes, bytes | None] = {}
    size = 0
    for record in walk(file, writing.header, limit, Place(HEADER_PAGE_BYTES, 6, 3, 0)):
        put, uniform = decode_put(record.body), decode_uniform(record.body)
        if record.kind == COMMIT and (put is not None or uniform is not None):
            content.update([put] if put is not None else zip(*uniform or ((), ()), strict=True))
            size += record.size
        else:
            expected.append((shown(record), list(content.items())))
            content.clear()
    expected.append(list(content.items()))
    assert (found, puts.size) == (expected, size)


def test_stretches_of_one_shape_come_as_runs_of_many():
    writing = Writing().puts(1000)
    found, _, n_runs = seen(writing, runs=True)
    assert len(found) == 1000
    assert n_runs <= 8
    assert seen(Writing().puts(1000), runs=False)[2] == 0


def test_a_run_has_the_columns_of_its_records():
    run = Writing().puts(8, 2, 1).run()
    assert run is not None
    assert run.seqnos == tuple(range(7, 15))
    assert run.watermarks == tuple(range(6, 14))
    assert run.times_us == tuple(range(1007, 1015))
    assert run.keys == (b"07", b"08", b"09", b"10", b"11", b"12", b"13", b"14")
    assert run.values == tuple(bytes([n]) for n in range(7, 15))
    assert run.offsets == range(HEADER_PAGE_BYTES, HEADER_PAGE_BYTES + 8 * 54, 54)
    assert run.segment == 7


def test_less_than_eight_records_of_one_shape_are_no_run():
    assert Writing().puts(LEAST_RECORDS - 1).run() is None
    assert Writing().puts(LEAST_RECORDS - 1).puts(LEAST_RECORDS, 4, 4).run() is None
    assert Writing().puts(LEAST_RECORDS).run(until=6 + LEAST_RECORDS - 1) is None
    assert Writing().puts(LEAST_RECORDS).run(until=6 + LEAST_RECORDS) is not None


@pytest.mark.parametrize(
    ("at", "why"),
    [
        (0, "marker"),
        (4, "crc"),
        (8, "length"),
        (13, "kind"),
        (16, "seqno"),
        (40, "intents"),
        (51, "key"),
        (58, "value"),
    ],
)
def test_a_run_ends_before_a_record_in_which_anything_is_changed(at: int, why: str):
    writing = Writing().puts(40)
    offset = writing.record(7 + 20)
    writing.data[offset + at] ^= 1
    run = writing.run()
    assert run is not None, why
    assert 16 <= len(run.seqnos) <= 20
    found, place, _ = seen(writing, runs=True)
    assert [record[Record.__slots__.index("seqno")] for record in found] == list(range(7, 27))
    assert place[Place.__slots__.index("stop")] is Stop.INVALID
    assert place[Place.__slots__.index("offset")] == offset


@pytest.mark.parametrize(("seqno", "watermark"), [(28, 20), (26, 20), (27, 27), (27, 1 << 60)])
def test_a_run_ends_before_a_record_that_verifies_and_is_not_in_order(seqno: int, watermark: int):
    writing = Writing().puts(20)
    writing.add(encode_put(b"abc", b"12345"), seqno=seqno, watermark=watermark)
    writing.puts(20)
    run = writing.run()
    assert run is not None
    assert run.seqnos == tuple(range(7, 27))[: len(run.seqnos)]
    _, place, _ = seen(writing, runs=True)
    assert place[Place.__slots__.index("stop")] is Stop.DISORDER
    assert place[Place.__slots__.index("last_seqno")] == 26


def test_a_first_record_that_is_damaged_begins_no_run():
    for at in (4, 45, 53):
        writing = Writing().puts(40)
        writing.data[HEADER_PAGE_BYTES + at] ^= 1
        assert writing.run() is None
