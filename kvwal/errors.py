"""Every error that kvwal raises on purpose, in one tree.

    Error
    |-- UsageError              the caller's mistake; nothing was changed
    |   |-- ClosedError           the store, snapshot or transaction is closed
    |   |-- ReadOnlyError         a write to a store opened with flag="r"
    |   |-- ForkedError           the store was opened before a fork; open it again in the child
    |   |-- ReentrancyError       a signal handler or finalizer called the store in the middle of another call of it
    |   |-- TransactionTooLargeError  a transaction holds more memory than one may
    |   |-- StoreNotFoundError    flag "r" or "w" and there is no store (also a FileNotFoundError)
    |   |-- StoreExistsError      the target of a salvage is not empty (also a FileExistsError)
    |   |-- ConsumerExistsError   a consumer of this name has another filter
    |   |-- FencedError           a consumer was taken over by another owner
    |   |-- CodecError            a codec cannot read these bytes (also a ValueError)
    |   |-- TableNotFoundError    there is no table of this name, or it was dropped (also a LookupError)
    |   |-- TableExistsError      a table has the new name already
    |   |-- TableCodecError       a table was made with other codecs
    |   |-- IndexNotFoundError    a table has no index of this name (also a LookupError)
    |   |-- IndexNotDeclaredError a put into a table with an index whose function is not known
    |   |-- IndexNotReadyError    an index is still being built
    |   |-- ObjectMissing         a backup's destination has no object of this name (also a LookupError)
    |   |-- ArchiveDiverged       an archive holds another history than the store that is to go on with it
    |   |   `-- ForkDiverged            a line left another one behind a commit that is another one there
    |   |-- SnapshotTooOld        the moment, or a version of a key, asked for is no longer kept
    |   |   `-- NotInBackup           backups do not have the moment that is to be restored
    |   `-- FeedGap               changes asked for are no longer kept
    |-- CorruptionError         the bytes on disk are not what kvwal wrote
    |-- FormatError             not a store, or a store of a format this version does not know
    |-- EnvironmentFailure      the machine failed us, not the data
    |   |-- LockedError           another process (its pid is named) has the store
    |   |-- PoisonedError         an earlier write or flush failed; reads go on, writes need a reopen
    |   |-- BackupDestinationError  what a backup is written to, or read from, cannot be used
    |   |-- ArchiveBehindError    an archive that commits wait for cannot go on; nothing was written
    |   |-- DiskFullError         no space; nothing was written, retry after freeing some
    |   `-- SystemCallError       a call of the operating system failed (also an OSError, with its errno)
    |       |-- RefusedError          it did nothing: too many open files, no permission, read-only; retry when cured
    |       `-- StoreRemovedError     the store's directory or a file of it was removed or replaced while it was open
    |-- StaleError              a follower shows less than it is to, by its max_lag_s
    |-- ConflictError           a concurrent commit changed what this transaction read; retry it
    |   `-- IndexesChangedError   a table got another index meanwhile
    `-- InternalError           a bug in kvwal

`kvwal.compat.dbm` raises all of these as its `error`, with the one that it was as the cause.

Wrong argument types and sizes are `TypeError` and `ValueError`, as in the standard library.
An error carries its facts as attributes, and its text says what to do next. Every error can be copied and pickled,
and keeps its text, attributes and notes, and the cause if that is one of kvwal's or Python's own: an error that cannot
be pickled breaks a process pool, and is lost with it.

What several modules say is said here once: `closed`, `read_only`, `not_followed`, `forked`, `poisoned` and `stalled`
make the errors.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

__all__ = [
    "ArchiveBehindError",
    "ArchiveDiverged",
    "BackupDestinationError",
    "ClosedError",
    "CodecError",
    "ConflictError",
    "ConsumerExistsError",
    "CorruptionError",
    "DiskFullError",
    "EnvironmentFailure",
    "Error",
    "FeedGap",
    "FencedError",
    "Finding",
    "ForkDiverged",
    "ForkedError",
    "FormatError",
    "IndexNotDeclaredError",
    "IndexNotFoundError",
    "IndexNotReadyError",
    "IndexesChangedError",
    "InternalError",
    "LockedError",
    "NotInBackup",
    "ObjectMissing",
    "PoisonedError",
    "ReadOnlyError",
    "ReentrancyError",
    "RefusedError",
    "SnapshotTooOld",
    "StaleError",
    "StoreExistsError",
    "StoreNotFoundError",
    "StoreRemovedError",
    "SystemCallError",
    "TableCodecError",
    "TableExistsError",
    "TableNotFoundError",
    "TransactionTooLargeError",
    "UsageError",
    "closed",
    "forked",
    "not_followed",
    "other_store",
    "poisoned",
    "read_only",
    "stalled",
]


class Error(Exception):
    """Base of every error kvwal raises on purpose. You do *not* get it for wrong types or sizes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from their text, which is not what the constructors here take.
        arguments = super().__reduce__()[1]
        state = dict(self.__dict__)
        cause = self.__cause__
        if isinstance(cause, Error) or type(cause).__module__ == "builtins":
            state["__cause__"] = cause
        return _rebuilt, (type(self), arguments), state


