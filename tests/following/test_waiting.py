"""Those who wait for commits of a follower."""

from __future__ import annotations

from collections.abc import Callable

from kvwal.following.waiting import Waiting
from kvwal.keys import Seqno


def test_one_is_woken_by_a_commit_beyond_its_own_also_if_that_came_before() -> None:
    newest = Seqno(5)
    waiting = Waiting(lambda: newest)
    woken: list[int] = []

    def wait(seqno: int) -> Callable[[], object]:
        return waiting.when_beyond(Seqno(seqno), lambda: woken.append(seqno))

    take_back = wait(4)
    assert woken == [4]
    take_back()
    take_back()
    assert not waiting
    wait(5)
    take_back = wait(7)
    assert woken == [4]
    newest = Seqno(6)
    waiting.wake()
    assert woken == [4, 5]
    waiting.wake_all()
    assert woken == [4, 5, 5, 7]
    take_back()
    assert waiting
