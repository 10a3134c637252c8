"""The meta slots: golden bytes, and the table that chooses between them, row by row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c
from pages_fixtures import STORE_ID, Scratch, columns, overwrite, two_generations

from kvwal.errors import CorruptionError, FormatError
from kvwal.features import EXTENSIONS, KEYSPACES, KNOWN_REQUIRED, VERSION
from kvwal.keys import Seqno
from kvwal.pages import Meta, Row, create_page_file
from kvwal.pages.meta import META_SIZE, choose, decode_meta, encode_meta
from kvwal.pages.node import PAGE_SIZE, POINTER

SIX = Meta(STORE_ID, 6, Seqno(60), 600, 1, 50, 2, POINTER.pack(5, 1, 2, 0, 100), 7, 8, 9)
SEVEN = replace(SIX, generation=7, seqno=Seqno(70))


def sound(meta: Meta) -> str | None:
    return None


def broken(*generations: int) -> Any:
    return lambda meta: "does not match its checksum" if meta.generation in generations else None


def test_meta_has_these_bytes() -> None:
    meta = Meta(
        STORE_ID, 3, Seqno(4), 5, 6, 7, 2, POINTER.pack(10, 11, 12, 1, 13), 20, 21, 22, KEYSPACES, 1 << 40, b"the line",
        23, 24, Seqno(25), POINTER.pack(26, 27, 28, 0, 29), 1, POINTER.pack(30, 31, 32, 0, 33), 34, 35, 36, 37, "0.1.0",
    )  # fmt: skip
    raw = encode_meta(meta)
    assert (len(raw), META_SIZE) == (512, 512)
    assert raw[:176].hex(" ", -8) == (
        "6b76777061676573 0100000200100000 3031323334353637 3839616263646566 0300000000000000 0400000000000000 "
        "0500000000000000 0600000000000000 0700000002000000 0a0000000b000000 0c0001000d000000 0000000014000000 "
        "1500000016000000 0100000000000000 0000000000010000 746865206c696e65 1700000000000000 1800000000000000 "
        "1900000000000000 1a0000001b000000 1c0000001d000000 0000000001000000"
    )
    assert raw[176:212].hex(" ", -8) == "1e0000001f000000 2000000021000000 0000000022000000 2300000024000000 25000000"
    assert raw[212:296] == bytes(84)
    assert raw[296:508] == b"0.1.0".ljust(212, b"\0")
    assert raw[508:].hex() == "c118aa2d"
    assert decode_meta(1, raw.ljust(PAGE_SIZE, b"\0")) == meta


def test_meta_comes_back_from_its_slot() -> None:
    raw = encode_meta(SEVEN)
    assert len(raw) == META_SIZE
    assert decode_meta(1, raw.ljust(PAGE_SIZE, b"\0")) == SEVEN


def test_meta_in_the_wrong_slot_is_not_valid() -> None:
    assert "belongs in the other" in str(decode_meta(0, encode_meta(SEVEN)))


@pytest.mark.parametrize("length", [0, 1, META_SIZE - 1])
def test_meta_cut_short_is_not_valid(length: int) -> None:
    assert isinstance(decode_meta(1, encode_meta(SEVEN)[:length]), str)


def test_every_flipped_bit_of_a_meta_is_noticed() -> None:
    raw = encode_meta(SEVEN)
    for bit in range(8 * META_SIZE):
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        assert isinstance(decode_meta(1, bytes(flipped).ljust(PAGE_SIZE, b"\0")), str)


def test_row_both_valid() -> None:
    choice = choose([SIX, SEVEN], sound)
    assert (choice.row, choice.meta, choice.older, choice.detail) == (Row.BOTH_VALID, SEVEN, SIX, "")
    assert str(choice) == "both_valid"


def test_row_gap() -> None:
    choice = choose([replace(SIX, generation=4), SEVEN], sound)
    assert (choice.row, choice.meta, choice.older) == (Row.GAP, SEVEN, None)
    assert "generation 6 is missing" in choice.detail


def test_row_gap_offers_no_way_back() -> None:
    with pytest.raises(CorruptionError, match="root of generation 7"):
        choose([replace(SIX, generation=4), SEVEN], broken(7))


@pytest.mark.parametrize("torn", [0, 1])
def test_row_one_torn(torn: int) -> None:
    slots: list[Meta | str] = [SIX, SEVEN]
    slots[torn] = "torn"
    choice = choose(slots, sound)
    assert (choice.row, choice.meta, choice.older) == (Row.ONE_TORN, slots[1 - torn], None)
    assert f"slot {torn}: torn" in choice.detail


def test_row_newer_root_bad() -> None:
    choice = choose([SIX, SEVEN], broken(7))
    assert (choice.row, choice.meta, choice.older) == (Row.NEWER_ROOT_BAD, SIX, None)
    assert "root of 7" in choice.detail


def test_row_both_bad() -> None:
    with pytest.raises(CorruptionError, match=r"slot 0: one; slot 1: two") as caught:
        choose(["one", "two"], sound)
    assert (caught.value.file, caught.value.offset) == ("data", 0)


@pytest.mark.parametrize("slots", [[SIX, SEVEN], ["torn", SEVEN], [SIX, "torn"]])
def test_row_roots_bad(slots: list[Meta | str]) -> None:
    with pytest.raises(CorruptionError) as caught:
        choose(slots, broken(6, 7))
    assert caught.value.offset == 5 * PAGE_SIZE


def test_row_foreign() -> None:
    with pytest.raises(CorruptionError, match="different stores"):
        choose([replace(SIX, store_id=b"x" * 16), SEVEN], sound)


def test_row_newer_format() -> None:
    raw = bytearray(encode_meta(SEVEN))
    raw[8] = 2
    raw[-4:] = crc32c(bytes(raw[:-4])).to_bytes(4, "little")
    with pytest.raises(FormatError, match="version 2"):
        decode_meta(1, bytes(raw))


def test_row_newer_format_may_have_a_longer_meta() -> None:
    raw = bytearray(encode_meta(SEVEN)[:-4] + bytes(60))
    raw[8:12] = b"\x02\x00" + (META_SIZE + 60).to_bytes(2, "little")
    raw += crc32c(bytes(raw)).to_bytes(4, "little")
    with pytest.raises(FormatError):
        decode_meta(1, bytes(raw).ljust(PAGE_SIZE, b"\0"))


def test_other_page_size_is_another_format() -> None:
    raw = bytearray(encode_meta(SEVEN))
    raw[12:16] = (8192).to_bytes(4, "little")
    raw[-4:] = crc32c(bytes(raw[:-4])).to_bytes(4, "little")
    with pytest.raises(FormatError, match="8192"):
        decode_meta(1, bytes(raw))


def with_bytes(meta: Meta, at: int, data: bytes) -> bytes:
    """The slot of a version that knows more: these bytes in it, under a checksum that matches."""
    raw = bytearray(encode_meta(meta)[:-4])
    raw[at : at + len(data)] = data
    return (bytes(raw) + crc32c(bytes(raw)).to_bytes(4, "little")).ljust(PAGE_SIZE, b"\0")


@pytest.mark.parametrize("bit", [3, 4, 5, 63])
def test_required_feature_that_is_not_known_is_a_newer_format(bit: int) -> None:
    with pytest.raises(FormatError, match=rf"does not know \({bit}\)"):
        decode_meta(1, encode_meta(replace(SEVEN, required=KEYSPACES | 1 << bit)).ljust(PAGE_SIZE, b"\0"))


def test_required_features_that_are_known_are_read() -> None:
    meta = replace(SEVEN, required=KNOWN_REQUIRED)
    assert decode_meta(1, encode_meta(meta).ljust(PAGE_SIZE, b"\0")) == meta


@pytest.mark.parametrize("at", [212, 295, 312, 507])
def test_field_of_a_later_version_is_refused_without_an_optional_feature_and_kept_with_one(at: int) -> None:
    with pytest.raises(FormatError, match="fields"):
        decode_meta(1, with_bytes(SEVEN, at, b"\x07"))
    raw = with_bytes(replace(SEVEN, optional=1 << 63), at, b"\x07")
    meta = decode_meta(1, raw)
    assert isinstance(meta, Meta)
    assert encode_meta(meta).ljust(PAGE_SIZE, b"\0") == raw


def test_slot_that_asks_for_less_log_than_it_holds_is_not_valid() -> None:
    assert "asks for less" in str(decode_meta(1, with_bytes(SEVEN, 144, (69).to_bytes(8, "little"))))
    assert isinstance(decode_meta(1, with_bytes(SEVEN, 144, (71).to_bytes(8, "little"))), Meta)


def test_read_error_of_a_root_is_not_taken_for_a_bad_root() -> None:
    def fails(meta: Meta) -> str | None:
        raise OSError(5, "input/output error")

    with pytest.raises(OSError, match="input/output"):
        choose([SIX, SEVEN], fails)


# What a checkpoint makes of the fields beside the trees.


def test_meta_says_what_the_engine_wants_and_keeps_what_it_does_not_mention(tmp_path: Any) -> None:
    scratch = Scratch(str(tmp_path))
    scratch.pages.close()
    Path(scratch.path).unlink()
    create_page_file(scratch.directory, STORE_ID, time_us=5, line=b"the line")
    scratch.pages = scratch.open()
    first = scratch.pages.meta
    assert (first.line, first.session, first.wall_us, first.writer) == (b"the line", 0, 5, VERSION)
    meta = scratch.pages.checkpoint([], seqno=Seqno(1), time_us=6, wall_us=7, session=8, required=EXTENSIONS)
    assert (meta.line, meta.session, meta.wall_us, meta.required) == (b"the line", 8, 7, EXTENSIONS)
    meta = scratch.pages.checkpoint([], seqno=Seqno(2), time_us=9)
    assert (meta.line, meta.session, meta.wall_us, meta.required) == (b"the line", 8, 7, EXTENSIONS)
    scratch.reopen()
    assert scratch.pages.meta == meta


def test_what_an_unknown_optional_feature_brought_is_in_the_next_meta_as_it_was(tmp_path: Any) -> None:
    scratch = two_generations(tmp_path)
    meta = scratch.pages.meta
    scratch.pages.close()
    raw = with_bytes(replace(meta, optional=1 << 20), 400, b"of a later version")
    overwrite(scratch, meta.generation % 2 * PAGE_SIZE, raw)
    scratch.pages = scratch.open()
    for _ in range(3):
        scratch.checkpoint({b"a": b"b"})
        scratch.reopen()
        assert scratch.pages.meta.generation > meta.generation
        assert scratch.pages.meta.optional == 1 << 20
        assert encode_meta(scratch.pages.meta)[400:418] == b"of a later version"


def test_replay_through_holds_until_a_checkpoint_has_that_commit(tmp_path: Any) -> None:
    scratch = Scratch(str(tmp_path))
    checkpoint = scratch.pages.checkpoint
    assert checkpoint(columns([(b"a", b"1")]), seqno=Seqno(10), time_us=1).replay_through == 10
    meta = checkpoint(columns([(b"a", b"2")]), seqno=Seqno(10), time_us=1, replay_through=Seqno(20))
    assert meta.replay_through == 20
    assert checkpoint(columns([(b"b", b"2")]), seqno=Seqno(10), time_us=1).replay_through == 20
    scratch.reopen()
    meta = scratch.pages.meta
    assert (meta.seqno, meta.replay_through, scratch.pages.tree().get(b"a")) == (10, 20, b"2")
    assert scratch.pages.checkpoint([], seqno=Seqno(15), time_us=1, replay_through=Seqno(12)).replay_through == 20
    assert scratch.pages.checkpoint([], seqno=Seqno(21), time_us=1).replay_through == 21
