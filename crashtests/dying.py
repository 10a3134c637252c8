"""A writer in a process of its own, that may kill itself at a named point: `python -m crashtests.dying`.

Another process collects what it prints on standard output, so that survives the writer:

- `open SEQNO`: the store was opened and answered,
- `begin THREAD N`: thread THREAD is about to commit its Nth transaction,
- `done THREAD N`: that commit returned.

Each transaction of a thread puts N into two keys (which must never differ), into one of fifty others, adds one to a
counter that all threads share, and now and then deletes a range of the fifty.
"""

from __future__ import annotations

import fnmatch
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import kvwal
from kvwal.files import system_files

#: Where a process may kill itself: (operation, pattern of the path), and what is going on there.
POINTS: dict[str, tuple[str, str]] = {
    "mid-commit": ("datasync", "*.[lt][om][gp]"),
    "mid-write": ("pwrite", "*.[lt][om][gp]"),
    "mid-checkpoint": ("pwrite", "*/data"),
    "before the flip": ("sync*|datasync", "*/data"),
    "between flip and log removal": ("unlink", "*.log"),
    "mid-removal": ("sync_directory", "*"),
    "mid-rotation": ("rename", "*.log"),
    "mid-slot": ("sync_directory|pwrite", "*"),
    "mid-recovery": ("*", "*"),
}


_OF_DIRECTORIES = {
    "rename": "rename",
    "unlink": "unlink",
    "sync": "sync_directory",
    "sync_parent": "sync_directory",
    "names": "list_directory",
}


class _Doomed:
    """Counts the calls that match, and kills the process before the nth."""

    def __init__(self, operation: str, path: str, nth: int) -> None:
        self.operations = operation.split("|")
        self.path = path
        self.left = nth

    def before(self, operation: str, path: str) -> None:
        if fnmatch.fnmatch(path, self.path) and any(fnmatch.fnmatch(operation, o) for o in self.operations):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class _File:
    def __init__(self, file: Any, path: str, doom: _Doomed) -> None:
        self._file = file
        self._path = path
        self._doom = doom

    def __getattr__(self, name: str) -> Any:
        return _watched(getattr(self._file, name), name, self._path, self._doom)


class DoomedFiles:
    """The system's files, for a process that dies at a given operation."""

    def __init__(self, doom: _Doomed) -> None:
        self._files: Any = system_files()
        self._doom = doom

    def open_directory(self, path: str) -> _Directory:
        self._doom.before("open_directory", path)
        return _Directory(self._files.open_directory(path), path, self._doom)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._files, name)
        return _watched(found, name, "", self._doom) if name == "make_directory" else found


class _Directory:
    def __init__(self, directory: Any, path: str, doom: _Doomed) -> None:
        self._directory = directory
        self._path = path
        self._doom = doom

    def open(self, name: str, **options: Any) -> _File:
        path = f"{self._path}/{name}"
        self._doom.before("create" if options.get("create") else "open", path)
        return _File(self._directory.open(name, **options), path, self._doom)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._directory, name)
        operation = _OF_DIRECTORIES.get(name)
        return _watched(found, operation, self._path, self._doom) if operation else found


def _watched(call: Callable[..., Any], operation: str, path: str, doom: _Doomed) -> Callable[..., Any]:
    def watched(*arguments: Any, **options: Any) -> Any:
        # A file has no names to be given; a directory is given the last one that it is about.
        names = [path, *(a for a in arguments[-1:] if isinstance(a, str))]
        doom.before(operation, "/".join(names))
        return call(*arguments, **options)

    return watched


def _say(line: str) -> None:
    # One write, shorter than a pipe's buffer, so lines of several threads never mix.
    os.write(1, line.encode() + b"\n")


def _increment(txn: Any) -> None:
    txn.put(b"count", b"%d" % (int(txn.get(b"count", b"0")) + 1))


def work(store: Any, thread: int, first: int, commits: int, random: Random) -> None:
    """The transactions of one thread."""
    for n in range(first, first + commits):
        _say(f"begin {thread} {n}")

        def act(txn: Any, n: int = n) -> None:
            value = b"%d" % n
            txn.put(b"t%d/a" % thread, value)
            txn.put(b"t%d/b" % thread, value)
            if n % 17 == 0:
                txn.delete_range(b"t%d/v10" % thread, b"t%d/v20" % thread)
            txn.put(b"t%d/v%02d" % (thread, n % 50), value * random.choice((1, 30, 300)))
            _increment(txn)

        store.run(act, attempts=1000)
        _say(f"done {thread} {n}")


def main(arguments: Sequence[str]) -> None:
    """Arguments: one JSON object (path, threads, commits, seed, first, point, nth, options)."""
    about = json.loads(arguments[0])
    options = dict(about["options"])
    if about["point"]:
        options["files"] = DoomedFiles(_Doomed(*POINTS[about["point"]], about["nth"]))
    store = kvwal.open(about["path"], **options)
    _say(f"open {store.last_seqno}")
    threads = [
        threading.Thread(
            target=work, args=(store, t, about["first"][t], about["commits"], Random(about["seed"] * 100 + t))
        )
        for t in range(about["threads"])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()
    _say("closed")


if __name__ == "__main__":
    main(sys.argv[1:])
