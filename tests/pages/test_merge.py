"""What goes into a merge: leaves and updates made one, batches of a stream."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages_fixtures import Scratch, columns

from kvwal.errors import InternalError
from kvwal.pages.freelist import Allocator, Freed, extents_of
from kvwal.pages.merge import Merge, MergeJob, Updates, merged
from kvwal.pages.node import POINTER, encode_inner
from kvwal.pages.pager import Pager
from kvwal.pages.writer import PageWriter, one_size

short = st.binary(max_size=2)
NOWHERE: Any = None  # no value here is large, so nothing is written


@given(
    st.dictionaries(short, short, max_size=40),
    st.dictionaries(short, st.none() | short, min_size=1, max_size=6),
)
def test_merged_is_what_a_dict_would_hold(entries: dict[bytes, bytes], updates: dict[bytes, bytes | None]) -> None:
    """Few updates go in one by one, more by way of a dict, and those behind the last key are appended."""
    expected = {key: value for key, value in {**entries, **updates}.items() if value is not None}
    old, new = sorted(entries), sorted(updates)
    keys, values = merged(old, [entries[key] for key in old], new, [updates[key] for key in new])
    assert keys == sorted(expected)
    assert dict(zip(keys, values, strict=True)) == expected


@given(st.lists(short, unique=True, max_size=200), st.lists(short, max_size=5), st.sampled_from([1, 7, 40, 1000]))
def test_updates_come_once_each_and_up_to_the_stop(keys: list[bytes], stops: list[bytes], run: int) -> None:
    keys = sorted(keys)
    updates = Updates(columns(((key, b"v") for key in keys), run), NOWHERE)
    taken: list[bytes] = []
    for stop in [*sorted(stops), None]:
        for batch, values in updates.take(stop):
            assert len(batch) == len(values) > 0
            taken += batch
        assert taken == [key for key in keys if stop is None or key < stop]
    assert updates.next is None


@pytest.mark.parametrize("run", [1, 16, 1000])
@pytest.mark.parametrize("second", [b"a", b"b"])
def test_order_is_checked_across_batches_and_runs_too(second: bytes, run: int) -> None:
    items = [(b"a%03d" % index, b"") for index in range(16)] + [(second, b"")]
    items = [*items, (b"a", b"")] if second == b"b" else items
    updates = Updates(columns(items, run), NOWHERE)
    with pytest.raises(InternalError):
        list(updates.take(None))


def test_one_size_is_the_length_that_all_have() -> None:
    assert one_size([b"ab", b"cd"]) == 2
    assert one_size([b"ab", b"c"]) == -1
    assert one_size([b""]) == 0


def test_empty_runs_of_updates_are_passed_over() -> None:
    runs: Any = [([], []), ([b"a"], [b"1"]), ([], []), ([b"b"], [None]), ([], [])]
    assert list(Updates(runs, NOWHERE).take(None)) == [([b"a"], [b"1"]), ([b"b"], [None])]
    assert Updates([([], [])], NOWHERE).next is None


def test_run_with_fewer_values_than_keys_is_our_own_bug() -> None:
    with pytest.raises(InternalError):
        Updates([([b"a", b"b"], [b"1"])], NOWHERE)


def test_root_with_one_child_is_freed_and_its_child_is_the_root(tmp_path: Path) -> None:
    scratch = Scratch(str(tmp_path))
    scratch.checkpoint({b"a": b"1"})
    meta, file = scratch.pages.meta, scratch.pages._file
    writer = PageWriter(file, Allocator(array("Q"), meta.page_count), 9)
    child = meta.root
    root = writer.node(encode_inner([], child, 1, 9), 0, 1)
    higher = writer.node(encode_inner([], root, 2, 9), 0, 1)
    writer.flush()
    freed = Freed(10)
    assert Merge(Pager(file, 0), writer, freed, MergeJob()).run(higher, 3) == (child, 1)
    pages = [POINTER.unpack(pointer)[0] for pointer in (higher, root)]
    assert sorted(page for page, _ in extents_of(freed.places)) == sorted(pages)
    assert list(freed.born) == [9, 9]
    scratch.pages.close()
