"""`python -m bench.past`: what past moments cost, beside the same reads of now; each figure a median of turns.

Past reads are of a moment with some sealed segments between it and its base. Reads of now are of pages that the system
has in memory and the store has not, and in a scan of pages that have to be decoded.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter, process_time
from typing import Any, Final

import kvwal
from bench.data import key

_SEGMENT_BYTES: Final = 16 << 20
# As little as there may be, so that nearly every get reads its leaf.
_NO_CACHE: Final[Any] = {"cache_bytes": 256 << 10}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.past", description=__doc__)
    parser.add_argument("--keys", type=int, default=200_000, help="in the tree, with values of 100 bytes")
    parser.add_argument("--segments", type=int, default=4, help="of 16 MiB, between base and moment")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dir", default=None, help="where the store is made")
    options = parser.parse_args(arguments)
    directory = Path(tempfile.mkdtemp(dir=options.dir))
    try:
        at = _make(directory / "store", options.keys, options.segments)
        _reads(directory / "store", at, options.keys, options.turns)
        _puts(directory / "puts", options.turns)
    finally:
        shutil.rmtree(directory)
    return 0


def _make(path: Path, keys: int, segments: int) -> int:
    """A store with a base, and commits of random keys behind it; the moment that is read."""
    random = Random(1)
    # A base at the first checkpoint, and no other.
    settings: Any = {"keep_history_bytes": 1 << 40, "history_base_bytes": 0, "durability": "os"}
    with kvwal.open(path, **settings) as db:
        for first in range(0, keys, 1000):
            db.update({key(number): random.randbytes(100) for number in range(first, min(first + 1000, keys))})
        db.checkpoint()
        size = 0
        while size < segments * _SEGMENT_BYTES:
            db.put(key(random.randrange(keys)), random.randbytes(100))
            size += 180
        at = db.last_seqno
        db.put(key(0), b"")
        db.checkpoint()
        # Has every segment that is sealed get its index.
        assert not list(db.versions(b"no such key"))
    return at


def _reads(path: Path, at: int, keys: int, turns: int) -> None:
    random = Random(2)
    wanted = [key(random.randrange(keys)) for _ in range(1000)]

    def got(source: Any) -> float:
        began_s = perf_counter()
        for each in wanted:
            source.get(each)
        return (perf_counter() - began_s) / len(wanted)

    def scanned(source: Any) -> float:
        began_s = perf_counter()
        for _ in source.items():
            pass
        return perf_counter() - began_s

    def opened(db: kvwal.Store) -> float:
        began_s = perf_counter()
        for _ in range(100):
            db.snapshot(at=at).close()
        return (perf_counter() - began_s) / 100

    found: dict[str, list[tuple[float, float]]] = {"get": [], "scan of all": []}
    opening: list[float] = []
    for _ in range(turns):
        for name, measure in (("get", got), ("scan of all", scanned)):
            pair: list[float] = []
            for moment in (None, at):
                with kvwal.open(path, "r", **_NO_CACHE) as db, db.snapshot(at=moment) as snapshot:
                    # What is made once: the table of the newest segment.
                    assert not list(db.versions(b"no such key"))
                    pair.append(measure(snapshot))
                    opening.append(opened(db))
            found[name].append((pair[0], pair[1]))
    for name, pairs in found.items():
        now, past = (median(each[i] for each in pairs) for i in (0, 1))
        ratio = median(each[1] / each[0] for each in pairs)
        print(f"{name}: now {now * 1e6:,.0f} us, past {past * 1e6:,.0f} us, {ratio:.2f}x")
    print(f"opening a past moment: {median(opening) * 1e6:,.0f} us")


def _puts(path: Path, turns: int) -> None:
    """Puts with the window that is there by default, and without one."""

    def put(durability: Any, count: int, **more: Any) -> tuple[float, float]:
        shutil.rmtree(path, ignore_errors=True)
        value = bytes(100)
        with kvwal.open(path, durability=durability, **more) as db:
            began_s, began_cpu_s = perf_counter(), process_time()
            for number in range(count):
                db.put(key(number * 7919 % count), value)
            return (perf_counter() - began_s) / count, (process_time() - began_cpu_s) / count

    for durability, count in (("commit", 3000), ("os", 200_000)):
        with_window, without = [], []
        for _ in range(turns):
            with_window.append(put(durability, count))
            without.append(put(durability, count, keep_history_bytes=0))
        for i, what in enumerate(("time", "processor time")):
            ratio = median(one[i] / other[i] for one, other in zip(with_window, without, strict=True))
            print(f'put at "{durability}", {what}: with a window {ratio:.2f}x of without')


if __name__ == "__main__":
    sys.exit(main())
