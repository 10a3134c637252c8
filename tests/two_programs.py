"""A writer and a follower on one simulated disk, taking turns at file operations.

The writer runs once, and what it does to the disk is recorded. Then it is done again, operation by operation, between
those of a follower, in any order of turns that a test wants, on one thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import kvwal
from kvwal.log.segment import list_segments
from kvwal.testing import SimulatedDisk

PATH = "/store"
_CHANGES_OF_FILES = ("pwrite", "pwrite_all", "datasync", "sync", "allocate", "truncate", "close")
_CHANGES_OF_NAMES = ("rename", "unlink", "sync")

#: What one operation does to a disk, by the handles that were opened so far.
_Step = Callable[[Any, dict[int, Any]], object]


class Recorded:
    """What a writer did: its operations, and after each of them the last commit that it may call durable."""

    def __init__(self, program: Callable[[Recorded], None], *, seed: int = 0) -> None:
        self.disk = SimulatedDisk(seed=seed)
        self.disk.make_directory(PATH)
        self.steps: list[tuple[str, _Step]] = []
        self.durable: list[int] = []
        #: The same if the directory is flushed by another program then.
        self.named: list[int] = []
        self._has_name = False
        #: Whether it has the lock, before each of them.
        self.held: list[bool] = []
        self.holds = False
        #: Whether it says that it recovers the store, before each of them.
        self.recovering: list[bool] = []
        self.recovers = False
        #: The store after each commit.
        self.states: list[dict[bytes, bytes]] = [{}]
        #: Where a follower may begin.
        self.begin = 0
        #: Where the store is erased: from there on a follower may be told so.
        self.erased: int | None = None
        self._db: kvwal.Store | None = None
        program(self)
        self.durable.append(len(self.states) - 1)
        self.named.append(len(self.states) - 1)
        self.held.append(self.holds)
        self.recovering.append(self.recovers)

    def open(self, flag: Any = "c", **options: Any) -> kvwal.Store:
        self._db, self._has_name = None, False
        tiny = {"background": False, "segment_bytes": 16 << 10, "keep_history_s": 0}
        self._db = kvwal.open(PATH, flag, files=_Files(self), **(tiny | options))
        return self._db

    def put(self, *pairs: tuple[bytes, bytes | None], durability: Any = None) -> None:
        """One commit."""
        assert self._db is not None
        batch = kvwal.WriteBatch()
        state = dict(self.states[-1])
        for key, value in pairs:
            if value is None:
                batch.delete(key)
                state.pop(key, None)
            else:
                batch.put(key, value)
                state[key] = value
        # Before, since it is seen before this returns.
        self.states.append(state)
        try:
            assert self._db.commit(batch, durability=durability) == len(self.states) - 1
        except kvwal.DiskFullError:
            self.states.pop()

    def note(self, name: str, step: _Step) -> None:
        # What is durable after the step before this one. An open makes all durable that it found, in a new segment, as
        # soon as the name of that is flushed.
        if self._db is not None:
            self.durable.append(self._db.durable_seqno)
            self.named.append(self.durable[-1])
        else:
            before = self.steps[-1][0] if self.steps else ""
            self._has_name = self._has_name or (before.startswith("rename") and ".log" in before)
            everything, so_far = len(self.states) - 1, max(self.durable, default=0)
            self.durable.append(everything if self._has_name and before == "sync ()" else so_far)
            self.named.append(everything if self._has_name else so_far)
        self.steps.append((name, step))
        self.held.append(self.holds)
        self.recovering.append(self.recovers)

    def hold(self, holds: bool) -> None:
        """It takes the lock, or lets go of it."""
        if holds != self.holds:
            self.note("lock" if holds else "unlock", lambda directory, handles: None)
            self.holds = holds


class _Files:
    """The files of the writer, which are recorded."""

    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded

    def __getattr__(self, name: str) -> Any:
        return getattr(self._recorded.disk, name)

    def open_directory(self, path: str) -> _Directory:
        return _Directory(self._recorded)


class _Directory:
    def __init__(self, recorded: Recorded) -> None:
        self._recorded = recorded
        self._directory: Any = recorded.disk.open_directory(PATH)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._directory, name)
        if name not in _CHANGES_OF_NAMES:
            return found

        def change(*args: Any) -> Any:
            self._recorded.note(f"{name} {args}", lambda directory, handles: getattr(directory, name)(*args))
            return found(*args)

        return change

    def lock(self, *, shared: bool, mode: int = 0o600, recovers: bool = False) -> None:
        self._directory.lock(shared=shared, mode=mode, recovers=recovers)
        self._recorded.hold(True)
        self._recorded.recovers = recovers

    def recovered(self) -> None:
        self._directory.recovered()
        self._recorded.recovers = False

    def close(self) -> None:
        self._directory.close()
        self._recorded.hold(False)
        self._recorded.recovers = False

    def open(
        self, name: str, *, write: bool = False, create: bool = False, bulk: bool = False, mode: int = 0o600
    ) -> Any:
        if not write and not create:
            return self._directory.open(name)
        handle = len(self._recorded.steps)

        def step(directory: Any, handles: dict[int, Any]) -> None:
            handles[handle] = directory.open(name, write=write, create=create)

        self._recorded.note(f"open {name}", step)
        return _File(self._recorded, self._directory.open(name, write=write, create=create), handle, name)


class _File:
    def __init__(self, recorded: Recorded, file: Any, handle: int, name: str) -> None:
        self._recorded = recorded
        self._file = file
        self._handle = handle
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        if name not in _CHANGES_OF_FILES:
            return found

        def change(*args: Any) -> Any:
            kept = [[bytes(each) for each in arg] if isinstance(arg, (list, tuple)) else arg for arg in args]
            kept = [bytes(arg) if isinstance(arg, (bytearray, memoryview)) else arg for arg in kept]
            self._recorded.note(
                f"{name} {self._name} {[arg for arg in args if isinstance(arg, int)]}",
                lambda directory, handles: getattr(handles[self._handle], name)(*kept),
            )
            return found(*args)

        return change


class World:
    """The disk on which the recorded writer and a follower take turns."""

    def __init__(self, recorded: Recorded, turns: Callable[[int], int] = lambda n: 0) -> None:
        """`turns`: before the follower's operation number n, how many operations the writer does."""
        self.recorded = recorded
        self.disk = SimulatedDisk()
        self.disk.make_directory(PATH)
        self._directory: Any = self.disk.open_directory(PATH)
        self._directory.sync_parent()
        self._handles: dict[int, Any] = {}
        self._turns = turns
        # What is durable since the follower flushed the directory.
        self._flushed = 0
        #: Operations that the writer and the follower did.
        self.done = 0
        self.looked = 0

    def advance(self, count: int) -> None:
        """Let the writer do this number of operations, or all that are left."""
        for _, step in self.recorded.steps[self.done : self.done + count]:
            # What failed for the writer, such as to remove what is not there, fails again.
            with suppress(OSError):
                step(self._directory, self._handles)
            self.done += 1

    @property
    def durable(self) -> int:
        """The last commit that may be called durable now."""
        return max(self.recorded.durable[self.done], self._flushed)

    def flushed(self) -> None:
        """The follower has flushed the directory."""
        self._flushed = max(self._flushed, self.recorded.named[self.done])

    def look(self) -> None:
        """The follower is about to do an operation."""
        self.advance(self._turns(self.looked))
        self.looked += 1

    @property
    def is_locked(self) -> bool:
        """Whether the writer has the lock now."""
        return self.recorded.held[self.done]

    @property
    def is_recovering(self) -> bool:
        """Whether the writer has the lock now, and says that it recovers the store."""
        return self.recorded.recovering[self.done]

    def follow(self) -> kvwal.Follower:
        return kvwal.follow(PATH, pin=False, files=_LookingFiles(self))  # type: ignore[arg-type]  # it stands for files

    def read(self) -> kvwal.Store:
        """A store that is opened with flag "r"."""
        return kvwal.open(PATH, "r", files=_LookingFiles(self))  # type: ignore[arg-type]


