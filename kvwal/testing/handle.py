"""An open file of a simulated disk."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvwal.errors import StoreRemovedError
from kvwal.files.protocol import Buffer
from kvwal.testing.content import PAGE
from kvwal.testing.faults import Fault, failure, raise_after
from kvwal.testing.inode import Directory, Inode

if TYPE_CHECKING:
    from kvwal.testing.disk import SimulatedDisk

__all__ = ["SimulatedFile"]


class SimulatedFile:
    """An open file of a `SimulatedDisk`; see `kvwal.files.protocol.File`."""

    __slots__ = ("_directory", "_disk", "_inode", "_open", "_path", "_process", "_write", "flush_failure")

    def __init__(self, disk: SimulatedDisk, inode: Inode, directory: Directory, path: str, write: bool) -> None:
        self._disk = disk
        self._directory = directory
        self._inode = inode
        self._path = path
        self._write = write
        self._process = disk.process
        self._open = True
        self.flush_failure: OSError | None = None
        inode.handles += 1

    def _begin(self, name: str, offset: int, size: int) -> Fault | None:
        self._refuse_if_over()
        # POSIX flushes by any descriptor.
        if not self._write and name not in ("pread", "datasync", "sync"):
            raise OSError(errno.EBADF, "the file is not open for writing", self._path)
        return self._disk.begin(name, self._path, offset, size)

    def pread(self, size: int, offset: int) -> bytes:
        with self._disk.mutex:
            fault = self._begin("pread", offset, size)
            if fault:
                raise failure(fault.error, self._path)
            return self._inode.shown.read(size, offset)

    def pwrite(self, data: Buffer, offset: int) -> None:
        with self._disk.mutex:
            fault = self._begin("pwrite", offset, len(data))
            data = bytes(data)
            disk = self._disk
            lands_at: int | None = offset
            if fault:
                if fault.effect == "lost":
                    lands_at = None
                elif fault.effect == "misdirected":
                    lands_at = max(0, offset + fault.by)
                elif fault.effect == "part":
                    data = data[: disk.random.randrange(len(data))] if data else data
                elif fault.effect == "none":
                    data = b""
            fits = disk.fitting(self._inode, offset, len(data))
            self._inode.write(disk.operations, offset, data[:fits], lands_at)
            if fits < len(data):
                raise failure(errno.ENOSPC, self._path, "write")
            raise_after(fault, self._path, "write")

    def pwrite_all(self, chunks: Sequence[Buffer], offset: int) -> None:
        for chunk in chunks:
            self.pwrite(chunk, offset)
            offset += len(chunk)

    def datasync(self) -> None:
        self._flush("datasync", data_only=True)

    def sync(self) -> None:
        self._flush("sync", data_only=False)

    def _flush(self, name: str, *, data_only: bool) -> None:
        with self._disk.mutex:
            fault = self._begin(name, 0, 0)
            if fault is None:
                self._inode.sync(data_only=data_only)
                if not self._is_named():
                    raise StoreRemovedError(errno.ENOENT, "the file was removed", self._path)
                return
            # First: a system loses it and says so in one step.
            self.flush_failure = failure(fault.error, self._path, "flush")
            self._inode.fail_sync(fault.survivors(sum(1 for _ in self._inode.pieces()), self._disk))
            raise_after(fault, self._path, "flush")

    def allocate(self, offset: int, size: int) -> None:
        with self._disk.mutex:
            fault = self._begin("allocate", offset, size)
            if fault is None or fault.effect == "all":
                inode = self._inode
                end = offset + size
                disk = self._disk
                if inode.shown.new_blocks(0, end) * PAGE > disk.free_bytes():
                    raise failure(errno.ENOSPC, self._path)
                inode.shown.reserve(end)
                if end > inode.shown.size:
                    inode.resize(disk.operations, end, exact=False)
            raise_after(fault, self._path)

    def truncate(self, size: int) -> None:
        with self._disk.mutex:
            fault = self._begin("truncate", size, 0)
            if fault is None or fault.effect == "all":
                inode = self._inode
                if size < inode.shown.size:
                    self._disk.remember(inode)
                if size != inode.shown.size:
                    inode.resize(self._disk.operations, size, exact=True)
            raise_after(fault, self._path, "write")

    def _is_named(self) -> bool:
        return any(node is self._inode for node in self._directory.entries.values())

    def _refuse_if_over(self) -> None:
        if not self._open or self._process is not self._disk.process:
            raise OSError(errno.EBADF, "the file is closed, or its process was killed", self._path)

    def size(self) -> int:
        self._refuse_if_over()
        return self._inode.shown.size

    def identity(self) -> object:
        self._refuse_if_over()
        return self._inode

    def has_name(self) -> bool:
        with self._disk.mutex:
            self._refuse_if_over()
            return self._is_named()

    def lock_record(self) -> bool:
        with self._disk.mutex:
            fault = self._begin("lock", 0, 0)
            if fault:
                raise failure(fault.error, self._path)
            if self.holder() is not None:
                return False
            self._process.record_locks[self._inode] = self._process
            return True

    def holder(self) -> int | None:
        with self._disk.mutex:
            self._refuse_if_over()
            found = self._process.record_locks.get(self._inode)
            return None if found is None or found is self._process or not found.alive else found.pid

    def close(self) -> None:
        if self._open:
            self._open = False
            self._inode.handles -= 1
            if self._process.record_locks.get(self._inode) is self._process:
                del self._process.record_locks[self._inode]
