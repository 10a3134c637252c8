"""The meta slots: golden bytes, and the table that chooses between them, row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from crc32c import crc32c
from pages_fixtures import STORE_ID, Scratch, WatchedFiles

from kvwal.batch import Seqno
from kvwal.errors import CorruptionError, FormatError
from kvwal.pages import Meta, PageFile, Row, check
from kvwal.pages.meta import META_SIZE, choose, decode_meta, encode_meta
from kvwal.pages.node import PAGE_SIZE, POINTER

SIX = Meta(STORE_ID, 6, Seqno(60), 600, 1, 50, 2, POINTER.pack(5, 1, 2, 0, 100), 7, 8, 9)
SEVEN = replace(SIX, generation=7, seqno=Seqno(70))


def sound(meta: Meta) -> str | None:
    return None


def broken(*generations: int) -> Any:
    return lambda meta: "does not match its checksum" if meta.generation in generations else None


def test_meta_has_these_bytes() -> None:
    meta = Meta(STORE_ID, 3, Seqno(4), 5, 6, 7, 2, POINTER.pack(10, 11, 12, 1, 13), 20, 21, 22)
    assert encode_meta(meta).hex(" ", -8) == (
        "6b76777061676573 0100900000100000 3031323334353637 3839616263646566 0300000000000000 0400000000000000 "
        "0500000000000000 0600000000000000 0700000002000000 0a0000000b000000 0c0001000d000000 0000000014000000 "
        "1500000016000000 0000000000000000 0000000000000000 0000000000000000 0000000000000000 00000000e3bb957f"
    )


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
    raw[8:12] = b"\x02\x00\xcc\x00"
    raw += crc32c(bytes(raw)).to_bytes(4, "little")
    with pytest.raises(FormatError):
        decode_meta(1, bytes(raw).ljust(PAGE_SIZE, b"\0"))


def test_other_page_size_is_another_format() -> None:
    raw = bytearray(encode_meta(SEVEN))
    raw[12:16] = (8192).to_bytes(4, "little")
    raw[-4:] = crc32c(bytes(raw[:-4])).to_bytes(4, "little")
    with pytest.raises(FormatError, match="8192"):
        decode_meta(1, bytes(raw))


def test_read_error_of_a_root_is_not_taken_for_a_bad_root() -> None:
    def fails(meta: Meta) -> str | None:
        raise OSError(5, "input/output error")

    with pytest.raises(OSError, match="input/output"):
        choose([SIX, SEVEN], fails)


# The same rows, on a file.


def two_generations(tmp_path: Any) -> Scratch:
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"%04d" % index: b"old" for index in range(500)})
    scratch.checkpoint({b"%04d" % index: b"new" for index in range(0, 500, 7)})
    return scratch


def overwrite(scratch: Scratch, offset: int, data: bytes) -> None:
    with open(scratch.path, "r+b") as file:
        file.seek(offset)
        file.write(data)


def test_file_with_a_torn_newer_slot_opens_with_the_older_generation_and_goes_on(tmp_path: Any) -> None:
    scratch = two_generations(tmp_path)
    newest = scratch.pages.meta
    scratch.pages.close()
    overwrite(scratch, newest.generation % 2 * PAGE_SIZE + 40, b"\xff\xff")
    scratch.pages = scratch.open()
    assert scratch.pages.choice.row is Row.ONE_TORN
    assert scratch.pages.meta.generation == newest.generation - 1
    assert scratch.pages.older is None
    scratch.model = {b"%04d" % index: b"old" for index in range(500)}
    scratch.verify()
    for step in range(4):
        scratch.checkpoint({b"%04d" % step: b"again"})
        scratch.verify()
    assert scratch.pages.meta.generation == newest.generation + 3


def test_file_with_a_bad_newer_root_opens_with_the_older_generation_and_the_bad_one_never_returns(
    tmp_path: Any,
) -> None:
    """The root may read well again after the pages below it were reused: its slot must not survive."""
    scratch = two_generations(tmp_path)
    newest = scratch.pages.meta
    scratch.pages.close()
    at = POINTER.unpack(newest.root)[0] * PAGE_SIZE + 100
    with open(scratch.path, "rb") as file:
        file.seek(at)
        good = file.read(1)
    overwrite(scratch, at, bytes([good[0] ^ 1]))
    scratch.pages = scratch.open()
    assert scratch.pages.choice.row is Row.NEWER_ROOT_BAD
    overwrite(scratch, at, good)

    def stop() -> None:
        raise KeyError("crash before the flip")

    with pytest.raises(KeyError):
        scratch.pages.checkpoint([(b"x", b"y")], (), seqno=Seqno(9), time_us=9, before_flip=stop)
    scratch.pages.abandon()
    scratch.pages = scratch.open()
    assert scratch.pages.choice.row is Row.ONE_TORN
    assert scratch.pages.meta.generation == newest.generation - 1
    assert list(check(scratch.pages)) == []


def test_first_checkpoint_writes_the_newest_slot_again_before_the_other(tmp_path: Any) -> None:
    """Its writer may have died before the sync; then only the page cache has it, and the other slot is all there is."""
    scratch = two_generations(tmp_path)
    scratch.pages.close()
    files = WatchedFiles()
    calls: list[tuple[str, int]] = []
    pages = PageFile(files, scratch.path, cache_bytes=1 << 20, writable=True)  # type: ignore[arg-type]
    files.before = lambda operation, offset, size: calls.append((operation, offset))
    slot = pages.meta.generation % 2 * PAGE_SIZE
    pages.checkpoint([(b"k", b"v")], (), seqno=Seqno(9), time_us=9)
    writes = [call for call in calls if call[0] in {"pwrite", "sync"}]
    assert writes[:2] == [("pwrite", slot), ("sync", 0)]
    assert writes[-3:] == [("sync", 0), ("pwrite", PAGE_SIZE - slot), ("sync", 0)]
    pages.close()


def test_open_reads_two_slots_and_a_root_and_writes_nothing(tmp_path: Any) -> None:
    scratch = two_generations(tmp_path)
    scratch.pages.close()
    files = WatchedFiles()
    calls: list[str] = []
    files.before = lambda operation, offset, size: calls.append(operation)
    PageFile(files, scratch.path, cache_bytes=1 << 20, writable=True).close()  # type: ignore[arg-type]
    assert calls == ["pread", "pread"]
