"""What a pin is on disk, and how the writer finds the pins of other processes."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

import kvwal
from kvwal.files import Files, inside, system_files
from kvwal.readers.listing import PinListing
from kvwal.readers.pin import PinMaker, pin_of_this_process
from kvwal.readers.record import NO_LOG, PIN_BYTES, PinRecord, decode_pin, encode_pin
from kvwal.readers.status import ask
from kvwal.testing import SimulatedDisk

RECORD = PinRecord(b"s" * 16, b"l" * 8, 7, 99, 4711, 1_700_000_000_000_000, "wörker 1")
ROOT = Path(__file__).parent.parent.parent


# The record.


def test_a_pin_comes_back_as_it_was_written() -> None:
    raw = encode_pin(RECORD)
    assert len(raw) == PIN_BYTES == 140
    assert decode_pin(raw) == RECORD
    assert raw[:12].hex() == "6b7677616c70696e01008c00"
    longest = RECORD._replace(name="x" * 64, after=NO_LOG)
    assert decode_pin(encode_pin(longest)) == longest


def test_no_damaged_pin_is_taken_for_one() -> None:
    raw = encode_pin(RECORD)
    for at in range(len(raw)):
        for bit in range(8):
            assert decode_pin(raw[:at] + bytes([raw[at] ^ 1 << bit]) + raw[at + 1 :]) is None
    for size in (0, 1, PIN_BYTES - 1):
        assert decode_pin(raw[:size]) is None
    assert decode_pin(raw + b"\0") is None


def test_a_pin_of_no_date_is_none() -> None:
    last = RECORD._replace(made_us=253_402_300_799_999_999)
    assert decode_pin(encode_pin(last)) == last
    for made_us in (last.made_us + 1, (1 << 64) - 1):
        assert decode_pin(encode_pin(RECORD._replace(made_us=made_us))) is None


# The listing. The processes of a simulated disk, and one of the system.


class Machine:
    """A disk with two processes: pins are made by one, and looked for by the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk = SimulatedDisk()
        self.disk.make_directory("/store")
        self.other = self.disk.beside()
        self.there = self.other.open_directory("/store")
        self.here = self.disk.open_directory("/store")
        self.listing = PinListing(self.here)
        # They are one process to Python.
        monkeypatch.setattr("kvwal.readers.listing.pin_of_this_process", lambda name: None)

    def pin(self, generation: int = 1) -> Any:
        return PinMaker(self.other, self.there, "test").pin(b"s" * 16, b"l" * 8, generation, 5)

    def names(self) -> list[str]:
        return sorted(inside(self.here, "readers").names())


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_pin_is_found_until_it_is_released(machine: Machine) -> None:
    assert machine.listing.look() == {}
    pins = [machine.pin(n) for n in (1, 2)]
    found = machine.listing.look()
    assert [each.record for each in sorted(found.values(), key=str)] == [pin.record for pin in pins]
    assert {each.pid for each in found.values()} == {machine.other.process.pid}
    pins[0].release()
    pins[0].release()
    assert not pins[0].is_held()
    assert pins[1].is_held()
    assert [each.record for each in machine.listing.look().values()] == [pins[1].record]
    pins[1].release()
    assert machine.names() == []


