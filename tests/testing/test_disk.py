"""The simulated disk loses what POSIX does not promise, and keeps what it does."""

import errno
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvwal.errors import LockedError
from kvwal.testing import Choice, SimulatedDisk, crash_every
from kvwal.testing.directory import SimulatedDirectory

pytest_plugins = ["kvwal.testing.plugin"]


def make(disk: SimulatedDisk, path: str = "/f", data: bytes = b""):
    parent, name = path.rsplit("/", 1)
    directory = disk.open_directory(parent or "/")
    file = directory.open(name, create=True)
    if data:
        file.pwrite(data, 0)
    file.sync()
    directory.sync()
    return file


def locked(disk: SimulatedDisk, *, shared: bool) -> SimulatedDirectory:
    directory = disk.open_directory("/")
    directory.lock(shared=shared)
    return directory


def outcomes(disk: SimulatedDisk, path: str = "/f") -> set[bytes | None]:
    states = disk.states()
    found = [disk.crash(c.survivors, stale=c.stale) for c in states.choices(1 << 12, random.Random(0))]
    return {d.read(path) if d.kind(path) else None for d in found}


# --- what a power cut leaves ---


def test_synced_bytes_survive_every_cut():
    disk = SimulatedDisk()
    make(disk, data=b"abc")
    assert outcomes(disk) == {b"abc"}


def test_an_unsynced_overwrite_survives_or_not():
    disk = SimulatedDisk()
    make(disk, data=b"abc").pwrite(b"X", 1)
    assert outcomes(disk) == {b"abc", b"aXc"}


def test_a_write_survives_in_any_subset_of_its_sectors():
    disk = SimulatedDisk()
    make(disk, data=b"a" * 1536).pwrite(b"b" * 1536, 0)
    wanted = {b"".join(c * 512 for c in letters) for letters in itertools.product([b"a", b"b"], repeat=3)}
    assert outcomes(disk) == wanted


def test_unaligned_writes_are_torn_at_sector_boundaries():
    disk = SimulatedDisk()
    make(disk, data=b"a" * 1024).pwrite(b"b" * 4, 510)
    middles = {content[508:516] for content in outcomes(disk)}
    assert middles == {b"aaaaaaaa", b"aabbaaaa", b"aaaabbaa", b"aabbbbaa"}


def test_a_later_write_may_survive_without_an_earlier_one():
    disk = SimulatedDisk()
    file = make(disk, data=b"..")
    file.pwrite(b"1", 0)
    file.pwrite(b"2", 1)
    assert outcomes(disk) == {b"..", b"1.", b".2", b"12"}


def test_files_survive_independently_of_each_other():
    disk = SimulatedDisk()
    a, b = make(disk, "/a", b"."), make(disk, "/b", b".")
    a.pwrite(b"A", 0)
    b.pwrite(b"B", 0)
    found = [disk.crash(c.survivors) for c in disk.states().choices(99, random.Random(0))]
    assert {d.read("/a") + d.read("/b") for d in found} == {b"..", b"A.", b".B", b"AB"}


def test_a_new_size_survives_without_data_as_zeros_and_data_without_size_is_gone():
    disk = SimulatedDisk()
    make(disk, data=b"ab").pwrite(b"cd", 2)
    assert outcomes(disk) == {b"ab", b"abcd", b"ab\0\0"}


def test_a_new_size_without_data_may_show_what_the_disk_held_before():
    disk = SimulatedDisk()
    make(disk, "/old", b"stale" * 300)
    disk.open_directory("/").unlink("old")
    disk.open_directory("/").sync()
    make(disk).pwrite(b"n" * 1024, 0)
    assert (b"stale" * 300)[:1024] in outcomes(disk)
    assert bytes(1024) in outcomes(disk)
    # A sector of which any byte was written holds no foreign bytes.
    assert b"n" * 512 + (b"stale" * 300)[512:1024] in outcomes(disk)


def test_preallocated_space_never_shows_old_content():
    disk = SimulatedDisk()
    make(disk, "/old", b"stale" * 300)
    disk.open_directory("/").unlink("old")
    file = make(disk)
    file.allocate(0, 4096)
    file.sync()
    file.pwrite(b"n" * 512, 0)
    assert {content[:512] for content in outcomes(disk)} == {bytes(512), b"n" * 512}


def test_preallocation_is_not_data():
    disk = SimulatedDisk()
    file = make(disk)
    file.allocate(0, 8192)
    assert file.pread(4, 4096) == bytes(4)
    assert disk.used_bytes() == 8192
    assert {len(content) for content in outcomes(disk)} == {0, 8192}


def test_datasync_keeps_the_data_and_the_size_it_needs_but_not_a_preallocation():
    disk = SimulatedDisk()
    file = make(disk)
    file.allocate(0, 4096)
    file.pwrite(b"abc", 0)
    file.datasync()
    assert outcomes(disk) == {b"abc", b"abc" + bytes(4093)}
    file.sync()
    assert outcomes(disk) == {b"abc" + bytes(4093)}


