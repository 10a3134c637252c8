"""The demo's main job: the sources of the standard library, one transaction a file.

A transaction puts, for one file:

    text/<path>               its bytes
    sha256/<path>             their SHA-256
    name/<name>\\0<path>       the lines where the identifier occurs, outside of comments and strings
    progress                  how many transactions there were, this one included

so a file is in the store whole or not at all, and the number of transactions tells exactly what must be there.
When every file is in and there are kills left, another round takes each file out and puts it in again, in one
transaction.
"""

from __future__ import annotations

import hashlib
import keyword
import os
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import kvwal
from kvwal.demo.promise import OPTIONS, Answer, BrokenPromise, Recount

if TYPE_CHECKING:
    from kvwal.api.store import Store

__all__ = ["Library", "corpus", "identifiers", "work"]

_PROGRESS = b"progress"

_TOKEN = re.compile(
    rb"""
    (?P<name> [A-Za-z_\x80-\xff] [A-Za-z_0-9\x80-\xff]* )
    | \n
    | \#[^\n]*
    | (?P<long> '''(?:\\[\s\S]|[^\\])*?''' | \"\"\"(?:\\[\s\S]|[^\\])*?\"\"\" )
    | '(?:\\[\s\S]|[^'\\\n])*' | "(?:\\[\s\S]|[^"\\\n])*"
    """,
    re.VERBOSE,
)
_NOT_NAMES = frozenset(word.encode() for word in keyword.kwlist)


def corpus(seed: int) -> list[tuple[bytes, str]]:
    """Names in the store and paths on disk of the library's sources, in an order that the seed decides."""
    root = sysconfig.get_path("stdlib")
    found = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in ("site-packages", "dist-packages")]
        found += [os.path.join(directory, name) for name in files if name.endswith(".py")]
    found.sort()
    random.Random(seed).shuffle(found)
    return [(os.fsencode(os.path.relpath(path, root)).replace(os.sep.encode(), b"/"), path) for path in found]


def identifiers(source: bytes) -> dict[bytes, list[int]]:
    """The names in a source, without keywords, and the lines (from 1) where each occurs."""
    found: dict[bytes, list[int]] = {}
    line = 1
    for match in _TOKEN.finditer(source):
        kind = match.lastgroup
        if kind == "name":
            name = match.group()
            if name in _NOT_NAMES:
                continue
            lines = found.setdefault(name, [])
            if not lines or lines[-1] != line:
                lines.append(line)
        else:
            line += match.group().count(b"\n")
    return found