def _rebuilt(kind: type[Error], arguments: tuple[Any, ...]) -> Error:
    """An error as it was pickled, but for its attributes: its constructor does not run again."""
    return kind.__new__(kind, *arguments)


class UsageError(Error):
    """The call cannot be right in this state. Nothing was changed."""


class ClosedError(UsageError):
    """The store, snapshot or transaction was used after it was closed."""


class ReadOnlyError(UsageError):
    """A write was asked of a store, snapshot or transaction that is read-only."""


class ForkedError(UsageError):
    """The store was opened before a fork. The child must open it for itself."""

    def __init__(
        self,
        text: str = "the store was opened before the fork; open it again in the child, after the parent closed it",
    ) -> None:
        super().__init__(text)


class ReentrancyError(UsageError):
    """A signal handler or a finalizer called the store while its thread was in the middle of another call of it.

    Nothing was changed. To wait would be to wait for oneself; call again when the other call is over. You do *not* get
    it from `close`, nor where the interrupted call only waits, or holds nothing.

    Attributes:
        what: the call that was refused.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(
            f"{what} was called from within another call of the same store (by a signal handler, or a finalizer), at a "
            "moment that forbids it; call again when that one is over"
        )


class TransactionTooLargeError(UsageError):
    """What a transaction has read and is to write takes more memory than one may. What was done before stays.

    Attributes:
        limit: the limit in bytes.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"the transaction holds more than {limit >> 20} MiB; commit in parts, or read from a snapshot")


class StoreNotFoundError(UsageError, FileNotFoundError):
    """There is no store at the path, and the flag does not allow one to be made."""


class StoreExistsError(UsageError, FileExistsError):
    """Something is in the way where a new store or file should be made."""


class ConsumerExistsError(UsageError):
    """There is a consumer of this name, with another filter. Nothing was changed.

    Attributes:
        name: of the consumer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(
            f"consumer {name!r} exists with another filter; ask for it with that, or with replace=True to change it"
        )


class FencedError(UsageError):
    """The consumer was taken over, with `steal=True`, or was removed. What was to be committed was not.

    Attributes:
        name: of the consumer.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"consumer {name!r} was taken over or removed; its new owner goes on from the stored position")


class CodecError(UsageError, ValueError):
    """A codec was given bytes that it never makes: they are another codec's, or a newer version's. Nothing was changed.

    You do *not* get it for damage on disk, which checksums find, nor for a value that a codec cannot store: that is a
    TypeError or ValueError.

    Attributes:
        codec: name of the codec.
        data: the bytes, as they are stored.
        reason: what does not hold, in a few words.
    """

    def __init__(self, codec: str, data: bytes, reason: str) -> None:
        self.codec = codec
        self.data = data
        self.reason = reason
        begin = repr(data[:32]) + ("..." if len(data) > 32 else "")
        super().__init__(
            f"codec {codec} cannot read {len(data)} bytes, {begin}: {reason}; use the codec that wrote them, or take "
            "them as they are from this error's attribute data"
        )


