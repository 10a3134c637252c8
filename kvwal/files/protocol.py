"""What kvwal asks of a file system, a clock and a source of randomness.

Rules for every implementation:

- Offsets and sizes are in bytes.
- A store is its directory, not its path: `Files.open_directory` resolves the path once, and every file is reached
  through that `Directory` by its name, wherever the directory is moved to, and whatever takes its place.
- A call that fails raises what `kvwal.files.failures.failed` makes of it: an `OSError` with its errno, which says what
  to do, and whether anything was done.
- `File.pread` returns fewer bytes than asked for only at the end of the file, never because a
  system call was cut short.
- `File.pwrite` writes all or raises; after it raised, any part may have been written.
- Nothing is durable before `datasync` or `sync` returned, no directory entry before
  `Directory.sync` returned. Nothing here retries a failed flush.
- A name that is a symbolic link is never followed: such an open fails.
- All methods may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

__all__ = ["Buffer", "Directory", "EntryKind", "File", "Files", "end_recovery", "inside", "is_recovering"]

Buffer: TypeAlias = bytes | bytearray | memoryview

EntryKind: TypeAlias = Literal["file", "directory", "other"]


class FileItself(Protocol):
    """What is asked of an open file beside its bytes: which one it is, whether it has its name, and who has it."""

    def identity(self) -> object:
        """Equal for two that are open if they are the same file, whatever name it has by now."""
        ...

    def has_name(self) -> bool:
        """Whether it still has the one name that it had when this was asked first, and never had another.

        Not when it was unlinked, nor when a hard link was made to it: that would stay behind.
        """
        ...

    def lock_record(self) -> bool:
        """Lock the file for this process, or False if another one has it. It must be open for writing.

        The lock goes when the process ends, however it does, and when it closes *any* handle of the file. A forked
        child does not inherit it.
        """
        ...

    def holder(self) -> int | None:
        """The process that has the lock, as far as the system tells its id (else 0); None if no other one has it."""
        ...


class File(FileItself, Protocol):
    """An open file, addressed by offset. It has no position of its own."""

    #: What `datasync` or `sync` failed with last. It is noted first: an interruption may take its place on the way, and
    #: the system says only once that it has lost what was written.
    flush_failure: OSError | None

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
        """Make written data, and a size needed to read it back, durable. On POSIX also by a handle that only reads."""
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


class Directory(Protocol):
    """An open directory. A `name` is that of an entry in it, never a path.

    Two that are open are equal if they are the same directory, by whatever paths it was reached.
    """

    @property
    def path(self) -> str:
        """As it was given to `Files.open_directory`. For messages only: another directory may be there by now."""
        ...

    @property
    def inherited(self) -> bool:
        """Whether another process opened it, and this one was forked from that, seen by the interpreter or not.

        Every other call but `close` then raises `ForkedError`, also of the files that were opened through it.
        """
        ...

    def kind(self, name: str) -> EntryKind | None:
        """What `name` is, not following a symbolic link ("other"); None if there is nothing of that name."""
        ...

    def names(self) -> list[str]:
        """Names in the directory, in no order."""
        ...

    def open(
        self, name: str, *, write: bool = False, create: bool = False, bulk: bool = False, mode: int = 0o600
    ) -> File:
        """Open a file. `create` demands that it does not exist yet (exclusive) and implies `write`.

        `bulk`: much is written to it once, from its beginning to its end. The system may begin to bring that on disk
        before a flush asks for it.
        """
        ...

    def rename(self, source: str, target: str, *, replace: bool = True) -> None:
        """Atomically rename a file, replacing the target. Not durable on return.

        Without `replace`, FileExistsError if the target is there, also if it came just now. A file may then have both
        names, after a power cut or a failure.
        """
        ...

    def unlink(self, name: str) -> None:
        """Remove a file. Not durable on return."""
        ...

    def sync(self) -> None:
        """Make creations, renames and removals in the directory durable."""
        ...

    def free_bytes(self) -> int:
        """Space that files in it may still take."""
        ...

    def sync_parent(self) -> None:
        """Make the directory's own entry, in the directory that holds it, durable."""
        ...

    def lock(self, *, shared: bool, mode: int = 0o600, recovers: bool = False) -> None:
        """Lock the directory as a store, until it is closed; at once, or raise `LockedError`.

        An exclusive lock leaves in the file `lock` who holds it, and whether that recovers the store: until
        `end_recovery`. A shared one writes nothing.
        """
        ...

    def recovered(self) -> None:
        """See `end_recovery`."""
        ...

    def is_recovering(self) -> bool:
        """See `is_recovering`."""
        ...

    def again(self) -> Directory:
        """See `opened_again`."""
        ...

    def inner(self, name: str, *, make: bool) -> Directory:
        """See `inside`."""
        ...

    def close(self) -> None:
        """Release the handle and the lock. Idempotent. In a forked child the lock stays the parent's."""
        ...


class Files(Protocol):
    """A file system with a clock and randomness, seen from one process."""

    def open_directory(self, path: str) -> Directory:
        """Open the directory at `path`; a symbolic link is followed, since the user names this one.

        Raises FileNotFoundError where there is nothing, NotADirectoryError where there is something else.
        """
        ...

    def make_directory(self, path: str, mode: int = 0o700) -> None:
        """Create one directory; its parent must exist. Not durable before `Directory.sync_parent`."""
        ...

    def now_us(self) -> int:
        """Wall clock, microseconds since 1970-01-01 UTC. It may step back."""
        ...

    def monotonic_s(self) -> float:
        """A clock in seconds that never steps, and, where the system has one, goes on while the machine sleeps."""
        ...

    def random_bytes(self, size: int) -> bytes:
        """Unpredictable bytes, for salts and identities."""
        ...

    def give_way(self, pause_s: float) -> None:
        """Let other threads run for `pause_s` seconds; long background work calls it often. 0: as short as possible."""
        ...


def opened_again(directory: Directory) -> Directory:
    """The same directory, whatever its path leads to by now, opened once more: what it locks is unlocked alone."""
    return directory.again()


def inside(directory: Directory, name: str, *, make: bool = False) -> Directory:
    """Open a directory in a directory. `make`: make it if it is missing, with the permissions of the outer one.

    Only the owner of the outer one makes it, so that what another user makes is not closed to the owner; and with the
    group and all permissions of the outer one, or not at all. There and for files that are made in it the umask of the
    process takes nothing: other users' processes share them.
    """
    return directory.inner(name, make=make)


def end_recovery(directory: Directory) -> None:
    """Say that the recovery for which it was locked is over. A failure to say so costs readers some seconds."""
    directory.recovered()


def is_recovering(directory: Directory) -> bool:
    """Whether the process that holds the lock says that it recovers the store. Requires: one holds it."""
    return directory.is_recovering()
