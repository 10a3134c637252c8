"""Where the log ends, and whether it may end there: the decisions of recovery, as two tables.

Nothing here reads a file. The reader gathers the evidence about a segment, the first row whose condition
holds is the answer, and the tests have a case for every row.

The question behind the rows is always the same: can a commit that was acknowledged be missing? These are
known to be on disk, hence were possibly acknowledged:
1. what the checkpoint's meta says is merged (the reader's `floor`),
2. what a watermark in a record that verifies says, wherever in the newest segment that record lies,
3. everything before the first seqno of a segment that exists.
If the log ends before one of them, that is corruption. If not, what is cut off was never acknowledged.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

from kvwal.errors import CorruptionError, FormatError
from kvwal.files.names import segment_name
from kvwal.keys import Seqno
from kvwal.log.record import LogPosition
from kvwal.log.segment import HeaderFault, SegmentHeader, SegmentInfo, Slot
from kvwal.log.walk import Stop

__all__ = ["LINK_TABLE", "TAIL_TABLE", "Link", "LogEnd", "Tail", "TailRow", "Verdict", "judge"]


class Verdict(enum.Enum):
    """What a row means for the opening of the log."""

    CONTINUE = "goes on in the next segment"
    END = "the log ends here, and may"
    CORRUPT = "CorruptionError"
    FORMAT = "FormatError"


class TailRow(enum.Enum):
    """The label of a row. Every one of them has a test of the same name."""

    # How a segment hangs together with its neighbours.
    UNKNOWN_VERSION = "unknown version"
    FOREIGN_SEGMENT = "foreign segment"
    BAD_HEADER = "bad header"
    MISPLACED_SEGMENT = "misplaced segment"
    MISSING_OLDEST_SEGMENT = "missing oldest segment"
    MISSING_MIDDLE_SEGMENT = "missing middle segment"
    MISSING_NEWEST_SEGMENT = "missing newest segment"
    BAD_SUCCESSOR = "bad successor slot"
    LINKED = "linked"
    NEWEST = "newest segment"
    # What lies where the good records of a segment end.
    CONTINUED = "continued in the next segment"
    DAMAGED_MARK = "damaged watermark record"
    UNKNOWN_RECORD = "unknown kind of record"
    DISORDER = "records out of order"
    TRUNCATED_BEFORE_LATER_SEGMENT = "truncated before a later segment"
    DAMAGE_BEFORE_LATER_SEGMENT = "damage before a later segment"
    DAMAGE_BELOW_WATERMARK = "damage below the watermark"
    CLOSED = "closed"
    TRUNCATED_SEGMENT = "truncated segment"
    CLEAN_END = "clean end"
    UNSYNCED_HOLE = "unsynced hole"
    ZERO_HOLE = "zero hole"
    TORN_TAIL = "torn tail"


@dataclass(frozen=True, slots=True)
class Link:
    """A segment and its neighbours, before its records are read.

    Attributes:
        fault: why its header cannot be used, if it cannot; then nothing below is known.
        reaches: it holds, or could hold, the first commit asked for. Only asked of the oldest one.
        slot: its successor slot.
        next: first seqno of the next segment there is, by name.
        next_previous: what that segment says comes before it; None if there is none, or its header is bad.
        first_seqno: its own.
        previous: what it says comes before itself.
    """

    first_seqno: int
    fault: HeaderFault | None = None
    reaches: bool = True
    slot: Slot = Slot(None, damaged=False)  # noqa: RUF009  # immutable
    next: int | None = None
    next_previous: int | None = None
    previous: int = 0


@dataclass(frozen=True, slots=True)
class Tail:
    """The end of the good records of a segment, and what lies behind it.

    Attributes:
        stop: why the walk ended.
        last_seqno: the last commit in order.
        durable: the highest seqno known to be on disk, from whatever source.
        later: a record that verifies lies behind.
        resumes: the first of those follows upon the last good commit.
        short: the file is smaller than it was made.
        zeros: how many zero bytes follow at once.
        written: how many bytes follow up to the last that is not zero.
        next: first seqno of the segment that follows, if one does.
        paused: the last good record is that of a clean close which left the segment open.
    """

    stop: Stop
    last_seqno: int
    durable: int
    later: bool = False
    resumes: bool = False
    short: bool = False
    zeros: int = 0
    written: int = 0
    next: int | None = None
    paused: bool = False


LINK_TABLE: tuple[tuple[TailRow, Verdict, Callable[[Link], bool]], ...] = (
    # A newer version's header verifies, but whatever else it says is not ours to interpret.
    (TailRow.UNKNOWN_VERSION, Verdict.FORMAT, lambda e: e.fault is HeaderFault.NEWER),
    (TailRow.FOREIGN_SEGMENT, Verdict.FORMAT, lambda e: e.fault is HeaderFault.FOREIGN),
    # A name is given only to a file whose header is on disk: no crash leaves a bad one.
    (TailRow.BAD_HEADER, Verdict.CORRUPT, lambda e: e.fault is HeaderFault.DAMAGED),
    (TailRow.MISPLACED_SEGMENT, Verdict.CORRUPT, lambda e: e.fault is HeaderFault.MISPLACED),
    # Segments are retired only when a checkpoint covers them: the first one needed is there.
    (TailRow.MISSING_OLDEST_SEGMENT, Verdict.CORRUPT, lambda e: not e.reaches),
    # A slot that names another, or a successor that follows upon another: something between them is gone.
    (
        TailRow.MISSING_MIDDLE_SEGMENT,
        Verdict.CORRUPT,
        lambda e: (
            e.next is not None
            and (e.slot.next not in (None, e.next) or e.next_previous not in (None, e.first_seqno))
        ),
    ),
    # The slot is still empty, or torn, when the crash came between the successor's birth and the slot. If the
    # successor's header is bad its own row says so.
    (TailRow.LINKED, Verdict.CONTINUE, lambda e: e.next is not None),
    # The slot is written only when the successor is on disk: that file was lost.
    (TailRow.MISSING_NEWEST_SEGMENT, Verdict.CORRUPT, lambda e: e.slot.next is not None),
    # For the same reason a torn slot without a successor is no crash of ours.
    (TailRow.BAD_SUCCESSOR, Verdict.CORRUPT, lambda e: e.slot.damaged),
    (TailRow.NEWEST, Verdict.END, lambda e: True),
)

TAIL_TABLE: tuple[tuple[TailRow, Verdict, Callable[[Tail], bool]], ...] = (
    # What the next segment repeats, or was left behind, is superseded: no reader looks at it.
    (TailRow.CONTINUED, Verdict.CONTINUE, lambda e: e.next is not None and e.stop is Stop.REACHED),
    (TailRow.UNKNOWN_RECORD, Verdict.FORMAT, lambda e: e.stop is Stop.UNKNOWN),
    # The CRC is right and the place is right, so it was written like this: never by a sound kvwal.
    (TailRow.DISORDER, Verdict.CORRUPT, lambda e: e.stop is Stop.DISORDER),
    # The seqnos go on behind the damage, so no commit lies in it: what was lost is a watermark.
    (TailRow.DAMAGED_MARK, Verdict.CONTINUE, lambda e: e.resumes),
    # The next segment attests that everything before it was on disk.
    (
        TailRow.TRUNCATED_BEFORE_LATER_SEGMENT,
        Verdict.CORRUPT,
        lambda e: e.next is not None and e.short and e.stop in (Stop.END, Stop.CUT),
    ),
    (TailRow.DAMAGE_BEFORE_LATER_SEGMENT, Verdict.CORRUPT, lambda e: e.next is not None),
    # Something says that a commit was on disk which is not there now.
    (TailRow.DAMAGE_BELOW_WATERMARK, Verdict.CORRUPT, lambda e: e.durable > e.last_seqno),
    # Nothing is ever written behind a closed record, and nothing was written behind this paused one.
    (
        TailRow.CLOSED,
        Verdict.END,
        lambda e: e.stop is Stop.CLOSED or (e.paused and not e.short and not e.written),
    ),
    # Only a clean close makes a segment smaller, and leaves a closed record at its end.
    (TailRow.TRUNCATED_SEGMENT, Verdict.CORRUPT, lambda e: e.short),
    (TailRow.CLEAN_END, Verdict.END, lambda e: e.written == 0),
    # Younger records reached the disk before an older one did. None of them was acknowledged: their
    # watermarks say that the older one was not known to be on disk yet.
    (TailRow.UNSYNCED_HOLE, Verdict.END, lambda e: e.later),
    # The same, but of the younger ones only pieces did.
    (TailRow.ZERO_HOLE, Verdict.END, lambda e: e.zeros > 0),
    (TailRow.TORN_TAIL, Verdict.END, lambda e: True),
)

_SAYS = {
    TailRow.UNKNOWN_VERSION: "the segment has a format that this version of kvwal does not know",
    TailRow.FOREIGN_SEGMENT: "the segment belongs to another store",
    TailRow.BAD_HEADER: "the segment's header is damaged",
    TailRow.MISPLACED_SEGMENT: "the segment's header does not belong to a file of this name",
    TailRow.MISSING_OLDEST_SEGMENT: "the log does not reach back to the checkpoint; its oldest segment is missing",
    TailRow.MISSING_MIDDLE_SEGMENT: "this segment is missing, and later ones are there",
    TailRow.MISSING_NEWEST_SEGMENT: "this segment is missing, and the one before it says that it was there",
    TailRow.BAD_SUCCESSOR: "the slot that names the next segment is damaged, and there is no next segment",
    TailRow.UNKNOWN_RECORD: "the record is of a kind that this version of kvwal does not know",
    TailRow.DISORDER: "the record does not follow the one before it",
    TailRow.TRUNCATED_BEFORE_LATER_SEGMENT: (
        "the segment was cut short before commit {wanted}, and a later segment is there"
    ),
    TailRow.DAMAGE_BEFORE_LATER_SEGMENT: "commit {wanted} is damaged, and a later segment says that it was on disk",
    TailRow.DAMAGE_BELOW_WATERMARK: "commit {wanted} is damaged, and all up to {durable} were on disk",
    TailRow.TRUNCATED_SEGMENT: "the segment was cut short: it is smaller than it was made, and was not closed",
    TailRow.CONTINUED: "the log goes on in the next segment",
    TailRow.DAMAGED_MARK: "a watermark record is damaged; no commit is missing",
    TailRow.CLOSED: "the log was closed cleanly after commit {last}",
    TailRow.CLEAN_END: "the log ends after commit {last}; nothing was being written",
    TailRow.UNSYNCED_HOLE: (
        "commit {wanted} did not reach the disk, later ones did; none was acknowledged, {cut} bytes cut"
    ),
    TailRow.ZERO_HOLE: (
        "commit {wanted} did not reach the disk, pieces behind it did; none was acknowledged, {cut} bytes cut"
    ),
    TailRow.TORN_TAIL: "a write after commit {last} was cut off before it was acknowledged, {cut} bytes cut",
    TailRow.LINKED: "the log goes on in the next segment",
    TailRow.NEWEST: "this is the newest segment",
}


def judge(evidence: Link | Tail) -> tuple[TailRow, Verdict]:
    """The first row that applies."""
    if isinstance(evidence, Link):
        return next((row, verdict) for row, verdict, applies in LINK_TABLE if applies(evidence))
    return next((row, verdict) for row, verdict, applies in TAIL_TABLE if applies(evidence))


def describe(row: TailRow, tail: Tail | None = None) -> str:
    """The row as a sentence for a person."""
    if tail is None:
        return _SAYS[row]
    return _SAYS[row].format(
        wanted=tail.last_seqno + 1, last=tail.last_seqno, durable=tail.durable, cut=tail.written
    )


def failure(row: TailRow, verdict: Verdict, file: str, offset: int | None, reason: str) -> Exception:
    """The error of a row that is no end."""
    if verdict is Verdict.FORMAT:
        where = file if offset is None else f"{file} at byte {offset}"
        return FormatError(f"{where}: {reason}")
    return CorruptionError(file, offset, reason)


def missing_file(link: Link, row: TailRow) -> str:
    """The name of the segment that a missing-segment row is about."""
    if row is TailRow.MISSING_OLDEST_SEGMENT:
        return segment_name(link.previous or link.first_seqno)
    if link.slot.next not in (None, link.next):
        return segment_name(link.slot.next or 0)
    return segment_name(link.next_previous or 0)


@dataclass(frozen=True, slots=True)
class LogEnd:
    """How a log ended, as recovery reports it.

    Attributes:
        row: the row of the table that decided.
        last_seqno: the last commit there is.
        watermark: the last commit that is on disk for sure; those after it may be in the page cache only.
        last_time_us: time of the last record.
        position: where the good records end.
        cut_bytes: bytes behind that which are given up.
        detail: the same for a person.
        segments: every segment there is, oldest first.
        header: the newest segment's.
        required: features that a reader of it, or of what was replayed, must know.
        goes_on: more may be written to that segment, at `position`; not so behind a closed record.
        clean: nothing needs to be written again or cut.
    """

    row: TailRow
    last_seqno: Seqno
    watermark: Seqno
    last_time_us: int
    position: LogPosition
    cut_bytes: int
    detail: str
    segments: tuple[SegmentInfo, ...]
    header: SegmentHeader
    required: int
    goes_on: bool

    @property
    def clean(self) -> bool:
        """Whether the log ended with what is known to be on disk, and with nothing behind it."""
        return self.watermark == self.last_seqno and self.cut_bytes == 0
