"""The feed: what durable commits changed, in their order, each once; and a snapshot from which a feed begins.

Rules:
- Nothing is handed out that a power cut could take back, or that a read would not see yet.
- `position` moves with the last change of a commit, and over commits of which nothing is handed out. So whatever a
  program was doing when it ended, `changes(after=position)` misses nothing, and repeats of one commit at most.
- What is beyond the position is held in the log until the feed is exhausted, closed or collected.

Invariant: a call counts what it hands out (`_told`) by its last step, so one that is interrupted counts nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final, Protocol, Self
from weakref import WeakSet

from kvwal.db.handle import Closing
from kvwal.db.snapshot import Snapshot
from kvwal.engine.engine import Engine
from kvwal.errors import ClosedError, Error, FeedGap, PoisonedError, closed
from kvwal.feed.change import Change, Filter, Prefixes, Selection
from kvwal.feed.chosen import AnyTables, table_ids
from kvwal.feed.line import durable_now, position_at
from kvwal.feed.quiet import Quiet
from kvwal.files import call_in_forked_child
from kvwal.finalizing import quiet_at_exit
from kvwal.keys import Seqno, as_seconds
from kvwal.log import Run, SegmentCursor
from kvwal.positions import Position

__all__ = ["STEP_S", "Bootstrap", "Changes", "forget_in_forked_child", "goes_on", "heartbeat"]

#: Who waits looks this often whether the feed was closed, or commits are refused for good.
STEP_S: Final = 0.1


class _Ahead(Protocol):
    """What has read changes ahead: it asks nothing for each of them, not whether the process was forked."""

    def forget_ahead(self) -> None: ...


_ahead: WeakSet[_Ahead] = WeakSet()


def forget_in_forked_child(feed: _Ahead) -> None:
    """In a forked child, have its next call ask the store whether there is still one."""
    _ahead.add(feed)


def _forget_ahead() -> None:
    for feed in list(_ahead):
        feed.forget_ahead()


call_in_forked_child(_forget_ahead)


def goes_on(engine: Engine, cursor: SegmentCursor) -> bool:
    """Whether the log has a commit there, or may have one later."""
    try:
        engine.state.refuse_if_gone()
        if not cursor.wait(0):
            engine.queue.refuse_if_ended()
    except Error:
        return False
    return True


def heartbeat(engine: Engine, position: Seqno) -> Change:
    """What says that no change came beyond the position."""
    return Change(position, engine.reads.moments.clock.now_us(), {}, 0, "heartbeat", b"", None, None, True)


class Changes(Iterator[Change], Closing):
    """What commits changed, one `Change` after the other. Made by `Store.changes`; use it in a `with` block.

    For one thread at a time, but for `close`, which any may call. An error closes it; `changes(after=position)` goes
    on. It raises ClosedError when it or the store was closed, PoisonedError when it waits for what can never come, and
    what reading the log raises.
    """

    __slots__ = (
        "__weakref__",
        "_cursor",
        "_ended",
        "_engine",
        "_filter",
        "_follow",
        "_owner",
        "_passed",
        "_pending",
        "_polled_s",
        "_position",
        "_quiet",
        "_told",
    )

    def __init__(
        self,
        engine: Engine,
        after: Seqno | None,
        wanted: Selection,
        *,
        follow: bool = False,
        quiet: Quiet | None = None,
        owner: object = None,
        cursor: SegmentCursor | None = None,
    ) -> None:
        """`cursor`: where it reads, for a caller that holds the log itself; else one of its own, after `after`."""
        self._cursor: SegmentCursor | None = None
        self._filter = wanted
        # Before anything is read ahead.
        forget_in_forked_child(self)
        self._engine = engine
        self._follow = follow
        # None: it waits for ever.
        self._quiet = Quiet(None) if quiet is None else quiet
        self._polled_s = time.monotonic()
        # The store, which is not collected while it is read.
        self._owner = owner
        # What is left of the commit or run that is being handed out, and the last commit of that.
        self._pending: Iterator[Change] = iter(())
        self._ended = False
        if cursor is None:
            cursor = engine.upkeep.read(after, None if follow else durable_now(engine), "changes")
        self._cursor = cursor
        self._position: Seqno = cursor.position
        self._passed = self._position
        # What was handed out of it last. Of a run each change is the last of its commit.
        self._told: Change | None = None

    @property
    def position(self) -> Position:
        """The last commit that was wholly handed out or passed over: the place to go on after."""
        return position_at(self._engine, self._counted())

    def _counted(self) -> Seqno:
        """The last commit that was wholly handed out or passed over."""
        told = self._told
        return self._position if told is None or not told.last else max(told.seqno, self._position)

    def __iter__(self) -> Changes:
        return self

    def __next__(self) -> Change:
        try:
            for change in self._pending:
                self._told = change
                return change
            found = self._next()
            if found is None and self._follow:
                found = self._await_next()
        except BaseException as error:
            self._fail(error)
            raise
        if found is None:
            raise StopIteration
        self._told = found
        return found

    @property
    def alive(self) -> bool:
        """Whether it goes on: there are commits that it has not looked at, or more may come. From any thread."""
        cursor = self._cursor
        if cursor is None or self._ended:
            return False
        return goes_on(self._engine, cursor) if self._follow else not self._engine.is_closed

    @property
    def last_poll_s(self) -> float:
        """How long ago it asked for a commit, in seconds. It asks all the time while it waits for one."""
        return time.monotonic() - self._polled_s

    def poll(self) -> Change | None:
        """The next change if it is there now, else None: it never waits."""
        try:
            change = self._next()
        except BaseException as error:
            self._fail(error)
            raise
        if change is not None:
            self._told = change
        return change

    def _next(self) -> Change | None:
        """The next change that is there now."""
        change = next(self._pending, None)
        if change is not None or self._ended:
            return change
        state = self._engine.state
        state.refuse_if_gone()
        cursor = self._open()
        # All that was pending was handed out: where it was closed, there is no cursor any more.
        self._position = max(self._position, self._passed)
        self._polled_s = time.monotonic()
        visible = state.seqno
        while (part := cursor.next_part(visible)) is not None:
            if isinstance(part, Run):
                last, found = part.seqnos[-1], self._filter.changes_of(part)
            else:
                last = part.seqno
                if last > visible:
                    visible = self._await_visible(last)
                found = self._filter.changes(part)
            if found is not None:
                if self._follow:
                    self._quiet.end()
                change = next(found)
                self._passed, self._pending = last, found
                # It may have been closed meanwhile.
                self._open()
                return change
            self._position = last
        self._ended = not self._follow
        return None

    def _await_visible(self, seqno: Seqno) -> Seqno:
        """Wait for a commit that was flushed just now, until a read sees it too. Returns the last that one sees."""
        while (visible := self._engine.state.seqno) < seqno:
            self._engine.queue.refuse_if_ended()
            # Nothing, while no commit is under way.
            self._engine.queue.run(lambda: None)
        return visible

    def when_ready(self, wake: Callable[[], object]) -> Callable[[], object]:
        """Have `wake` called once a commit has come, or none can come any more. Returns what takes that back.

        The thread that flushes calls it, so it must be short and not raise. Raises as waiting does.
        """
        try:
            self._refuse_if_ended()
            return self._open().when_beyond(wake)
        except BaseException as error:
            self._fail(error)
            raise

    def _await_next(self) -> Change | None:
        """The next change or heartbeat, or None if none came within the time."""
        quiet = self._quiet
        quiet.begin()
        while True:
            left_s = quiet.left_s(STEP_S)
            if self._wait(left_s):
                change = self._next()
                if change is not None:
                    return change
            self._polled_s = time.monotonic()
            if left_s <= 0:
                return None if quiet.is_over() else heartbeat(self._engine, self._position)

    def wait(self, timeout_s: float) -> None:
        """Wait for a commit, at most so long. Raises as iterating does; TypeError, ValueError for what is no time."""
        timeout_s = as_seconds("timeout_s", timeout_s)
        try:
            self._wait(timeout_s)
        except BaseException as error:
            self._fail(error)
            raise

    def _wait(self, timeout_s: float) -> bool:
        """Whether there is a commit now."""
        if self._open().wait(max(0.0, timeout_s)):
            return True
        self._refuse_if_ended()
        return False

    def _refuse_if_ended(self) -> None:
        """Raise why no commit can come any more, if that is so."""
        self._engine.state.refuse_if_gone()
        self._engine.queue.refuse_if_ended()

    def _open(self) -> SegmentCursor:
        if self._cursor is None:
            raise closed("feed")
        return self._cursor

    def _fail(self, error: BaseException) -> None:
        """It is over. Raises what the error came of, if it came of a close."""
        was_closed = self._cursor is None
        self.close()
        if not isinstance(error, Exception):
            return
        self._engine.state.refuse_if_gone()
        if was_closed:
            raise closed("feed") from None
        if isinstance(error, ClosedError):
            # The log is closed a little before the store is.
            raise closed() from None
        if isinstance(error, PoisonedError):
            # So a close need not say it.
            self._engine.queue.told_feed = True

    def forget_ahead(self) -> None:
        """For `forget_in_forked_child`."""
        self._pending = iter(())
        self._ended = False

    def close(self) -> None:
        """Let go of the log that it holds. Idempotent; from any thread."""
        cursor, self._cursor = self._cursor, None
        self._pending = iter(())
        if cursor is not None:
            cursor.close()
        self._filter.close()

    # A cursor and what it reads refer to each other, so they may stay for a while.
    __del__ = quiet_at_exit(close)

    def __enter__(self) -> Self:
        self._open()
        return self

    def __repr__(self) -> str:
        return f"<Changes after commit {self._counted()}{' (closed)' if self._cursor is None else ''}>"


class Bootstrap(Closing):
    """A snapshot, and the position from which `changes` goes on where it ends: nothing between, and nothing twice.

    Made by `Store.bootstrap`; use it in a `with` block. Until it is closed or collected it holds the log beyond the
    position, so that `changes` may be called as late as one likes, and again.
    """

    __slots__ = ("__weakref__", "_engine", "_hold", "_owner", "snapshot")

    def __init__(self, engine: Engine, *, owner: object = None) -> None:
        self._engine = engine
        self._owner = owner
        self._hold: SegmentCursor | None = None
        while self._hold is None:
            snapshot = Snapshot(engine, owner=owner)
            try:
                until = snapshot.seqno if engine.upkeep.is_read_only else None
                self._hold = engine.upkeep.read(snapshot.seqno, until, "bootstrap")
                if snapshot.seqno > engine.upkeep.durable_seqno:
                    # Durability: a position is on disk. Else a crash could give its number to another commit.
                    engine.upkeep.sync()
            except FeedGap:
                # Two checkpoints came between the snapshot and the hold.
                snapshot.close()
            except BaseException:
                if self._hold is not None:
                    self._hold.close()
                snapshot.close()
                raise
        #: The store as `position` left it.
        self.snapshot = snapshot

    @property
    def position(self) -> Position:
        """The last commit that the snapshot contains."""
        return position_at(self._engine, self.snapshot.seqno)

    def changes(
        self,
        *,
        prefix: Prefixes = b"",
        tables: AnyTables | None = None,
        follow: bool = False,
        timeout_s: float | None = None,
        heartbeat_s: float | None = None,
    ) -> Changes:
        """What came after the snapshot. Arguments as in `Store.changes`."""
        if self._hold is None:
            raise closed("bootstrap")
        wanted, quiet = Filter(prefix, table_ids(self._engine, tables)), Quiet(timeout_s, heartbeat_s)
        return Changes(self._engine, self.snapshot.seqno, wanted, follow=follow, quiet=quiet, owner=self._owner)

    def close(self) -> None:
        """Close the snapshot, and hold the log no more; a feed that was begun goes on. Idempotent."""
        hold, self._hold = self._hold, None
        if hold is not None:
            hold.close()
            self.snapshot.close()

    def __enter__(self) -> Self:
        if self._hold is None:
            raise closed("bootstrap")
        return self

    def __repr__(self) -> str:
        return f"<Bootstrap at commit {self.snapshot.seqno}{' (closed)' if self._hold is None else ''}>"
