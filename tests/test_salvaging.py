"""Salvage: all that verifies is saved, what does not is listed, and nothing is invented."""

from __future__ import annotations

import errno
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from click.testing import CliRunner
from store_fixtures import TINY, problems_of

import kvwal
from kvwal import (
    CorruptionError,
    FormatError,
    LockedError,
    RefusedError,
    StoreExistsError,
    StoreNotFoundError,
    WriteBatch,
    salvage,
    salvaging,
)
from kvwal.__main__ import whole_app
from kvwal.engine.indexes import FIRST_DERIVED_ID
from kvwal.engine.request import CommitRequest
from kvwal.engine.tables import NEXT_IDS_KEY, encode_row, next_ids, row_key
from kvwal.engine.writes import EncodedBatch
from kvwal.files.names import SALVAGING
from kvwal.keys import SYSTEM_TABLE
from kvwal.log.extension import META
from kvwal.testing import Operation, SimulatedDisk, crash_every

OPTIONS = {**TINY, "background": False, "durability": "os"}


def build(path: Path, *, commits: int = 300) -> dict[bytes, bytes]:
    model: dict[bytes, bytes] = {}
    with kvwal.open(path, **OPTIONS) as db:
        for number in range(commits):
            key = b"%04d" % (number % 200)
            db[key] = model[key] = b"%d." % number * 20
            if number % 7 == 0:
                db.delete(b"%04d" % (number % 100))
                model.pop(b"%04d" % (number % 100), None)
    return model


def test_a_sound_store_is_saved_completely(tmp_path: Path) -> None:
    model = build(tmp_path / "a.kv")
    report = salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    assert report.complete
    assert report.saved_keys == len(model)
    with kvwal.open(tmp_path / "b.kv") as db:
        assert dict(db) == model
        assert problems_of(db) == []


def test_what_commits_say_of_themselves_is_saved_with_them(tmp_path: Path) -> None:
    said = {"by": "teller"}
    with kvwal.open(tmp_path / "a.kv", background=False) as db:
        db.put(b"checkpointed", b"1", meta=said)
        db.checkpoint()
        db.put(b"plain", b"1")
        with db.batch(meta=said) as batch:
            batch.put(b"said", b"1")
            batch.table(16).delete_range()
        batch = WriteBatch()
        batch.put(b"damaged", b"1")
        db.engine.commit(CommitRequest(EncodedBatch(batch, {META: b"\xff\xff"}), sync=True))
    report = salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    [finding] = report.damages
    assert "the user's pairs in the commit are cut short" in finding.reason
    with kvwal.open(tmp_path / "b.kv", "r") as db:
        assert [(change.key, change.meta) for change in db.changes() if change.key != b"checkpointed"] == [
            (b"plain", {}),
            (b"", said),
            (b"said", said),
            (b"damaged", {}),
        ]


def test_named_tables_are_saved_with_their_names(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "old") as db:
        db.table("users", str, int).update({"a": 1, "b": 2})
        db.checkpoint()
        db.table("users", str, int)["c"] = 3
    assert kvwal.salvage(tmp_path / "old", tmp_path / "new").damages == ()
    with kvwal.open(tmp_path / "new") as db:
        assert db.table("users", str, int) == {"a": 1, "b": 2, "c": 3}
        db.table("others", str, int)["x"] = 1
        assert len({info.id for info in db.tables()}) == 2


def without_rows(db: kvwal.Store, *keys: bytes) -> None:
    """Take rows out of table 1, as damage does."""
    batch = WriteBatch()
    for key in keys:
        batch.table(SYSTEM_TABLE).delete(key)
    db.engine.commit(CommitRequest(EncodedBatch(batch), sync=True))


