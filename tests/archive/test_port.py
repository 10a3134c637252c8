"""A destination has an object whole or not at all, keeps it through a power cut, and leaves alone what is foreign."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import kvwal
from kvwal.backup.port import MAX_NAME_CHARS, Destination, DirectoryDestination, destination_at, is_object_name
from kvwal.cli.app import app
from kvwal.errors import BackupDestinationError, ObjectMissing, SystemCallError
from kvwal.files import system_files
from kvwal.files.directory import SystemDirectory
from kvwal.testing import SimulatedDisk, crash_every

UNIT = "00000000000000aa/unit/0/00000000000000000001-00000000000000000002.r0"


@pytest.fixture(params=["system", "simulated"])
def place(request: Any, tmp_path: Path) -> DirectoryDestination:
    if request.param == "system":
        return DirectoryDestination(tmp_path / "b")
    return DirectoryDestination("/b", files=SimulatedDisk())


def test_an_object_is_made_once_and_read_back(place: DirectoryDestination) -> None:
    assert isinstance(place, Destination)
    assert place.put_new(UNIT, b"0123456789")
    assert not place.put_new(UNIT, b"other")
    assert place.get(UNIT) == b"0123456789"
    assert place.get(UNIT, start=3, size=4) == b"3456"
    assert place.get(UNIT, start=8, size=4) == b"89"
    assert place.get(UNIT, start=8) == b"89"
    assert place.get(UNIT, start=11) == b""
    assert place.put_new("a/b", iter([b"12", memoryview(b"34")]))
    assert place.get("a/b") == b"1234"


def test_an_object_is_written_as_a_bulk_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[bool] = []
    written = SystemDirectory.open

    def noted(self: Any, name: str, **options: Any) -> Any:
        if options.get("create"):
            asked.append(options.get("bulk", False))
        return written(self, name, **options)

    monkeypatch.setattr(SystemDirectory, "open", noted)
    assert DirectoryDestination(tmp_path / "b").put_new("a/b", iter([b"1", b"2"]))
    assert asked == [True]


def test_what_is_not_there_is_an_error_that_names_it(place: DirectoryDestination) -> None:
    assert list(place.list_after("")) == []
    for _ in range(2):
        with pytest.raises(ObjectMissing, match="a/b") as caught:
            place.get("a/b")
        assert (caught.value.name, caught.value.place) == ("a/b", place.path)
        place.delete("a/b")
        place.put_new("a/other", b"")


def test_names_are_listed_in_their_order_from_any_point(place: DirectoryDestination) -> None:
    draw = random.Random(5)
    names = {"/".join(draw.choice(["a", "a-", "a.", "b", "b0"]) for _ in range(draw.randint(1, 3))) for _ in range(60)}
    # Where a directory is, no file of that name can be.
    names = {name for name in names if not any(other.startswith(name + "/") for other in names)}
    for name in names:
        place.put_new(name, name.encode())
    for prefix in ["", "a", "a/", "a-/", "a/b", "b0/a./", "c"]:
        for after in ["", *names]:
            expected = [(name, len(name)) for name in sorted(names) if name.startswith(prefix) and name > after]
            assert list(place.list_after(prefix, after)) == expected


def test_deleting_twice_is_deleting_once(place: DirectoryDestination) -> None:
    place.put_new("a/b", b"1")
    place.swap("a/s", None, b"1")
    place.swap("a/s", b"1", b"2")
    for name in ("a/b", "a/s"):
        place.delete(name)
        place.delete(name)
        with pytest.raises(ObjectMissing):
            place.get(name)
    assert list(place.list_after("")) == []
    assert place.put_new("a/b", b"2")
    assert place.swap("a/s", None, b"3")


def test_a_swap_is_made_only_from_what_is_there(place: DirectoryDestination) -> None:
    assert not place.swap("state/mark", b"0", b"1")
    assert place.swap("state/mark", None, b"1")
    assert not place.swap("state/mark", None, b"2")
    for i in range(1, 20):
        assert place.swap("state/mark", b"%d" % i, b"%d" % (i + 1))
        assert not place.swap("state/mark", b"%d" % i, b"never")
    assert place.get("state/mark") == b"20"
    assert list(place.list_after("state/")) == [("state/mark", 2)]


def test_of_threads_that_swap_the_same_value_one_wins(tmp_path: Path) -> None:
    # Each with a destination of its own, as two processes have.
    places = [DirectoryDestination(tmp_path / "b") for _ in range(4)]
    places[0].swap("n", None, b"0")
    won: list[bytes] = []

    def count(i: int) -> None:
        while len(won) < 120:
            before = places[i].get("n")
            if places[i].swap("n", before, b"%d" % (int(before) + 1)):
                won.append(before)

    threads = [threading.Thread(target=count, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == len(set(won)), "each value was replaced once"
    assert int(places[0].get("n")) > max(map(int, won))


class _Late(DirectoryDestination):
    """Stands still between its look at the versions and the making of one, for others to go ahead."""

    meanwhile: Any = None

    def _publish(self, *arguments: Any) -> bool:
        then, self.meanwhile = self.meanwhile, None
        if then is not None:
            then()
        return super()._publish(*arguments)


@pytest.mark.parametrize("ahead", [1, 3, 9])
def test_a_swap_that_comes_too_late_is_refused_even_where_its_number_is_free_again(tmp_path: Path, ahead: int) -> None:
    late, quick = _Late(tmp_path), DirectoryDestination(tmp_path)
    late.swap("s", None, b"0")

    def go() -> None:
        for i in range(ahead):
            assert quick.swap("s", b"%d" % i, b"%d" % (i + 1))

    late.meanwhile = go
    assert not late.swap("s", b"0", b"late")
    assert quick.get("s") == b"%d" % ahead


@pytest.mark.parametrize(
    "name",
    ["", "/a", "a/", "a//b", "..", "a/../b", "A", "a b", "a~1", ".a", "-", "é", "a\0", "a\n", "x.tmp", "a" * 201],
)
def test_a_name_that_is_none_is_refused_and_changes_nothing(tmp_path: Path, name: str) -> None:
    place = DirectoryDestination(tmp_path / "b")
    assert not is_object_name(name)
    for call in (
        lambda: place.put_new(name, b""),
        lambda: place.get(name),
        lambda: place.delete(name),
        lambda: place.swap(name, None, b""),
    ):
        with pytest.raises(ValueError, match="name"):
            call()
    assert os.listdir(tmp_path) == []


def test_a_relative_path_is_one_of_the_directory_in_which_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "a")
    place, used = DirectoryDestination("d"), DirectoryDestination("e")
    used.put_new("a/b", b"1")
    monkeypatch.chdir(tmp_path / "b")
    for each in (place, used):
        assert each.put_new("a/c", b"2")
        assert each.get("a/c") == b"2"
        assert each.swap("a/s", None, b"3")
        assert ("a/c", 1) in list(each.list_after("a/"))
        each.sweep()
    used.delete("a/b")
    assert sorted(os.listdir(tmp_path / "a")) == ["d", "e"]
    assert os.listdir(tmp_path / "b") == []
    assert repr(place) == "DirectoryDestination('d')"


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    place = DirectoryDestination(tmp_path)
    place.put_new("a/b", b"1")
    (tmp_path / "secret").write_bytes(b"s")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "linked").symlink_to(tmp_path / "a", target_is_directory=True)
    os.mkfifo(tmp_path / "a" / "fifo")
    (tmp_path / "a" / "Readme.TXT").write_bytes(b"")
    (tmp_path / "a" / "b.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "s~1").write_bytes(b"")
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert [name for name, _ in place.list_after("")] == ["a/b", "secret"]
    for name in ("a/link", "a/fifo"):
        with pytest.raises(OSError, match=name.partition("/")[2]):
            place.get(name)
        with pytest.raises(BackupDestinationError, match=f"{name} in .* is not a regular file"):
            place.put_new(name, b"x")
        with pytest.raises(BackupDestinationError):
            place.swap(name, None, b"x")
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "secret").read_bytes() == b"s"


def test_a_directory_that_took_the_place_is_not_written_to(tmp_path: Path) -> None:
    place = DirectoryDestination(tmp_path / "b")
    place.put_new("a/b", b"1")
    os.rename(tmp_path / "b", tmp_path / "moved")
    with pytest.raises(BackupDestinationError, match="not there any more"):
        place.put_new("a/c", b"1")
    assert not (tmp_path / "b").exists()
    (tmp_path / "b").mkdir()
    for call in (lambda: place.put_new("a/c", b""), lambda: place.get("a/b"), lambda: place.swap("s", None, b"")):
        with pytest.raises(BackupDestinationError, match="unmounted"):
            call()
    assert os.listdir(tmp_path / "b") == []
    os.rmdir(tmp_path / "b")
    os.rename(tmp_path / "moved", tmp_path / "b")
    assert place.put_new("a/c", b"1")


def test_a_directory_that_is_away_is_not_an_empty_one(tmp_path: Path) -> None:
    """What reads or deletes there fails: an archive would take what it cannot see for lost."""
    place = DirectoryDestination(tmp_path / "b")
    assert list(place.list_after("")) == []
    place.put_new("a/b", b"1")
    os.rename(tmp_path / "b", tmp_path / "moved")
    for call in (
        lambda: list(place.list_after("")),
        lambda: list(place.list_after("a/")),
        lambda: place.get("a/b"),
        lambda: place.delete("a/b"),
        place.sweep,
    ):
        with pytest.raises(BackupDestinationError, match="not there any more"):
            call()
    os.rename(tmp_path / "moved", tmp_path / "b")
    assert place.get("a/b") == b"1"


class _Leaving:
    """The files of the system; a directory is moved away as soon as it has been opened."""

    def __init__(self, path: Path, to: Path) -> None:
        self.path, self.to = path, to

    def open_directory(self, path: str) -> Any:
        opened = system_files().open_directory(path)
        if path == str(self.path):
            self.path.rename(self.to)
        return opened

    def __getattr__(self, name: str) -> Any:
        return getattr(system_files(), name)


@pytest.mark.parametrize("what", ["list", "get", "delete"])
def test_a_directory_that_goes_away_in_the_middle_of_a_call_is_not_an_empty_one(tmp_path: Path, what: str) -> None:
    place = DirectoryDestination(tmp_path / "b")
    place.put_new("a/b", b"1")
    leaving: Any = _Leaving(tmp_path / "b", tmp_path / "moved")
    place._files = leaving
    calls: dict[str, Any] = {
        "list": lambda: list(place.list_after("a/")),
        "get": lambda: place.get("a/b"),
        "delete": lambda: place.delete("a/b"),
    }
    with pytest.raises(BackupDestinationError, match="not there any more"):
        calls[what]()


def test_a_destination_below_one_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    place = DirectoryDestination(tmp_path / "mount" / "b")
    with pytest.raises(FileNotFoundError):
        place.put_new("a", b"")
    assert os.listdir(tmp_path) == []


def test_a_forked_child_has_it_too(tmp_path: Path) -> None:
    place = DirectoryDestination(tmp_path)
    place.put_new("a", b"1")
    pid = os.fork()
    if not pid:
        try:
            os._exit(0 if place.put_new("b", b"2") and place.get("a") == b"1" else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert place.get("b") == b"2"


def test_temporaries_of_the_dead_go_and_those_of_the_living_stay() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    place.put_new("a/b", b"1")

    def write(name: str, data: bytes, *, new: bool = True) -> None:
        file = disk.open_directory("/b/a").open(name, write=True, create=new)
        file.pwrite(data, 0)
        file.close()

    write("dead.0123456789abcdef.tmp", b"half")
    write("alive.0123456789abcdef.tmp", b"half")
    write("b.tmp", b"foreign")
    assert place.sweep() == 0
    disk.pass_time(3599)
    write("alive.0123456789abcdef.tmp", b"half and more", new=False)
    assert place.sweep() == 0
    disk.pass_time(2)
    assert place.sweep() == 1
    assert sorted(disk.open_directory("/b/a").names()) == ["alive.0123456789abcdef.tmp", "b", "b.tmp"]


def test_what_a_killed_writer_has_left_goes_at_once_and_what_is_being_written_stays(tmp_path: Path) -> None:
    place, seen = DirectoryDestination(tmp_path), DirectoryDestination(tmp_path)
    counts: list[int] = []

    def data() -> Iterator[bytes]:
        yield b"1"
        # By this process, by another one, and again by this one: closing the file would let go of its lock.
        counts.append(seen.sweep())
        code = "import sys, kvwal.backup.port as port; print(port.DirectoryDestination(sys.argv[1]).sweep())"
        counts.append(int(subprocess.run([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE).stdout))
        yield b"2"

    assert place.put_new("a/b", data())
    assert place.get("a/b") == b"12"
    assert counts == [0, 0]
    code = (
        "import os, signal, sys, kvwal.backup.port as port\n"
        "def data():\n"
        "    yield b'half'\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "port.DirectoryDestination(sys.argv[1]).put_new('a/c', data())\n"
    )
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "a")) == 2
    assert place.sweep() == 1
    assert os.listdir(tmp_path / "a") == ["b"]


def test_what_a_killed_backup_has_left_goes_with_the_next_one_or_an_archive_or_a_pruning(tmp_path: Path) -> None:
    left = tmp_path / "b" / "left.0123456789abcdef.held.tmp"
    with kvwal.open(tmp_path / "s") as db:
        db.put(b"k", b"v")
        db.backup(tmp_path / "b")

        def archived() -> None:
            with kvwal.archive(db, tmp_path / "b", keep=None) as archive:
                assert archive.flush(timeout_s=60)

        def pruned() -> None:
            assert CliRunner().invoke(app, ["archive", "prune", str(tmp_path / "b")]).exit_code == 0

        for call in (lambda: db.backup(tmp_path / "b"), archived, pruned):
            left.write_bytes(b"half")
            call()
            assert not left.exists()


def test_where_nothing_can_be_locked_a_temporary_goes_when_it_is_old() -> None:
    disk = SimulatedDisk()
    place = DirectoryDestination("/b", files=disk)
    place.put_new("a/b", b"1")
    disk.fail("lock", error=errno.ENOLCK, forever=True)

    def data() -> Iterator[bytes]:
        yield b"half"
        (name,) = (each for each in disk.open_directory("/b/a").names() if each.endswith(".tmp"))
        assert name.count(".") == 2
        disk.kill()
        yield b"more"

    with pytest.raises(OSError, match="killed"):
        place.put_new("a/c", data())
    place = DirectoryDestination("/b", files=disk)
    assert place.sweep() == 0
    disk.pass_time(3601)
    assert place.sweep() == 1
    assert place.put_new("a/c", b"whole")
    assert sorted(disk.open_directory("/b/a").names()) == ["b", "c"]


def test_the_directory_of_a_store_takes_no_backups(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv") as db, kvwal.open(tmp_path / "b.kv") as other:
        names = sorted(os.listdir(tmp_path / "b.kv"))
        for each in (db, other):
            with pytest.raises(BackupDestinationError, match=r"b\.kv holds a store; give its backups a directory of"):
                each.backup(tmp_path / "b.kv")
        assert sorted(os.listdir(tmp_path / "b.kv")) == names


@pytest.mark.parametrize("is_file", [False, True])
def test_a_directory_beside_something_else_that_is_named_data_takes_backups(tmp_path: Path, is_file: bool) -> None:
    (tmp_path / "data").touch() if is_file else (tmp_path / "data").mkdir()
    with kvwal.open(tmp_path / "data.kv") as db:
        db[b"a"] = b"1"
        assert db.backup(tmp_path / "backups").made
        (tmp_path / "inner").mkdir()
        assert db.backup(tmp_path / "inner" / "backups").made


def test_no_directory_in_a_store_takes_backups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kvwal.open(tmp_path / "a.kv") as db:
        (tmp_path / "a.kv" / "x" / "y").mkdir(parents=True)
        (tmp_path / "link").symlink_to(tmp_path / "a.kv")
        monkeypatch.chdir(tmp_path / "a.kv" / "x")
        names = sorted(os.listdir(tmp_path / "a.kv"))
        for where in (tmp_path / "a.kv" / "b", tmp_path / "a.kv" / "x" / "y", tmp_path / "link" / "b", "y/b"):
            with pytest.raises(BackupDestinationError, match=r"lies in \S+a\.kv, which holds a store; give"):
                db.backup(where)
            with kvwal.archive(db, where) as archive:
                assert not archive.flush(timeout_s=1)
                assert "which holds a store" in str(archive.status().error)
        assert sorted(os.listdir(tmp_path / "a.kv")) == names
        assert os.listdir(tmp_path / "a.kv" / "x") == ["y"]
        assert os.listdir(tmp_path / "a.kv" / "x" / "y") == []
    disk = SimulatedDisk()
    with kvwal.open("/kv", files=disk) as db, pytest.raises(BackupDestinationError, match="/kv/b lies in /kv, which"):
        db.backup(DirectoryDestination("/kv/b", files=disk))


def test_what_a_user_may_name_as_a_destination(tmp_path: Path) -> None:
    for where in (tmp_path, str(tmp_path), os.fsencode(tmp_path)):
        assert repr(destination_at(where)) == f"DirectoryDestination({str(tmp_path)!r})"
    place = DirectoryDestination(tmp_path)
    assert destination_at(place) is place
    wrong: Any = 5
    with pytest.raises(TypeError):
        destination_at(wrong)
    with pytest.raises(ValueError, match="empty"):
        destination_at("")


# -- power cuts and failing calls ------------------------------------------------------------------


def write_much(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
    place = DirectoryDestination("/b", files=disk)
    for i in range(3):
        name = f"l/unit/{i}/x"
        assert place.put_new(name, [b"%d" % i * 700, b"tail"])
        acknowledged.append((name, b"%d" % i * 700 + b"tail"))
        assert place.swap("state/mark", b"%d" % (i - 1) * 600 if i else None, b"%d" % i * 600)
        acknowledged.append(("state/mark", b"%d" % i * 600))
    place.delete("l/unit/0/x")
    acknowledged.append(("l/unit/0/x", None))


def check_all(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
    place = DirectoryDestination("/b", files=disk)
    listed = dict(place.list_after(""))
    for name in listed:
        found = place.get(name)
        assert len(found) == listed[name]
        whole = found == found[:1] * 600 if name == "state/mark" else found == found[:1] * 700 + b"tail"
        assert whole, f"{name} is torn"
    for name, expected in dict(acknowledged).items():
        if name == "state/mark":
            assert place.get(name)[:1] >= expected[:1]
        elif expected is None:
            assert name not in listed
        elif name != "l/unit/0/x":
            assert place.get(name) == expected
    # Whatever was found, it goes on.
    assert place.put_new("l/unit/0/y", b"2" * 700 + b"tail")
    assert place.swap("state/mark", place.get("state/mark") if "state/mark" in listed else None, b"7" * 600)
    assert place.get("state/mark") == b"7" * 600


def test_a_power_cut_at_any_operation_leaves_whole_objects_and_all_that_were_acknowledged() -> None:
    report = crash_every(write_much, check_all, states_per_point=12)
    assert report.points > 40
    assert report.states > 50


@pytest.mark.parametrize("effect", ["none", "all"])
def test_an_object_whose_answer_is_lost_is_durable_once_the_call_is_asked_again(effect: Any) -> None:
    """Each call fails once; asked again it returns False or True, and either way the object outlives a power cut."""
    counted = SimulatedDisk()
    DirectoryDestination("/b", files=counted).put_new("l/a", b"1" * 700)
    for nth in range(1, counted.operations + 1):
        disk = SimulatedDisk()
        fault = disk.fail("any", nth, error=errno.EIO, effect=effect)
        place = DirectoryDestination("/b", files=disk)
        for _ in range(3):
            try:
                place.put_new("l/a", b"1" * 700)
                break
            except SystemCallError:
                continue
        else:
            pytest.fail("one fault makes one call fail")
        assert fault.struck == 1
        found = DirectoryDestination("/b", files=disk.crash())
        assert found.get("l/a") == b"1" * 700


def test_a_writer_that_is_killed_leaves_no_object_that_the_next_one_takes_for_durable() -> None:
    counted = SimulatedDisk()
    DirectoryDestination("/b", files=counted).put_new("l/a", b"1" * 700)
    for nth in range(1, counted.operations + 1):
        disk = SimulatedDisk()
        disk.fail("any", nth, error=errno.EIO, effect="all", forever=True)
        with pytest.raises(OSError, match="EIO"):
            DirectoryDestination("/b", files=disk).put_new("l/a", b"1" * 700)
        disk.kill()
        disk.heal()
        DirectoryDestination("/b", files=disk).put_new("l/a", b"1" * 700)
        assert DirectoryDestination("/b", files=disk.crash()).get("l/a") == b"1" * 700


def test_a_name_of_the_most_characters_is_one(tmp_path: Path) -> None:
    name = "a" * MAX_NAME_CHARS
    assert is_object_name(name)
    place = DirectoryDestination(tmp_path / "b")
    assert place.put_new(name, b"1")
    assert place.get(name) == b"1"
    assert [each for each, _ in place.list_after("")] == [name]