class ObjectMissing(UsageError, LookupError):
    """A destination has no object of this name.

    Attributes:
        name: of the object.
        place: the destination, as messages call it.
    """

    def __init__(self, name: str, place: str) -> None:
        self.name = name
        self.place = place
        super().__init__(f"there is no {name} in {place}; see what is there with kvwal archive status")


class ArchiveDiverged(UsageError):
    """An archive holds other commits than the store does, beyond `at_seqno`. Nothing was changed.

    Two copies of a store have each gone on: a disk or a virtual machine was set back, or its files were copied.

    Attributes:
        at_seqno: the last commit that both have, as far as that can be told.
    """

    def __init__(self, at_seqno: int) -> None:
        self.at_seqno = at_seqno
        super().__init__(
            f"the archive and the store have different commits beyond {at_seqno}: one of them is a copy that went on "
            "by itself; archive this store to a new destination, or restore from the archive into a new store"
        )


class ForkDiverged(ArchiveDiverged):
    """A line of commits does not come from where it says: the line that it left has another commit at the fork.

    It is the same as for its base class, but that one of the two copies was restored, and so has a line of its own.
    Nothing was changed.

    Attributes:
        line, parent: the line, and the one that it left; 8 bytes each.
        fork: the last commit that both were to have. `at_seqno` is the one before it.
    """

    def __init__(self, line: bytes, parent: bytes, fork: int) -> None:
        self.line, self.parent, self.fork = line, parent, fork
        self.at_seqno = fork - 1
        UsageError.__init__(
            self,
            f"line {line.hex()} left line {parent.hex()} behind commit {fork}, and in the destination that is another "
            "commit: a copy of that line went on by itself; use another destination for this store, or restore "
            "positions of either line (LINE:SEQNO)",
        )


class _NotKeptError(UsageError):
    """What `SnapshotTooOld` and `FeedGap` have in common: what was asked for, and what is kept.

    Attributes:
        asked: the seqno or the time that was asked for.
        oldest, newest: first and last seqno that can be had.
        oldest_time, newest_time: times of these, in UTC; None where they are not known.
        nearest: seqnos of the last kept moment before what was asked, and of the first one after it; None for none.
        lost_commits: how many commits between what was asked and `oldest` are gone; None where that cannot be told.
        forked_at: the last commit that the line of what was asked has in common with this store's, 0 if none is known;
            None on one line.
    """

    def __init__(
        self,
        asked: int | datetime,
        oldest: int,
        newest: int,
        *,
        oldest_time: datetime | None = None,
        newest_time: datetime | None = None,
        nearest: tuple[int | None, int | None] = (None, None),
        lost_commits: int | None = None,
        forked_at: int | None = None,
    ) -> None:
        self.asked = asked
        self.oldest = oldest
        self.newest = newest
        self.oldest_time = oldest_time
        self.newest_time = newest_time
        self.nearest = nearest
        self.lost_commits = lost_commits
        self.forked_at = forked_at
        super().__init__(self._text())

    @abstractmethod
    def _text(self) -> str:
        """What the error says."""

    def _other_line(self) -> str:
        known = f"which left this one after commit {self.forked_at}" if self.forked_at else "of another store"
        return f"{self.asked} is on another line, {known}"

    def _kept(self) -> str:
        """What can be had instead, in words."""
        if self.oldest > self.newest:
            return f"no commit is kept; the newest is {self.newest}"
        since = "" if self.oldest_time is None else f" of {self.oldest_time.isoformat()}"
        moments = [str(seqno) for seqno in self.nearest if seqno is not None]
        beside = f"; the nearest moments that are kept are those of commit {' and '.join(moments)}" if moments else ""
        return f"kept are commits {self.oldest}{since} to {self.newest}{beside}"


def _stretch(first: int, last: int) -> str:
    return str(first) if first == last else f"{first} to {last}"


