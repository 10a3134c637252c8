"""Consumers in programs, and what the states of a history say of them.

A state calls the position of a consumer `u/NAME`, behind all tables, so that a store that is found must have the
position and what was projected of one and the same moment. Three consumers are told of the keys of table 0 that begin
with k:

- "0" writes each position that is acknowledged at once, "1" the first and then those that close it.
- "mirror" projects: `p` and a key for the value of each, and in `n` how many values it was told of. So a change that is
  applied twice, or never, shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import kvwal
from crashtests.history import History, State, Violation
from kvwal.feed.asked import Asked
from kvwal.feed.change import Change
from kvwal.feed.consumer import Consumer
from kvwal.feed.owned import RowCommit

__all__ = ["MIRROR", "Feed", "positions", "row_key"]

MIRROR: Final = "mirror"
_ROW: Final = b"u/"

#: Makes and counts a commit: the state that it leads to, what makes it and returns its seqno, and whether it writes
#: nothing to users' tables.
Commit = Callable[[State, Callable[[], int], bool], None]


def row_key(name: str) -> bytes:
    """What a state calls a position."""
    return _ROW + name.encode()


def positions(state: State) -> dict[str, int]:
    """The position of each consumer in a state."""
    return {key[2:].decode(): int(value) for key, value in state.items() if key.startswith(_ROW)}


def told_of(history: History, after: int, until: int) -> list[tuple[int, bytes, bytes]]:
    """Commit, key and value of each put that consumers are told of; empty values are left out."""
    found = []
    for number in range(after + 1, until + 1):
        new = history.states[number].items() - history.states[number - 1].items()
        found += sorted((number, key, value) for key, value in new if key.startswith(b"k") and value)
    return found


def mirrored(history: History, position: int) -> State:
    """What the mirror has at a position: a fold of exactly the commits from its beginning up to that one."""
    key_of_row = row_key(MIRROR)
    first = next((n for n, state in enumerate(history.states) if key_of_row in state), None)
    began = position if first is None else int(history.states[first][key_of_row])
    state: State = {}
    for number in range(began + 1, position + 1):
        before, after = history.states[number - 1], history.states[number]
        for key in {key for key, _ in before.items() ^ after.items() if key.startswith(b"k")}:
            if key in after:
                state[b"p" + key] = after[key]
            else:
                state.pop(b"p" + key, None)
    count = len(told_of(history, began, position))
    return state | ({b"n": b"%d" % count} if count else {})


class Feed(Consumer):
    """A consumer that says what it is about to commit, and that is told of exactly what the history has."""

    def __init__(self, store: kvwal.Store, history: History, name: str, commit: Commit) -> None:
        self._history = history
        self._commit_of = commit
        self._batch_taken: kvwal.Batch | None = None
        asked = Asked(
            name,
            b"k",
            [0],
            start="now",
            max_lag_bytes=None,
            max_lag_s=None,
            own=False,
            replace=False,
            steal=False,
            on_error="stop",
            ack_interval_s=3600 if name == "1" else 0,
            timeout_s=0,
            heartbeat_s=None,
        )

        def make() -> int:
            super(Feed, self).__init__(store.engine, asked, owner=store)
            return store.last_seqno

        stored = positions(history.newest).get(name)
        if stored is None:
            stored = history.begun
            commit(history.newest | {row_key(name): b"%d" % stored}, make, True)
        else:
            make()
        if self.position != stored:
            raise Violation(f"consumer {name} goes on after {self.position}, and its position is {stored}")
        #: The last commit that it was told of, or that it begins after.
        self._told = stored

    def _commit(self, commit: RowCommit | None) -> None:
        if commit is None:
            return
        row = commit.operation._change(self._row)
        assert row is not None
        state = self._history.newest
        if self.name == MIRROR:
            state = {key: value for key, value in state.items() if not key.startswith((b"n", b"p"))}
            state |= mirrored(self._history, row.position)

        def act() -> int:
            Consumer._commit(self, commit)
            return commit.request.seqno

        self._commit_of(state | {row_key(self.name): b"%d" % row.position}, act, not commit.operation._batch)

    def take(self) -> None:
        """Be told of a batch."""
        batch = next(self)
        if batch.first != self._told + 1:
            raise Violation(f"consumer {self.name} was told of {self._told}, and then from {batch.first} on")
        self._check(batch.changes, self._told, batch.last)
        self._told = batch.last
        self._batch_taken = batch

    def acknowledge(self) -> None:
        """The batch that was taken last was handled."""
        if self._batch_taken is not None:
            self.ack(self._batch_taken)

    def mirror(self) -> None:
        """Project all that is there."""

        def project(txn: kvwal.Transaction, changes: Sequence[Change]) -> None:
            self._check(changes, self.position, self._covered)
            count = int(txn.get(b"n", b"0"))
            for change in changes:
                if change.kind == "delete_range":
                    txn.delete_range(b"p" + change.key, b"q" if change.stop is None else b"p" + change.stop)
                elif change.value is None:
                    txn.delete(b"p" + change.key)
                else:
                    txn[b"p" + change.key] = change.value
                    count += bool(change.value)
            if count:
                txn[b"n"] = b"%d" % count

        self.project(project, timeout_s=0)

    def _check(self, changes: Sequence[Change], after: int, until: int) -> None:
        found = sorted((change.seqno, change.key, change.value) for change in changes if change.value)
        expected: list[Any] = told_of(self._history, after, until)
        if found != expected:
            raise Violation(f"consumer {self.name} is told {found[:3]} of {after} to {until}, not {expected[:3]}")
        # What is told must not be taken back.
        self._history.acknowledge(until)
