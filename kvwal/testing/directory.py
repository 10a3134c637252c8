"""An open directory of a simulated disk, in which a program reaches its files by name."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kvwal.errors import LockedError, StoreRemovedError
from kvwal.files.protocol import EntryKind
from kvwal.testing.faults import failure, raise_after, raise_before
from kvwal.testing.handle import SimulatedFile
from kvwal.testing.inode import Directory, Entry, Inode

if TYPE_CHECKING:
    from kvwal.testing.disk import SimulatedDisk

__all__ = ["SimulatedDirectory", "kind_of"]


def kind_of(node: Inode | Directory) -> EntryKind:
    """As `kvwal.files.protocol.Directory.kind` says it."""
    return "file" if isinstance(node, Inode) else "directory"


class SimulatedDirectory:
    """An open directory of a `SimulatedDisk`; see `kvwal.files.protocol.Directory`."""

    __slots__ = ("_disk", "_lock", "_node", "_open", "_process", "path")

    def __init__(self, disk: SimulatedDisk, node: Directory, path: str) -> None:
        self.path = path
        self._disk = disk
        self._node = node
        self._process = disk.process
        self._open = True
        self._lock = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SimulatedDirectory) and self._node is other._node and self._process is other._process

    def __hash__(self) -> int:
        return id(self._node)

    @property
    def inherited(self) -> bool:
        return False

    def _entries(self) -> dict[str, Inode | Directory]:
        if not self._open or self._process is not self._disk.process:
            raise OSError(errno.EBADF, "the directory is closed, or its process was killed", self.path)
        return self._node.entries

    def _path(self, name: str) -> str:
        return f"{self.path.rstrip('/')}/{name}"

    def kind(self, name: str) -> EntryKind | None:
        with self._disk.mutex:
            node = self._entries().get(name)
            return None if node is None else kind_of(node)

    def names(self) -> list[str]:
        with self._disk.mutex:
            entries = self._entries()
            raise_after(self._disk.begin("list_directory", self.path), self.path)
            # In no order, but the same one every time.
            return sorted(entries, reverse=True)

    def open(
        self, name: str, *, write: bool = False, create: bool = False, bulk: bool = False, mode: int = 0o600
    ) -> SimulatedFile:
        del bulk  # What is not flushed may be on this disk or not as it is.
        disk, path = self._disk, self._path(name)
        with disk.mutex:
            entries = self._entries()
            fault = disk.begin("create" if create else "open", path)
            raise_before(fault, path)
            node = entries.get(name)
            if create:
                if self._node.removed:
                    raise StoreRemovedError(errno.ENOENT, "the directory was removed", self.path)
                if node is not None:
                    raise failure(errno.EEXIST, path)
                if disk.free_bytes() <= 0:
                    raise failure(errno.ENOSPC, path)
                node = Inode()
                self._node.change(Entry(disk.operations, "", name, node))
            if node is None:
                raise failure(errno.ENOENT, path)
            if isinstance(node, Directory):
                raise failure(errno.EISDIR, path)
            raise_after(fault, path)
            return SimulatedFile(disk, node, self._node, path, write or create)

    def rename(self, source: str, target: str, *, replace: bool = True) -> None:
        disk, path = self._disk, self._path(source)
        with disk.mutex:
            entries = self._entries()
            fault = disk.begin("rename", self._path(target))
            raise_before(fault, path)
            node = entries.get(source)
            if node is None:
                raise failure(errno.ENOENT, path)
            replaced = entries.get(target)
            if not replace:
                if replaced is not None:
                    raise failure(errno.EEXIST, path)
                # Two changes: the power may be cut between them.
                self._node.change(Entry(disk.operations, "", target, node))
                self._node.change(Entry(disk.operations, source, "", None))
                raise_after(fault, path)
                return
            if isinstance(replaced, Inode):
                disk.remember(replaced)
            if source != target:
                self._node.change(Entry(disk.operations, source, target, node))
            raise_after(fault, path)

    def unlink(self, name: str) -> None:
        disk, path = self._disk, self._path(name)
        with disk.mutex:
            entries = self._entries()
            fault = disk.begin("unlink", path)
            raise_before(fault, path)
            node = entries.get(name)
            if node is None:
                raise failure(errno.ENOENT, path)
            if isinstance(node, Directory):
                raise failure(errno.EISDIR, path)
            disk.remember(node)
            self._node.change(Entry(disk.operations, name, "", None))
            raise_after(fault, path)

    def again(self) -> SimulatedDirectory:
        disk = self._disk
        with disk.mutex:
            self._entries()
            raise_after(disk.begin("open_directory", self.path), self.path)
            return SimulatedDirectory(disk, self._node, self.path)

    def inner(self, name: str, *, make: bool) -> SimulatedDirectory:
        disk, path = self._disk, self._path(name)
        with disk.mutex:
            entries = self._entries()
            node = entries.get(name)
            if node is None and make:
                fault = disk.begin("make_directory", path)
                raise_before(fault, path)
                node = Directory(self._node)
                self._node.change(Entry(disk.operations, "", name, node))
                raise_after(fault, path)
            raise_after(disk.begin("open_directory", path), path)
            if node is None:
                raise failure(errno.ENOENT, path)
            if isinstance(node, Inode):
                raise failure(errno.ENOTDIR, path)
            return SimulatedDirectory(disk, node, path)

    def sync(self) -> None:
        self._sync(self._node, self.path)

    def free_bytes(self) -> int:
        with self._disk.mutex:
            self._entries()
            return max(0, self._disk.free_bytes())

    def sync_parent(self) -> None:
        self._sync(self._node.parent, self.path.rstrip("/").rpartition("/")[0] or "/")

    def _sync(self, node: Directory, path: str) -> None:
        disk = self._disk
        with disk.mutex:
            self._entries()
            fault = disk.begin("sync_directory", path)
            if fault is None:
                node.sync()
                return
            node.fail_sync(fault.survivors(len(node.pending), disk))
            raise_after(fault, path, "flush")

    def lock(self, *, shared: bool, mode: int = 0o600, recovers: bool = False) -> None:
        disk, path = self._disk, self._path("lock")
        with disk.mutex:
            entries = self._entries()
            raise_after(disk.begin("lock", path), path)
            held = self._process.locks.get(self._node, 0)
            if held < 0 or (held and not shared):
                raise LockedError(self.path, self._process.pid, own=True)
            if not shared:
                node = entries.get("lock")
                if node is None:
                    node = Inode()
                    self._node.change(Entry(disk.operations, "", "lock", node))
                if isinstance(node, Inode):
                    # Programs read nothing but the pid back from it, so its content gets no crash states.
                    node.write(disk.operations, 0, b"%d\n" % self._process.pid, 0)
                    node.sync(data_only=False)
            self._lock = 1 if shared else -1
            self._process.locks[self._node] = held + self._lock
            if recovers:
                self._process.recovering.add(self._node)

    def recovered(self) -> None:
        self._process.recovering.discard(self._node)

    def is_recovering(self) -> bool:
        return self._node in self._process.recovering

    def close(self) -> None:
        with self._disk.mutex:
            if self._lock < 0:
                self._process.recovering.discard(self._node)
            # Interrupted behind the first of these, it is called again.
            held = self._process.locks.pop(self._node, 0) if self._lock else 0
            if held and held != self._lock:
                self._process.locks[self._node] = held - self._lock
            self._lock = 0
            self._open = False
