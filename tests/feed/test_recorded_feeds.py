"""The checker of recorded feeds finds each thing that may be wrong with a recording."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from recorded_feeds import SMALL, History, Told, Watch, broken, commit_of, follow_once, numbered

import kvwal
from kvwal import FeedGap
from kvwal.testing import SimulatedDisk


def recorded() -> tuple[History, Watch]:
    """A watch of everything, from the fourth commit on, that keeps all promises."""
    names = [b"%d" % number for number in range(1, 21)]
    with kvwal.open("/kv", files=SimulatedDisk(), background=False, **SMALL) as db:
        for name in names:
            db.commit(commit_of(name)[0])
        first = state(names[:4])
        watch = follow_once(db.changes(4, follow=True, timeout_s=0), Watch(4, b"", db.durable_seqno, first=first))
        with pytest.raises(FeedGap):
            db.changes(21)
    return {seqno: numbered(seqno, name) for seqno, name in enumerate(names, 1)}, watch


def state(names: list[bytes]) -> dict[bytes, bytes]:
    with kvwal.open("/kv", files=SimulatedDisk(), background=False) as db:
        for name in names:
            db.commit(commit_of(name)[0])
        return dict(db)


def swapped(watch: Watch) -> None:
    watch.told[3], watch.told[4] = watch.told[4], watch.told[3]


def told_twice(watch: Watch) -> None:
    watch.told.insert(3, watch.told[3])


def split(watch: Watch) -> None:
    n = next(n for n, told in enumerate(watch.told) if len(told.events) > 1)
    events, position = watch.told[n]
    watch.told[n : n + 1] = [Told(events[:1], position - 1), Told(events[1:], position)]


def half(watch: Watch) -> None:
    n = next(n for n, told in enumerate(watch.told) if len(told.events) > 1)
    watch.told[n] = Told(watch.told[n].events[:-1], watch.told[n].position)


def dropped(watch: Watch) -> None:
    del watch.told[5]


def dropped_first(watch: Watch) -> None:
    del watch.told[0]


def told_before(watch: Watch) -> None:
    watch.after = 5


def promised_too_much(watch: Watch) -> None:
    watch.told[3] = Told(watch.told[3].events, watch.told[4].position)


def went_back(watch: Watch) -> None:
    watch.told[-1] = Told((), watch.told[-1].position - 1)


def invented(watch: Watch) -> None:
    (event, *rest), position = watch.told[2]
    watch.told[2] = Told((event._replace(value=b"another"), *rest), position)


def said_complete_too_early(watch: Watch) -> None:
    watch.complete = 5


def began_with_less(watch: Watch) -> None:
    assert watch.first
    watch.first.popitem()


def gap_without_a_gap(watch: Watch) -> None:
    watch.told, watch.oldest = [], watch.after + 1


def told_after_a_gap(watch: Watch) -> None:
    watch.oldest = watch.after + 3


@pytest.mark.parametrize(
    ("change", "promise"),
    [
        (swapped, "ordered"),
        (told_twice, "unique"),
        (split, "atomic"),
        (half, "atomic"),
        (dropped, "reliable"),
        (dropped_first, "resumable"),
        (told_before, "resumable"),
        (promised_too_much, "bookmarkable"),
        (went_back, "bookmarkable"),
        (invented, "true"),
        (said_complete_too_early, "all that was there"),
        (began_with_less, "what is there first"),
        (gap_without_a_gap, "compacted"),
        (told_after_a_gap, "compacted"),
    ],
)
def test_the_checker_finds_what_is_wrong_with_a_recording(change: Callable[[Watch], None], promise: str) -> None:
    history, watch = recorded()
    assert broken(history, watch) == set()
    change(watch)
    assert promise in broken(history, watch)
