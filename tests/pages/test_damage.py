"""Whatever happens to the bytes of the page file: right data or CorruptionError, never wrong data."""

from __future__ import annotations

import errno
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crc32c import crc32c
from pages_fixtures import Scratch, WatchedFiles, columns, contents, entries

from kvwal.errors import CorruptionError, Finding, FormatError
from kvwal.expiring import Expiring
from kvwal.files.failures import failed
from kvwal.keys import Seqno
from kvwal.pages import Keep, PageFile, Row, Salvaged, Tree, check, salvage_pages
from kvwal.pages.freelist import extents_of
from kvwal.pages.meta import META_SIZE, encode_meta
from kvwal.pages.node import OVERFLOW_REF, PAGE_SIZE, POINTER
from kvwal.pages.rebuild import rebuilt


def copied(directory: Path) -> Path:
    """Where a copy of the page file goes: a directory of its own, since its name is fixed."""
    (directory / "copy").mkdir()
    return directory / "copy" / "data"


def outcome(scratch: Scratch, path: Path) -> tuple[int, dict[bytes, bytes]] | str:
    """What an open and a full read of a copy give: the generation and its content, or the error's kind."""
    try:
        pages = PageFile(scratch.files.open_directory(str(path.parent)), cache_bytes=100_000, writable=False)
    except (CorruptionError, FormatError) as error:
        return type(error).__name__
    try:
        tree = pages.tree()
        found = dict(entries(tree))
        for key in found:
            assert tree.get(key) == found[key]
        return pages.meta.generation, found
    except CorruptionError as error:
        return "CorruptionError" if error.file == "data" and error.offset is not None else "without a place"
    finally:
        pages.close()


@pytest.fixture
def small(tmp_path: Path) -> Any:
    """Three levels in few bytes, a large value, and both generations different."""
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"%02d" % index * 300: b"v%d" % index for index in range(30)})
    scratch.checkpoint({b"large": b"large" * 1000})
    scratch.before = scratch.model  # type: ignore[attr-defined]
    scratch.checkpoint({b"07" * 300: b"changed", b"x": b"new"})
    yield scratch
    scratch.pages.close()


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_byte_gives_right_data_or_corruption(small: Any, tmp_path: Path, stride: int) -> None:
    good = Path(small.path).read_bytes()
    newest, before = small.pages.meta.generation, small.before
    copy = copied(tmp_path)
    copy.write_bytes(good)
    seen: dict[str, int] = {"right": 0, "older": 0, "error": 0}
    with copy.open("r+b", buffering=0) as file:
        for offset in range(len(good)):
            # Every byte of a slot and of a node's header; elsewhere a part of them, unless there is time.
            if offset % PAGE_SIZE > (150 if offset < 2 * PAGE_SIZE else 48) and offset % stride:
                continue
            file.seek(offset)
            file.write(bytes([good[offset] ^ (1 << offset % 8)]))
            result = outcome(small, copy)
            if isinstance(result, str):
                assert result != "without a place"
                seen["error"] += 1
            elif result[0] == newest:
                assert result[1] == small.model
                seen["right"] += 1
            else:
                assert result == (newest - 1, before)
                seen["older"] += 1
            file.seek(offset)
            file.write(good[offset : offset + 1])
    assert all(seen.values()), seen


