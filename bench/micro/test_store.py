"""The hot paths a user calls. Names say what one round does."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

from bench.data import pairs

VALUE = b"v" * 100


def test_hot_get(benchmark: Any, filled: Any, keys: list[bytes]) -> None:
    hot = keys[77]
    filled.get(hot)
    assert benchmark(filled.get, hot) is not None


def test_get_of_a_missing_key(benchmark: Any, filled: Any) -> None:
    assert benchmark(filled.get, b"nothing here") is None


def test_get_many_of_100_hot_keys(benchmark: Any, filled: Any, keys: list[bytes]) -> None:
    hundred = keys[:100]
    assert None not in benchmark(filled.get_many, hundred)


def test_get_from_the_pages(benchmark: Any, filled: Any, keys: list[bytes]) -> None:
    """A snapshot's tree, below the rows: the path of a cold get when the leaf is cached."""
    tree = filled.engine.state.version.tree
    names = cycle(keys)
    assert benchmark(lambda: tree.get(next(names))) is not None


def test_put_without_sync(benchmark: Any, written: Any, keys: list[bytes]) -> None:
    names = cycle(keys)
    benchmark(lambda: written.put(next(names), VALUE))


def test_durable_put(benchmark: Any, tmp_path: Path) -> None:
    import kvwal

    with kvwal.open(tmp_path / "durable") as db:
        benchmark(db.put, b"key", VALUE)


def test_batch_of_1000_without_sync(benchmark: Any, written: Any) -> None:
    some = pairs(list(range(1000)), 100)
    benchmark(written.update, some)


def test_transaction_of_one_increment_without_sync(benchmark: Any, written: Any, keys: list[bytes]) -> None:
    name = keys[5]

    def change(txn: Any) -> None:
        txn.put(name, txn.get(name))

    benchmark(lambda: written.run(change))


def test_scan_of_100(benchmark: Any, filled: Any, keys: list[bytes]) -> None:
    start = sorted(keys)[len(keys) // 2]
    assert len(benchmark(lambda: list(filled.scan(start, limit=100)))) == 100


def test_full_scan_of_20000(benchmark: Any, filled: Any) -> None:
    assert len(benchmark(lambda: list(filled.scan()))) == 20_000


def test_snapshot_opened_and_closed(benchmark: Any, filled: Any) -> None:
    benchmark(lambda: filled.snapshot().close())
