"""The deliberate defects: what is changed, in which function, and which part of the harness must notice.

Each is an edit of one step of the real code: the text of a function, in which `old` is replaced by `new`. A
mutant whose text is no longer found does not apply, and that fails the run: then the code has changed, and
the mutant must follow it.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

__all__ = ["MUTANTS", "DoesNotApply", "Edit", "Mutant", "applied"]


@dataclass(frozen=True, slots=True)
class Edit:
    """In the function at `target` ("module:Class.function"), `old` becomes `new`."""

    target: str
    old: str
    new: str


@dataclass(frozen=True, slots=True)
class Mutant:
    """A defect."""

    name: str
    #: The part that must kill it.
    part: str
    edits: tuple[Edit, ...]
    #: The case, or a pattern of cases, that the part begins with: one that killed it before.
    first: str = ""


class DoesNotApply(Exception):
    """The code that the mutant changes is not there."""


def _function(target: str) -> FunctionType:
    module_name, _, path = target.partition(":")
    found: Any = importlib.import_module(module_name)
    try:
        for name in path.split("."):
            found = inspect.getattr_static(found, name)
    except AttributeError as error:
        raise DoesNotApply(f"{target} is not there") from error
    found = inspect.unwrap(getattr(found, "__func__", found))
    assert isinstance(found, FunctionType)
    return found


def _edited(function: FunctionType, edits: list[Edit]) -> CodeType:
    try:
        source = inspect.getsource(function)
    except OSError as error:
        raise DoesNotApply(f"{function.__qualname__}: {error}") from error
    lines = source.splitlines(keepends=True)
    while lines[0].lstrip().startswith("@"):
        lines.pop(0)
    source = "".join(lines)
    for edit in edits:
        if source.count(edit.old) < 1:
            raise DoesNotApply(f"{edit.target} does not contain {edit.old!r}")
        source = source.replace(edit.old, edit.new)
    if source.startswith(" "):
        # A method, as it stands in its class.
        source = "if True:\n" + source
    flags = __future__.annotations.compiler_flag
    code = compile(source, inspect.getsourcefile(function) or "<mutant>", "exec", flags=flags, dont_inherit=True)
    return next(
        constant
        for constant in code.co_consts
        if isinstance(constant, CodeType) and constant.co_name == function.__code__.co_name
    )


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """The code with the defect in it. Raises DoesNotApply."""
    by_function: dict[FunctionType, list[Edit]] = {}
    for edit in mutant.edits:
        by_function.setdefault(_function(edit.target), []).append(edit)
    codes = {function: _edited(function, edits) for function, edits in by_function.items()}
    before = {function: function.__code__ for function in codes}
    for function, code in codes.items():
        if code == _edited(function, []):
            raise DoesNotApply(f"{function.__qualname__} is the same as before")
    try:
        for function, code in codes.items():
            function.__code__ = code
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code


class Deaf:
    """A file whose failing reads look like the end of the file."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def pread(self, size: int, offset: int) -> bytes:
        try:
            data: bytes = self._file.pread(size, offset)
        except OSError:
            return b""
        return data


def _mutant(name: str, part: str, *edits: tuple[str, str, str], first: str = "") -> Mutant:
    return Mutant(name, part, tuple(Edit(*edit) for edit in edits), first)


_WRITER = "kvwal.log.writer:SegmentWriter."
_LOG = "kvwal.log.segmentlog:SegmentLog."
_MAKER = "kvwal.log.segments:SegmentMaker."
_PAGES = "kvwal.pages.pagefile:PageFile."

