"""Records and intents survive the way to bytes and back, and nothing else passes for them."""

import struct

import pytest
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st

from kvwal.batch import WriteBatch
from kvwal.errors import CorruptionError
from kvwal.keys import MAX_KEY_BYTES, KeyRange
from kvwal.log import decode_intents, encode_intents, encode_put
from kvwal.log.record import COMMIT, RECORD_HEADER_BYTES, WATERMARK, Record, decode_put, encode_record

keys = st.binary(max_size=40)
values = st.binary(max_size=100)


@st.composite
def batches(draw: st.DrawFn) -> WriteBatch:
    batch = WriteBatch()
    for step in draw(st.lists(st.tuples(st.sampled_from("pdr"), keys, st.none() | values), max_size=30)):
        kind, key, value = step
        if kind == "p":
            batch.put(key, value or b"")
        elif kind == "d":
            batch.delete(key)
        else:
            batch.delete_range(key, value)
    return batch


def joined(batch: WriteBatch) -> bytes:
    return b"".join(encode_intents(batch))


def of(**writes: bytes | None) -> WriteBatch:
    batch = WriteBatch()
    batch.writes = {key.encode(): value for key, value in writes.items()}
    return batch


@given(batches())
def test_any_batch_comes_back_equal_and_in_order(batch: WriteBatch):
    again = decode_intents(joined(batch))
    assert list(again.writes.items()) == list(batch.writes.items())
    assert again.ranges == batch.ranges


@given(keys, values)
def test_one_put_is_encoded_like_a_batch_of_one(key: bytes, value: bytes):
    batch = WriteBatch()
    batch.put(key, value)
    assert encode_put(key, value) == joined(batch)
    assert decode_intents(encode_put(key, value)).writes == {key: value}


@given(batches(), st.data())
def test_a_body_cut_short_or_grown_is_refused(batch: WriteBatch, data: st.DataObject):
    body = joined(batch)
    cut = data.draw(st.integers(0, len(body) - 1))
    with pytest.raises(ValueError):
        decode_intents(body[:cut])
    with pytest.raises(ValueError):
        decode_intents(body + b"\0")


@given(st.binary(max_size=200))
def test_random_bytes_are_decoded_or_refused_and_nothing_else(body: bytes):
    try:
        batch = decode_intents(body)
    except ValueError:
        return
    assert joined(batch) == body


def test_golden_bytes_of_intents():
    batch = of(k=b"vv", d=None)
    batch.ranges = [KeyRange(b"a", b"b"), KeyRange(b"c", None)]
    assert joined(batch) == bytes.fromhex(
        "04000000"  # four intents
        "03040102"  # range, open range, put, delete
        "0100010001000100"  # key lengths
        "01000000000000000200000000000000"  # value lengths
        "61636b64"  # a c k d
        "627676"  # b vv
    )
    assert encode_put(b"k", b"vv") == bytes.fromhex("01000000 01 0100 02000000 6b 7676".replace(" ", ""))


def test_golden_bytes_of_a_record():
    data = encode_record(0x01020304, 0x11111111, COMMIT, 7, 5, 1_700_000_000_000_000, b"body")
    assert data == bytes.fromhex(
        "04030201"  # marker
        "7aa6aaa6"  # CRC-32C of all that follows, seeded with 0x11111111
        "04000000"  # body length
        "01000000"  # kind and flags
        "0700000000000000"  # seqno
        "0500000000000000"  # watermark
        "00401e18240a0600"  # time
        "626f6479"
    )
    assert len(encode_record(1, 0, WATERMARK, 1, 1, 1)) == RECORD_HEADER_BYTES


def test_a_small_batch_is_one_chunk():
    assert len(encode_intents(of(a=b"x" * 60_000))) == 1


def test_large_values_stay_uncopied_chunks_of_their_own():
    large = b"x" * 100_000
    chunks = encode_intents(of(a=b"1", b=large, c=b"2", d=large, e=b"3"))
    assert [chunk is large for chunk in chunks] == [False, True, False, True, False]
    assert decode_intents(b"".join(chunks)).writes[b"d"] == large


def test_many_small_values_are_one_chunk_however_many():
    batch = WriteBatch()
    for i in range(1000):
        batch.put(b"%d" % i, b"v" * 100)
    assert len(encode_intents(batch)) == 1
    assert decode_intents(joined(batch)).writes == batch.writes


