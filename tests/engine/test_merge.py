"""Merging sources: pure rules against plain dicts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.engine.merge import Source, chunks_in, larger, merged, overlaid
from kvwal.engine.range_map import Cover
from kvwal.keys import KeyRange, in_any

KEYS = st.integers(0, 25).map(lambda number: bytes([97 + number]))
RANGES = st.lists(st.builds(KeyRange, KEYS, st.one_of(st.none(), KEYS)), max_size=3)
VALUES = st.sampled_from([b"1", b"2", b"3"])
SOURCES = st.lists(st.tuples(st.dictionaries(KEYS, st.one_of(st.none(), VALUES)), RANGES), max_size=4)


def cover_of(ranges: list[KeyRange]) -> Cover | None:
    return Cover.of(bounds for bounds in ranges if not bounds.is_empty()) or None


def chunks(layer: dict[bytes, Any], reverse: bool, size: int) -> Iterator[Any]:
    keys = sorted(layer, reverse=reverse)
    for start in range(0, len(keys), size):
        yield keys[start : start + size], [layer[key] for key in keys[start : start + size]]


def model_of(layers: list[Any]) -> dict[bytes, bytes | None]:
    model: dict[bytes, bytes | None] = {}
    for writes, ranges in layers:
        model = {key: value for key, value in model.items() if not in_any(key, ranges)}
        model.update(writes)
    return model


def pairs_of(sources: list[Source], reverse: bool) -> list[tuple[bytes, bytes]]:
    found: list[tuple[bytes, bytes]] = []
    for keys, values in merged(sources, reverse=reverse):
        assert len(keys) == len(values) > 0
        found += zip(keys, values, strict=True)
    return found


@given(SOURCES, st.sets(KEYS, min_size=20), st.booleans())
def test_few_keys_of_newer_sources_are_put_into_a_chunk(layers: list[Any], keys: set[bytes], reverse: bool) -> None:
    few = [({key: writes[key] for key in sorted(writes)[:4]}, []) for writes, _ in layers]
    layers = [(dict.fromkeys(keys, b"0"), []), *few]
    sources = [Source(chunks(writes, reverse, 30), reverse=reverse) for writes, _ in layers]
    wanted = sorted(((k, v) for k, v in model_of(layers).items() if v is not None), reverse=reverse)
    assert pairs_of(sources, reverse) == wanted


@given(SOURCES, st.booleans(), st.integers(1, 7))
def test_the_newest_source_that_knows_a_key_decides(layers: list[Any], reverse: bool, size: int) -> None:
    sources = [
        Source(chunks(writes, reverse, size + index), cover=cover_of(ranges), reverse=reverse)
        for index, (writes, ranges) in enumerate(layers)
    ]
    model = model_of(layers)
    wanted = sorted(((k, v) for k, v in model.items() if v is not None), reverse=reverse)
    assert pairs_of(sources, reverse) == wanted


@given(st.dictionaries(KEYS, VALUES, min_size=10), SOURCES, st.booleans(), st.integers(1, 7))
def test_a_source_that_can_seek_passes_over_what_is_hidden(
    tree: dict[bytes, bytes], layers: list[Any], reverse: bool, size: int
) -> None:
    def seek(beyond: bytes) -> Iterator[Any]:
        rest = {key: value for key, value in tree.items() if (key < beyond if reverse else key >= beyond)}
        return chunks(rest, reverse, size)

    sources = [Source(chunks(tree, reverse, size), deletes=False, seek=seek, reverse=reverse)]
    sources += [
        Source(chunks(writes, reverse, size + index), cover=cover_of(ranges), reverse=reverse)
        for index, (writes, ranges) in enumerate(layers)
    ]
    model = model_of([(tree, []), *layers])
    wanted = sorted(((k, v) for k, v in model.items() if v is not None), reverse=reverse)
    assert pairs_of(sources, reverse) == wanted


@pytest.mark.parametrize("reverse", [False, True])
def test_what_a_wide_range_hides_is_not_read(reverse: bool) -> None:
    """A scan over a deleted range takes the time of what is left, not of what was there."""
    tree = {b"%06d" % number: b"v" for number in range(100_000)}
    keys = sorted(tree)
    read = 0

    def of_tree(low: int, high: int) -> Iterator[Any]:
        nonlocal read
        while low < high:
            part = keys[max(low, high - 100) : high][::-1] if reverse else keys[low : min(low + 100, high)]
            read += len(part)
            if reverse:
                high -= len(part)
            else:
                low += len(part)
            yield part, [b"v"] * len(part)

    def seek(beyond: bytes) -> Iterator[Any]:
        at = bisect_left(keys, beyond)
        return of_tree(0, at) if reverse else of_tree(at, len(keys))

    sources = [
        Source(of_tree(0, len(keys)), deletes=False, seek=seek, reverse=reverse),
        Source(iter(()), cover=Cover.of([KeyRange(b"000005", b"050000"), KeyRange(b"040000", b"099995")])),
    ]
    wanted = [(key, b"v") for key in [*keys[:5], *keys[-5:]]]
    assert pairs_of(sources, reverse) == (wanted[::-1] if reverse else wanted)
    assert read <= 400


@given(st.lists(KEYS, unique=True, min_size=1, max_size=12), RANGES, st.booleans())
def test_a_cover_hides_what_it_holds_and_nothing_else(keys: list[bytes], ranges: list[KeyRange], reverse: bool) -> None:
    keys = sorted(keys, reverse=reverse)
    cover = Cover.of(bounds for bounds in ranges if not bounds.is_empty())
    kept, values = cover.hide(keys, list(keys))
    assert list(kept) == list(values) == [key for key in keys if not in_any(key, ranges)]


@given(st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS, st.one_of(st.none(), VALUES)), st.booleans())
def test_newer_keys_over_pairs_are_what_a_merge_gives(
    older: dict[bytes, bytes], newer: dict[bytes, bytes | None], reverse: bool
) -> None:
    pairs = sorted(older.items(), reverse=reverse)
    keys = sorted(newer, reverse=reverse)
    wanted = pairs_of([Source(chunks(older, reverse, 3)), Source(chunks(newer, reverse, 2))], reverse)
    # With few keys for the pairs there is another way than with many.
    padding = [(b"A%04d" % number, b"") for number in range(300)]
    padded = [*pairs, *reversed(padding)] if reverse else [*padding, *pairs]
    found = overlaid(list(padded), list(keys), newer, cut=False, reverse=reverse)
    assert found == ([*wanted, *reversed(padding)] if reverse else [*padding, *wanted])
    assert overlaid(pairs, keys, newer, cut=False, reverse=reverse) == wanted


@given(
    st.dictionaries(KEYS, VALUES),
    st.dictionaries(KEYS, st.one_of(st.none(), VALUES), min_size=2),
    st.integers(1, 20),
    st.booleans(),
)
def test_beyond_the_last_newer_key_that_is_known_nothing_is_said(
    older: dict[bytes, bytes], newer: dict[bytes, bytes | None], known: int, reverse: bool
) -> None:
    pairs = sorted(older.items(), reverse=reverse)
    keys = sorted(newer, reverse=reverse)[: min(known, len(newer) - 1)]
    last = keys[-1]
    everything = pairs_of([Source(chunks(older, reverse, 3)), Source(chunks(newer, reverse, 2))], reverse)
    wanted = [pair for pair in everything if (pair[0] >= last if reverse else pair[0] <= last)]
    assert overlaid(pairs, list(keys), newer, cut=True, reverse=reverse) == wanted


def test_pairs_become_one_chunk_or_none() -> None:
    assert list(chunks_in([])) == []
    assert list(chunks_in([(b"a", b"1"), (b"b", b"2")])) == [([b"a", b"b"], [b"1", b"2"])]


@given(sizes=st.lists(st.integers(1, 9), max_size=60), most=st.integers(1, 40))
def test_larger_chunks_have_the_same_pairs_and_grow(sizes: list[int], most: int) -> None:
    keys = [b"%03d" % number for number in range(sum(sizes))]
    parts = [keys[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    found = list(larger(iter([(part, [key + b"v" for key in part]) for part in parts]), most))
    assert [key for keys, _ in found for key in keys] == keys
    assert [value for _, values in found for value in values] == [key + b"v" for key in keys]
    # All but the last one, which is what is left.
    assert all(len(after) >= min(len(before), most) for (before, _), (after, _) in pairwise(found[:-1]))
    assert all(len(keys) < most + 9 for keys, _ in found)