def test_every_truncation_gives_right_data_or_corruption(small: Any, tmp_path: Path) -> None:
    good = Path(small.path).read_bytes()
    newest = small.pages.meta.generation
    copy = copied(tmp_path)
    for size in range(0, len(good), PAGE_SIZE // 2):
        copy.write_bytes(good[:size])
        result = outcome(small, copy)
        if not isinstance(result, str):
            assert result[1] == (small.model if result[0] == newest else small.before)


def test_every_page_replaced_by_an_older_version_of_itself_is_noticed(tmp_path: Path) -> None:
    """A lost write: the disk said it had written the page, and kept the old one, whose checksum is right."""
    scratch = Scratch(str(tmp_path))
    pictures = []
    for step in range(6):
        scratch.checkpoint({b"%03d" % index: b"%d" % step * 30 for index in range(600)})
        pictures.append(Path(scratch.path).read_bytes())
    scratch.pages.close()
    newest, model = pictures[-1], scratch.model
    copy = copied(tmp_path)
    noticed = 0
    for picture in pictures[:-1]:
        for page in range(2, len(newest) // PAGE_SIZE):
            at = page * PAGE_SIZE
            old = picture[at : at + PAGE_SIZE]
            if not old or old == newest[at : at + PAGE_SIZE]:
                continue
            copy.write_bytes(newest[:at] + old + newest[at + PAGE_SIZE :])
            result = outcome(scratch, copy)
            if isinstance(result, str):
                noticed += 1
            else:
                assert result[1] == (model if result[0] == 7 else dict.fromkeys(model, b"4" * 30))
    assert noticed


def test_every_page_replaced_by_another_page_is_noticed(small: Any, tmp_path: Path) -> None:
    """A misplaced write."""
    good = Path(small.path).read_bytes()
    pages = [good[at : at + PAGE_SIZE] for at in range(0, len(good), PAGE_SIZE)]
    newest = small.pages.meta.generation
    copy = copied(tmp_path)
    for target in range(len(pages)):
        for source in range(0, len(pages), 3):
            mixed = [*pages]
            mixed[target] = pages[source]
            copy.write_bytes(b"".join(mixed))
            result = outcome(small, copy)
            if not isinstance(result, str):
                assert result[1] == (small.model if result[0] == newest else small.before)


def test_lost_write_of_the_newest_meta_opens_the_generation_before(small: Any, tmp_path: Path) -> None:
    """The slot still holds the generation two before the newest: the other one is the newest there is."""
    good = bytearray(Path(small.path).read_bytes())
    slot = small.pages.meta.generation % 2 * PAGE_SIZE
    two_back = copied(tmp_path)
    good[slot : slot + PAGE_SIZE] = bytes(PAGE_SIZE)
    two_back.write_bytes(good)
    assert outcome(small, two_back) == (small.pages.meta.generation - 1, small.before)


def damage(scratch: Scratch, offset: int) -> None:
    with open(scratch.path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 0x10]))


def test_check_names_what_is_damaged_and_goes_on(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"%04d" % index: b"v" * 100 for index in range(1000)} | {b"large": bytes(5000)})
    scratch.checkpoint({b"0500": b"changed"})
    children = scratch.pages.pager.node(scratch.pages.meta.root, 0, 1)[1]
    damaged = [POINTER.unpack_from(children, 20 * index)[0] * PAGE_SIZE for index in (0, 3)]
    for offset in damaged:
        damage(scratch, offset + 200)
    problems = list(check(scratch.pages, scratch.pages.meta))
    assert {problem.offset for problem in problems if "checksum" in problem.reason} == set(damaged)
    assert all(problem.file == "data" for problem in problems)


def test_salvage_saves_what_lies_around_the_damage(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    large = {b"x%d" % index: bytes([index]) * 5000 for index in range(5)}
    scratch.checkpoint({b"%04d" % index: b"v" * 100 for index in range(1000)} | large)
    children = scratch.pages.pager.node(scratch.pages.meta.root, 0, 1)[1]
    damage(scratch, POINTER.unpack_from(children, 40)[0] * PAGE_SIZE + 300)
    found, problems = _saved(scratch)
    assert len(problems) == 1
    assert "entries are lost" in problems[0].reason
    lost = set(scratch.model) - set(found)
    assert 0 < len(lost) < 100
    assert all(scratch.model[key] == value for key, value in found.items())


def test_damaged_large_value_hides_its_key_and_no_other(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"a": b"1", b"large": b"L" * 9000, b"z": b"2"})
    damage(scratch, Path(scratch.path).read_bytes().index(b"LLLL") + 10)
    assert scratch.pages.tree().get(b"a") == b"1"
    with pytest.raises(CorruptionError) as caught:
        scratch.pages.tree().get(b"large")
    assert caught.value.offset is not None
    assert entries(scratch.pages.tree(), b"m") == [(b"z", b"2")]
    parts = list(salvage_pages(scratch.pages))
    assert [part.keys for part in parts if isinstance(part, Salvaged)] == [(b"a",), (b"z",)]
    assert any(isinstance(part, Finding) and "b'large' is lost" in part.reason for part in parts)