def test_a_table_whose_row_is_lost_gets_a_name_and_a_new_one_no_id_of_another(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "old", background=False) as db:
        accounts, passwords = db.table("accounts", str, str), db.table("passwords", str, str)
        accounts.update({"a": "1", "b": "2"})
        passwords["c"] = "3"
        db.table("salvaged-17", str, str)["d"] = "4"
        db.table("gone", str, str)["e"] = "5"
        db.drop_table("gone")
        without_rows(db, row_key("passwords"), NEXT_IDS_KEY)
        assert [problem.reason for problem in db.verify().problems] == [
            "the id of table 'accounts', 16, is to be given to a new one",
            "the id of table 'salvaged-17', 18, is to be given to a new one",
            "table 17 has no row that names it, so no one reaches its 1 keys",
        ]
    report = salvage(tmp_path / "old", tmp_path / "new")
    assert [(each.file, each.reason) for each in report.damages] == [
        ("data", "the name of table 17 is lost, and its codecs; it is saved as 'salvaged-17-'")
    ]
    with kvwal.open(tmp_path / "new") as db:
        assert {info.name: (info.id, info.keys) for info in db.tables()} == {
            "accounts": (16, 2),
            "salvaged-17": (18, 1),
            "salvaged-17-": (17, 1),
        }
        assert report.saved_keys == 4
        assert dict(db.table("salvaged-17-")) == {b"c": b"3"}
        new = db.table("passwords", str, str)
        new["x"] = "new"
        assert (new.id, dict(new)) == (20, {"x": "new"})
        db.drop_table("passwords")
        assert db.table("accounts", str, str) == {"a": "1", "b": "2"}
        assert problems_of(db) == []


@pytest.mark.parametrize("checkpointed", [False, True])
def test_verify_tells_of_keys_that_no_name_leads_to_and_of_a_row_that_says_nothing(
    tmp_path: Path, checkpointed: bool
) -> None:
    path = tmp_path / "old"
    with kvwal.open(path, background=False) as db:
        for name in ("a", "b", "c", "empty"):
            db.table(name, str, str).update({"j": name, "k": name})
        db.table("empty", str, str).clear()
        batch = WriteBatch()
        batch.table(99).put(b"k", b"of an id that was given to no table")
        db.commit(batch)
        assert problems_of(db) == []
        without_rows(db, row_key("a"), row_key("empty"))
        batch = WriteBatch()
        batch.table(SYSTEM_TABLE).put(row_key("b"), b"{}")
        db.engine.commit(CommitRequest(EncodedBatch(batch), sync=True))
        if checkpointed:
            db.checkpoint()
        expected = [
            "the row of table b'b' is not valid",
            "table 16 has no row that names it, so no one reaches its 2 keys",
            "table 17 has no row that names it, so no one reaches its 2 keys",
        ]
        assert [problem.reason for problem in db.verify().problems] == expected
        # What a newer version wrote of a table may name any of them.
        batch.table(SYSTEM_TABLE).put(row_key("b"), b'{"v": 2}')
        db.engine.commit(CommitRequest(EncodedBatch(batch), sync=True))
        assert problems_of(db) == []
    salvage(path, tmp_path / "new")
    with kvwal.open(tmp_path / "new", "r") as db:
        assert {info.name: info.keys for info in db.tables()} == {
            "b": 0,
            "c": 2,
            "salvaged-16": 2,
            "salvaged-17": 2,
            "salvaged-99": 1,
        }


@pytest.mark.parametrize("lost", ["the row of the next ids", "nothing", "all but the pages"])
def test_a_new_table_after_a_salvage_has_an_id_above_all(tmp_path: Path, lost: str) -> None:
    with kvwal.open(tmp_path / "old", background=False) as db:
        for name in ("a", "b", "c"):
            db.table(name, str, str)["k"] = name
        db.table("c", str, str).index("by_value", key=str, codec=str)
        db.table("c", str, str)["k"] = "c"
        if lost != "nothing":
            without_rows(db, NEXT_IDS_KEY)
        db.checkpoint()
    if lost == "all but the pages":
        for segment in (tmp_path / "old").glob("*.log"):
            segment.unlink()
    salvage(tmp_path / "old", tmp_path / "new")
    with kvwal.open(tmp_path / "new") as db:
        new = db.table("new", str, str)
        index = new.index("by_value", key=str, codec=str)
        new["n"] = "1"
        assert new.id == 19
        assert list(index.keys()) == [("1", "n")]
        assert {info.name: info.keys for info in db.tables()} == {"a": 1, "b": 1, "c": 1, "new": 1}
        assert next_ids(db.engine.reads.read(NEXT_IDS_KEY, table=SYSTEM_TABLE)) == (20, FIRST_DERIVED_ID + 4)
        assert problems_of(db) == []


