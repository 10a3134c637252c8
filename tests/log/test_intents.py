"""What a commit wrote survives the way to bytes and back, and nothing else passes for it."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.batch import WriteBatch
from kvwal.features import EXTENSIONS, KEYSPACES
from kvwal.keys import MAX_KEY_BYTES, KeyRange
from kvwal.log.columns import Columns, decode_intents, decode_put, decode_put_key, decode_uniform, pieces
from kvwal.log.extension import UnknownToUs, decode_extension, encode_extension, extension_of, meta_of
from kvwal.log.intents import EXTENDED, SYSTEM, TABLES, Body, encode_intents, encode_put, features_of, is_of_users

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


@given(st.lists(st.tuples(st.binary(min_size=2, max_size=3), st.binary(min_size=1, max_size=2)), max_size=6), st.data())
def test_what_is_uniform_is_the_same_to_both_decoders(pairs: list[tuple[bytes, bytes]], data: st.DataObject):
    batch = WriteBatch()
    batch.update(pairs)
    body = bytearray(b"head" + joined(batch))
    uniform = len({len(key) for key in batch.writes}) == len({len(value) for value in batch.writes.values()}) == 1
    if data.draw(st.booleans()):
        # With any byte changed it is what the general decoder says, or None.
        body[data.draw(st.integers(4, len(body) - 1))] = data.draw(st.integers(0, 255))
        uniform = False
    found = decode_uniform(bytes(body), 4)
    assert found is not None or not uniform
    if found is not None:
        assert list(decode_intents(bytes(body[4:])).writes.items()) == list(zip(*found, strict=True))


def test_a_uniform_batch_that_writes_a_key_twice_is_left_to_the_general_decoder():
    assert decode_uniform(columns(b"\x01\x01", [b"a", b"a"], [b"x", b"y"])) is None
    assert decode_uniform(columns(b"\x01\x01", [b"a", b"b"], [b"x", b"y"])) == ([b"a", b"b"], [b"x", b"y"])
    for size in range(22):
        assert decode_uniform(columns(b"\x01\x01", [b"a", b"b"], [b"x", b"y"])[:size]) is None


@pytest.mark.parametrize("n", [2, 255, 256, 257, 1000])
def test_a_uniform_batch_is_cut_right_however_large(n: int):
    batch = WriteBatch()
    batch.update({b"%08d" % i: b"%d" % (i % 10) * 50 for i in range(n)})
    assert dict(zip(*decode_uniform(joined(batch)), strict=True)) == batch.writes


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
        (columns(b"\x06", [b"b"], [b"c"]), "unknown operation"),
        (columns(b"\x05", [b"b"], [bytes(9)]), "does not queue it"),
        (columns(b"\x01\x04", [b"b", b"c"], [b"", b""]), "ranges after writes"),
        (struct.pack("<IBHI", 1, 1, 0, (1 << 30) + 1), "longer than the limit"),
    ],
)
def test_a_body_that_breaks_a_condition_is_refused_with_the_reason(body: bytes, reason: str):
    with pytest.raises(ValueError, match=reason):
        decode_intents(body)


# -- tables ------------------------------------------------------------------------------------


@st.composite
def table_batches(draw: st.DrawFn) -> WriteBatch:
    batch = draw(batches())
    for table in draw(st.lists(st.sampled_from([1, 2, 15, 16, 17, (1 << 32) - 1]), max_size=4)):
        part = draw(batches())
        batch.table(table).writes.update(part.writes)
        batch.table(table).ranges += part.ranges
    return batch


def tables_of(batch: WriteBatch) -> dict[int, tuple[list[tuple[bytes, bytes | None]], list[object]]]:
    parts = {0: batch} | (batch.others or {})
    listed = {table: (list(part.writes.items()), list(part.ranges)) for table, part in parts.items()}
    return {table: lists for table, lists in listed.items() if any(lists)}


def bits_of(body: object) -> int:
    return body.bits if isinstance(body, Body) else 0


@given(table_batches(), st.none() | st.just({3: b"trace"}))
def test_a_batch_of_several_tables_comes_back_equal_and_in_order(batch: WriteBatch, extension: dict[int, bytes] | None):
    body = encode_intents(batch, extension)
    bits, data = bits_of(body), b"".join(body)
    again = decode_intents(data, bits)
    assert tables_of(again) == tables_of(batch)
    assert bool(bits & EXTENDED) == bool(extension)
    assert bool(bits & TABLES) == any(table for table in tables_of(batch))
    users = [table for table in tables_of(batch) if table == 0 or 16 <= table < 1 << 31]
    assert bool(bits & SYSTEM) == (bool(tables_of(batch)) and not users)
    if extension:
        assert decode_extension(data)[0] == extension
    if not bits:
        assert data == joined(batch)


@given(table_batches(), st.integers(0, 30), st.integers(0, 255))
def test_a_body_of_tables_with_a_changed_byte_is_decoded_or_refused_and_nothing_else(
    batch: WriteBatch, at: int, byte: int
):
    body = encode_intents(batch)
    data = bytearray(b"".join(body))
    data[at % len(data)] = byte
    try:
        again = decode_intents(bytes(data), bits_of(body))
    except ValueError:
        return
    assert b"".join(encode_intents(again)) == bytes(data)


def test_what_no_table_but_the_default_one_has_is_plain():
    batch = of(k=b"v")
    plain = encode_intents(batch)
    batch.table(16)
    batch.table(1).delete_range(b"b", b"a")
    assert encode_intents(batch) == plain
    assert type(encode_intents(batch)) is list


def test_golden_bytes_of_two_tables_and_an_extension():
    batch = of(k=b"v")
    batch.table(16).delete_range(b"a", None)
    batch.table(1).delete(b"d")
    body = encode_intents(batch, {2: b"\1", 5: b"me"})
    assert bits_of(body) == EXTENDED | TABLES
    assert b"".join(body) == bytes.fromhex(
        "0900 02 0100 01 05 0200 6d65"  # nine bytes of items: a cause of 1, the consumer "me"
        "03000000"  # three intents
        "04 01 02"  # open range, put, delete
        "0100 0100 0100"  # key lengths
        "00000000 01000000 00000000"  # value lengths
        "10000000 00000000 01000000"  # tables
        "61 6b 64"  # a k d
        "76"  # v
    )


def tabled(ops: bytes, keys: list[bytes], tables: list[int]) -> bytes:
    n = len(ops)
    data = struct.pack(f"<I{n}s{n}H{n}I{n}I", n, ops, *map(len, keys), *[0] * n, *tables)
    return data + b"".join(keys)


@pytest.mark.parametrize(
    ("body", "bits", "reason"),
    [
        (tabled(b"\1\1", [b"a", b"b"], [17, 16]), TABLES, "out of order"),
        (tabled(b"\4\4", [b"a", b"b"], [17, 16]), TABLES, "out of order"),
        (tabled(b"\1\1", [b"a", b"b"], [0, 0]), TABLES, "only the default one"),
        (tabled(b"", [], []), TABLES, "only the default one"),
        (tabled(b"\1\1", [b"a", b"a"], [16, 16]), TABLES, "twice"),
        (tabled(b"\1\4", [b"a", b"b"], [16, 16]), TABLES, "ranges after writes"),
        (tabled(b"\1\1", [b"a", b"b"], [0, 1]), TABLES | SYSTEM, "falsely"),
        (tabled(b"\1\1", [b"a", b"b"], [1, 16]), TABLES | SYSTEM, "falsely"),
        (tabled(b"\1\1", [b"a", b"b"], [1, 15]), TABLES, "falsely"),
        (tabled(b"\1\1", [b"a", b"b"], [1, (1 << 31) - 1]), TABLES | SYSTEM, "falsely"),
        (tabled(b"\1\1", [b"a", b"b"], [15, 1 << 31]), TABLES, "falsely"),
        (tabled(b"\1\1", [b"a", b"b"], [16, 1 << 31]), TABLES | SYSTEM, "falsely"),
        (tabled(b"\1", [b"a"], [16])[:-1], TABLES, "do not fill"),
        (tabled(b"\1", [b"a"], [16])[:14], TABLES, "longer than its record"),
    ],
)
def test_tables_that_break_a_condition_are_refused_with_the_reason(body: bytes, bits: int, reason: str):
    with pytest.raises(ValueError, match=reason) as caught:
        decode_intents(body, bits)
    assert not isinstance(caught.value, UnknownToUs)


@pytest.mark.parametrize("op", [0, 6, 7, 8, 255])
@pytest.mark.parametrize("bits", [0, TABLES])
def test_an_operation_that_is_not_known_is_of_a_newer_version(op: int, bits: int):
    body = tabled(bytes([1, op]), [b"a", b"b"], [0, 16]) if bits else columns(bytes([1, op]), [b"a", b"b"], [b"", b""])
    with pytest.raises(UnknownToUs, match="unknown operation"):
        decode_intents(body, bits)


def test_features_say_what_a_reader_must_know():
    assert [features_of(bits) for bits in (0, EXTENDED, TABLES, TABLES | SYSTEM, EXTENDED | TABLES)] == [
        0,
        EXTENSIONS,
        KEYSPACES,
        KEYSPACES,
        EXTENSIONS | KEYSPACES,
    ]


# -- the extension block -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "least", "most"), [(1, 1, 4096), (2, 1, 1), (3, 1, 64), (5, 1, 255)], ids=["pairs", "cause", "trace", "by"]
)
def test_an_extension_item_has_its_limits(item: int, least: int, most: int):
    for size in (least, most):
        assert decode_extension(encode_extension({item: b"x" * size}))[0] == {item: b"x" * size}
    for size in (least - 1, most + 1):
        with pytest.raises(ValueError, match=f"item {item}"):
            encode_extension({item: b"x" * size})
        raw = struct.pack("<HBH", 3 + size, item, size) + b"x" * size
        with pytest.raises(ValueError, match=f"type {item}"):
            decode_extension(raw)


@pytest.mark.parametrize("item", [0, 4, 6, 127, 128, 255])
def test_an_item_of_an_unknown_type_is_not_written(item: int):
    with pytest.raises(ValueError, match=f"item {item}"):
        encode_extension({item: b"x"})


def test_items_of_types_from_128_on_are_skipped_and_lower_ones_refused():
    block = encode_extension({3: b"trace"})
    longer = block[2:] + b"\x80\3\0abc" + b"\xff\0\0"
    assert decode_extension(struct.pack("<H", len(longer)) + longer + b"intents") == ({3: b"trace"}, 2 + len(longer))
    for item in (4, 6, 127):
        refused = block[2:] + struct.pack("<BH", item, 0)
        with pytest.raises(UnknownToUs, match=f"type {item}"):
            decode_extension(struct.pack("<H", len(refused)) + refused)


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("", "cut short"),
        ("00", "cut short"),
        ("0400 03 0100 61", None),
        ("0500 03 0100 61", "fill"),
        ("0300 03 0100 61", "fill"),
        ("0800 03 0100 61 03 0100 61", "out of order"),
        ("0800 03 0100 61 02 0100 61", "out of order"),
        ("0400 80 0100", "fill"),
    ],
)
def test_a_block_that_its_items_do_not_fill_in_order_is_refused(block: str, reason: str | None):
    data = bytes.fromhex(block)
    if reason is None:
        assert decode_extension(data)[0] == {3: b"a"}
        return
    with pytest.raises(ValueError, match=reason):
        decode_extension(data)


@given(batches(), batches())
def test_columns_say_what_the_batch_does_and_cut_out_values_that_are_asked_for(batch: WriteBatch, other: WriteBatch):
    if len(other):
        batch.others = {16: other}
    chunks = encode_intents(batch)
    columns = Columns(b"".join(chunks), getattr(chunks, "bits", 0))
    parts = [(0, batch), *batch.parts()]
    assert columns.ranges == [bounds for _, part in parts for bounds in part.ranges]
    n = len(columns.ranges)
    tables = [table for table, part in parts for _ in part.writes]
    assert list(columns.tables or [0] * len(columns.keys))[n:] == tables
    written = [pair for _, part in parts for pair in part.writes.items()]
    assert columns.keys[n:] == [key for key, _ in written]
    expected = [value or b"" for _, value in written]
    assert columns.values()[n:] == expected
    chosen = range(n, len(columns.keys), 2)
    assert list(columns.values_of(chosen)) == expected[::2]


@given(st.binary(max_size=60))
def test_columns_refuse_what_the_whole_decoder_refuses_but_for_order_and_doubles(body: bytes):
    try:
        Columns(body)
    except ValueError as error:
        with pytest.raises(type(error)):
            decode_intents(body)


def whole_of(body: bytes, bits: int, most: int) -> object:
    """What the pieces say, or why they are refused."""
    try:
        found = [each for each in pieces(body, bits, most) if each is not None]
    except ValueError as error:
        return type(error)
    assert all(0 < len(each.keys) <= most for each in found)
    assert [each.first for each in found] == list(range(0, sum(len(each.keys) for each in found), most))
    parts = [each.tables for each in found]
    tables = None if None in parts else [table for part in parts for table in part or ()]
    return [bounds for each in found for bounds in each.ranges], [key for each in found for key in each.keys], tables


@given(table_batches(), st.integers(1, 5), st.none() | st.tuples(st.integers(0, 200), st.integers(0, 255)))
def test_pieces_are_those_of_the_columns_and_refuse_what_these_refuse(
    batch: WriteBatch, most: int, changed: tuple[int, int] | None
):
    chunks = encode_intents(batch)
    body, bits = bytearray(b"".join(chunks)), bits_of(chunks)
    if changed is not None:
        body[changed[0] % len(body)] = changed[1]
    expected: object
    try:
        columns = Columns(bytes(body), bits)
    except ValueError as error:
        expected = type(error)
    else:
        tables = None if columns.tables is None or not columns.keys else list(columns.tables)
        expected = columns.ranges, columns.keys, tables if columns.keys else []
    assert whole_of(bytes(body), bits, most) == expected


@given(keys, values)
def test_the_key_of_one_put_is_that_of_the_whole(key: bytes, value: bytes):
    body = encode_put(key, value)
    assert decode_put_key(body) == key
    assert decode_put_key(body + b"x") is None
    assert decode_put_key(body[:-1]) is None
    assert decode_put_key(joined(of(a=b"1", b=b"2"))) is None
    assert decode_put_key(joined(of(a=None))) is None


def pairs(*texts: bytes) -> bytes:
    """Extension item 1 with these keys and values in turn."""
    split = list(zip(texts[::2], texts[1::2], strict=True))
    return b"".join(struct.pack("<HH", len(key), len(value)) + key + value for key, value in split)


def test_the_pairs_of_a_user_come_back():
    block = encode_extension({1: pairs(b"", b"empty", b"by", b"ada", "é".encode(), b""), 5: b"mailer"})
    said = {"é": "", "by": "ada", "": "empty"}
    assert meta_of(decode_extension(block + joined(of(k=b"v")))[0]) == said
    assert encode_extension({**(extension_of(said) or {}), 5: b"mailer"}) == block
    assert meta_of({5: b"mailer"}) == {}


@given(st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=20))
def test_any_pairs_come_back(said: dict[str, str]):
    extension = extension_of(said)
    assert (extension is None) == (not said)
    assert meta_of(extension) == said


@pytest.mark.parametrize(
    ("said", "error", "reason"),
    [
        ([("by", "teller")], TypeError, "mapping of str to str, not list"),
        ("", TypeError, "mapping of str to str, not str"),
        ({b"by": "teller"}, TypeError, "not bytes to str"),
        ({"by": 1}, TypeError, "not str to int"),
        ({"by": "\ud800"}, ValueError, "surrogate"),
        ({"\ud800": ""}, ValueError, "surrogate"),
        ({"é": "x" * 4091}, ValueError, "takes 4097 bytes .*the limit is 4096"),
        ({"": "x" * (1 << 17)}, ValueError, "the limit is 4096"),
    ],
)
def test_pairs_that_cannot_be_kept_are_refused(said: object, error: type[Exception], reason: str):
    assert extension_of(None) is None
    assert extension_of({"é": "x" * 4090}) is not None
    with pytest.raises(error, match=reason):
        extension_of(said)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pairs(b"b", b"", b"a", b""), "out of order"),
        (pairs(b"a", b"", b"a", b""), "out of order"),
        (pairs(b"", b"", b"", b""), "out of order"),
        (pairs(b"a", b"1")[:-1], "cut short"),
        (pairs(b"a", b"1") + b"\1\0\0", "cut short"),
        (pairs(b"\xff", b""), "utf-8"),
        (pairs(b"a", b"\xff"), "utf-8"),
    ],
)
def test_pairs_that_are_not_as_they_are_written_are_refused(content: bytes, reason: str):
    with pytest.raises(ValueError, match=reason):
        meta_of({1: content})


def test_which_tables_are_of_users():
    known = [0, 1, 15, 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]
    assert [table for table in known if is_of_users(table)] == [0, 16, (1 << 31) - 1]
