"""What a follower rests on, left out: each time the two programs of a bounded run come to a wrong moment, or fail."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from recorded_programs import at_random, checkpoints, ranges, recorded, refusals, restarts, rolls, step_by_step
from two_programs import Recorded

import kvwal
from kvwal.following.progress import Progress
from kvwal.log import Watch
from kvwal.log.watch import _told
from kvwal.pages.followed import Guard
from kvwal.pages.meta import Meta, decode_meta

Patch = Callable[[pytest.MonkeyPatch], None]


def skip_the_second_look(patch: pytest.MonkeyPatch) -> None:
    """R6: skip the second meta read."""
    patch.setattr(Guard, "is_whole", lambda guard: True)


def look_before_the_read(patch: pytest.MonkeyPatch) -> None:
    """R6: check before the read."""

    def pread(guard: Any, size: int, offset: int) -> bytes:
        if not guard.is_whole():
            guard.when_gone()
            raise kvwal.SnapshotTooOld(0, 1, 1)
        found: bytes = guard._file.pread(size, offset)
        return found

    patch.setattr(Guard, "pread", pread)


def read_the_generation_before(patch: pytest.MonkeyPatch) -> None:
    """R6: use the older generation, which has gone a flip earlier."""

    def is_whole(guard: Any) -> bool:
        raw = guard._file.pread(4096, guard._offset)
        meta = decode_meta(guard._meta.generation % 2, raw)
        return isinstance(meta, Meta) and meta.generation <= guard._meta.generation + 2

    patch.setattr(Guard, "is_whole", is_whole)


def apply_beyond_the_watermark(patch: pytest.MonkeyPatch) -> None:
    """R6: apply beyond the watermark."""
    step = Watch._step

    def beyond(watch: Any, newest: Any, file: Any, tell: Any) -> None:
        step(watch, newest, file, tell)
        watch.know(newest.place.last_seqno)

    patch.setattr(Watch, "_step", beyond)


def ignore_the_inode(patch: pytest.MonkeyPatch) -> None:
    """R6: ignore that another file has the segment's name."""
    find = Watch._find

    def by_name(watch: Any) -> Any:
        found = find(watch)
        newest = watch._newest
        return newest.found if newest is not None and found.first_seqno == newest.found.first_seqno else found

    patch.setattr(Watch, "_find", by_name)


def forget_what_a_segment_says(patch: pytest.MonkeyPatch) -> None:
    """That all before it is on disk."""
    know = Watch.know

    def from_records(watch: Any, durable: int) -> None:
        newest = watch._newest
        if newest is not None and durable == newest.place.watermark:
            know(watch, durable)

    patch.setattr(Watch, "know", from_records)


def tell_what_an_older_segment_had(patch: pytest.MonkeyPatch) -> None:
    """Keep what was passed there, and is not known to be on disk, when a newer one is found."""
    open_newest = Watch._open

    def keeping(watch: Any, found: Any) -> Any:
        newest = open_newest(watch, found)
        if watch._newest is not None:
            newest.passed = watch._newest.passed
        return newest

    patch.setattr(Watch, "_open", keeping)


def tell_before_the_segment_is_looked_for(patch: pytest.MonkeyPatch) -> None:
    """What was passed is believed as soon as it is read."""
    step = Watch._step

    def early(watch: Any, newest: Any, file: Any, tell: Any) -> None:
        step(watch, newest, file, tell)
        if tell is not None:
            _told(newest.passed, newest.place.last_seqno, tell)

    patch.setattr(Watch, "_step", early)


def publish_what_does_not_follow(patch: pytest.MonkeyPatch) -> None:
    """Whatever the watch tells is what comes next."""
    patch.setattr(Progress, "_publish_next", Progress._publish)


def go_back(patch: pytest.MonkeyPatch) -> None:
    """Go over to a generation without the log behind it."""
    for module in ("engine", "progress"):
        patch.setattr(f"kvwal.following.{module}.fill", lambda memtable, reader, after, until: 0)


MUTANTS: list[tuple[Patch, Callable[[Recorded], None]]] = [
    (skip_the_second_look, checkpoints),
    (look_before_the_read, checkpoints),
    (read_the_generation_before, checkpoints),
    (apply_beyond_the_watermark, restarts),
    (ignore_the_inode, restarts),
    (forget_what_a_segment_says, rolls),
    (tell_what_an_older_segment_had, refusals),
    (tell_before_the_segment_is_looked_for, refusals),
    (publish_what_does_not_follow, rolls),
    (go_back, ranges),
]


@pytest.mark.parametrize(("mutant", "program"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_a_follower_without_what_it_rests_on_is_found_out(
    mutant: Patch, program: Callable[[Recorded], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = recorded(program)
    mutant(monkeypatch)
    with pytest.raises((AssertionError, kvwal.Error)):
        step_by_step(writer)
        # The seeds are always the same, so what dies does so in each run of the tests.
        for seed in range(100):
            at_random(writer, random.Random(seed), 10)