def with_bad_pages(directory: Path) -> tuple[WatchedFiles, Scratch, set[int]]:
    """A page file of which those pages cannot be read that are in the set."""
    files, bad = WatchedFiles(), set[int]()

    def before(operation: str, offset: int, size: int) -> None:
        if operation == "pread" and not bad.isdisjoint(range(offset // PAGE_SIZE, -(-(offset + size) // PAGE_SIZE))):
            raise OSError(errno.EIO, "bad sector")

    scratch = Scratch(str(directory), cache_bytes=0, files=files)
    for step in range(3):
        scratch.checkpoint(
            {b"%04d" % index: b"%d" % step * 90 for index in range(step * 9, 400)} | {b"large": bytes([step]) * 9000},
            tables={16: ({b"t%04d" % step: bytes(3000)}, ())},
        )
    files.before = before
    return files, scratch, bad


def test_a_page_that_cannot_be_read_is_damage_to_check_and_salvage(tmp_path: Path) -> None:
    _, scratch, bad = with_bad_pages(tmp_path)
    model = scratch.model | scratch.tables[16]
    assert list(check(scratch.pages)) == []
    assert _saved(scratch) == (model, [])
    seen = set()
    for page in range(2, scratch.pages.meta.page_count):
        bad.add(page)
        in_check = list(check(scratch.pages))
        saved, lost = _saved(scratch)
        bad.clear()
        seen.add((bool(in_check), bool(lost)))
        for finding in lost[:1] + [each for each in in_check if "cannot be read" in each.reason][:1]:
            assert finding.file == "data"
            assert finding.offset is not None
            assert finding.offset // PAGE_SIZE <= page
        assert all("cannot be read" in finding.reason and "bad sector" in finding.reason for finding in lost)
        assert saved.items() <= model.items()
        assert (saved == model) == (not lost)
        assert any("cannot be read" in finding.reason for finding in in_check) == bool(in_check)
    # Neither misses a page that is free; check alone reads what only the older generation reaches, and the free list.
    assert seen == {(False, False), (True, False), (True, True)}


def _saved(scratch: Scratch) -> tuple[dict[bytes, bytes], list[Finding]]:
    found: dict[bytes, bytes] = {}
    lost = []
    for part in salvage_pages(scratch.pages):
        if isinstance(part, Finding):
            lost.append(part)
        else:
            found.update(zip(part.keys, part.values, strict=True))
    return found, lost


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.EBADF, errno.ESTALE])
def test_a_read_that_was_refused_is_no_damage_to_check_and_salvage(tmp_path: Path, code: int) -> None:
    files, scratch, _ = with_bad_pages(tmp_path)

    def refuse(operation: str, offset: int, size: int) -> None:
        raise failed(OSError(code, "no"), "data")

    files.before = refuse
    with pytest.raises(OSError, match="no"):
        list(check(scratch.pages))
    with pytest.raises(OSError, match="no"):
        list(salvage_pages(scratch.pages))