class _LookingFiles:
    """The files of the follower, which lets the writer take its turn before each operation."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __getattr__(self, name: str) -> Any:
        return getattr(self._world.disk, name)

    def give_way(self, pause_s: float) -> None:
        self._world.disk.give_way(pause_s)
        if pause_s > 0.06 and self._world.is_recovering:
            # It is not stopped.
            self._world.advance(1)

    def open_directory(self, path: str) -> _Looking:
        return _Looking(self._world, self._world.disk.open_directory(path))


class _Looking:
    """A directory or a file of the follower. What would write is refused."""

    def __init__(self, world: World, there: Any) -> None:
        self._world = world
        self._there = there

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._there, name)
        if name in ("pread", "names", "kind", "open", "size"):

            def look(*args: Any, **options: Any) -> Any:
                self._world.look()
                result = found(*args, **options)
                return _Looking(self._world, result) if name == "open" else result

            return look
        if name in ("datasync", "sync"):

            def flush() -> None:
                self._world.look()
                found()
                if getattr(self._there, "path", None) == PATH:
                    self._world.flushed()

            return flush
        assert name in ("close", "path", "inherited", "free_bytes", "identity"), f"a follower called {name}"
        return found

    def lock(self, *, shared: bool, mode: int = 0o600, recovers: bool = False) -> None:
        assert shared
        assert not recovers
        self._world.look()
        if self._world.is_locked:
            raise kvwal.LockedError(PATH, None, own=False)

    def again(self) -> _Looking:
        return _Looking(self._world, self._there.again())

    def is_recovering(self) -> bool:
        self._world.look()
        return self._world.is_recovering


class Follow:
    """A follower whose every answer is checked against what the writer did."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._follower = world.follow()
        self._seqno = -1
        self.check()

    def check(self) -> None:
        """It shows the state after one commit, which is durable and not before the one that it showed last."""
        follower, world = self._follower, self._world
        seqno = follower.seqno
        assert self._seqno <= seqno <= world.durable, (self._seqno, seqno, world.durable)
        self._seqno = seqno

    def refresh(self) -> None:
        # The newest segment says that all before it is on disk.
        least = max(list_segments(self._world.disk.open_directory(PATH))) - 1
        self._follower.refresh()
        assert self._follower.seqno >= least
        self.check()

    def _forget(self) -> None:
        """Have the next read look into the file."""
        engine: Any = self._follower.engine
        engine.state.cache.clear()
        engine._pages.pager.cache.resize(0)

    def scan(self) -> None:
        follower = self._follower
        self._forget()
        # One leaf, which is the first chunk: that is read again where it is gone.
        found = dict(follower.items())
        before, self_seqno = self._seqno, follower.seqno
        self.check()
        assert found in self._world.recorded.states[before : self_seqno + 1], (before, self_seqno, found)

    def get(self) -> None:
        follower, states = self._follower, self._world.recorded.states
        for key in sorted({key for state in states for key in state}):
            self._forget()
            found = follower.get(key)
            before = self._seqno
            self.check()
            assert found in [state.get(key) for state in states[before : follower.seqno + 1]], (key, before, found)

    def count(self) -> None:
        self._forget()
        found = len(self._follower)
        before = self._seqno
        self.check()
        assert found in [len(state) for state in self._world.recorded.states[before : self._follower.seqno + 1]]

    def snapshot(self) -> Iterator[bool]:
        """Takes a snapshot, and reads it each time it is asked; whether it is still there."""
        with self._follower.snapshot() as snapshot:
            self.check()
            state = self._world.recorded.states[snapshot.seqno]
            there = True
            while there:
                yield there
                try:
                    assert dict(snapshot.items()) == state
                    assert all(snapshot.get(key) == value for key, value in state.items())
                except kvwal.SnapshotTooOld as error:
                    assert error.asked == snapshot.seqno
                    there = False
            while True:
                yield there

    def end(self) -> None:
        """The writer comes to its end, which is clean, and the follower sees all of it."""
        self._world.advance(len(self._world.recorded.steps))
        self.refresh()
        assert self._follower.seqno == len(self._world.recorded.states) - 1
        self.scan()
        self.close()

    def close(self) -> None:
        self._follower.close()