def test_datasync_does_not_make_a_shrink_durable():
    disk = SimulatedDisk()
    file = make(disk, data=b"abcdef")
    file.truncate(2)
    file.pwrite(b"X", 0)
    assert outcomes(disk) == {b"abcdef", b"Xbcdef", b"ab", b"Xb"}
    file.datasync()
    assert outcomes(disk) == {b"Xbcdef", b"Xb"}
    file.sync()
    assert outcomes(disk) == {b"Xb"}


def test_a_created_file_survives_only_once_its_directory_was_synced():
    disk = SimulatedDisk()
    file = disk.open_directory("/").open("f", create=True)
    file.pwrite(b"x", 0)
    file.sync()
    assert outcomes(disk) == {None, b"x"}
    disk.open_directory("/").sync()
    assert outcomes(disk) == {b"x"}


def test_a_name_may_survive_without_the_content_of_its_file():
    disk = SimulatedDisk()
    disk.open_directory("/").open("f", create=True).pwrite(b"x", 0)
    disk.open_directory("/").sync()
    assert outcomes(disk) == {b"", b"\0", b"x"}


def test_a_rename_is_atomic():
    disk = SimulatedDisk()
    make(disk, "/f", b"old")
    make(disk, "/t", b"new")
    disk.open_directory("/").rename("t", "f")
    found = [disk.crash(c.survivors) for c in disk.states().choices(9, random.Random(0))]
    assert {(d.read("/f"), d.kind("/t")) for d in found} == {(b"old", "file"), (b"new", None)}


def test_entries_survive_in_any_subset():
    disk = SimulatedDisk()
    make(disk, "/a", b"a")
    disk.open_directory("/").unlink("a")
    disk.open_directory("/").open("b", create=True)
    found = [disk.crash(c.survivors) for c in disk.states().choices(9, random.Random(0))]
    assert {tuple(sorted(d.open_directory("/").names())) for d in found} == {(), ("a",), ("a", "b"), ("b",)}


def test_a_directory_that_was_not_synced_into_its_parent_takes_all_with_it():
    disk = SimulatedDisk()
    disk.make_directory("/d")
    make(disk, "/d/f", b"x")
    assert outcomes(disk, "/d/f") == {None, b"x"}
    disk.open_directory("/").sync()
    assert outcomes(disk, "/d/f") == {b"x"}


def test_pending_data_of_a_file_whose_removal_is_lost_may_be_there():
    disk = SimulatedDisk()
    make(disk, "/f", b"a").pwrite(b"b", 0)
    disk.open_directory("/").unlink("f")
    assert outcomes(disk) == {None, b"a", b"b"}


def test_a_killed_process_loses_nothing_and_holds_nothing():
    disk = SimulatedDisk()
    file = make(disk, data=b"a")
    lock = locked(disk, shared=False)
    file.pwrite(b"b", 0)
    with pytest.raises(LockedError):
        locked(disk, shared=True)
    disk.kill()
    assert disk.read("/f") == b"b"
    with pytest.raises(OSError, match="killed"):
        file.pwrite(b"c", 0)
    second = locked(disk, shared=False)
    lock.close()
    with pytest.raises(LockedError):
        locked(disk, shared=False)
    second.close()
    assert outcomes(disk) == {b"a", b"b"}


def test_shared_locks_exclude_an_exclusive_one_until_the_last_is_released():
    disk = SimulatedDisk()
    locked(disk, shared=False).close()
    first, second = locked(disk, shared=True), locked(disk, shared=True)
    first.close()
    with pytest.raises(LockedError):
        locked(disk, shared=False)
    second.close()
    locked(disk, shared=False)


def test_a_copy_has_the_page_cache_and_its_own_future():
    disk = SimulatedDisk()
    file = make(disk, data=b"a")
    file.pwrite(b"b", 0)
    other = disk.copy()
    file.pwrite(b"c", 0)
    assert other.read("/f") == b"b"
    assert outcomes(other) == {b"a", b"b"}
    other.open_directory("/").open("f", write=True).pwrite(b"zz", 0)
    assert disk.read("/f") == b"c"


def test_choices_are_all_of_them_when_few_and_a_sample_without_duplicates_when_many():
    disk = SimulatedDisk()
    file = make(disk, data=bytes(512 * 40))
    file.pwrite(b"x" * 512 * 3, 0)
    states = disk.states()
    assert len(set(states.choices(8, random.Random(1)))) == 8
    file.pwrite(b"x" * 512 * 30, 1536)
    sample = list(disk.states().choices(50, random.Random(1)))
    assert len(sample) == len(set(sample)) == 50
    assert sample[:2] == [Choice(0, False), Choice((1 << 33) - 1, False)]
    assert sample == list(disk.states().choices(50, random.Random(1)))
    assert [Choice.parse(str(choice)) for choice in sample] == sample


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others():
    assert SimulatedDisk(seed=3).random_bytes(100) == SimulatedDisk(seed=3).random_bytes(100)
    assert SimulatedDisk(seed=3).random_bytes(100) != SimulatedDisk(seed=4).random_bytes(100)


