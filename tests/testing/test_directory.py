"""An open directory of the simulated disk behaves as one of the system does, whatever becomes of its name."""

import errno

import pytest

from kvwal.errors import LockedError, RefusedError, StoreRemovedError, SystemCallError
from kvwal.testing import SimulatedDisk
from kvwal.testing.directory import SimulatedDirectory


@pytest.fixture
def disk() -> SimulatedDisk:
    disk = SimulatedDisk()
    disk.make_directory("/a")
    opened(disk).sync_parent()
    return disk


def opened(disk: SimulatedDisk, path: str = "/a") -> SimulatedDirectory:
    return disk.open_directory(path)


def test_a_directory_that_was_moved_is_the_same_directory(disk):
    directory = opened(disk)
    file = directory.open("f", create=True)
    disk.move("/a", "/b")
    disk.make_directory("/a")
    file.pwrite(b"x", 0)
    file.sync()
    directory.rename("f", "g")
    directory.sync()
    assert disk.read("/b/g") == b"x"
    assert opened(disk).names() == []
    assert disk.crash().read("/b/g") == b"x"
    directory.sync_parent()


def test_nothing_can_be_made_in_a_directory_that_was_removed_and_nothing_flushed_into_its_files(disk):
    directory = opened(disk)
    file = directory.open("f", create=True)
    disk.remove("/a")
    disk.make_directory("/a")
    with pytest.raises(StoreRemovedError):
        directory.open("g", create=True)
    file.pwrite(b"x", 0)
    with pytest.raises(StoreRemovedError):
        file.datasync()
    assert file.pread(1, 0) == b"x", "as long as it is open"
    assert directory.names() == []
    assert disk.kind("/a") == "directory"


def test_a_file_is_the_same_whatever_its_name_and_another_one_in_its_place_is_not(disk):
    directory = opened(disk)
    file = directory.open("f", create=True)
    assert file.identity() == directory.open("f").identity()
    directory.rename("f", "g")
    assert file.identity() == directory.open("g").identity()
    other = directory.open("f", create=True)
    directory.rename("f", "g")
    assert file.identity() != directory.open("g").identity() == other.identity()


def test_a_file_that_was_replaced_cannot_be_flushed(disk):
    directory = opened(disk)
    file = directory.open("f", create=True)
    directory.open("g", create=True).close()
    file.sync()
    directory.rename("g", "f")
    with pytest.raises(StoreRemovedError):
        file.sync()


def test_the_lock_is_on_the_directory_and_not_on_its_name(disk):
    first = opened(disk)
    first.lock(shared=False)
    disk.move("/a", "/b")
    disk.make_directory("/a")
    opened(disk).lock(shared=False)
    with pytest.raises(LockedError):
        opened(disk, "/b").lock(shared=True)
    first.close()
    opened(disk, "/b").lock(shared=True)


def test_a_handle_ends_with_its_process(disk):
    directory = opened(disk)
    directory.lock(shared=False)
    disk.kill()
    for call in (directory.names, directory.sync, directory.sync_parent, lambda: directory.open("f", create=True)):
        with pytest.raises(OSError, match="killed"):
            call()
    directory.close()
    opened(disk).lock(shared=False)


def test_a_directory_that_is_moved_into_another_is_flushed_there(disk):
    disk.make_directory("/p")
    opened(disk, "/p").sync_parent()
    directory = opened(disk)
    disk.move("/a", "/p/a")
    opened(disk, "/p").open("f", create=True)
    directory.sync_parent()
    assert disk.crash().kind("/p/f") == "file"


@pytest.mark.parametrize("operation", ["create", "open", "rename", "unlink", "list_directory", "open_directory"])
def test_what_is_refused_is_not_done(disk, operation):
    directory = opened(disk)
    directory.open("f", create=True).close()
    disk.fail(operation, error=errno.EMFILE)
    calls = {
        "create": lambda: directory.open("g", create=True),
        "open": lambda: directory.open("f"),
        "rename": lambda: directory.rename("f", "g"),
        "unlink": lambda: directory.unlink("f"),
        "list_directory": directory.names,
        "open_directory": lambda: opened(disk),
    }
    with pytest.raises(RefusedError):
        calls[operation]()
    assert directory.names() == ["f"]


def test_a_failed_flush_is_no_refusal_whatever_its_errno(disk):
    directory = opened(disk)
    file = directory.open("f", create=True)
    for flush in (file.sync, file.datasync, directory.sync, directory.sync_parent):
        disk.fail("fsync", error=errno.ENOSPC)
        with pytest.raises(SystemCallError) as caught:
            flush()
        assert not isinstance(caught.value, RefusedError)


def test_a_rename_that_replaces_nothing_may_be_cut_between_its_two_names(disk):
    directory = opened(disk)
    file = directory.open("f", create=True)
    file.pwrite(b"x", 0)
    file.sync()
    directory.open("taken", create=True).close()
    with pytest.raises(FileExistsError):
        directory.rename("f", "taken", replace=False)
    with pytest.raises(FileNotFoundError):
        directory.rename("none", "g", replace=False)
    directory.sync()
    directory.rename("f", "g", replace=False)
    assert directory.open("g").pread(9, 0) == b"x"
    found = {tuple(sorted(disk.crash(mask).open_directory("/a").names())) for mask in range(4)}
    assert found == {("f", "taken"), ("f", "g", "taken"), ("taken",), ("g", "taken")}
    directory.sync()
    assert disk.crash().open_directory("/a").names() == ["taken", "g"]