MUTANTS: tuple[Mutant, ...] = (
    # --- the commit ---
    _mutant("acknowledge before the sync", "exhaustive", (_WRITER + "sync", "self._file.datasync()", "pass")),
    _mutant(
        "publish before durable",
        "exhaustive",
        (
            "kvwal.engine.commit:CommitQueue.put",
            "            if sync:\n                log.sync()\n",
            "            self._publisher.publish_put(seqno, key, value, 0)\n"
            "            if sync:\n                log.sync()\n",
        ),
    ),
    _mutant(
        "a failed fsync is tried again and believed",
        "faults",
        (
            _WRITER + "sync",
            "self._failure = error\n                self._limit = -1\n"
            "                raise self._poisoned(error) from error",
            "self._file.datasync()",
        ),
    ),
    _mutant(
        "after a failed write the log goes on",
        "faults",
        (_WRITER + "append_put", "self._failure = error\n            self._limit = -1\n", "pass\n"),
        (_WRITER + "_write", "self._failure = error\n            self._limit = -1\n", "pass\n"),
    ),
    _mutant(
        "the watermark is one too high",
        "exhaustive",
        (_WRITER + "append_put", "seqno, self.durable_seqno, now_us", "seqno, self.durable_seqno + 1, now_us"),
    ),
    _mutant(
        "the watermark counts what was only written",
        "exhaustive",
        (_WRITER + "append_put", "seqno, self.durable_seqno, now_us", "seqno, self.last_seqno, now_us"),
        first="unsynced only",
    ),
    _mutant(
        "read keys are not validated",
        "exhaustive",
        ("kvwal.engine.occ:History._conflict", "if seqno > since:", "if False:"),
        first="transactions among others",
    ),
    _mutant(
        "range reads are not validated",
        "exhaustive",
        ("kvwal.engine.occ:History._conflict", "for bounds in ranges:", "for bounds in ():"),
        first="transactions among others",
    ),
    _mutant(
        "a transaction reads the newest rows",
        "exhaustive",
        (
            "kvwal.db.transaction:Transaction.get",
            "if self._state.horizon == self._seqno:",
            "if True:",
        ),
        first="transactions among others",
    ),
    _mutant(
        "members of a group are not validated against each other",
        "isolation",
        (
            "kvwal.engine.judge:Judge.accepts",
            "if member.error is None and self._own is not None:",
            "if False:",
        ),
        first="round:threads:*",
    ),
    _mutant(
        "an interrupted commit is forgotten although it is in the log",
        "isolation",
        (
            "kvwal.engine.ending:CommitEnding._end_of",
            "if failure is None and group.began",
            "if False and group.began",
        ),
        first="batch:*:K",
    ),
    # --- groups ---
    _mutant(
        "followers are acknowledged although the leader's flush failed",
        "isolation",
        (
            "kvwal.engine.group:Group.fail",
            "member.error = error",
            "member.error = None if member is not self.members[0] else error",
        ),
        first="round:threads:*",
    ),
    _mutant(
        "the last record of a group is lost",
        "isolation",
        (
            "kvwal.engine.group:Group._append",
            "for member in accepted]",
            "for member in [*accepted[:-1], accepted[0]]]",
        ),
        first="round:threads:*",
    ),
    _mutant(
        "a group is flushed only if its leader asks for it",
        "isolation",
        (
            "kvwal.engine.commit:CommitQueue._commit_group",
            "if group.sync:",
            "if group.sync and len(group.members) == 1:",
        ),
        first="round:threads:*",
    ),
    # --- segments ---
    _mutant(
        "an entry of the index counts before it is whole",
        "isolation",
        ("kvwal.log.index:Index.add", "n = len(self.offsets)\n", "n = len(self.seqnos)\n"),
        ("kvwal.log.index:Index.add", "del self.times[n:]\n", "pass\n"),
        first="indexed-weak-put:*:K",
    ),
    _mutant(
        "the index of a segment leads to the entry behind",
        "sizes",
        (
            "kvwal.log.index:Index.at_or_before",
            "bisect_right(self.seqnos, seqno) - 1",
            "bisect_right(self.seqnos, seqno)",
        ),
    ),
    _mutant(
        "the directory is not flushed after a new segment",
        "exhaustive",
        (_MAKER + "_make", "self._directory.sync()", "pass"),
    ),
    _mutant(
        "a segment gets its name before it is on disk",
        "exhaustive",
        (_MAKER + "_make", "file.sync() if spare is None else file.datasync()", "pass"),
    ),
    _mutant(
        "a new segment before the old one is flushed",
        "exhaustive",
        (_LOG + "_roll", "self.sync()", "self.durable_seqno = self.last_seqno"),
        first="rotation unsynced",
    ),
    _mutant(
        "the successor slot is never written",
        "bitflips",
        (_MAKER + "write_slot_to", "file.pwrite(encode_slot(header.salt, next_seqno), SLOT_OFFSET)", "pass"),
        first="closed:remove:*.log",
    ),
    _mutant(
        "a closed segment is cut before its last record is on disk",
        "exhaustive",
        (_LOG + "_seal", "file.datasync()\n", "pass\n"),
        first="closed large, and on",
    ),
    _mutant(
        "segments are retired newest first",
        "exhaustive",
        (
            _LOG + "retire",
            "for segment in going:",
            "for segment in reversed(going):",
        ),
        first="rotation",
    ),
    _mutant(
        "removals are not flushed one by one",
        "exhaustive",
        (_MAKER + "remove", "self._directory.sync()", "pass"),
        first="many segments retired at once",
    ),
    _mutant(
        "the log goes on behind a record that closed it",
        "exhaustive",
        (
            "kvwal.log.reader:Replay.__iter__",
            "goes_on=tail.stop is not Stop.CLOSED and not tail.short",
            "goes_on=True",
        ),
        first="closed large, and on",
    ),
    _mutant(
        "a new store says that it was closed before its page file has its name",
        "exhaustive",
        (
            "kvwal.engine.create:create_if_missing",
            "log_options(options), time_us=now_us).abandon()",
            "log_options(options), time_us=now_us).close()",
        ),
        first="three puts",
    ),
    _mutant(
        "a tail that may be in the page cache only is gone on with as if it had been closed",
        "exhaustive",
        (_LOG + "resume", "if end.row is not TailRow.CLOSED:", "if False:"),
        first="killed",
    ),
    _mutant(
        "a segment that is rewritten whole begins behind the watermark",
        "exhaustive",
        (
            "kvwal.log.carry:Carry._whole",
            "source.replay(Seqno(self.first_seqno - 1), end.watermark)",
            "source.replay(end.watermark, end.watermark)",
        ),
        first="killed",
    ),
    # --- reading the log ---
    _mutant(
        "the CRC of a record is ignored",
        "exhaustive",
        ("kvwal.log.walk:walk_parts", "if crc32c(rest, (seed + pos) & 0xFFFFFFFF) != crc:", "if False:"),
        ("kvwal.log.run:read_run", "crcs != checked[::2] or ", ""),
        ("kvwal.log.run:read_run", "map(ne, crcs, checked[::2])", "map(ne, crcs, crcs)"),
    ),
    _mutant(
        "damage below the watermark is a torn tail",
        "bitflips",
        (
            "kvwal.log.tail:judge",
            "for row, verdict, applies in TAIL_TABLE if applies(evidence)",
            "for row, verdict, applies in TAIL_TABLE if applies(evidence)\n"
            "        and row is not TailRow.DAMAGE_BELOW_WATERMARK",
        ),
        first="cut:zero:*.log:4096",
    ),
    _mutant(
        "what a refused write left is a commit",
        "faults",
        (_WRITER + "_unmake", "file.pwrite(mark, offset)", "pass"),
    ),
    _mutant(
        "a hole in a middle segment is passed over",
        "bitflips",
        (
            "kvwal.log.tail:judge",
            "for row, verdict, applies in TAIL_TABLE if applies(evidence)",
            "for row, verdict, applies in TAIL_TABLE if applies(evidence) and row not in (\n"
            "            TailRow.DAMAGE_BEFORE_LATER_SEGMENT, TailRow.TRUNCATED_BEFORE_LATER_SEGMENT,\n"
            "            TailRow.DAMAGE_BELOW_WATERMARK, TailRow.TRUNCATED_SEGMENT,\n        )",
        ),
        first="closed:cut:*.log:4096",
    ),
    _mutant(
        "a truncated newest segment is a clean end",
        "bitflips",
        (
            "kvwal.log.tail:judge",
            "for row, verdict, applies in TAIL_TABLE if applies(evidence)",
            "for row, verdict, applies in TAIL_TABLE if applies(evidence)\n"
            "        and row is not TailRow.TRUNCATED_SEGMENT",
        ),
        first="closed:cut:*.log:4096",
    ),
    _mutant(
        "a missing newest segment is not missed",
        "bitflips",
        (
            "kvwal.log.tail:judge",
            "for row, verdict, applies in LINK_TABLE if applies(evidence)",
            "for row, verdict, applies in LINK_TABLE if applies(evidence)\n"
            "        and row is not TailRow.MISSING_NEWEST_SEGMENT",
        ),
        first="closed:remove:*.log",
    ),
    _mutant(
        "a read error is the end of the log",
        "faults",
        (
            "kvwal.log.reader:read_parts",
            "file = chain.open(segment)",
            "file = __import__('crashtests.mutations').mutations.Deaf(chain.open(segment))",
        ),
        first="killed:*:unreadable:*",
    ),
    _mutant(
        "what a newer segment supersedes is read",
        "exhaustive",
        (
            "kvwal.log.reader:Replay.__iter__",
            "until = chain[i + 1].first_seqno - 1 if i + 1 < len(chain) else None",
            "until = None",
        ),
    ),
    # --- recovery ---
    _mutant(
        "a transaction is recovered in part",
        "exhaustive",
        (
            "kvwal.engine.recovery:replay",
            "batch = record.batch()",
            "batch = record.batch()\n        if len(batch.writes) > 1:\n            batch.writes.popitem()",
        ),
        first="batches",
    ),
    _mutant(
        "recovery believes what may be in the page cache only",
        "exhaustive",
        (
            _LOG + "resume",
            "log.last_seqno = log.durable_seqno = end.watermark",
            "log.last_seqno = log.durable_seqno = end.last_seqno",
        ),
        (_LOG + "resume", "if end.clean:", "if end.clean or end.last_seqno != end.watermark:"),
        first="killed",
    ),
    _mutant(
        "recovery does not flush the directory",
        "exhaustive",
        (_LOG + "resume", "directory.sync()", "pass"),
        first="a record larger than a segment",
    ),
    _mutant(
        "the store's own directory is not flushed into its parent",
        "exhaustive",
        ("kvwal.engine.create:create_if_missing", "directory.sync_parent()", "pass"),
    ),
    # --- pages ---
    _mutant(
        "the meta is flipped before the pages are on disk",
        "exhaustive",
        (_PAGES + "_build", "self._file.sync()", "pass"),
        (_PAGES + "_build", "self._file.datasync()", "pass"),
        first="checkpoints",
    ),
    _mutant(
        "the log is removed before the meta is on disk",
        "exhaustive",
        (
            "kvwal.pages.slots:write_slot",
            "meta.generation % 2 * PAGE_SIZE)\n    file.datasync()",
            "meta.generation % 2 * PAGE_SIZE)",
        ),
    ),
    _mutant(
        "a freed page is reused one generation early",
        "exhaustive",
        (
            "kvwal.pages.space:Space.begin",
            "{newest.generation, newest.generation - 1, *self._pins.counts()}",
            "{newest.generation, *self._pins.counts()}",
        ),
        first="pages reused",
    ),
    _mutant(
        "pages of a pinned generation are reused",
        "exhaustive",
        (
            "kvwal.pages.space:Space.begin",
            "{newest.generation, newest.generation - 1, *self._pins.counts()}",
            "{newest.generation, newest.generation - 1}",
        ),
        first="snapshots of large values",
    ),
    _mutant(
        "pages are written over that a follower may read of which nothing is known",
        "tests",
        ("kvwal.engine.checkpoint:Checkpointer._run", "append=self._followers.must_append", "append=False"),
        first="tests/following/test_refused.py::test_where_pins_of_before_cannot_be_removed_no_page_is_written_over",
    ),
    _mutant(
        "a checkpoint that only appends takes what is free",
        "tests",
        ("kvwal.pages.freelist:Allocator.__init__", 'free = array("Q") if append else free', "pass"),
        first="tests/pages/test_pagefile.py::test_checkpoints_that_only_append_write_over_nothing_and_cut_nothing",
    ),
    _mutant(
        "the log of the older generation is removed",
        "exhaustive",
        ("kvwal.engine.checkpoint:Checkpointer._retire", "Seqno(older.seqno + 1)", "Seqno(self._pages.meta.seqno + 1)"),
    ),
    _mutant(
        "the pages hold commits that the log does not",
        "exhaustive",
        ("kvwal.engine.checkpoint:Checkpointer._flush_log", "self._queue.sync()", "pass"),
        first="unsynced only",
    ),
    _mutant(
        "the checkpoint's seqno is one too high",
        "exhaustive",
        (
            "kvwal.engine.checkpoint:merge_into",
            "seqno=memtable.last_seqno,",
            "seqno=memtable.last_seqno + 1,",
        ),
    ),
    _mutant(
        "a tombstone is lost in a merge",
        "exhaustive",
        ("kvwal.pages.merge:merged", "del keys[at], values[at]", "pass"),
        first="tombstones among many",
    ),
    _mutant(
        "the CRC of a page is ignored",
        "bitflips",
        ("kvwal.pages.pager:_verified", "len(raw) == size and crc32c(raw, page) == crc", "len(raw) == size"),
        ("kvwal.pages.tree:Tree._get_uncached", "crc32c(raw, page) != crc", "False"),
        first="closed:zero:data:*",
    ),
    _mutant(
        "the CRC of a meta slot is ignored",
        "bitflips",
        (
            "kvwal.pages.meta:decode_meta",
            "crc32c(raw[: size - 4]) != _CRC.unpack_from(raw, size - 4)[0]",
            "False",
        ),
        first="*:flip:data:*",
    ),
    _mutant(
        "a new page file gets its name before it is on disk",
        "exhaustive",
        ("kvwal.pages.slots:create_page_file", "file.sync()", "pass"),
    ),
    # --- consumers ---
    _mutant(
        "a projection's writes are one commit, and its position another",
        "exhaustive",
        (
            "kvwal.feed.consumer:Consumer._apply",
            "handled = self._handled(txn, batch, parked)\n",
            "txn.commit()\n"
            "                handled = self._change(\n"
            "                    lambda row: __import__('dataclasses').replace(row, position=batch.last))\n",
        ),
        first="a projection",
    ),
    _mutant(
        "a position names a commit before that is durable",
        "exhaustive",
        (_WRITER + "_durable", "return self.durable_seqno", "return self.last_seqno"),
        ("kvwal.feed.owned:OwnedConsumer._change", "sync=True", "sync=False"),
        first="a projection of what is flushed late",
    ),
    _mutant(
        "a position counts before it is flushed",
        "exhaustive",
        ("kvwal.feed.owned:OwnedConsumer._change", "sync=True", "sync=False"),
        first="acknowledgements",
    ),
    _mutant(
        "the window does not hold its log",
        "exhaustive",
        ("kvwal.engine.keeping:Keeping.refresh", 'held = self.hold(base.seqno, "window")', "held = None"),
        first="a window that moves under a past moment",
    ),
    _mutant(
        "the pages of a past moment are not pinned",
        "exhaustive",
        ("kvwal.engine.succession:Succession.past", "self._former = [made, *self._former]", "pass"),
        first="a window that moves under a past moment",
    ),
    _mutant(
        "a past moment does not hold the log behind its base",
        "exhaustive",
        (
            "kvwal.engine.past:Past._version",
            'hold = self._keeping.hold(meta.seqno, "snapshot")',
            'hold = self._keeping.hold(self._state.seqno, "snapshot")',
        ),
        first="a window that moves under a past moment",
    ),
    _mutant(
        "a hold on the log advances before the position is on disk",
        "exhaustive",
        (
            "kvwal.feed.owned:OwnedConsumer._acknowledge",
            "self._acked = max(self._acked, batch.last)",
            "self._acked = max(self._acked, batch.last)\n"
            "        self._consumers.hold(self.name).advance(self._acked)",
        ),
        first="acknowledgements that are written late",
    ),
    _mutant(
        "a deleted range is told beyond the prefix",
        "past",
        ("kvwal.feed.change:Filter._clip", "(part := own.clip(bounds)) is", "(part := own.clip(bounds) and bounds) is"),
    ),
    _mutant(
        "the feed tells what is not durable yet",
        "past",
        ("kvwal.feed.changes:durable_now", "engine.upkeep.durable_seqno, ", "1 << 62, "),
    ),
    _mutant(
        "the feed does not move over what is filtered out",
        "past",
        ("kvwal.feed.changes:Changes._next", "            self._position = last", "            pass"),
    ),
    _mutant(
        "a deleted range is no version of its keys",
        "past",
        ("kvwal.log.key_history:_with_key", "else reversed(list(found))", "else ()"),
    ),
    _mutant(
        "a projection is told of its own commits",
        "past",
        ("kvwal.feed.owned:_Watch.changes", "record.extension().get(CONSUMER) == self._own", "False"),
    ),
    _mutant(
        "a position moves over a batch that was not acknowledged",
        "past",
        ("kvwal.feed.owned:OwnedConsumer._poll", "if self._delivered <= self._acked:", "if True:"),
    ),
    _mutant(
        "an acknowledged batch takes the later ones with it",
        "past",
        ("kvwal.feed.owned:OwnedConsumer._acknowledge", "max(self._acked, batch.last)", "self._scanned"),
    ),
    _mutant(
        "a past scan shows what a range has deleted",
        "past",
        ("kvwal.engine.past_version:PastVersion.chunks", "in stretch.covers)", "in ())"),
    ),
    _mutant(
        "a past read of a deleted key shows what the base has",
        "past",
        ("kvwal.engine.past_version:PastVersion.get", "found is None", "found is None or found.value is None"),
    ),
    _mutant(
        "a past moment is read from a later base",
        "past",
        ("kvwal.engine.past:Past._version", "bases[n - 1]", "bases[-1]"),
    ),
    _mutant(
        "what was before a change is what it put",
        "past",
        ("kvwal.feed.previous:WithPrevious._previous", "Seqno(change.seqno - 1)", "change.seqno"),
    ),
)