# --- faults ---


def test_the_nth_operation_fails_once():
    disk = SimulatedDisk()
    file = make(disk, data=b"a")
    fault = disk.fail("pread", 2)
    file.pread(1, 0)
    with pytest.raises(OSError, match="EIO"):
        file.pread(1, 0)
    assert file.pread(1, 0) == b"a"
    assert fault.struck == 1


def test_an_operation_fails_for_good_on_paths_that_match():
    disk = SimulatedDisk()
    a, b = make(disk, "/a.log"), make(disk, "/b")
    disk.fail("write", error=errno.ENOSPC, forever=True, path="*.log")
    for _ in range(2):
        with pytest.raises(OSError, match="ENOSPC") as caught:
            a.pwrite(b"x", 0)
        assert caught.value.errno == errno.ENOSPC
    b.pwrite(b"x", 0)
    disk.heal()
    a.pwrite(b"x", 0)


def test_a_failed_sync_drops_the_data_and_a_second_sync_does_not_bring_it_back():
    disk = SimulatedDisk()
    file = make(disk, data=b"a")
    file.pwrite(b"b", 0)
    disk.fail("fsync")
    with pytest.raises(OSError, match="EIO"):
        file.datasync()
    assert file.pread(1, 0) == b"b"
    file.datasync()
    file.sync()
    assert file.pread(1, 0) == b"b"
    assert outcomes(disk) == {b"a"}
    file.pwrite(b"c", 0)
    file.sync()
    assert outcomes(disk) == {b"c"}


def test_a_size_that_a_failed_sync_dropped_comes_back_with_data_that_needs_it():
    disk = SimulatedDisk()
    file = make(disk)
    file.pwrite(b"ab", 0)
    disk.fail("fsync")
    with pytest.raises(OSError, match="EIO"):
        file.datasync()
    file.pwrite(b"B", 1)
    file.datasync()
    assert outcomes(disk) == {b"\0B"}


def test_a_failed_sync_may_have_done_all_the_same():
    disk = SimulatedDisk()
    file = make(disk, data=b"a")
    file.pwrite(b"b", 0)
    disk.fail("fsync", effect="all")
    with pytest.raises(OSError, match="EIO"):
        file.sync()
    assert outcomes(disk) == {b"b"}


def test_after_a_failed_directory_sync_the_entries_are_still_pending():
    disk = SimulatedDisk()
    disk.open_directory("/").open("f", create=True)
    disk.fail("sync_directory")
    with pytest.raises(OSError, match="EIO"):
        disk.open_directory("/").sync()
    assert outcomes(disk) == {None, b""}
    disk.open_directory("/").sync()
    assert outcomes(disk) == {b""}


def test_a_failed_write_may_leave_a_part():
    disk = SimulatedDisk(seed=1)
    file = make(disk)
    disk.fail("pwrite", effect="part")
    with pytest.raises(OSError, match="EIO"):
        file.pwrite(b"x" * 1000, 0)
    assert 0 < file.size() < 1000


def test_a_full_disk_takes_what_fits_and_gives_space_back():
    disk = SimulatedDisk(capacity=3 * 4096)
    file = make(disk, "/f", b"x" * 4096)
    file.allocate(0, 8192)
    with pytest.raises(OSError, match="ENOSPC"):
        file.allocate(0, 4 * 4096)
    file.pwrite(b"y" * 4096, 4096)
    with pytest.raises(OSError, match="ENOSPC"):
        file.pwrite(b"z" * 8192, 8192)
    assert file.size() == 3 * 4096
    with pytest.raises(OSError, match="ENOSPC"):
        disk.open_directory("/").open("g", create=True)
    disk.open_directory("/").unlink("f")
    assert disk.free_bytes() == 0
    file.close()
    assert disk.free_bytes() == 3 * 4096


def test_a_lost_write_shows_until_the_caches_are_dropped():
    disk = SimulatedDisk()
    file = make(disk, data=b"a")
    disk.lose_write()
    file.pwrite(b"b", 0)
    file.sync()
    assert file.pread(1, 0) == b"b"
    assert outcomes(disk) == {b"a"}
    disk.drop_caches()
    assert file.pread(1, 0) == b"a"


def test_a_misdirected_write_lands_elsewhere():
    disk = SimulatedDisk()
    file = make(disk, data=b"....")
    disk.misdirect_write(by=2)
    file.pwrite(b"b", 0)
    file.sync()
    assert file.pread(4, 0) == b"b..."
    assert outcomes(disk) == {b"..b."}


