"""Maps of str to what JSON has, that are kept in files: kvwal's table, and its peers at the same promise.

The promise is that what was put survives a killed process, and not a power cut; but shelve's, which is kept only when
it is closed.

- kvwal: `db.table(name, str, codecs.json())` at durability "os".
- raw: the store itself, with keys and values encoded outside of the measured time.
- sqlitedict: JSON in place of pickles; `autocommit=True`, WAL; it sets `synchronous=OFF` by itself.
- diskcache: `JSONDisk` without compression, nothing is thrown out, `synchronous=OFF`.
- shelve: pickles, over the `dbm` that the interpreter has.
"""

from __future__ import annotations

import json
import shelve
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import kvwal
from bench.peers.base import require
from kvwal import codecs

__all__ = ["MAPS", "RAW", "Map", "missing", "opened", "value_of"]

Map = MutableMapping[Any, Any]

RAW: Final = "raw"
MAPS: Final = ("kvwal", RAW, "sqlitedict", "diskcache", "shelve")


def value_of(number: int) -> dict[str, Any]:
    """What a small record of a program looks like: 130 bytes of JSON."""
    return {
        "id": number,
        "name": f"customer {number}",
        "email": f"customer.{number}@example.org",
        "active": bool(number % 3),
        "balance": number / 8,
        "tags": ["new", "north"],
    }


def missing(name: str) -> str | None:
    """Why one cannot take part, or None if it can."""
    try:
        if name in ("sqlitedict", "diskcache"):
            require(name)
    except ImportError:
        return f"{name} is left out: pip install {name}"
    return None


@contextmanager
def opened(name: str, path: Path) -> Iterator[Map]:
    """One of them, open, in a directory that is there."""
    if name == "kvwal":
        with kvwal.open(path / "store", durability="os") as db:
            yield db.table("users", str, codecs.json())
    elif name == RAW:
        with kvwal.open(path / "store", durability="os") as db:
            yield db
    elif name == "sqlitedict":
        found = require("sqlitedict").SqliteDict(
            str(path / "file"), autocommit=True, journal_mode="WAL", encode=json.dumps, decode=json.loads
        )
        yield found
        found.close()
    elif name == "diskcache":
        diskcache = require("diskcache")
        found = diskcache.Cache(
            str(path / "cache"),
            disk=diskcache.JSONDisk,
            disk_compress_level=0,
            eviction_policy="none",
            cull_limit=0,
            size_limit=1 << 40,
            sqlite_synchronous=0,
        )
        yield found
        found.close()
    else:
        with shelve.open(str(path / "shelf")) as shelf:  # noqa: S301  # of its own
            yield shelf