def test_no_more_memory_is_taken_for_a_read_than_the_file_has(tmp_path: Path) -> None:
    """An extent on disk may claim to have as many bytes as four bytes, or a count of pages, can say."""
    files, scratch, _ = with_bad_pages(tmp_path)
    size = scratch.pages.space.file_bytes()
    asked = []
    files.before = lambda operation, offset, size: asked.append(offset + size)
    for pager in (scratch.pages.pager, scratch.pages.pager.proving()):
        with pytest.raises(CorruptionError, match="the file ends inside or before page 3"):
            pager.overflow(OVERFLOW_REF.pack(3, 0, 0xFFFFFFFF, 1))
        with pytest.raises(CorruptionError, match="the file ends inside or before page 9999"):
            pager.overflow(OVERFLOW_REF.pack(9999, 0, 0xFFFFFFFF, 1))
        with pytest.raises(CorruptionError, match="the file ends inside or before page 2"):
            pager.read(2, 0xFFFFFFFF * PAGE_SIZE, 0)
    assert asked == [size, 9999 * PAGE_SIZE, size] * 2


def forged(scratch: Scratch, path: Path, change: Callable[[bytearray], None], level: int = 0) -> None:
    """A copy in which a node below the root, or the root, is another one, under checksums that are right."""
    data, meta = bytearray(Path(scratch.path).read_bytes()), scratch.pages.meta
    pointer = POINTER.unpack(meta.root)
    root = _extent(data, pointer)
    if not level:
        begin = int.from_bytes(root[20:24], "little")
        child = POINTER.unpack_from(root, begin)
        raw = _extent(data, child)
        change(raw)
        data[child[0] * PAGE_SIZE : child[0] * PAGE_SIZE + len(raw)] = raw
        root[begin : begin + 20] = POINTER.pack(child[0], crc32c(bytes(raw), child[0]), *child[2:])
    else:
        change(root)
    data[pointer[0] * PAGE_SIZE : pointer[0] * PAGE_SIZE + len(root)] = root
    meta = replace(meta, root=POINTER.pack(pointer[0], crc32c(bytes(root), pointer[0]), *pointer[2:]))
    slot = meta.generation % 2 * PAGE_SIZE
    data[slot : slot + META_SIZE] = encode_meta(meta)
    path.write_bytes(data)


def _extent(data: bytearray, pointer: tuple[int, ...]) -> bytearray:
    return data[pointer[0] * PAGE_SIZE : (pointer[0] + pointer[2]) * PAGE_SIZE]


def all_ways(scratch: Scratch, path: Path) -> dict[str, bool]:
    """Of each way to read a page file, whether it tells of damage. Whatever else is raised passes through."""
    told: dict[str, bool] = {}
    for cache_bytes in (0, 1 << 20):
        pages = PageFile(scratch.files.open_directory(str(path.parent)), cache_bytes=cache_bytes, writable=False)
        tree = pages.tree()

        def get(tree: Tree = tree) -> None:
            failures = []
            for key in [*scratch.model, b"", b"\xff" * 9, b"none"] * 2:
                try:
                    value = tree.get(key)
                    assert value is None or isinstance(value, bytes)
                except CorruptionError as error:
                    failures.append(error)
            for error in failures[:1]:
                raise error

        ways: dict[str, Callable[[], object]] = {
            "get": get,
            "scan": lambda tree=tree: entries(tree),  # type: ignore[misc]  # mypy knows no lambda with a default
            "rank": lambda tree=tree: tree.rank(b"0100"),  # type: ignore[misc]  # as above
        }
        for name, way in ways.items():
            try:
                way()
                told.setdefault(name, False)
            except CorruptionError:
                told[name] = True
        told["check"] = bool(list(check(pages, pages.meta)))
        told["salvage"] = any(isinstance(part, Finding) for part in salvage_pages(pages))
        pages.close()
    return told


