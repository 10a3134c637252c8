"""What kvwal asks of a file system, a clock and a source of randomness.

Rules for every implementation:

- Offsets and sizes are in bytes. Paths are `str` and are made by `join`.
- A call that fails raises `OSError` with its errno; ENOSPC and EIO must be told apart.
- `File.pread` returns fewer bytes than asked for only at the end of the file, never because a
  system call was cut short.
- `File.pwrite` writes all or raises; after it raised, any part may have been written.
- Nothing is durable before `datasync` or `sync` returned, no directory entry before
  `sync_directory` returned. Nothing here retries a failed flush.
- The last part of a path is never followed if it is a symbolic link: such an open fails.
- All methods may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

__all__ = ["Buffer", "EntryKind", "File", "Files", "LockHandle"]

Buffer: TypeAlias = bytes | bytearray | memoryview

EntryKind: TypeAlias = Literal["file", "directory", "other"]


class File(Protocol):
    """An open file, addressed by offset. It has no position of its own."""

    def pread(self, size: int, offset: int) -> bytes:
        """Up to `size` bytes from `offset`; fewer only where the file ends."""
        ...

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`, growing the file if needed. Not durable on return."""
        ...

    def pwrite_all(self, chunks: Sequence[Buffer], offset: int) -> None:
        """Write the chunks one after the other from `offset`, as `pwrite` would their concatenation."""
        ...

    def datasync(self) -> None:
        """Make written data, and a size needed to read it back, durable."""
        ...

    def sync(self) -> None:
        """Make data and all metadata durable."""
        ...

    def allocate(self, offset: int, size: int) -> None:
        """Reserve space so that writes there cannot meet a full disk. New space reads as zeros."""
        ...

    def truncate(self, size: int) -> None:
        """Cut or extend (with zeros) to `size`. Not durable on return."""
        ...

    def size(self) -> int:
        """Size in bytes now."""
        ...

    def close(self) -> None:
        """Release the handle. Idempotent. Does not flush."""
        ...


class LockHandle(Protocol):
    """A held lock on a store."""

    def release(self) -> None:
        """Let the lock go. Idempotent."""
        ...

    def abandon(self) -> None:
        """In a forked child: drop the handle without touching the parent's lock."""
        ...


class Files(Protocol):
    """A file system with a clock and randomness, seen from one process."""

    def join(self, directory: str, name: str) -> str:
        """The path of `name` in `directory`."""
        ...

    def kind(self, path: str) -> EntryKind | None:
        """What is at `path`, not following a final symbolic link ("other"); None if nothing is."""
        ...

    def directory_kind(self, path: str) -> EntryKind | None:
        """Like `kind`, but a symbolic link is followed: for the store's own directory, which the user names."""
        ...

    def open(self, path: str, *, write: bool = False, create: bool = False, mode: int = 0o600) -> File:
        """Open a file. `create` demands that it does not exist yet (exclusive) and implies `write`."""
        ...

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        """Create one directory; its parent must exist. Not durable before the parent is synced."""
        ...

    def list_directory(self, path: str) -> list[str]:
        """Names in the directory, in no order."""
        ...

    def rename(self, source: str, target: str) -> None:
        """Atomically rename within one directory, replacing the target. Not durable on return."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a file. Not durable on return."""
        ...

    def sync_directory(self, path: str) -> None:
        """Make creations, renames and removals in the directory durable."""
        ...

    def parent(self, path: str) -> str:
        """The directory that holds `path`."""
        ...

    def lock(self, path: str, *, shared: bool, mode: int = 0o600) -> LockHandle:
        """Take a lock at once or raise `LockedError`.

        An exclusive lock creates the file if needed and writes the pid into it. A shared one
        writes nothing, and where the file is missing and cannot be made, holds nothing.
        """
        ...

    def now_us(self) -> int:
        """Wall clock, microseconds since 1970-01-01 UTC. It may step back."""
        ...

    def monotonic_s(self) -> float:
        """A clock in seconds that never steps back."""
        ...

    def random_bytes(self, size: int) -> bytes:
        """Unpredictable bytes, for salts and identities."""
        ...

    def give_way(self, pause_s: float) -> None:
        """Let other threads run for so many seconds; called often by long background work. 0: as short as possible."""
        ...


