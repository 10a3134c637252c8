"""ZODB's `db.open(at=)` as a peer: FileStorage, and one BTree of bytes.

The same changes as kvwal's, but 100 in a transaction: each rewrites the leaves that it changes, and is flushed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, Final

from bench.data import Pair, key
from bench.history.filling import VALUE_BYTES, changes
from bench.peers.base import chunked, require

__all__ = ["fill", "missing", "opened"]

_CHANGES: Final = 100


def missing() -> str | None:
    """Why it cannot take part, or None if it can."""
    try:
        require("ZODB")
    except ImportError:
        return "ZODB is left out: pip install ZODB"
    return None


@contextmanager
def _database(path: Path, **options: Any) -> Iterator[Any]:
    storage = require("ZODB.FileStorage").FileStorage(str(path / "Data.fs"), **options)
    database = require("ZODB").DB(storage)
    try:
        yield database
    finally:
        database.close()


def fill(path: Path, keys: int, before: int, behind: int, say: Callable[[str], None]) -> bytes:
    """Load keys in order, and commit changes; the moment that has so many before and behind it."""
    path.mkdir(parents=True)
    with _database(path) as database:
        connection = database.open()
        manager = connection.transaction_manager
        tree = connection.root()["kv"] = require("BTrees.OOBTree").OOBTree()
        random = Random(1)
        for number, name in enumerate(sorted(map(key, range(keys)))):
            tree[name] = random.randbytes(VALUE_BYTES)
            if not number % 10_000:
                manager.commit()
        manager.commit()
        at = b""
        for seed, count in ((1, before), (2, behind)):
            _commit(manager, tree, changes(count, keys, seed), say)
            at = at or database.lastTransaction()
        return at


def _commit(manager: Any, tree: Any, pairs: list[Pair], say: Callable[[str], None]) -> None:
    for number, some in enumerate(chunked(pairs, _CHANGES)):
        if not number % 100:
            say(f"ZODB: {number * _CHANGES:,} of {len(pairs):,} changes")
        tree.update(some)
        manager.commit()


@contextmanager
def opened(path: Path, at: bytes | None) -> Iterator[Any]:
    """The tree, now or at a moment. No object of it is loaded but its root."""
    with _database(path, read_only=True) as database:
        connection = database.open(at=at)
        try:
            yield connection.root()["kv"]
        finally:
            connection.close()
