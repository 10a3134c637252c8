"""What a log offers, and what it needs to know. `SegmentLog`, which keeps segments, is the one that the engine uses.

Rules of a log:
- One thread at a time appends, flushes, retires and closes. The numbers may be read, and cursors used, by any thread.
- Seqnos are contiguous. A commit that was appended and never became durable may be gone at the next open, and its
  seqno is then given again.
- A failed write or flush is final: every later call that would write raises `PoisonedError`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeAlias

from kvwal.files import Buffer
from kvwal.keys import Seqno
from kvwal.log.record import Record

__all__ = ["Log", "LogCursor", "LogIdentity", "LogOptions", "LogStats", "LogWriter", "Preallocate", "RefusingLog"]

Preallocate: TypeAlias = Literal["allocate", "zeros"]


class LogIdentity(NamedTuple):
    """Whose log it is, and which open writes it.

    Attributes:
        store_id: 16 bytes, the store's for life.
        line: 8 bytes, new when a store is created, restored or promoted.
        session: number of the writable open, greater than that of every open before.
    """

    store_id: bytes
    line: bytes = bytes(8)
    session: int = 0


@dataclass(frozen=True, slots=True)
class LogOptions:
    """Settings of a log, with the defaults of `Options` again. Not stored: each open may choose anew.

    Attributes:
        segment_bytes: size of the largest segments; the first ones are smaller.
        preallocate: how the file system is made to give the space: by a call, or by writing zeros.
        mode: permissions of new files.
    """

    segment_bytes: int = 16 << 20
    preallocate: Preallocate = "allocate"
    mode: int = 0o600

    @property
    def first_segment_bytes(self) -> int:
        """Size of the first segments: an eighth of the largest ones, but from 16 to 64 KiB."""
        return min(self.segment_bytes, max(self.segment_bytes // 8, 16 << 10), 64 << 10)


@dataclass(frozen=True, slots=True)
class LogStats:
    """Figures of a log. Sizes in bytes.

    Attributes:
        segments, bytes: files of the log, and what they take on disk.
        oldest_seqno: the first commit that is kept (the next one to come, if none is).
        last_seqno, durable_seqno: the last commit appended, and the last one known to be on disk.
    """

    segments: int
    bytes: int
    oldest_seqno: Seqno
    last_seqno: Seqno
    durable_seqno: Seqno


class LogCursor(Protocol):
    """A place in the log from which reading goes on. While it is open, nothing beyond `position` is retired.

    For one thread at a time. It ends by `close`, at the end of a `with` block, or when it is collected.
    """

    @property
    def position(self) -> Seqno:
        """The last commit that was handed out, or the one it began after."""
        ...

    def __iter__(self) -> Iterator[Record]: ...

    def __next__(self) -> Record:
        """The next commit. StopIteration if there is none yet: asked again later, it goes on.

        Raises CorruptionError, FormatError or OSError as reading the log does, ClosedError after `close`.
        """
        ...

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until there is a commit beyond `position`, at most so long (None: for ever); whether there is one.

        PoisonedError if there is none, and the log takes no more.
        """
        ...

    def when_beyond(self, wake: Callable[[], object]) -> Callable[[], object]:
        """Have `wake` called when waiting would end, by the thread that ends it. Returns what takes that back.

        Raises as `wait`.
        """
        ...

    def close(self) -> None:
        """Let go of the log that it holds. Idempotent."""
        ...


class LogWriter(Protocol):
    """What commits need of a log: numbers, append, flush."""

    #: The last commit appended, and the last one known to be on disk.
    last_seqno: Seqno
    durable_seqno: Seqno

    def append_put(self, key: bytes, value: bytes, table: int = 0, whole: bytes | None = None) -> Seqno:
        """Append one commit that puts one value: what `append([encode_put(key, value, table)])` does, and faster."""
        ...

    def append(self, bodies: Sequence[bytes | list[Buffer]]) -> Seqno:
        """Append a commit for every body, all or none; returns the seqno of the last. Not durable on return."""
        ...

    def sync(self) -> None:
        """Flush. Durable on return: every commit that was appended before the call."""
        ...


class Log(LogWriter, Protocol):
    """An open log, for writing and reading."""

    #: When the last commit was appended, in microseconds.
    last_time_us: int

    def read(self, after: Seqno | None = None, *, until: Seqno | None = None, purpose: str = "history") -> LogCursor:
        """The commits beyond `after` (None: all that are kept), up to `until` (None: as they become durable).

        FeedGap if commits beyond `after` are no longer kept.
        """
        ...

    def retire(self, below: Seqno) -> list[Seqno]:
        """Remove what holds only commits before `below`, which recovery does not need, and no hold needs."""
        ...

    def stats(self) -> LogStats:
        """Figures. From any thread."""
        ...

    def close(self) -> None:
        """Flush and end cleanly. Idempotent."""
        ...

    def abandon(self) -> None:
        """Drop the handles and write nothing: in a forked child, or after a failure. Takes no lock."""
        ...


class RefusingLog:
    """What stands in for the log of a store that takes no commits: closed, read-only, forked or poisoned.

    The commit path thus needs no check of its own for any of these.
    """

    __slots__ = ("_reason", "durable_seqno", "last_seqno")

    def __init__(self, reason: Callable[[], Exception], seqno: Seqno) -> None:
        self._reason = reason
        self.last_seqno = seqno
        self.durable_seqno = seqno

    def _refuse(self, *_: Any) -> NoReturn:
        raise self._reason()

    append = append_put = sync = _refuse
