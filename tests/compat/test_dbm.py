"""What `kvwal.compat.dbm` does beyond what CPython's tests ask: str, errors, order, whole commits."""

from __future__ import annotations

import dbm.dumb as dumb
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import kvwal
from kvwal.compat import dbm, shelve


@pytest.fixture
def db(tmp_path: Path) -> Iterator[dbm.Database]:
    with dbm.open(tmp_path / "a.db", "c", durability="os", background=False) as database:
        yield database


def test_str_goes_in_as_utf_8_and_bytes_come_out(db: dbm.Database) -> None:
    db["ключ"] = "значение"
    key, value = "ключ".encode(), "значение".encode()
    assert db["ключ"] == db[key] == db.get("ключ") == db.setdefault("ключ", "x") == value
    assert [each in db for each in ("ключ", key, "key", 5)] == [True, True, False, False]
    assert (db.keys(), db.values(), db.items(), list(db)) == ([key], [value], [(key, value)], [key])
    assert db.setdefault("new") == b""
    db.update({"a": "1"}, b=b"2")
    db.update([(bytearray(b"c"), "3")][:0])
    assert (db.pop("a"), db.pop("a", None), db.pop("a", default=7), db.popitem()) == (b"1", None, 7, (key, value))
    with pytest.raises(KeyError):
        db.pop("a")
    del db["b"]
    assert db == {b"new": b""}
    for wrong in (5, None, 1.5):
        with pytest.raises(TypeError):
            db[wrong] = b""
        with pytest.raises(TypeError):
            db["k"] = wrong  # type: ignore[assignment]
        with pytest.raises(TypeError):
            db.nextkey(wrong)  # type: ignore[arg-type]  # that is what is refused
    with pytest.raises(KeyError):
        del db["missing"]
    db.clear()
    assert not db


def test_keys_can_be_walked_one_by_one_while_they_change(db: dbm.Database, rng: random.Random) -> None:
    longest = b"\xff" * kvwal.MAX_KEY_BYTES
    keys = sorted({b"", b"\0", longest, longest[:-1], *(rng.randbytes(rng.randrange(4)) for _ in range(50))})
    db.update(dict.fromkeys(keys, b""))
    walked = []
    key = db.firstkey()
    while key is not None:
        walked.append(key)
        if rng.random() < 0.5:
            del db[key]
        key = db.nextkey(key)
    assert walked == keys
    assert dbm.Database.nextkey(db, "zzz") in (None, *keys)
    db.clear()
    assert db.firstkey() is db.nextkey(b"") is None


def test_each_failure_is_an_error_of_the_module_and_an_os_error(tmp_path: Path) -> None:
    assert dbm.error.__bases__ == (kvwal.Error, OSError)
    for flag in ("r", "w"):
        with pytest.raises(dbm.error, match="there is no store") as caught:
            dbm.open(tmp_path / "a.db", flag)  # type: ignore[arg-type]
        assert isinstance(caught.value.__cause__, kvwal.StoreNotFoundError)
        assert caught.value.errno == caught.value.__cause__.errno
    with pytest.raises(ValueError, match="flag"):
        dbm.open(tmp_path / "a.db", "x")  # type: ignore[arg-type]
    with dbm.open(tmp_path / "a.db", "c") as db:
        db["k"] = "v"
        with pytest.raises(dbm.error, match="already open in this process"):
            dbm.open(tmp_path / "a.db", "w")
    walk = iter(db)
    uses: list[Any] = [db.keys, db.values, db.items, db.clear, db.popitem, db.firstkey, db.sync, db.reorganize]
    uses += [lambda: db["k"], lambda: db.get("k"), lambda: "k" in db, lambda: len(db), lambda: next(walk)]
    uses += [lambda: db.update(k="v"), lambda: db.pop("k"), lambda: db.setdefault("k"), lambda: db.nextkey("k")]
    uses += [lambda: db.__setitem__("k", "v"), lambda: db.__delitem__("k")]
    for use in uses:
        with pytest.raises(dbm.error, match="is closed"):
            use()
    db.close()
    assert "closed" in repr(db)
    with dbm.open(tmp_path / "a.db") as db:
        assert (db["k"], "open" in repr(db)) == (b"v", True)
        db.sync()
        with pytest.raises(dbm.error, match='opened with flag "r"') as caught:
            db["k"] = "w"
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_flag_n_takes_the_place_of_an_empty_file_and_of_nothing_else(tmp_path: Path) -> None:
    for path, text in ((tmp_path / "empty", ""), (tmp_path / "full", "mine")):
        path.write_text(text)
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for path in (tmp_path / "full", tmp_path / "link", Path(f"{tmp_path}/none/x")):
        with pytest.raises(dbm.error):
            dbm.open(path, "n")
    assert (tmp_path / "full").read_text() == "mine"
    assert (tmp_path / "empty").is_file()
    for flag in ("r", "w", "c"):
        with pytest.raises(dbm.error, match="not a directory"):
            dbm.open(tmp_path / "empty", flag)  # type: ignore[arg-type]
    dbm.open(tmp_path / "empty", "n").close()
    assert dbm.whichdb(tmp_path / "empty") == "kvwal.compat.dbm"


