"""Conflicts: the history against the rule written down plainly."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvwal.batch import WriteBatch
from kvwal.engine.occ import History, conflict_between
from kvwal.keys import KeyRange, Seqno, in_any

KEYS = st.sampled_from([b"", b"a", b"b", b"c", b"d", b"e"])
RANGES = st.lists(st.builds(KeyRange, KEYS, st.one_of(st.none(), KEYS)), max_size=2)
COMMITS = st.lists(st.tuples(st.sets(KEYS, max_size=3), RANGES), max_size=8)
# Between any two keys, and beyond both ends, so that overlaps of ranges can be told by their members.
POINTS = [b"", b"\0", b"a", b"a1", b"b", b"b1", b"c", b"c1", b"d", b"d1", b"e", b"e1"]


def batch_of(keys: set[bytes], ranges: list[Any]) -> WriteBatch:
    batch = WriteBatch()
    for start, stop in ranges:
        batch.delete_range(start, stop)
    for key in keys:
        batch.put(key, b"")
    return batch


def plainly(batch: WriteBatch, reads: set[bytes], ranges: list[Any]) -> bool:
    touched = [p for p in POINTS if p in batch.writes or in_any(p, batch.ranges)]
    return any(point in reads or in_any(point, ranges) for point in touched)


@given(COMMITS, st.integers(0, 8), st.integers(0, 8), st.sets(KEYS), RANGES)
def test_a_conflict_is_a_later_commit_that_touched_what_was_read(
    commits: list[Any], oldest: int, since: int, reads: set[bytes], ranges: list[Any]
) -> None:
    oldest = min(oldest, len(commits))
    since = min(max(since, oldest), len(commits))
    history = History()
    history.begin(Seqno(0))
    batches = [batch_of(*commit) for commit in commits]
    for seqno, batch in enumerate(batches, 1):
        history.record(Seqno(seqno), batch)
    history.forget(Seqno(oldest))
    found = history.conflict(Seqno(since), reads, ranges)
    guilty = {seqno for seqno, batch in enumerate(batches, 1) if seqno > since and plainly(batch, reads, ranges)}
    assert (found is not None) == bool(guilty)
    if found is not None:
        assert found.seqno in guilty
        assert conflict_between(batches[found.seqno - 1], Seqno(found.seqno), reads, ranges) is not None


def test_the_history_keeps_keys_not_values_and_not_the_callers_batch() -> None:
    history = History()
    batch = batch_of({b"a"}, [])
    history.record(Seqno(1), batch)
    batch.clear()
    assert history.conflict(Seqno(0), {b"a"}, ()) is not None


def test_a_history_that_is_cut_makes_older_readers_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvwal.engine.occ.MAX_HISTORY_KEYS", 6)
    history = History()
    history.begin(Seqno(0))
    for seqno in range(1, 10):
        history.record(Seqno(seqno), batch_of({b"k%d" % seqno}, []))
    assert len(history) <= 3
    assert history.conflict(Seqno(0), {b"unrelated"}, ()) is not None
    assert history.conflict(Seqno(8), {b"unrelated"}, ()) is None