class SnapshotTooOld(_NotKeptError):
    """The moment asked for is older than what is kept: a snapshot that held too much (see `max_snapshot_bytes`).

    Or a version of a key from `since` on (see `Store.versions`).

    Attributes: `asked`, `oldest`, `newest` (seqnos; `asked` may be a time), `oldest_time`, `newest_time`, `nearest`
    (kept moments on both sides), `lost_commits` and `forked_at`, None where they say nothing. `limit_bytes`: more than
    this was held by a snapshot, transaction or scan, and older ones; None if it is not about that. `while_read`: it was
    given, and what it is read from went before it was read to its end.
    """

    def __init__(
        self,
        asked: int | datetime,
        oldest: int,
        newest: int,
        *,
        limit_bytes: int | None = None,
        while_read: bool = False,
        **more: Any,
    ) -> None:
        self.limit_bytes = limit_bytes
        self.while_read = while_read
        super().__init__(asked, oldest, newest, **more)

    def _text(self) -> str:
        if self.limit_bytes is not None:
            return (
                f"the moment of commit {self.asked} was given up: what it and older ones held was more than "
                f"max_snapshot_bytes ({self.limit_bytes}); take a new one, hold it for less time, or raise the limit"
            )
        if self.while_read:
            # The bounds say nothing here: what was asked for may be within them.
            return (
                f"the moment of commit {self.asked} went while it was read: checkpoints of its writer have replaced "
                "what it is read from; begin again with a new one, and read it in less time, or follow with a pin"
            )
        if self.forked_at is not None:
            return f"{self._other_line()}; {self._kept()}"
        return f"what was from {_asked(self.asked)} on is no longer all kept; {self._kept()}; ask for one of these"


# More stretches of moments than this on each side of what was asked for are only counted.
_SHOWN_STRETCHES: Final = 3


class NotInBackup(SnapshotTooOld):
    """Backups do not have the moment that is to be restored: it is older, newer, or in a gap.

    Attributes: as `SnapshotTooOld` has. `stretches`: first and last commit of each stretch of moments that can be
    restored, ascending; `oldest` and `newest` are the bounds of all, `nearest` the moments on both sides of what was
    asked for. `nearest_times`: when these were committed, if a time was asked for; None where that is not known.
    `lost`: first and last of the commits that were there and are lost, beyond the newest moment of their line, if the
    latest one was asked for. `can_accept`: whether that is a gap which can be accepted.
    """

    def __init__(
        self,
        asked: int | datetime,
        stretches: Sequence[tuple[int, int]],
        *,
        nearest: tuple[int | None, int | None] = (None, None),
        nearest_times: tuple[datetime | None, datetime | None] = (None, None),
        lost: tuple[int, int] | None = None,
        can_accept: bool = False,
    ) -> None:
        self.lost = lost
        self.can_accept = can_accept
        self.stretches = tuple((first, last) for first, last in stretches)
        self.nearest_times = nearest_times
        super().__init__(asked, stretches[0][0], max(last for _, last in stretches), nearest=nearest)

    def _text(self) -> str:
        before, after = self.nearest
        i = sum(1 for first, _ in self.stretches if after is None or first < after)
        begin, end = max(i - _SHOWN_STRETCHES, 0), i + _SHOWN_STRETCHES
        shown = ", ".join(_stretch(*each) for each in self.stretches[begin:end])
        others = len(self.stretches) - len(self.stretches[begin:end])
        more = f", and {others} stretches that are further away" if others else ""
        pairs = zip(self.nearest, self.nearest_times, strict=True)
        moments = " and ".join(
            f"{seqno}{'' if time is None else f' ({time.isoformat()})'}" for seqno, time in pairs if seqno is not None
        )
        nearest = f"; the nearest ones are those of commit {moments}" if moments else ""
        if before is not None and after is not None:
            nearest += "; a plain backup has one moment, and one with history=True, or kvwal.archive, those between too"
        if self.lost is not None:
            accept = "accept the loss (kvwal archive status DEST names it), or " if self.can_accept else ""
            return (
                f"the latest moment, of commit {self.asked}, cannot be restored: objects with commits "
                f"{_stretch(*self.lost)} are missing in the backup; it has the moments of commits {shown}{more}; "
                f"{accept}ask for {before} by its number"
            )
        # Of the time of a moment before a gap there may be other commits, in the gap.
        by_number = "" if isinstance(self.asked, int) else " by its number"
        return (
            f"the backup does not have the moment of {_asked(self.asked)}; it has those of commits {shown}{more}"
            f"{nearest}; ask for one of these{by_number}"
        )


