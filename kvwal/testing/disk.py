"""A disk in memory whose power can be cut at any instant: the fault model of kvwal's crash tests.

What a power cut (`SimulatedDisk.crash`) may leave, which is everything that POSIX does not rule out:

1. A write that no sync covered survives whole, in part (any subset of the 512-byte sectors it covers) or
   not at all, independently of every other write to the same or another file, earlier or later.
2. A file's new size survives or not, independently of the data. Where it survives and the data does
   not, the bytes are zeros, or (`stale=True`) what was once written to this disk elsewhere. Where the
   data survives and the size does not, the data is gone.
3. `datasync` makes data durable, and of the size only as much as is needed to read that data back: a
   preallocation or a truncate may still be lost. `sync` makes both durable. Neither makes a name durable.
4. A creation, rename or removal survives once the `sync` of its directory returned; before that any subset does. A
   rename is atomic, and a name may survive whose file content did not.
5. Preallocation is not data: it reads as zeros, and what was written into it unsynced may read as zeros.
6. Bytes that a sync covered stay as they are, unless a fault below is asked for.

What a killed process (`SimulatedDisk.kill`) leaves: everything, in the page cache; its handles and locks
are gone. What was pending stays pending.

Faults on demand:

7. The nth operation of a kind fails, once or for good, with any errno (`fail`): before anything was done, or
   after a part or all of it was. ENOSPC also comes from a `capacity`.
8. After a failed sync of a file the dirty data is dropped, except for what happened to reach the medium (`effect`).
   Reads go on to show it until the power is cut, and a later sync succeeds without writing it, as on Linux. After a
   failed sync of a directory its entries are as pending as before.
9. A write that reports success and never reaches the medium (`lose_write`) or reaches it elsewhere
   (`misdirect_write`); reads show it right until the power is cut or `drop_caches`.
10. At rest: flipped bits and overwritten, truncated or missing files (`flip`, `damage`, `cut`, `remove`).
11. A wall clock that jumps (`jump_clock`; `pass_time` moves both). A monotonic clock does not.

Short reads and writes and EINTR end below `kvwal.files.protocol` (the system's loops hide them), so here a
write that raises after a part of it was done stands for them.

Everything is deterministic: the same calls on a disk of the same seed give the same bytes.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from copy import copy
from hashlib import blake2b
from random import Random
from time import sleep
from typing import Final

from kvwal.files.protocol import EntryKind
from kvwal.testing.content import PAGE
from kvwal.testing.directory import SimulatedDirectory, kind_of
from kvwal.testing.faults import FAMILIES, Effect, Fault, Operation, failure, raise_after, raise_before
from kvwal.testing.inode import Directory, Entry, Inode, Process
from kvwal.testing.states import Piece, States, Survivors, copy_tree, tree_key, walk

__all__ = ["SimulatedDisk"]

_PID: Final = 4242
_START_US: Final = 1_700_000_000_000_000
_STALE_PAGES: Final = 64
_READS: Final = frozenset(("open", "open_directory", "pread", "list_directory"))


class SimulatedDisk:
    """A `kvwal.files.protocol.Files` in memory; the module's docstring is its fault model.

    Pass it as `kvwal.open(path, files=disk)`. Every directory but "/" has to be made first. Thread-safe; one
    disk stands for one machine, on which one process runs until `kill`.

    Attributes:
        seed: what all randomness here derives from.
        operations: number of the last operation, from 1.
        capacity: bytes of space, or None for no limit. May be set at any time.
        clock_us: what the wall clock shows; each look at it takes a microsecond.
        trace: a list to which every `Operation` is appended, or None (the default).
        watcher: called with each `Operation` but the reads before it is done, while the disk holds still: the
            place to look at `states`, or to raise what should interrupt the program. None by default.
    """

    def __init__(self, *, seed: int = 0, capacity: int | None = None) -> None:
        self.seed = seed
        self.operations = 0
        self.capacity = capacity
        self.clock_us = _START_US
        self.trace: list[Operation] | None = None
        self.watcher: Callable[[Operation], None] | None = None
        self.process = Process(_PID)
        self.mutex = threading.RLock()
        self._elapsed_us = 0
        self._drawn = 0
        self._random: Random | None = None
        self._orphans: list[Inode] = []
        self._root = Directory()
        self._faults: list[Fault] = []
        # Old content by page number, for `stale`.
        self._stale: dict[int, bytes] = {}

    # --- what a program may do: kvwal.files.protocol.Files ---

    def open_directory(self, path: str) -> SimulatedDirectory:
        with self.mutex:
            raise_after(self.begin("open_directory", path), path)
            return SimulatedDirectory(self, self._directory(path), path)

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        with self.mutex:
            directory, name = self._place(path)
            fault = self.begin("make_directory", path)
            raise_before(fault, path)
            if name in directory.entries:
                raise failure(errno.EEXIST, path)
            directory.change(Entry(self.operations, "", name, Directory(directory)))
            raise_after(fault, path)

    def now_us(self) -> int:
        with self.mutex:
            self.clock_us += 1
            self._elapsed_us += 1
            return self.clock_us

    def monotonic_s(self) -> float:
        with self.mutex:
            self._elapsed_us += 1
            return self._elapsed_us / 1e6

    def random_bytes(self, size: int) -> bytes:
        with self.mutex:
            parts = bytearray()
            while len(parts) < size:
                self._drawn += 1
                parts += blake2b(b"%d %d" % (self.seed, self._drawn)).digest()
            return bytes(parts[:size])

    def give_way(self, pause_s: float) -> None:
        if threading.active_count() > 1:
            sleep(0)

    # --- power, processes and what may be found afterwards ---

    def states(self) -> States:
        """What is pending now, and all the disks that a power cut at this instant may leave."""
        return States(self._root)

    def pending(self) -> list[Piece]:
        """What may survive a power cut on its own, or not, oldest first."""
        return self.states().pieces

    def crash(self, survivors: Survivors = 0, *, stale: bool = False) -> SimulatedDisk:
        """The disk as it may be found after a power cut at this instant. This one is not changed.

        `survivors` says which of the `pending` pieces reached the medium: a bit mask (bit 0 is the first; 0
        is the default: nothing survives; -1: everything does), a function of the `Piece`, or a
        `random.Random` that throws a coin for each. `stale`: new space without its data shows old bytes of the disk
        rather than zeros. The new disk has no faults set and no locks held.
        """
        with self.mutex:
            found = self._successor()
            found._root = self.states().found(survivors, self._stale if stale else None)
            return found

    def copy(self) -> SimulatedDisk:
        """The machine as it is, page cache and pending pieces and all, with no process running on it."""
        with self.mutex:
            other = self._successor()
            other._root = copy_tree(self._root, {})
            return other

    def kill(self) -> None:
        """End the process (SIGKILL): handles stop working, locks are free, the page cache stays."""
        with self.mutex:
            self.process.alive = False
            self.process = Process(_PID, self.process.record_locks)

    def beside(self) -> SimulatedDisk:
        """The same files for another process, which runs beside this one: `kill` ends that process alone.

        Clocks, operation numbers and randomness go on apart. For programs that take turns, not for power cuts.
        """
        other = copy(self)
        other.process = Process(_PID + 1, self.process.record_locks)
        return other

    def drop_caches(self) -> None:
        """Make reads of every file without pending changes show what is on the medium (faults 8 and 9)."""
        with self.mutex:
            for _, node in walk(self._root):
                if isinstance(node, Inode):
                    node.drop_cache()

    def fingerprint(self) -> int:
        """A number that is equal for equal contents (names, sizes, bytes) on the medium."""
        with self.mutex:
            return hash(tree_key(self._root))

    def _successor(self) -> SimulatedDisk:
        other = SimulatedDisk.__new__(SimulatedDisk)
        other.seed = self.seed
        other.operations = self.operations
        other.capacity = self.capacity
        other.clock_us = self.clock_us
        other.trace = None
        other.watcher = None
        other._random = None
        other.process = Process(_PID)
        other.mutex = threading.RLock()
        other._elapsed_us = self._elapsed_us
        other._drawn = self._drawn
        other._faults = []
        other._orphans = []
        other._stale = self._stale
        return other

    # --- faults ---

    def fail(
        self,
        op: str = "any",
        nth: int = 1,
        error: int = errno.EIO,
        *,
        forever: bool = False,
        path: str = "*",
        effect: Effect = "none",
    ) -> Fault:
        """Let the nth operation from now on fail with `error`; with `forever`, all that follow too.

        `op` is the name of an operation (as in `Operation.name`) or of a family: "read", "write", "fsync", "change",
        "any". `path` is a pattern such as "*.log". `effect` says what is done before it fails: "none", "part" (a
        random part), "all". The fault returned counts in `struck` how often it was met.
        """
        return self._plan(Fault(FAMILIES.get(op, (op,)), nth, error, forever, path, effect))

    def lose_write(self, nth: int = 1, *, path: str = "*") -> Fault:
        """The nth write from now on succeeds and never reaches the medium."""
        return self._plan(Fault(("pwrite",), nth, 0, False, path, "lost"))

    def misdirect_write(self, nth: int = 1, *, by: int, path: str = "*") -> Fault:
        """The nth write from now on succeeds and reaches the medium `by` bytes off."""
        return self._plan(Fault(("pwrite",), nth, 0, False, path, "misdirected", by))

    def heal(self) -> None:
        """Forget all faults that were asked for. What they did stays done."""
        self._faults = []

    def jump_clock(self, delta_us: int) -> None:
        """Set the wall clock forward, or back if negative."""
        self.clock_us += delta_us

    def pass_time(self, seconds: float) -> None:
        """Let time pass, on both clocks."""
        with self.mutex:
            self.clock_us += int(seconds * 1e6)
            self._elapsed_us += int(seconds * 1e6)

    def kind(self, path: str) -> EntryKind | None:
        """What is there. Counts as no operation and meets no fault."""
        with self.mutex:
            node = self._node(path)
        return None if node is None else kind_of(node)

    def read(self, path: str) -> bytes:
        """What programs see in the file. Counts as no operation and meets no fault."""
        shown = self._file(path).shown
        return shown.read(shown.size, 0)

    def flip(self, path: str, offset: int, bit: int = 0) -> None:
        """Flip one bit of the file at rest."""
        byte = self.read(path)[offset]
        self.damage(path, offset, bytes((byte ^ 1 << bit,)))

    def damage(self, path: str, offset: int, data: bytes) -> None:
        """Overwrite bytes of the file at rest."""
        inode = self._file(path)
        for content in (inode.shown, inode.medium):
            content.write(offset, data)
            content.size = max(content.size, offset + len(data))

    def cut(self, path: str, size: int) -> None:
        """Truncate the file at rest."""
        inode = self._file(path)
        for content in (inode.shown, inode.medium):
            content.cut(size)
            content.size = min(content.size, size)

    def remove(self, path: str) -> None:
        """Make the file, or the directory with all in it, disappear at rest."""
        node = self._node(path)
        if isinstance(node, Directory):
            for name in list(node.entries):
                self.remove(f"{path}/{name}")
            node.removed = True
        directory, name = self._place(path)
        for entries in (directory.entries, directory.medium):
            entries.pop(name, None)

    def move(self, source: str, target: str) -> None:
        """Rename the file or directory at rest; nothing of the new name may be there."""
        old, old_name = self._place(source)
        new, new_name = self._place(target)
        node = old.entries[old_name]
        for entries in (old.entries, old.medium):
            entries.pop(old_name, None)
        for entries in (new.entries, new.medium):
            entries[new_name] = node
        if isinstance(node, Directory):
            node.parent = new

    def used_bytes(self) -> int:
        """Space that files take, in whole blocks; an unlinked file counts as long as it is open."""
        files = {id(node): node for _, node in walk(self._root, shown=True) if isinstance(node, Inode)}
        files.update((id(node), node) for node in self._orphans if node.handles)
        return sum(node.shown.blocks() for node in files.values()) * PAGE

    def free_bytes(self) -> int:
        """Space left under `capacity`."""
        return (1 << 62) if self.capacity is None else self.capacity - self.used_bytes()

    # --- for SimulatedDirectory and SimulatedFile ---

    @property
    def random(self) -> Random:
        """The generator that fault effects draw from."""
        if self._random is None:
            self._random = Random(f"{self.seed} {self.operations}")
        return self._random

    def begin(self, name: str, path: str, offset: int = 0, size: int = 0) -> Fault | None:
        """Count an operation, show it to trace and watcher, and find the fault that it meets."""
        self.operations += 1
        if self.trace is not None or self.watcher is not None:
            operation = Operation(self.operations, name, path, offset, size)
            if self.trace is not None:
                self.trace.append(operation)
            if self.watcher is not None and name not in _READS:
                self.watcher(operation)
        struck = None
        for fault in self._faults:
            if fault.strikes(name, path):
                struck = fault
        return struck

    def fitting(self, inode: Inode, offset: int, size: int) -> int:
        """How many of `size` bytes at `offset` can be written before the disk is full."""
        if self.capacity is None:
            return size
        free = self.free_bytes()
        while size and inode.shown.new_blocks(offset, size) * PAGE > free:
            # Leave out the last block: a write stops where the space ends.
            size = max(0, (offset + size - 1) // PAGE * PAGE - offset)
        return size

    def remember(self, node: Inode | Directory) -> None:
        """Keep what a file held, because another file may get its space and show it (`stale`)."""
        if isinstance(node, Inode):
            self._stale = dict(list((self._stale | node.shown.pages).items())[-_STALE_PAGES:])
            if node.handles:
                self._orphans.append(node)

    def _plan(self, fault: Fault) -> Fault:
        self._faults.append(fault)
        return fault

    def _node(self, path: str) -> Inode | Directory | None:
        node: Inode | Directory | None = self._root
        for name in path.split("/"):
            if name:
                node = node.entries.get(name) if isinstance(node, Directory) else None
        return node

    def _directory(self, path: str) -> Directory:
        node = self._node(path)
        if node is None:
            raise failure(errno.ENOENT, path)
        if isinstance(node, Inode):
            raise failure(errno.ENOTDIR, path)
        return node

    def _place(self, path: str) -> tuple[Directory, str]:
        parent, _, name = path.rstrip("/").rpartition("/")
        return self._directory(parent), name

    def _file(self, path: str) -> Inode:
        node = self._node(path)
        if not isinstance(node, Inode):
            raise failure(errno.ENOENT, path)
        return node