def test_files_are_damaged_at_rest():
    disk = SimulatedDisk()
    make(disk, data=b"abcd")
    disk.flip("/f", 0, bit=1)
    assert disk.read("/f") == b"cbcd"
    disk.damage("/f", 2, b"xy")
    disk.cut("/f", 3)
    assert outcomes(disk) == {b"cbx"}
    disk.remove("/f")
    assert outcomes(disk) == {None}


def test_the_wall_clock_jumps_and_the_other_does_not():
    disk = SimulatedDisk()
    before, steady = disk.now_us(), disk.monotonic_s()
    disk.jump_clock(-10_000_000)
    assert disk.now_us() < before
    assert disk.monotonic_s() > steady


def test_the_watcher_sees_each_operation_before_it_is_done():
    disk = SimulatedDisk()
    seen = []
    disk.watcher = lambda operation: seen.append((operation.name, disk.kind("/f")))
    make(disk, data=b"x")
    assert seen == [("create", None), ("pwrite", "file"), ("sync", "file"), ("sync_directory", "file")]


def test_errors_have_the_classes_of_the_system(simulated_disk):
    with pytest.raises(FileNotFoundError):
        simulated_disk.open_directory("/").open("f")
    make(simulated_disk)
    with pytest.raises(FileExistsError):
        simulated_disk.open_directory("/").open("f", create=True)
    with pytest.raises(NotADirectoryError):
        simulated_disk.open_directory("/f")
    with pytest.raises(OSError, match="not open"):
        simulated_disk.open_directory("/").open("f").pwrite(b"x", 0)


# --- any program ---

PAGE = 4096
steps = st.one_of(
    st.tuples(st.just("pwrite"), st.integers(0, 3 * PAGE), st.integers(1, 2 * PAGE)),
    st.tuples(st.just("truncate"), st.integers(0, 4 * PAGE)),
    st.tuples(st.just("allocate"), st.integers(0, 4 * PAGE), st.integers(1, PAGE)),
    st.tuples(st.sampled_from(["datasync", "sync"])),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(steps, max_size=12))
def test_everything_surviving_is_what_programs_see_and_nothing_is_never_older_than_the_sync(program):
    disk = SimulatedDisk()
    file = make(disk)
    shown, synced = bytearray(), b""
    for number, (name, *arguments) in enumerate(program):
        if name == "pwrite":
            offset, size = arguments
            data = bytes([number + 1]) * size
            file.pwrite(data, offset)
            shown.extend(bytes(max(0, offset + size - len(shown))))
            shown[offset : offset + size] = data
        elif name == "truncate":
            file.truncate(*arguments)
            del shown[arguments[0] :]
            shown.extend(bytes(arguments[0] - len(shown)))
        elif name == "allocate":
            file.allocate(*arguments)
            shown.extend(bytes(max(0, sum(arguments) - len(shown))))
        else:
            getattr(file, name)()
            if name == "sync":
                synced = bytes(shown)
                assert disk.crash(0).read("/f") == synced
            else:
                # All data is there, up to the part of the size that is zeros or that a shrink took.
                kept = disk.crash(0).read("/f")
                common = min(len(kept), len(shown))
                assert kept[:common] == shown[:common]
                assert not any(shown[common:])
        assert file.size() == len(shown)
        assert file.pread(1 << 20, 0) == disk.read("/f") == bytes(shown)
        assert disk.crash(-1).read("/f") == bytes(shown)
        assert disk.copy().crash(-1).fingerprint() == disk.crash(-1).fingerprint()


# --- crash_every ---


def careful(disk, acknowledged):
    for number in range(3):
        file = disk.open_directory("/").open("new", create=True)
        file.pwrite(b"%d" % number * 600, 0)
        file.sync()
        disk.open_directory("/").rename("new", "f")
        disk.open_directory("/").sync()
        acknowledged.append(number)


def careless(disk, acknowledged):
    for number in range(3):
        file = disk.open_directory("/").open("new", create=True)
        file.pwrite(b"%d" % number * 600, 0)
        disk.open_directory("/").rename("new", "f")
        disk.open_directory("/").sync()
        acknowledged.append(number)


def whole(disk, acknowledged):
    if acknowledged:
        content = disk.read("/f")
        assert len(content) == 600
        assert int(content[:1]) >= acknowledged[-1]
        assert len(set(content)) == 1


def test_a_careful_program_stands_every_cut():
    report = crash_every(careful, whole)
    assert report.points == 16
    assert report.states > 20


def test_a_careless_program_is_found_out_and_the_cut_is_named():
    with pytest.raises(AssertionError) as caught:
        crash_every(careless, whole)
    assert "power cut before operation" in caught.value.__notes__[0]
