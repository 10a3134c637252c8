"""Every error that kvwal raises on purpose, in one tree.

    Error
    |-- UsageError              the caller's mistake; nothing was changed
    |   |-- ClosedError           the store, snapshot or transaction is closed
    |   |-- ReadOnlyError         a write to a store opened with flag="r"
    |   |-- ForkedError           the store was opened before a fork; open it again in the child
    |   |-- StoreNotFoundError    flag "r" or "w" and there is no store (also a FileNotFoundError)
    |   |-- StoreExistsError      the target of a salvage or copy is not empty (also a FileExistsError)
    |   |-- SnapshotTooOld        the history asked for is no longer kept
    |   `-- FeedGap               changes asked for are no longer kept
    |-- CorruptionError         the bytes on disk are not what kvwal wrote
    |-- FormatError             not a store, or a store of a format this version does not know
    |-- EnvironmentFailure      the machine failed us, not the data
    |   |-- LockedError           another process (its pid is named) has the store
    |   |-- PoisonedError         an earlier write or flush failed; reads go on, writes need a reopen
    |   `-- DiskFullError         no space; nothing was written, retry after freeing some
    |-- ConflictError           a concurrent commit changed what this transaction read; retry it
    `-- InternalError           a bug in kvwal

Wrong argument types and sizes are `TypeError` and `ValueError`, as in the standard library.
An error carries its facts as attributes, and its text says what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ClosedError",
    "ConflictError",
    "CorruptionError",
    "DiskFullError",
    "EnvironmentFailure",
    "Error",
    "FeedGap",
    "Finding",
    "ForkedError",
    "FormatError",
    "InternalError",
    "LockedError",
    "PoisonedError",
    "ReadOnlyError",
    "SnapshotTooOld",
    "StoreExistsError",
    "StoreNotFoundError",
    "UsageError",
]


class Error(Exception):
    """Base of every error kvwal raises on purpose. You do *not* get it for wrong types or sizes."""


class UsageError(Error):
    """The call cannot be right in this state. Nothing was changed."""


class ClosedError(UsageError):
    """The store, snapshot or transaction was used after it was closed."""


class ReadOnlyError(UsageError):
    """A write was asked of a store, snapshot or transaction that is read-only."""


class ForkedError(UsageError):
    """The store was opened before `os.fork`. The child must open it for itself."""


class StoreNotFoundError(UsageError, FileNotFoundError):
    """There is no store at the path, and the flag does not allow one to be made."""


class StoreExistsError(UsageError, FileExistsError):
    """Something is in the way where a new store or file should be made."""


class SnapshotTooOld(UsageError):
    """The moment asked for is older than the history that is kept."""


class FeedGap(UsageError):
    """Changes between the position asked for and the oldest kept one are gone."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong in a store.

    Attributes:
        file: the name of the file, inside the store's directory.
        offset: byte offset in it, or None when the whole file is meant.
        reason: what does not hold, in a few words.
    """

    file: str
    offset: int | None
    reason: str

    def __str__(self) -> str:
        where = self.file if self.offset is None else f"{self.file} at byte {self.offset}"
        return f"{where}: {self.reason}"


class CorruptionError(Error):
    """Bytes on disk are not what was written there.

    Attributes:
        file: the name of the damaged file, inside the store's directory.
        offset: byte offset of the damage, or None when the whole file is meant.
        reason: what does not hold, in a few words.

    You do *not* get it for a torn tail: a write that was cut off before it was acknowledged
    is part of normal recovery.
    """

    def __init__(self, file: str, offset: int | None, reason: str) -> None:
        self.file = file
        self.offset = offset
        self.reason = reason
        super().__init__(
            f"{self.finding}. Restore a backup, or save what verifies into a new store with kvwal.salvage(path, into)"
        )

    @property
    def finding(self) -> Finding:
        """The damage as `Store.verify` and `kvwal.salvage` report it."""
        return Finding(self.file, self.offset, self.reason)


class FormatError(Error):
    """The path does not hold a store, or holds one in a format this version cannot read."""


class EnvironmentFailure(Error):
    """Something outside of the data and of the caller's control failed."""


class LockedError(EnvironmentFailure):
    """Another process, or another `Store` of this one, has the store open.

    Attributes:
        pid: process id of the holder as it wrote it, or None if it could not be read.
    """

    def __init__(self, path: str, pid: int | None, own: bool) -> None:
        self.path = path
        self.pid = pid
        if own:
            text = f"{path} is already open in this process (pid {pid}); share that Store between threads"
        elif pid is None:
            text = f"{path} is open in another process; close it there first"
        else:
            text = f"{path} is open in process {pid}; close it there first"
        super().__init__(text)


class PoisonedError(EnvironmentFailure):
    """An earlier write or flush failed, so what is on disk is unknown until the store is reopened.

    Reads go on. `__cause__` is the failure. Reopening runs recovery, which keeps every
    acknowledged commit.
    """


class DiskFullError(EnvironmentFailure):
    """There is no space left for this write. Nothing was written and nothing is lost.

    Reads go on, and so do writes once there is space; deleting keys works from a reserve.
    """


class ConflictError(Error):
    """A commit since this transaction began changed something it read. Run it again.

    `Store.run` and `Store.transactional` retry for you.

    Attributes:
        key: a key that changed, or None when it lies in a range that was read.
        seqno: the commit that changed it.
    """

    def __init__(self, key: bytes | None, seqno: int, detail: str) -> None:
        self.key = key
        self.seqno = seqno
        super().__init__(f"{detail} was changed by commit {seqno} after this transaction began; run it again")


class InternalError(Error):
    """kvwal found itself in a state that its own rules forbid. Please report it."""