def _postings(name: bytes, source: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The index entries of one file."""
    for identifier, lines in identifiers(source).items():
        yield b"name/%s\0%s" % (identifier, name), " ".join(map(str, lines)).encode()


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def work(arguments: list[str], say: Callable[[str], None]) -> None:
    """A life of the writing process: PATH SEED UNTIL, where UNTIL is the number of transactions to reach."""
    path, seed, until = arguments[0], int(arguments[1]), int(arguments[2])
    files = corpus(seed)
    say("start")
    with kvwal.open(path, "c", **OPTIONS) as db:
        say("open")
        number = int(db.get(_PROGRESS, b"0"))
        while number < until:
            name, source_path = files[number % len(files)]
            source = _read(source_path)
            with db.transaction() as txn:
                before = txn.get(b"text/" + name)
                if before is not None:
                    for key, _ in _postings(name, before):
                        txn.delete(key)
                txn.put(b"text/" + name, source)
                txn.put(b"sha256/" + name, hashlib.sha256(source).hexdigest().encode())
                for key, lines in _postings(name, source):
                    txn.put(key, lines)
                number += 1
                txn.put(_PROGRESS, b"%d" % number)
            say(f"ack {number}")
    say("done")


@dataclass(slots=True)
class Library:
    """What the watching process knows: the real files, and how many transactions were acknowledged."""

    path: str
    seed: int
    kills: int
    acked: int = 0
    found: int = 0
    files: list[tuple[bytes, str]] = field(default_factory=list)
    target: int = 0
    #: Of the first n files: how many postings, and the sum of their hashes. Grown as files are found.
    _expected: list[tuple[int, int]] = field(default_factory=lambda: [(0, 0)])

    unit = "files"
    options: ClassVar[dict[str, Any]] = {}

    def __post_init__(self) -> None:
        self.files = corpus(self.seed)
        # At least a few transactions for each kill, so that there is something to kill.
        rounds = max(1, -(-self.kills * 4 // len(self.files)))
        self.target = rounds * len(self.files)

    def describe(self) -> str:
        """What is going to happen, in one sentence."""
        return (
            f"{len(self.files):,} source files of the standard library go into {self.path}, one transaction a file: "
            "its text, its SHA-256 and an index of its identifiers."
        )

    def gap(self, kills_left: int) -> float:
        """Acknowledgements to wait for before a kill, on average, so that the work lasts for all of them."""
        return (self.target - self.found) / (kills_left + 1)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do, and hence nothing left to kill."""
        return self.found >= self.target

    def arguments(self, last: bool) -> list[str]:
        """Of the writing process."""
        del last  # It stops when it is through.
        return ["library", self.path, str(self.seed), str(self.target)]

    def heard(self, words: list[str]) -> None:
        """Take note of an acknowledgement."""
        self.acked = int(words[0])

    def check(self, db: Store) -> Recount:
        """Compare the store with the real files. BrokenPromise says what is wrong."""
        number = int(db.get(_PROGRESS, b"0"))
        if not self.acked <= number <= self.acked + 1:
            raise BrokenPromise(f"{self.acked} transactions were acknowledged and {number} are there")
        self.found = number
        present = min(number, len(self.files))
        compared = 0
        for name, path in self.files[:present]:
            real = _read(path)
            compared += len(real)
            if db.get(b"text/" + name) != real:
                raise BrokenPromise(f"the text of {os.fsdecode(name)} is not what the file {path} holds")
            if db.get(b"sha256/" + name) != hashlib.sha256(real).hexdigest().encode():
                raise BrokenPromise(f"the SHA-256 of {os.fsdecode(name)} is wrong")
        while len(self._expected) <= present:
            name, path = self.files[len(self._expected) - 1]
            count, total = self._expected[-1]
            hashes = [hash(entry) for entry in _postings(name, _read(path))]
            self._expected.append((count + len(hashes), total + sum(hashes)))
        count, total = self._expected[present]
        entries = 2 * present + count + (number > 0)
        if len(db) != entries:
            raise BrokenPromise(f"the store counts {len(db)} entries where {entries} belong")
        if sum(map(hash, db.scan(prefix=b"name/"))) != total:
            raise BrokenPromise("the index of identifiers is not that of the files")
        # This check has read what is there now, so it must stay.
        self.acked = number
        return Recount(
            number, compared, f"{present:,} files, {compared / 1e6:.1f} MB and {count:,} index entries compared"
        )

    def answers(self, db: Store) -> Iterator[Answer]:
        """Questions to the finished store, the first checked against the files themselves."""
        uses = [(key.split(b"\0")[1], lines.split()) for key, lines in db.scan(prefix=b"name/fsync\0")]
        direct = {
            name: [b"%d" % line for line in found[b"fsync"]]
            for name, path in self.files
            if b"fsync" in (text := _read(path)) and b"fsync" in (found := identifiers(text))
        }
        if dict(uses) != direct:
            raise BrokenPromise("the index and the files disagree on where fsync is used")
        yield Answer(
            "where is fsync used?",
            [f"{os.fsdecode(name)}: {b', '.join(lines).decode()}" for name, lines in uses] or ["nowhere"],
        )
        counts = Counter(key[5 : key.index(b"\0")] for key in db.keys(prefix=b"name/"))
        common = [f"{name.decode(errors='replace')} (in {files:,} files)" for name, files in counts.most_common(5)]
        yield Answer(f"which of the {len(counts):,} names are in the most files?", [", ".join(common)])
        names = sorted({key[5 : key.index(b"\0")].decode() for key in db.keys(prefix=b"name/crc")})
        yield Answer("which names begin with crc?", [", ".join(names) or "none"])

    def proved(self) -> str:
        """What the checks amount to."""
        return (
            f"all {self.acked:,} acknowledged transactions were there after every kill, whole and in their order, "
            "and never more than the one that was under way"
        )