class FeedGap(_NotKeptError):
    """Changes between the position asked for and the oldest kept one are gone, or there is no such position.

    It is beyond the newest commit (of another store, an older copy, or never durable), or on another line.

    Attributes: as `SnapshotTooOld` has.
    """

    def _text(self) -> str:
        if self.forked_at is not None:
            why = self._other_line()
        elif isinstance(self.asked, int) and self.asked > self.newest:
            why = f"there is no commit {self.asked}: this is another store, an older copy, or it was lost in a crash"
        else:
            lost = "" if self.lost_commits is None else f" (lost are {self.lost_commits})"
            why = f"not all changes after {_asked(self.asked)} are kept any more{lost}"
        return f"{why}; {self._kept()}; begin again with bootstrap(), a snapshot and where to go on"


def _asked(asked: int | datetime) -> str:
    return f"commit {asked}" if isinstance(asked, int) else asked.isoformat()


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong in a store.

    Attributes:
        file: the name of the file, inside the store's directory.
        offset: byte offset in it, or None when the whole file is meant.
        reason: what does not hold, in a few words.
        is_derived: nothing is lost: what the file says is in other files too, and it is made again.
    """

    file: str
    offset: int | None
    reason: str
    is_derived: bool = False

    def __str__(self) -> str:
        where = self.file if self.offset is None else f"{self.file} at byte {self.offset}"
        return f"{where}: {self.reason}"


_FILE_ADVICE: Final = (
    "Restore a backup (docs/backups.md), or save what verifies into a new store with kvwal.salvage(path, into)"
)
_OBJECT_ADVICE: Final = (
    "It is an object of a backup, so the store is as it was: see what else is damaged with kvwal archive verify, and "
    "make a new backup in another destination"
)


class CorruptionError(Error):
    """Bytes on disk are not what was written there.

    Attributes:
        file: the name of the damaged file, inside the store's directory, or of the damaged object of a backup.
        offset: byte offset of the damage, or None when the whole file is meant.
        reason: what does not hold, in a few words.

    You do *not* get it for a torn tail: a write that was cut off before it was acknowledged
    is part of normal recovery.
    """

    def __init__(self, file: str, offset: int | None, reason: str, *, advice: str | None = None) -> None:
        """`advice`: what to do; None: what helps with a file of a store, or with an object of a backup."""
        self.file = file
        self.offset = offset
        self.reason = reason
        if advice is None:
            # The name of a backup's object has a directory in it, and that of a store's file has none.
            advice = _OBJECT_ADVICE if "/" in file else _FILE_ADVICE
        super().__init__(f"{self.finding}. {advice}")

    @property
    def finding(self) -> Finding:
        """The damage as `Store.verify` and `kvwal.salvage` report it."""
        return Finding(self.file, self.offset, self.reason)


class FormatError(Error):
    """The path does not hold a store, or holds one in a format this version cannot read."""


class EnvironmentFailure(Error):
    """Something outside of the data and of the caller's control failed."""


class LockedError(EnvironmentFailure):
    """Another process, or another `Store` of this one, has the store open; or a consumer of it is in use.

    Attributes:
        path: the store's directory.
        pid: process id of the holder as it wrote it, or None if it could not be read.
        own: whether this process has it open itself.
        consumer: name of the consumer that is in use; None if it is the store.
        thread: name of the thread that asked for the consumer; None if it is the store.
    """

    def __init__(
        self, path: str, pid: int | None, own: bool, *, consumer: str | None = None, thread: str | None = None
    ) -> None:
        self.path = path
        self.pid = pid
        self.own = own
        self.consumer = consumer
        self.thread = thread
        if consumer is not None:
            text = (
                f"consumer {consumer!r} of {path} is in use by thread {thread!r} of this process (pid {pid}); close it "
                "there, or take it over with steal=True"
            )
        elif own:
            text = (
                f"{path} is already open in this process (pid {pid}); share that Store between threads, or open it by "
                "kvwal.shared everywhere"
            )
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


class ArchiveBehindError(EnvironmentFailure):
    """An archive with `on_behind="stall"` is behind by its limit, and fails. Nothing was written; try again later.

    The failure is the cause. Close the archive to go on without it.
    """