@pytest.mark.parametrize("shape", ["uniform", "lengths", "large", "expiring"])
def test_a_node_that_is_odd_under_a_right_checksum_is_corruption(tmp_path: Path, shape: str) -> None:
    scratch = Scratch(str(tmp_path))
    model: Any = {b"%04d" % index: b"v" * (20 if shape == "uniform" else index % 40) for index in range(600)}
    if shape == "large":
        model |= {b"0003": bytes(5000), b"0007": bytes(6000)}
    if shape == "expiring":
        model |= {b"0003": Expiring.of(b"soon", 9), b"0005": Expiring.of(bytes(5000), 9)}
    scratch.pages.checkpoint(columns(sorted(model.items())), seqno=Seqno(1), time_us=1, expiring=shape == "expiring")
    scratch.model = model
    copy = copied(tmp_path)
    forged(scratch, copy, lambda raw: None)
    assert not any(all_ways(scratch, copy).values())
    raw = _extent(bytearray(Path(scratch.path).read_bytes()), POINTER.unpack_from(_children(scratch)))
    end = int.from_bytes(raw[24:28], "little")
    places = [*range(8), *range(16, 40), *range(end, end + 12)]
    for level, offsets in ((0, places), (1, [*range(8), *range(16, 36)])):
        for offset in offsets:
            for byte in (0, 3, 0xFF):

                def change(raw: bytearray, offset: int = offset, byte: int = byte) -> None:
                    raw[offset] = byte

                forged(scratch, copy, change, level)
                try:
                    told = all_ways(scratch, copy)
                except CorruptionError:
                    # It is the root, and the generation before it is not chosen.
                    assert level
                    continue
                if not level and offset in (2, 3) and byte:
                    assert told == dict.fromkeys(told, True), (offset, byte)


def _children(scratch: Scratch) -> bytes:
    children: bytes = scratch.pages.pager.node(scratch.pages.meta.root, 0, 1)[1]
    return children


def with_damaged_free_list(tmp_path: Path) -> Scratch:
    """Pages that are free, pages that only the older generation reaches, large values, a table; and no list of them."""
    # Without a cache, since what is written over must be seen.
    scratch = Scratch(str(tmp_path), cache_bytes=0)
    for step in range(4):
        batch: Any = {b"%04d" % index: b"%d" % step * 50 for index in range(0, 600, 1 + step)}
        batch[b"large%d" % step] = bytes([step]) * 20_000
        scratch.checkpoint(batch, [(b"0500", b"0550")], {16: ({b"%d" % step: bytes(9000)}, [])})
    scratch.pages.close()
    damage(scratch, scratch.pages.meta.free_page * PAGE_SIZE)
    scratch.pages = scratch.open()
    return scratch


def test_damaged_free_list_is_made_anew_by_the_next_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scratch = with_damaged_free_list(tmp_path)
    older = scratch.pages.older
    assert older is not None
    before = contents(scratch.pages.tree(older))
    assert any("checksum" in problem.reason for problem in check(scratch.pages))
    assert scratch.pages.space.reclaimable_bytes(scratch.pages.meta) == 0

    def stop() -> None:
        # Nothing was written where the older generation has a page: it is what a torn flip falls back to.
        assert contents(scratch.pages.tree(older)) == before
        raise KeyError

    updates = [(b"%04d" % index, b"x" * 99) for index in range(600)]
    with pytest.raises(KeyError):
        scratch.pages.checkpoint(columns(updates), seqno=Seqno(9), time_us=9, before_flip=stop)
    pages = scratch.pages.meta.page_count
    scratch.checkpoint({b"a": b"b"})
    assert "made anew" in caplog.text
    assert list(check(scratch.pages, scratch.pages.meta)) == []
    for _ in range(4):
        scratch.checkpoint({b"%04d" % index: b"y" * 50 for index in range(600)})
    scratch.verify()
    # What was not listed is in use again.
    assert scratch.pages.meta.page_count < 2 * pages
    scratch.reopen()
    scratch.verify()


def test_free_list_is_not_made_anew_below_a_damaged_node(tmp_path: Path) -> None:
    scratch = with_damaged_free_list(tmp_path)
    scratch.pages.close()
    damage(scratch, POINTER.unpack(scratch.pages.meta.root)[0] * PAGE_SIZE + 5)
    scratch.pages = scratch.open()
    # The newest root does not verify, so the generation before it was chosen: its list is sound.
    assert scratch.pages.choice.row is Row.NEWER_ROOT_BAD
    damage(scratch, scratch.pages.meta.free_page * PAGE_SIZE)
    meta = scratch.pages.meta
    damage(scratch, POINTER.unpack(meta.catalogue)[0] * PAGE_SIZE + 5)
    for _ in range(2):
        with pytest.raises(CorruptionError, match="checksum"):
            scratch.checkpoint({b"a": b"b"})
    assert scratch.pages.meta == meta