def test_a_table_of_two_names_keeps_one(tmp_path: Path) -> None:
    """The commit that gave it the other one was lost, and a later one wrote its row again."""
    with kvwal.open(tmp_path / "old", background=False) as db:
        db.table("first", str, str)["k"] = "v"
        row = db.engine.tables.row("first")
        assert row is not None
        batch = WriteBatch()
        batch.table(SYSTEM_TABLE).put(row_key("second"), encode_row(replace(row, name="second")))
        db.engine.commit(CommitRequest(EncodedBatch(batch), sync=True))
        [problem] = db.verify().problems
        assert problem.reason == "tables 'first' and 'second' have one id, 16"
    [damage] = salvage(tmp_path / "old", tmp_path / "new").damages
    assert damage.reason == "table 16 has two names, 'first' and 'second'; it keeps the first"
    with kvwal.open(tmp_path / "new") as db:
        db.table("second", str, str)["other"] = "w"
        assert db.table("first", str, str) == {"k": "v"}
        assert problems_of(db) == []


def test_the_damaged_store_is_only_read(tmp_path: Path) -> None:
    build(tmp_path / "a.kv")
    before = {entry.name: entry.read_bytes() for entry in (tmp_path / "a.kv").iterdir()}
    salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    assert {entry.name: entry.read_bytes() for entry in (tmp_path / "a.kv").iterdir()} == before