class DiskFullError(EnvironmentFailure):
    """There is no space left for this write. Nothing was written and nothing is lost.

    Reads go on, and so do writes once there is space; deleting keys works from a reserve.
    """


class SystemCallError(EnvironmentFailure, OSError):
    """A call of the operating system failed. `errno` and `filename` say which; the text says what to do."""


class RefusedError(SystemCallError):
    """The system refused a call before it did anything: nothing was changed, and it may succeed when tried again.

    You get it for too many open files, missing permissions, a read-only file system and the like.
    """


class StoreRemovedError(SystemCallError):
    """The store's directory, or a file of it, was removed, moved or replaced while the store was open.

    Nothing more is written. What was acknowledged is in the directory that was opened, if that still exists.
    """


class BackupDestinationError(EnvironmentFailure):
    """What a backup is written to, or read from, cannot be used: it is another store's, or was replaced, or is damaged.

    Nothing was changed in it.
    """


class StaleError(Error):
    """What a follower shows may lack commits that were made longer ago than its `max_lag_s`.

    It has looked just now, and what it found cannot be shown yet: no record says that it is on disk.

    Attributes: `lag_s` (since when, in seconds; infinity if it was at no time known to lack none), `max_lag_s`.
    """

    def __init__(self, lag_s: float, max_lag_s: float) -> None:
        self.lag_s = lag_s
        self.max_lag_s = max_lag_s
        age = f"may be {lag_s:.3f} s old" if lag_s < math.inf else "was at no time known to be young enough"
        super().__init__(
            f"what is shown {age}, and max_lag_s is {max_lag_s} s; its writer makes commits that it "
            f"does not bring on disk, or says so late: read again later, or follow with a larger max_lag_s"
        )


class ConflictError(Error):
    """A commit since this transaction began changed something it read. Run it again.

    `Store.run` and `Store.transactional` retry for you.

    Attributes:
        key: a key that changed, or None when it lies in a range that was read.
        seqno: the commit that changed it.
        table: the id of the table that it is in; 0 is the default one.
    """

    def __init__(self, key: bytes | None, seqno: int, detail: str, table: int = 0) -> None:
        self.key = key
        self.seqno = seqno
        self.table = table
        super().__init__(f"{detail} was changed by commit {seqno} after this transaction began; run it again")


class TableNotFoundError(UsageError, LookupError):
    """There is no such table, or it was dropped.

    Attributes:
        name: its name, or its id if it was asked for by that.
    """

    def __init__(self, name: str | int) -> None:
        self.name = name
        named = "" if isinstance(name, int) else ": one comes to be with the first commit that puts something into it"
        super().__init__(f"there is no table {name!r}{named}; tables() lists those that there are")


