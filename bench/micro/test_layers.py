"""The hot paths inside: what a put and a cold get are made of."""

from __future__ import annotations

from typing import Any

import pytest

from bench.data import key, pairs

KEY = key(1)
VALUE = b"v" * 100


def test_encode_one_put(benchmark: Any) -> None:
    record = pytest.importorskip("kvwal.log.intents")
    benchmark(record.encode_put, KEY, VALUE)


def test_decode_one_put(benchmark: Any) -> None:
    record, columns = pytest.importorskip("kvwal.log.intents"), pytest.importorskip("kvwal.log.columns")
    assert len(benchmark(columns.decode_intents, record.encode_put(KEY, VALUE))) == 1


def test_encode_1000_puts(benchmark: Any) -> None:
    record = pytest.importorskip("kvwal.log.intents")
    benchmark(record.encode_intents, _batch(1000))


def test_decode_1000_puts(benchmark: Any) -> None:
    record, columns = pytest.importorskip("kvwal.log.intents"), pytest.importorskip("kvwal.log.columns")
    body = b"".join(record.encode_intents(_batch(1000)))
    assert len(benchmark(columns.decode_intents, body)) == 1000


def test_batch_takes_1000_puts_one_by_one(benchmark: Any) -> None:
    from kvwal.batch import WriteBatch

    some = pairs(list(range(1000)), 100)

    def fill() -> None:
        put = WriteBatch().put
        for name, value in some:
            put(name, value)

    benchmark(fill)


def test_decode_a_leaf(benchmark: Any) -> None:
    page = pytest.importorskip("kvwal.pages.node")
    assert len(benchmark(page.decode_leaf, _leaf(page))[0]) == 60


def test_find_in_an_undecoded_leaf(benchmark: Any) -> None:
    page = pytest.importorskip("kvwal.pages.node")
    wanted = sorted(key(n) for n in range(60))[41]
    assert benchmark(page.find_in_leaf, _leaf(page), wanted) is not None


def test_encode_a_leaf(benchmark: Any) -> None:
    page = pytest.importorskip("kvwal.pages.node")
    names = sorted(key(n) for n in range(60))
    benchmark(page.encode_leaf, names, [VALUE] * 60, 16, 100, (), 1)


def _leaf(page: Any) -> bytes:
    raw: bytes = page.encode_leaf(sorted(key(n) for n in range(60)), [VALUE] * 60, 16, 100, (), 1)
    return raw


def _batch(size: int) -> Any:
    from kvwal.batch import WriteBatch

    batch = WriteBatch()
    batch.update(pairs(list(range(size)), 100))
    return batch