def test_without_page_file_the_log_is_saved(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as db:
        db.update({b"a": b"1", b"b": b"2"})
        db.delete(b"a")
    (tmp_path / "a.kv" / "data").unlink()
    report = salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    assert not report.complete
    with kvwal.open(tmp_path / "b.kv") as db:
        assert dict(db) == {b"b": b"2"}


def test_without_page_file_and_newest_header_the_rest_of_the_log_is_saved() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/a.kv", files=disk, **OPTIONS) as db:
        db.update({b"%03d" % number: bytes(500) for number in range(50)})
        for number in range(50, 100):
            db[b"%03d" % number] = bytes(500)
        newest = max(name for name in disk.open_directory("/a.kv").names() if name.endswith(".log"))
    disk.remove("/a.kv/data")
    disk.fail("read", forever=True, path=f"/a.kv/{newest}")
    report = salvage("/a.kv", "/b.kv", files=disk)
    assert 50 < report.saved_keys < 100
    assert [damage.file for damage in report.damages if "cannot be read" in damage.reason] == [newest]
    with kvwal.open("/b.kv", files=disk) as db:
        assert list(db) == [b"%03d" % number for number in range(report.saved_keys)]
    # An open does not pass over it, and a refusal says nothing of the header.
    with pytest.raises(OSError, match="the device failed"):
        kvwal.open("/a.kv", files=disk)
    disk.heal()
    disk.fail("read", error=errno.EMFILE, forever=True, path=f"/a.kv/{newest}")
    with pytest.raises(RefusedError):
        salvage("/a.kv", "/c.kv", files=disk)


def test_without_log_the_pages_are_saved(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", durability="os", background=False) as db:
        db.update({b"a": b"1", b"b": b"2"})
        db.checkpoint()
    for segment in (tmp_path / "a.kv").glob("*.log"):
        segment.unlink()
    with pytest.raises(CorruptionError):
        kvwal.open(tmp_path / "a.kv")
    report = salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    assert not report.complete
    with kvwal.open(tmp_path / "b.kv") as db:
        assert dict(db) == {b"a": b"1", b"b": b"2"}


def test_a_key_the_pages_lost_gets_its_last_value_from_the_log_and_a_deleted_one_stays_deleted(tmp_path: Path) -> None:
    """The log goes back beyond the pages: what it says last counts, not what it says first."""
    path = tmp_path / "a.kv"
    filler = {b"filler%05d" % number: b"f" * 100 for number in range(3000)}
    with kvwal.open(path, durability="os", background=False, keep_history_bytes=1 << 30) as db:
        db.update(filler)
        db.update({b"twice": b"old", b"gone": b"x", b"ranged": b"x", b"back": b"old"})
        db[b"twice"] = b"new"
        db.delete(b"gone")
        db.delete_range(b"range", b"rangf")
        db.delete(b"back")
        db[b"back"] = b"new"
        db.checkpoint()
        db[b"twice"] = b"newest"
        db.checkpoint()
    # Damage every page that can be damaged so that the store still opens: all of the newest generation but its root.
    data = bytearray((path / "data").read_bytes())
    damaged = 0
    for page in range(2, len(data) // 4096):
        before = bytes(data)
        data[page * 4096 + 50] ^= 0xFF
        (path / "data").write_bytes(data)
        try:
            with kvwal.open(path, "r") as db:
                newest = db.recovery.checkpoint_seqno == db.last_seqno
        except CorruptionError:
            newest = False
        if newest:
            damaged += 1
        else:
            data[:] = before
    (path / "data").write_bytes(data)
    assert damaged > 20
    with kvwal.open(path, "r") as db, pytest.raises(CorruptionError):
        dict(db)
    report = salvage(path, tmp_path / "b.kv")
    assert not report.complete
    assert report.base_seqno > 0
    with kvwal.open(tmp_path / "b.kv") as db:
        assert dict(db) == filler | {b"twice": b"newest", b"back": b"new"}


def test_a_flipped_byte_anywhere_is_reported_or_harmless(tmp_path: Path, rng: Random) -> None:
    model = build(tmp_path / "a.kv")
    history: set[tuple[bytes, bytes]] = {(b"%04d" % (n % 200), b"%d." % n * 20) for n in range(300)}
    names = [entry.name for entry in (tmp_path / "a.kv").iterdir() if entry.suffix == ".log" or entry.name == "data"]
    for round_number in range(25):
        copy, into = tmp_path / f"{round_number}.kv", tmp_path / f"{round_number}.saved"
        shutil.copytree(tmp_path / "a.kv", copy)
        victim = copy / rng.choice(names)
        data = bytearray(victim.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        victim.write_bytes(data)
        report = salvage(copy, into)
        with kvwal.open(into) as db:
            saved = dict(db)
        assert set(saved.items()) <= history, "a value that was never written"
        if saved != model:
            assert not report.complete
        try:
            with kvwal.open(copy, "r") as db:
                assert dict(db) == model, "wrong data without an error"
        except CorruptionError as error:
            assert error.file in names
            assert not report.complete
        shutil.rmtree(copy)
        shutil.rmtree(into)


@pytest.mark.parametrize("end", ["closed", "killed", "opened again"])
def test_a_log_without_its_newest_segment_is_not_complete(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.kv"
    build(path)
    if end != "closed":
        shutil.copytree(path, tmp_path / "work.kv")
        with kvwal.open(tmp_path / "work.kv", **OPTIONS) as db:
            db[b"more"] = b"1"
            if end == "killed":
                shutil.rmtree(path)
                shutil.copytree(tmp_path / "work.kv", path)
        if end == "opened again":
            path = tmp_path / "work.kv"
    segments = sorted(path.glob("*.log"))
    assert len(segments) > 1
    assert salvage(path, tmp_path / "all.kv").complete
    segments[-1].unlink()
    report = salvage(path, tmp_path / "b.kv")
    assert not report.complete
    assert any(segments[-1].name in str(damage) for damage in report.damages)


def test_a_damaged_commit_takes_no_other_commit_with_it(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path, durability="os", background=False) as db:
        for number in range(20):
            db[b"%02d" % number] = b"value of %02d" % number
    (segment,) = path.glob("*.log")
    whole = segment.read_bytes()
    for number in range(20):
        data = bytearray(whole)
        data[whole.index(b"value of %02d" % number)] ^= 0xFF
        segment.write_bytes(data)
        report = salvage(path, tmp_path / f"{number}.kv")
        assert [damage.file for damage in report.damages] == [segment.name] * len(report.damages)
        assert not report.complete
        assert report.last_seqno == (20 if number < 19 else 19)
        with kvwal.open(tmp_path / f"{number}.kv") as db:
            assert list(db) == [b"%02d" % other for other in range(20) if other != number]


def test_a_key_deleted_after_the_checkpoint_stays_deleted_though_the_pages_are_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    filler = {b"filler%05d" % number: b"f" * 100 for number in range(3000)}
    with kvwal.open(path, durability="os", background=False, keep_history_bytes=1 << 30) as db:
        db.update(filler | {b"one": b"1", b"in range": b"1", b"kept": b"1"})
        db.checkpoint()
        db.delete(b"one")
        db.delete_range(b"in", b"io")
        db[b"more"] = b"1"
    data = bytearray((path / "data").read_bytes())
    for page in range(2, len(data) // 4096):
        data[page * 4096 + 50] ^= 0xFF
    (path / "data").write_bytes(data)
    report = salvage(path, tmp_path / "b.kv")
    assert not report.complete
    with kvwal.open(tmp_path / "b.kv") as db:
        assert dict(db) == filler | {b"kept": b"1", b"more": b"1"}


def test_the_target_must_be_new_and_the_source_must_be_there(tmp_path: Path) -> None:
    build(tmp_path / "a.kv", commits=3)
    with pytest.raises(StoreNotFoundError):
        salvage(tmp_path / "missing", tmp_path / "b.kv")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_bytes(b"")
    with pytest.raises(StoreExistsError):
        salvage(tmp_path / "a.kv", tmp_path / "full")
    with pytest.raises(StoreExistsError):
        salvage(tmp_path / "a.kv", tmp_path / "a.kv")
    (tmp_path / "empty").mkdir()
    assert salvage(tmp_path / "a.kv", tmp_path / "empty").complete


def test_a_link_to_an_empty_directory_is_followed_and_another_one_is_refused(tmp_path: Path) -> None:
    """The new store is made where it is to stay, and no directory is renamed."""
    build(tmp_path / "a.kv", commits=3)
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    assert salvage(tmp_path / "a.kv", tmp_path / "link").complete
    (tmp_path / "dangling").symlink_to("nowhere")
    for taken in ("link", "dangling"):
        with pytest.raises(kvwal.Error):
            salvage(tmp_path / "a.kv", tmp_path / taken)


def test_a_salvage_that_is_interrupted_leaves_no_part_of_a_store(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        db.update({b"%05d" % number: b"" for number in range(3000)})
        db.checkpoint()

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        salvage(tmp_path / "a.kv", tmp_path / "b.kv", progress=interrupt)
    assert list((tmp_path / "b.kv").iterdir()) == []
    assert salvage(tmp_path / "a.kv", tmp_path / "b.kv").saved_keys == 3000


def test_what_a_salvage_that_is_cut_off_leaves_is_never_taken_for_a_store_and_the_next_one_replaces_it() -> None:
    model = {b"%03d" % number: bytes(100) for number in range(100)}
    disk = SimulatedDisk()
    with kvwal.open("/a.kv", files=disk, **OPTIONS) as db:
        db.update(model)
    seen: set[str] = set()

    def save(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        assert salvage("/a.kv", "/b.kv", files=disk).complete
        acknowledged.append("saved")

    def check(disk: SimulatedDisk, acknowledged: list[Any]) -> None:
        try:
            with kvwal.open("/b.kv", "r", files=disk) as db:
                assert dict(db) == model
            seen.add("saved")
            return
        except StoreNotFoundError:
            seen.add("none")
        except FormatError as error:
            assert "salvage into it again" in str(error)
            seen.add("part")
            for flag in ("w", "c"):
                with pytest.raises(kvwal.Error, match="salvage into it again|no store"):
                    kvwal.open("/b.kv", flag, files=disk)
        assert not acknowledged
        with suppress(LockedError):
            assert salvage("/a.kv", "/b.kv", files=disk).complete
        with kvwal.open("/b.kv", files=disk, background=False) as db:
            assert dict(db) == model
            assert problems_of(db) == []

    crash_every(save, check, disk=disk, states_per_point=4)
    assert seen == {"saved", "none", "part"}


def test_a_part_is_replaced_only_while_no_other_salvage_makes_it_and_flag_n_erases_it(tmp_path: Path) -> None:
    model = build(tmp_path / "a.kv")
    copies = []

    def look(done: int) -> None:
        with pytest.raises(LockedError):
            salvage(tmp_path / "a.kv", tmp_path / "b.kv")
        with pytest.raises(FormatError, match="salvage into it again"):
            kvwal.open(tmp_path / "b.kv", "r")
        with pytest.raises(FormatError, match="salvage into it again"):
            kvwal.follow(tmp_path / "b.kv")
        copies.append(shutil.copytree(tmp_path / "b.kv", tmp_path / f"part{len(copies)}"))

    with kvwal.open(tmp_path / "a.kv", **OPTIONS) as db:
        db.update({b"more%04d" % number: b"" for number in range(3000)})
        db.checkpoint()
        model.update(db)
    assert salvage(tmp_path / "a.kv", tmp_path / "b.kv", progress=look).saved_keys == len(model)
    with kvwal.open(tmp_path / "b.kv", "r") as db:
        assert dict(db) == model
    part = copies[-1]
    # Damage may leave nothing but the part.
    [damage] = [each for each in salvage(part, tmp_path / "of part").damages if each.file == "salvaging"]
    assert "was cut off" in damage.reason
    (part / "notes").write_bytes(b"a file of the user")
    with pytest.raises(StoreExistsError):
        salvage(tmp_path / "a.kv", part)
    (part / "notes").unlink()
    (part / "readers").mkdir()
    assert salvage(tmp_path / "a.kv", part).saved_keys == len(model)
    with kvwal.open(part, "r") as db:
        assert dict(db) == model
    (part / "salvaging").write_bytes(b"not what kvwal writes")
    with pytest.raises(StoreExistsError):
        salvage(tmp_path / "a.kv", part)
    with kvwal.open(part, "n") as db:
        assert dict(db) == {}


@pytest.mark.parametrize("fails", [False, True])
def test_what_another_program_makes_of_the_target_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Between making the marker and opening the store there, no process has its lock."""
    build(tmp_path / "a.kv")
    engine_open = salvaging.Engine.open

    def taken_first(*arguments: Any) -> Any:
        monkeypatch.setattr(salvaging.Engine, "open", engine_open)
        with kvwal.open(tmp_path / "b.kv", "n") as db:
            db[b"durable"] = b"of the other program"
        if fails:
            raise KeyboardInterrupt
        return engine_open(*arguments)

    monkeypatch.setattr(salvaging.Engine, "open", taken_first)
    with pytest.raises(KeyboardInterrupt if fails else StoreExistsError):
        salvage(tmp_path / "a.kv", tmp_path / "b.kv")
    with kvwal.open(tmp_path / "b.kv", "r") as db:
        assert dict(db) == {b"durable": b"of the other program"}


def test_wherever_a_salvage_is_interrupted_the_target_is_empty_again() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/a.kv", files=disk, **OPTIONS) as db:
        db.update({b"%03d" % number: bytes(100) for number in range(50)})
    at = 0
    while True:
        at += 1
        found = disk.copy()
        start = found.operations

        def stop(operation: Operation, at: int = at, start: int = start, disk: SimulatedDisk = found) -> None:
            if operation.number >= start + at:
                disk.watcher = None
                raise KeyboardInterrupt

        found.watcher = stop
        try:
            salvage("/a.kv", "/b.kv", files=found)
            break
        except KeyboardInterrupt:
            found.watcher = None
            names: list[str] = []
            with suppress(FileNotFoundError):
                names = found.open_directory("/b.kv").names()
            if SALVAGING in names or not names:
                assert names == [], at
                continue
            # All was there, and the marker gone.
            with kvwal.open("/b.kv", "r", files=found) as db:
                assert len(db) == 50
    assert at > 40


def test_a_salvage_into_a_full_disk_names_the_target_and_is_made_again_when_there_is_space() -> None:
    """At whichever step there is no space any more."""
    disk = SimulatedDisk()
    with kvwal.open("/s", files=disk, background=False) as db:
        for i in range(200):
            db.put(b"%d" % i, b"v" * 1000)
    used = disk.used_bytes()
    salvage("/s", "/r", files=disk)
    needed = disk.used_bytes() - used
    full = 0
    for part in range(20):
        disk.capacity = disk.used_bytes() + needed * part // 20
        try:
            salvage("/s", f"/t{part}", files=disk)
        except kvwal.DiskFullError as error:
            assert str(error) == f"there is no space to save into /t{part}; free some, and call it again"
            full += 1
        disk.capacity = None
        if full and part == 10:
            assert salvage("/s", f"/t{part}", files=disk).saved_keys == 200
    assert full > 3


def test_a_full_disk_that_progress_met_is_not_said_to_be_that_of_the_new_store() -> None:
    disk = SimulatedDisk()
    with kvwal.open("/s", files=disk, background=False) as db:
        for i in range(1100):
            db.put(b"%d" % i, b"v")
    for full in (OSError(errno.ENOSPC, "the log of the user"), kvwal.DiskFullError("another store")):

        def tell(done: int, full: Exception = full) -> None:
            raise full

        with pytest.raises(type(full)) as caught:
            salvage("/s", "/t", files=disk, progress=tell)
        assert caught.value is full
    assert salvage("/s", "/t", files=disk).saved_keys == 1100


def test_a_file_of_the_user_that_has_the_name_of_the_marker_is_said_to_be_that(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    build(path)
    (path / "salvaging").write_bytes(b"my notes")
    for flag in ("r", "c"):
        with pytest.raises(FormatError, match="not what kvwal makes under this name"):
            kvwal.open(path, flag)
    assert not [each for each in salvage(path, tmp_path / "b.kv").damages if each.file == "salvaging"]


def test_relative_paths_are_those_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may change the working directory at any time."""
    build(tmp_path / "a.kv", commits=3)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    refuse = salvaging._refuse_inside

    def go_elsewhere(*arguments: Any) -> None:
        refuse(*arguments)
        monkeypatch.chdir(tmp_path / "elsewhere")

    monkeypatch.setattr(salvaging, "_refuse_inside", go_elsewhere)
    assert salvage("a.kv", "b.kv").complete
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.kv", "b.kv", "elsewhere"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize("inside", ["sub", "."])
def test_a_target_in_the_damaged_store_is_refused(tmp_path: Path, inside: str) -> None:
    build(tmp_path / "a.kv", commits=3)
    before = sorted((tmp_path / "a.kv").iterdir())
    (tmp_path / "link").symlink_to("a.kv")
    for target in (tmp_path / "a.kv" / inside, tmp_path / "link" / inside):
        with pytest.raises(StoreExistsError):
            salvage(tmp_path / "a.kv", target)
    assert sorted((tmp_path / "a.kv").iterdir()) == before


def test_an_open_store_is_not_salvaged(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "a.kv"), pytest.raises(LockedError):
        salvage(tmp_path / "a.kv", tmp_path / "b.kv")


def test_a_flipped_byte_of_a_log_is_one_finding_that_says_which_commits_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    with kvwal.open(path, **OPTIONS, keep_history_bytes=1 << 30) as db:
        for number in range(100):
            db[b"%03d" % number] = b"value of %03d" % number * 40
    segments = sorted(path.glob("*.log"))
    firsts = [int(segment.stem) for segment in segments]
    assert len(segments) > 2
    first, second = firsts[1:3]

    def findings(segment: Path, at: int) -> list[str]:
        whole = segment.read_bytes()
        segment.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        report = salvage(path, tmp_path / "b.kv")
        segment.write_bytes(whole)
        shutil.rmtree(tmp_path / "b.kv")
        return [damage.reason for damage in report.damages]

    data = segments[1].read_bytes()
    for commit in (first, first + 1, second - 1):
        [reason] = findings(segments[1], data.index(b"value of %03d" % (commit - 1)))
        assert reason.endswith(f"; commit {commit} is missing")
    [reason] = findings(segments[1], 70)
    assert reason.endswith(f"; commits {first} to {second - 1} are missing")


def test_commits_between_the_pages_and_the_log_are_missing_once(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    build(path)
    segments = sorted(path.glob("*.log"))
    (path / "data").unlink()
    for gone in segments[:1]:
        gone.unlink()
    damages = salvage(path, tmp_path / "b.kv").damages
    first = int(segments[1].stem)
    assert [damage.reason for damage in damages] == [
        "it is missing; only the log is saved",
        f"before it commits 1 to {first - 1} are missing",
    ]


def test_a_finding_of_a_salvage_does_not_advise_to_salvage(tmp_path: Path) -> None:
    path = tmp_path / "a.kv"
    build(path, commits=3)
    (path / "data").write_bytes(b"x" * 100)
    damages = salvage(path, tmp_path / "b.kv").damages
    assert damages
    assert not any("kvwal.salvage" in str(damage) for damage in damages)


@pytest.mark.parametrize("names", [[], ["lock", "reserve"], ["12.log", "notes.txt"]])
def test_a_directory_that_is_no_store_is_refused_and_nothing_is_left(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "a"
    path.mkdir()
    for name in names:
        (path / name).write_bytes(b"")
    with pytest.raises(StoreNotFoundError):
        salvage(path, tmp_path / "b.kv")
    assert sorted(each.name for each in path.iterdir()) == names
    assert not (tmp_path / "b.kv").exists()
    done = CliRunner().invoke(whole_app(), ["salvage", str(path), str(tmp_path / "b.kv")])
    assert (done.exit_code, done.stderr) == (5, f"kvwal: there is no store at {path}\n")


def test_the_saved_keys_are_those_that_stats_and_tables_count(tmp_path: Path) -> None:
    path, into = str(tmp_path / "a.kv"), str(tmp_path / "b.kv")
    with kvwal.open(path, **OPTIONS) as db:
        db[b"k"] = b"v"
        people = db.table("people", str, str)
        people.index("by_value", key=str, codec=str)
        people.update({"ada": "x", "bob": "y"})
        db.consumer("mailer").close()
        db.put(b"soon", b"v", expire_s=3600)
    report = salvage(path, into)
    with kvwal.open(into, "r") as db:
        counted = len(db) + sum(info.keys for info in db.tables())
        assert report.saved_keys == counted == 4


def test_a_file_is_no_place_to_save_into(tmp_path: Path) -> None:
    with kvwal.open(tmp_path / "kv", background=False) as db:
        db[b"a"] = b"1"
    (tmp_path / "into").write_bytes(b"mine")
    with pytest.raises(StoreExistsError, match="is not empty"):
        kvwal.salvage(tmp_path / "kv", tmp_path / "into")
    assert (tmp_path / "into").read_bytes() == b"mine"