class TableExistsError(UsageError):
    """There is a table of this name already.

    Attributes:
        name: the name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        super().__init__(f"there is a table {name!r} already; drop it first, or take another name")


class TableCodecError(UsageError):
    """A table was made with other codecs than those it was asked for with.

    Attributes:
        name: of the table.
        what: "keys" or "values".
        has, asked: names of codecs.
    """

    def __init__(self, name: str, what: str, has: str, asked: str) -> None:
        self.name = name
        self.what = what
        self.has = has
        self.asked = asked
        super().__init__(
            f"the {what} of table {name!r} are {has}, and it was asked for with {asked}; ask for it with {has}, or "
            "take another name"
        )


class IndexNotFoundError(UsageError, LookupError):
    """A table has no index of this name: it was never declared, or was dropped, with its table or alone.

    Attributes:
        table: the name of the table.
        index: the name of the index.
    """

    def __init__(self, table: str, index: str) -> None:
        self.table = table
        self.index = index
        super().__init__(
            f"table {table!r} has no index {index!r}; the program that writes the store makes it with index(), and "
            "tables() lists those that there are"
        )


class IndexNotDeclaredError(UsageError):
    """A put into a table with an index that this program has not declared: it would go stale. Nothing was changed.

    You do *not* get it for reads and deletes, which need no function.

    Attributes:
        table: the name of the table.
        index: the name of the index.
    """

    def __init__(self, table: str, index: str) -> None:
        self.table = table
        self.index = index
        super().__init__(
            f"table {table!r} has index {index!r}, whose function is not known here; declare it first with "
            f"index({index!r}, key=..., codec=...), or remove it with drop_index({index!r})"
        )


class IndexNotReadyError(UsageError):
    """An index is still being built, so that it cannot be read.

    Attributes:
        table: the name of the table.
        index: the name of the index.
        done, total: how many keys of the table it has, and how many there are. Where building failed, the cause is what
            the function raised, and the text has it.
    """

    def __init__(self, table: str, index: str, done: int, total: int, failure: Exception | None = None) -> None:
        self.table = table
        self.index = index
        self.done = done
        self.total = total
        has = f"index {index!r} of table {table!r} has {done} of {total} keys"
        if failure is not None:
            super().__init__(
                f"{has}, and is not built further: its function raised {type(failure).__name__}: {failure}; declare it "
                "again with one that takes every value"
            )
            return
        super().__init__(
            f"{has}; the program that writes the store builds it once it declares it, and waits for that with wait(); "
            "a follower reads it when it has moved on since"
        )


class IndexesChangedError(ConflictError):
    """A table got another index while something was put into it. Nothing was changed; do it again.

    You get it from a transaction, which `Store.run` tries again; other writes do that by themselves.
    """

    def __init__(self, table: int) -> None:
        self.key = None
        self.seqno = 0
        self.table = table
        Error.__init__(self, f"table {table} got another index meanwhile; do it again")


class InternalError(Error):
    """kvwal found itself in a state that its own rules forbid. Please report it."""


_AGAIN: Final = {
    "store": "open it again",
    "snapshot": "take another with snapshot()",
    "transaction": "begin another with transaction()",
    "feed": "go on with changes(after=position)",
    "consumer": "ask for it again with consumer(name)",
}


def closed(what: str = "store") -> ClosedError:
    """Of a store, snapshot, transaction or scan that is over."""
    return ClosedError(f"the {what} is closed; {_AGAIN.get(what, 'begin another')}")


def left_open() -> ClosedError:
    """Of a store for tasks whose close was refused for want of a thread."""
    return ClosedError("the store is closing, and the system had no thread left for that; call close() again")


def read_only() -> ReadOnlyError:
    """Of a store opened with flag "r"."""
    return ReadOnlyError('the store was opened with flag "r"; open it with "w" or "c" to write')


def other_store(what: str) -> UsageError:
    """Of a table that takes part in a transaction, a snapshot or a batch of another open store."""
    return UsageError(f"the table is of another open store than the {what}; use the table of that store: its table()")


def not_followed() -> ReadOnlyError:
    """Of a feed that is to wait for what comes in a store opened with flag "r"."""
    return ReadOnlyError(
        'a store opened with flag "r" stays at one commit, so that no feed of it waits for what comes; use '
        "kvwal.follow(path), which moves on with the program that writes it"
    )


def forked() -> ForkedError:
    """Of a store in a child that has only inherited it."""
    return ForkedError()


def poisoned(cause: BaseException) -> PoisonedError:
    """Of a store whose disk has failed: what it was, and what to do now."""
    # Of one that was refused for an earlier failure, that failure.
    while isinstance(cause, PoisonedError) and cause.__cause__ is not None:
        cause = cause.__cause__
    error = PoisonedError(
        f"an earlier write or flush failed ({str(cause) or type(cause).__name__}), so what is on disk is unknown; "
        "reads go on; close the store and open it again: recovery keeps every commit that was durable"
    )
    error.__cause__ = cause
    return error


def stalled(cause: BaseException) -> Error:
    """Of a commit that waits for a checkpoint which cannot be made."""
    if isinstance(cause, PoisonedError):
        return cause
    if isinstance(cause, DiskFullError):
        # It may be a limit on the size of files, or of pages, and not the disk.
        return DiskFullError(f"commits cannot move from memory to the pages: {cause}")
    if isinstance(cause, RefusedError):
        # Nothing was changed: the next commit tries again.
        text = f"commits cannot move from memory to the pages: {cause.strerror}"
        return RefusedError(cause.errno, text, cause.filename)
    return poisoned(cause)
