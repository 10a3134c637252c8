"""Merging levels: pure rules against plain dicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvwal.engine.merge import Level, merged, without
from kvwal.keys import KeyRange, in_any

KEYS = st.integers(0, 25).map(lambda number: bytes([97 + number]))
RANGES = st.lists(st.builds(KeyRange, KEYS, st.one_of(st.none(), KEYS)), max_size=3)
LEVELS = st.lists(
    st.tuples(st.dictionaries(KEYS, st.one_of(st.none(), st.sampled_from([b"1", b"2", b"3"]))), RANGES), max_size=4
)


def chunks(level: dict[bytes, Any], reverse: bool, size: int) -> Iterator[Any]:
    keys = sorted(level, reverse=reverse)
    for start in range(0, len(keys), size):
        yield keys[start : start + size], [level[key] for key in keys[start : start + size]]
        yield [], []  # A level may come by nothing for a while.


@given(LEVELS, st.booleans(), st.integers(1, 7))
def test_the_newest_level_that_knows_a_key_decides(levels: list[Any], reverse: bool, size: int) -> None:
    model: dict[bytes, bytes | None] = {}
    for writes, masks in levels:
        model = {key: value for key, value in model.items() if not in_any(key, masks)}
        model.update(writes)
    sources = [Level(chunks(writes, reverse, size + index), masks) for index, (writes, masks) in enumerate(levels)]
    found: list[tuple[bytes, bytes]] = []
    for keys, values in merged(sources, reverse=reverse):
        assert len(keys) == len(values) > 0
        found += zip(keys, values, strict=True)
    assert found == sorted(((k, v) for k, v in model.items() if v is not None), reverse=reverse)


@given(st.lists(KEYS, unique=True, max_size=12), RANGES, st.booleans())
def test_masks_take_out_what_they_hold_and_nothing_else(keys: list[bytes], masks: list[Any], reverse: bool) -> None:
    keys = sorted(keys, reverse=reverse)
    kept, values = without(keys, list(keys), masks)
    assert list(kept) == list(values) == [key for key in keys if not in_any(key, masks)]