def test_a_pin_that_another_thread_releases_while_it_is_asked_for_is_not_held(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pin = machine.pin()
    file = type(pin._file)
    has_name = file.has_name

    def late(self: Any) -> bool:
        pin.release()
        return has_name(self)

    monkeypatch.setattr(file, "has_name", late)
    assert not pin.is_held()


def test_a_pin_of_a_process_that_was_killed_is_removed(machine: Machine) -> None:
    machine.pin()
    machine.other.kill()
    assert machine.listing.look() == {}
    assert machine.names() == []


def test_a_broken_pin_says_so_and_no_other_does(machine: Machine) -> None:
    one, other = machine.pin(), machine.pin()
    name = min(machine.listing.look())
    machine.listing.break_pins([name, "gone.pin"])
    assert [one.is_held(), other.is_held()].count(False) == 1
    assert len(machine.listing.look()) == 1


def test_what_is_no_pin_is_left_alone_and_one_that_does_not_verify_is_held(machine: Machine) -> None:
    machine.pin()
    readers = inside(machine.there, "readers")
    for name in ("foreign", "other.tmp", "now", "x.pin.bak"):
        readers.open(name, create=True).pwrite(b"text", 0)
    odd = readers.open("odd.pin", create=True)
    odd.lock_record()
    inside(readers, "inner.pin", make=True)
    found = machine.listing.look()
    assert found["odd.pin"].record is None
    assert len(found) == 2
    odd.pwrite(encode_pin(RECORD), 0)
    assert machine.listing.look()["odd.pin"].record == RECORD
    machine.other.kill()
    assert machine.listing.look() == {}
    assert machine.names() == ["foreign", "inner.pin", "now", "other.tmp", "x.pin.bak"]


def test_a_pin_that_was_begun_by_a_process_that_died_goes_with_the_second_look(machine: Machine) -> None:
    readers = inside(machine.there, "readers", make=True)
    begun = readers.open("1.pin.tmp", create=True)
    machine.listing.look()
    # It may still become one.
    assert machine.names() == ["1.pin.tmp"]
    begun.lock_record()
    machine.listing.look()
    machine.listing.look()
    assert machine.names() == ["1.pin.tmp"]
    machine.other.kill()
    machine.listing.look()
    machine.listing.look()
    assert machine.names() == []


@pytest.mark.parametrize(
    "error", [errno.EIO, errno.ENOSPC, errno.EMFILE, errno.EACCES, errno.EPERM, errno.EROFS], ids=errno.errorcode.get
)
@pytest.mark.parametrize("op", ["make_directory", "open_directory", "create", "lock", "pwrite", "rename"])
def test_a_follower_that_can_make_no_pin_says_so_once_and_leaves_nothing(
    machine: Machine, op: str, error: int, caplog: pytest.LogCaptureFixture
) -> None:
    maker = PinMaker(machine.other, machine.there, "test")
    fault = machine.other.fail(op, error=error, forever=True, path="*readers*")
    with caplog.at_level(logging.WARNING, "kvwal"):
        for _ in range(2):
            assert maker.pin(b"s" * 16, b"l" * 8, 1) is None
    assert fault.struck
    assert len(caplog.records) == 1
    (text,) = (record.getMessage() for record in caplog.records)
    assert text.startswith("no pin can be made in /store/readers (")
    may_not = error in (errno.EACCES, errno.EPERM, errno.EROFS)
    assert text.endswith("SnapshotTooOld" + "; let this program write to that directory" * may_not)
    machine.other.heal()
    machine.disk.heal()
    if machine.here.kind("readers"):
        assert machine.names() == []
    assert machine.listing.look() == {}


def test_a_name_of_64_bytes_is_the_longest(machine: Machine) -> None:
    PinMaker(machine.other, machine.there, "é" * 32)
    with pytest.raises(ValueError, match="64 bytes"):
        PinMaker(machine.other, machine.there, "é" * 33)


# The system's own locks.


@pytest.fixture
def store(tmp_path: Path) -> str:
    path = str(tmp_path / "store")
    kvwal.open(path).close()
    return path


HOLD = """
    import sys, os
    from kvwal.files import system_files
    from kvwal.readers.pin import PinMaker
    files = system_files()
    pin = PinMaker(files, files.open_directory(sys.argv[1]), None).pin(b"s" * 16, b"l" * 8, 3, 9)
    child = os.fork() if "fork" in sys.argv else 1
    if not child:
        sys.stdin.readline()
        os._exit(0)
    print(os.getpid(), pin.record.name, flush=True)
    sys.stdin.readline()
    print(pin.is_held(), flush=True)
    sys.stdin.readline()
"""


def hold(path: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLD), path, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def ended(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.wait()
    for pipe in (child.stdin, child.stdout):
        assert pipe is not None
        pipe.close()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline()


@pytest.mark.skipif(sys.platform == "win32", reason="that system has no record locks")
def test_another_process_is_named_and_told_and_killed(store: str) -> None:
    listing = PinListing(system_files().open_directory(store))
    child = hold(store)
    try:
        assert said(child) == f"{child.pid} -c\n"
        ((name, found),) = listing.look().items()
        assert found.pid == child.pid
        assert found.record is not None
        assert (found.record.generation, found.record.after, found.record.pid) == (3, 9, child.pid)
        listing.break_pins([name])
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
        assert said(child) == "False\n"
    finally:
        ended(child)
    child = hold(store)
    assert said(child)
    ended(child)
    assert listing.look() == {}
    assert os.listdir(f"{store}/readers") == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork_keeps_no_pin_of_a_parent_that_was_killed(store: str) -> None:
    """T10: a lock of the open file would be held by the child."""
    listing = PinListing(system_files().open_directory(store))
    child = hold(store, "fork")
    assert said(child)
    assert len(listing.look()) == 1
    child.kill()
    child.wait()
    try:
        # The forked one lives, and has the descriptor.
        assert listing.look() == {}
    finally:
        ended(child)


@pytest.mark.skipif(sys.platform == "win32", reason="that system has no pins")
@pytest.mark.parametrize("looks", [True, False])
def test_a_hard_link_to_a_pin_ends_it(store: str, looks: bool) -> None:
    """`cp -al` of the store: when the writer breaks the pin, its file keeps the other name."""
    files = system_files()
    pin = PinMaker(files, files.open_directory(store), "mine").pin(b"s" * 16, b"l" * 8, 3)
    assert pin is not None
    (name,) = os.listdir(f"{store}/readers")
    assert not looks or pin.is_held()
    # A tick of the clock of the file system.
    time.sleep(0.02)
    os.link(f"{store}/readers/{name}", f"{store}/copy")
    assert not looks or not pin.is_held()
    assert not files.open_directory(store).open("copy").has_name()
    os.unlink(f"{store}/readers/{name}")
    assert not pin.is_held()
    pin.release()


def test_a_writer_of_the_same_process_leaves_the_lock_in_place(store: str) -> None:
    files = system_files()
    directory = files.open_directory(store)
    pin = PinMaker(files, directory, "mine").pin(b"s" * 16, b"l" * 8, 3)
    assert pin is not None
    ((name, found),) = PinListing(directory).look().items()
    assert (found.record, found.pid) == (pin.record, os.getpid())
    # Another process sees it locked still.
    look = "import sys; from kvwal.files import system_files; from kvwal.readers.listing import PinListing; "
    look += "print([p.pid for p in PinListing(system_files().open_directory(sys.argv[1])).look().values()])"
    done = subprocess.run([sys.executable, "-c", look, store], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == f"[{os.getpid()}]\n"
    pin.release()
    assert pin_of_this_process(name) is None
    assert PinListing(directory).look() == {}


@pytest.mark.skipif(sys.platform == "win32", reason="that system has no umask")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_place_of_pins_is_as_open_as_the_store(tmp_path: Path, umask: int) -> None:
    files, before = system_files(), os.umask(umask)
    try:
        _make_pins(files, tmp_path)
    finally:
        os.umask(before)


def _make_pins(files: Files, tmp_path: Path) -> None:
    for mode in (0o700, 0o750, 0o755, 0o770):
        path = tmp_path / f"{mode:o}"
        path.mkdir()
        path.chmod(mode)
        pin = PinMaker(files, files.open_directory(str(path)), "x").pin(b"s" * 16, b"l" * 8, 3)
        assert pin is not None
        ask(files, files.open_directory(str(path)))
        assert (path / "readers").stat().st_mode & 0o777 == mode
        assert {each.stat().st_mode & 0o777 for each in (path / "readers").iterdir()} == {0o644}
        assert len(list((path / "readers").iterdir())) == 2
        pin.release()


@pytest.mark.skipif(sys.platform == "win32", reason="that system has no umask")
@pytest.mark.parametrize("call", ["fchmod", "fchown"])
def test_a_place_of_pins_that_cannot_be_opened_to_the_group_is_not_made(
    store: str, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "not permitted")

    files = system_files()
    directory = files.open_directory(store)
    os.chmod(store, 0o775)
    real = os.fstat
    if call == "fchown":
        # As if the directory were of another group.
        monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:5], -1, *real(fd)[6:])))
    monkeypatch.setattr(os, call, refuse)
    before = os.umask(0o077)
    try:
        assert PinMaker(files, directory, "x").pin(b"s" * 16, b"l" * 8, 3) is None
    finally:
        os.umask(before)
    assert not os.path.exists(f"{store}/readers")