@pytest.mark.parametrize("n", [2, 255, 256, 257, 511, 512, 513, 1000])
@pytest.mark.parametrize("size", [0, 1, 100])
def test_values_of_one_size_come_back_however_many(n: int, size: int):
    batch = WriteBatch()
    for i in range(n):
        batch.put(b"%04d" % i, bytes([i % 251]) * size)
    assert list(decode_intents(joined(batch)).writes.items()) == list(batch.writes.items())
    body = joined(batch)
    with pytest.raises(ValueError, match="do not fill"):
        decode_intents(body + b"\0")
    with pytest.raises(ValueError, match="do not fill"):
        decode_intents(body[:-1])


def test_one_put_is_told_from_everything_else():
    assert decode_put(encode_put(b"k", b"value")) == (b"k", b"value")
    assert decode_put(b"before" + encode_put(b"", b""), 6) == (b"", b"")
    for other in (of(k=None), of(a=b"1", b=b"2"), WriteBatch()):
        assert decode_put(joined(other)) is None
    ranged = WriteBatch()
    ranged.delete_range(b"a", b"b")
    assert decode_put(joined(ranged)) is None


@given(st.binary(max_size=60))
def test_what_is_one_put_is_the_same_to_both_decoders(body: bytes):
    put = decode_put(body)
    if put is not None:
        assert decode_intents(body).writes == dict([put])


def test_one_put_that_does_not_fill_its_body_is_none():
    body = encode_put(b"key", b"value")
    for size in range(len(body)):
        assert decode_put(body[:size]) is None
    assert decode_put(body + b"\0") is None


def test_a_batch_with_deletes_and_large_values_comes_back():
    batch = of(a=b"x" * 70_000, b=None, c=b"")
    assert decode_intents(joined(batch)).writes == batch.writes


def test_the_longest_key_fits():
    key = b"k" * MAX_KEY_BYTES
    assert decode_intents(encode_put(key, b"")).writes == {key: b""}


def columns(ops: bytes, keys: list[bytes], values: list[bytes]) -> bytes:
    n = len(ops)
    lengths = struct.pack(f"<I{n}s{n}H{n}I", n, ops, *map(len, keys), *map(len, values))
    return lengths + b"".join(keys) + b"".join(values)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "cut short"),
        (struct.pack("<I", 1 << 31), "longer than its record"),
        (columns(b"\x01\x01", [b"a", b"a"], [b"", b""]), "twice"),
        (columns(b"\x02", [b"a"], [b"v"]), "has a value"),
        (columns(b"\x04", [b"a"], [b"v"]), "has a stop"),
        (columns(b"\x03", [b"b"], [b"a"]), "end after its start"),
        (columns(b"\x03", [b"b"], [b"c" * (MAX_KEY_BYTES + 1)]), "end after its start"),
        (columns(b"\x05", [b"b"], [b"c"]), "unknown operation"),
        (columns(b"\x01\x04", [b"b", b"c"], [b"", b""]), "ranges after writes"),
        (struct.pack("<IBHI", 1, 1, 0, (1 << 30) + 1), "longer than the limit"),
    ],
)
def test_a_body_that_breaks_a_condition_is_refused_with_the_reason(body: bytes, reason: str):
    with pytest.raises(ValueError, match=reason):
        decode_intents(body)


def test_a_record_whose_body_does_not_decode_names_its_place():
    record = Record(COMMIT, 3, 2, 0, 1, 5000, b"?")
    with pytest.raises(CorruptionError) as caught:
        record.batch()
    assert (caught.value.file, caught.value.offset) == ("00000000000000000001.log", 5000)


@pytest.mark.parametrize("offset", range(4, 44))
def test_every_byte_of_a_record_but_the_marker_is_under_its_crc(offset: int):
    data = bytearray(encode_record(9, 77, COMMIT, 1, 0, 5, b"body"))
    data[offset] ^= 1
    assert crc32c(bytes(data[8:]), 77) != struct.unpack_from("<I", data, 4)[0]


def test_a_record_does_not_verify_at_another_place():
    here, there = (encode_record(9, seed, COMMIT, 1, 0, 5, b"body") for seed in (4096, 4136))
    assert here[4:8] != there[4:8]
    assert here[8:] == there[8:]