def test_files_of_another_module_are_not_taken_for_an_empty_database(tmp_path: Path) -> None:
    old = str(tmp_path / "shelf")
    with dumb.open(old, "n") as database:
        database["k"] = b"v"
    for flag in ("c", "w", "r"):
        with pytest.raises(dbm.error, match=r"a database of dbm\.dumb, and none of kvwal yet.*another name.*update"):
            dbm.open(old, flag)  # type: ignore[arg-type]  # a str, of a loop over literals
        with pytest.raises(dbm.error, match=r"dbm\.dumb"):
            shelve.open(old, flag)  # type: ignore[arg-type]  # as above
    assert not Path(old).exists()
    with dumb.open(old, "r") as database, dbm.open(old, "n") as new:
        new.update(database)
    with dbm.open(old, "c") as again:
        assert again["k"] == b"v"


def test_whichdb_knows_a_store_that_is_open_and_asks_the_standard_library_for_the_rest(
    db: dbm.Database, tmp_path: Path
) -> None:
    assert dbm.whichdb(tmp_path / "a.db") == "kvwal.compat.dbm"
    dumb.open(str(tmp_path / "d"), "c").close()
    assert dbm.whichdb(tmp_path / "d") == "dbm.dumb"
    (tmp_path / "other").write_text("something else")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "data").write_text("of another program")
    assert dbm.whichdb(tmp_path / "other") == ""
    assert dbm.whichdb(tmp_path / "missing") is dbm.whichdb(tmp_path / "directory") is None


def test_a_database_is_a_store_like_any_other(tmp_path: Path) -> None:
    with dbm.open(tmp_path / "a.db", "c", 0o640) as db:
        db["k"] = "v"
        db.reorganize()
    assert (tmp_path / "a.db").stat().st_mode & 0o777 == 0o750
    with kvwal.open(tmp_path / "a.db", "r") as store:
        assert dict(store) == {b"k": b"v"}


def test_a_shelf_keeps_what_can_be_pickled(tmp_path: Path) -> None:
    with shelve.open(tmp_path / "s", writeback=True, durability="os") as shelf:
        shelf["list"] = [1]
        shelf["list"].append({"two": (3, None)})
    with shelve.open(tmp_path / "s", "r") as shelf:
        assert shelf["list"] == [1, {"two": (3, None)}]
    with shelve.open(tmp_path / "s", "w", writeback=True) as shelf:
        assert shelf["list"]
        before = shelf.dict._store.last_seqno  # type: ignore[attr-defined]
        shelf.clear()
        assert shelf.dict._store.last_seqno == before + 1  # type: ignore[attr-defined]
    with shelve.open(tmp_path / "s") as shelf:
        assert not dict(shelf)


_LEFT_OPEN = {
    "a shelf": "shelf = shelve.open(path)\nshelf['a'] = [1, 2]",
    "a shelf that writes back": "shelf = shelve.open(path, writeback=True)\nshelf['a'] = [1]\nshelf['a'].append(2)",
    "a shelf whose database is closed": "shelf = shelve.open(path)\nshelf['a'] = [1, 2]\nshelf.dict.close()",
    "a shelf that writes back, and whose database is closed": "shelf = shelve.open(path, writeback=True)\n"
    "shelf['a'] = [1, 2]\nshelf.sync()\nshelf['a'].append(3)\nshelf.dict.close()",
    "a shelf that writes back, and is only read": "with shelve.open(path) as shelf:\n    shelf['a'] = [1, 2]\n"
    "shelf = shelve.open(path, 'r', writeback=True)\nshelf['a'].append(3)",
    "a shelf that was opened at exit": "shelve.open(path)['a'] = [1, 2]\n"
    "import atexit\natexit._run_exitfuncs()\nshelf = shelve.open(path)",
}
if hasattr(os, "fork"):
    _LEFT_OPEN["a shelf in a forked child"] = (
        "shelf = shelve.open(path, writeback=True)\nshelf['a'] = [1]\nshelf['a'].append(2)\n"
        "import os\nif child := os.fork():\n    assert os.waitpid(child, 0)[1] == 0"
    )


@pytest.mark.parametrize("what", _LEFT_OPEN)
def test_a_shelf_that_is_left_open_at_the_end_of_a_program_is_written(tmp_path: Path, what: str) -> None:
    source = f"import sys\nfrom kvwal.compat import shelve\npath = sys.argv[1]\n{_LEFT_OPEN[what]}"
    # From 3.12 on a fork beside threads warns, such as that of a store.
    quiet = "ignore:This process:DeprecationWarning"
    command = [sys.executable, "-W", quiet, "-c", source, str(tmp_path / "s")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with shelve.open(tmp_path / "s", "r") as shelf:
        assert dict(shelf) == {"a": [1, 2]}