def test_damage_that_only_the_older_generation_reaches_is_found_in_it_alone(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"%04d" % index: b"old" * 30 for index in range(300)})
    older = scratch.pages.meta
    scratch.checkpoint({b"%04d" % index: b"new" * 30 for index in range(300)})
    damage(scratch, Path(scratch.path).read_bytes().index(b"oldold"))
    problems = list(check(scratch.pages))
    assert problems
    assert problems == list(check(scratch.pages, older))
    assert list(check(scratch.pages, scratch.pages.meta)) == []
    scratch.pages.close()


def test_file_that_was_longer_when_its_older_generation_was_made_is_sound(tmp_path: Path) -> None:
    """Only free pages were cut off, so falling back to that generation loses nothing, and goes on."""
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"%04d" % index: b"v" * 100 for index in range(3000)})
    scratch.checkpoint({}, [(b"", b"2990")])
    model = {}
    for _ in range(3):
        model = scratch.model
        scratch.checkpoint({b"x": b"y"})
    newest = scratch.pages.meta.generation
    scratch.pages.close()
    damage(scratch, newest % 2 * PAGE_SIZE + 20)
    scratch.pages = scratch.open()
    assert scratch.pages.choice.row is Row.ONE_TORN
    scratch.model = model
    scratch.verify()
    scratch.checkpoint({b"%04d" % index: b"w" * 100 for index in range(3000)})
    scratch.verify()
    shutil.copy(scratch.path, copied(tmp_path))


@pytest.mark.parametrize("more", [1 << 21, (1 << 63) - 1])
def test_pages_that_are_not_there_are_told_and_take_no_memory(tmp_path: Path, more: int) -> None:
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"k%d" % index: b"v" for index in range(100)})
    scratch.checkpoint({b"x": b"y"}, keep=Keep(1, "kept"))
    there = scratch.pages.meta.page_count
    meta = replace(scratch.pages.meta, page_count=there + more)
    tracemalloc.start()
    problems = list(check(scratch.pages, meta))
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert problems[0].reason == (
        f"generation {meta.generation}: the meta counts {there + more} pages, which are many more than the file has"
    )
    assert taken < 32 << 20
    scratch.pages.close()


@pytest.mark.parametrize("more", [3, 1 << 25, (1 << 32) - 1000])
def test_a_free_list_is_made_anew_in_memory_for_the_pages_that_are_there(tmp_path: Path, more: int) -> None:
    """What the meta counts beyond the end of the file is free at once, and no file is made of it."""
    scratch = with_damaged_free_list(tmp_path)
    scratch.pages.close()
    data = Path(scratch.path)
    there = data.stat().st_size // PAGE_SIZE
    slots = bytearray(data.read_bytes())
    meta = replace(scratch.pages.meta, page_count=there + more)
    slots[meta.generation % 2 * PAGE_SIZE : meta.generation % 2 * PAGE_SIZE + META_SIZE] = encode_meta(meta)
    data.write_bytes(slots)
    scratch.pages = scratch.open()
    assert scratch.pages.meta == meta
    tracemalloc.start()
    free, _ = rebuilt(scratch.pages.pager, meta, (), lambda: None)
    taken = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert taken < 32 << 20
    assert list(extents_of(free.free)) == [(there, more)]
    scratch.checkpoint({b"a": b"b"})
    scratch.checkpoint({b"a": b"c"})
    assert list(check(scratch.pages, scratch.pages.meta)) == []
    scratch.verify()
    assert data.stat().st_size // PAGE_SIZE < 2 * there
    scratch.pages.close()
