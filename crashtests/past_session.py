"""Runs the programs of the part `past`. A program is a list of steps, each a list that JSON can hold.

| step | what it does |
|---|---|
| `["one", what, key, other, how]` | one of the store's own methods; how: "why" (says it), "weak" (durability "os") |
| `["batch", [[table, what, key, other], ...], how]` | writes (see `past_model.py`) in one commit |
| `["txn", [[0, what, key, other], ...], how]` | the same in a transaction, which reads each key before |
| `["revert", table, key, share]` | a key as it was at a moment, this share of the window from its beginning |
| `["consume", c, most, ack]` | consumer c reads batches, and acknowledges one of them, or none |
| `["project"]` | the last consumer projects what has come |
| `["live", most]` | a feed that goes on all the time is read on |
| `["base"]` | a bootstrap; the next such step adds what came since, and compares |
| `["sync"]`, `["checkpoint"]`, `["prepare"]`, `["idle"]` | upkeep |
| `["reopen"]`, `["kill"]`, `["cut", seed]`, `["read-only"]` | the end of a process; the power fails; flag "r" |
| `["look", seed]` | a part of all comparisons |
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any
from zlib import crc32

import kvwal
from crashtests.history import Violation
from crashtests.looked import OPTIONS, PATH
from crashtests.past_looks import Looks, by_commit, equal, equal_told, pairs_of, plain
from crashtests.past_model import CONSUMERS, KEYS, PROJECTS, SUM, Told, ToldOf, Written
from crashtests.session import Program
from kvwal.batch import WriteBatch
from kvwal.testing import SimulatedDisk


class Past(Looks):
    """A store, its model, and what was told so far. Raises `Violation` where they differ."""

    def __init__(self, options: dict[str, Any], seed: int = 0) -> None:
        self.options = OPTIONS | {"checkpoint_log_bytes": 8 << 10} | options
        self.disk = SimulatedDisk(seed=seed)
        super().__init__(self._opened("c"), keeps_all=self.options.get("keep_history_s") == 1e9)
        #: Of the consumers by number: where each began, what it has acknowledged, and what it has read.
        self._began: dict[int, int] = {}
        self._acked: dict[int, int] = {}
        self._read: dict[int, int] = {}
        self._live_told: list[tuple[int, Told]] = []
        self._live_start = 0
        self._consumers: dict[int, Any] = {}
        self._base: Any = None
        self._follow(0)

    def _opened(self, flag: str) -> Any:
        return kvwal.open(PATH, flag, files=self.disk, **self.options)

    def run(self, program: Program) -> None:
        """All the steps, and a last look."""
        for step in program:
            getattr(self, "_do_" + step[0].replace("-", "_"))(*step[1:])
            equal("the last commit", self.store.last_seqno, self.model.last)
        self.store.sync()
        for number in sorted(self._began):
            if number == PROJECTS:
                self._do_project()
            else:
                self._do_consume(number, 10_000, 10_000)
        self._do_live(-1)
        self.look(Random(1), few=False)
        self._compare_sum()
        self.store.close()

    # -- commits ------------------------------------------------------------------------------

    def _value(self, size: int) -> bytes:
        """No two commits put the same value, but empty ones."""
        return (b"%d/" % (self.model.last + 1) * size)[:size]

    def _commit(self, written: Written, seqno: int | None) -> None:
        """A commit returned this seqno; None: it says none."""
        if not written.count:
            return
        self.model.add(written)
        if seqno is not None:
            equal("the seqno of a commit", seqno, self.model.last)

    def _write(self, written: Written, part: Any, table: int, what: str, number: int, other: int | None) -> Any:
        """One write, to what has the methods of a batch and to the model."""
        key = KEYS[number]
        if what == "put":
            value = self._value(other or 0)
            written.put(table, key, value)
            return part.put(key, value)
        if what == "del":
            written.put(table, key, None)
            return part.delete(key)
        stop = None if other is None else KEYS[other]
        written.delete_range(table, key, stop)
        return part.delete_range(key, stop)

    def _do_one(self, what: str, number: int, other: int | None, how: str) -> None:
        """The store's own methods. An empty range is no commit, but says the last one's number."""
        written = Written({})
        part: Any = self.store
        if how == "why":
            written.meta = {"who": "one", "why": str(self.model.last)}
            part = _With(self.store, meta=written.meta)
        elif how == "weak":
            part = _With(self.store, durability="os")
        seqno = self._write(written, part, 0, what, number, other)
        self._commit(written, seqno)

    def _do_batch(self, writes: list[Any], how: str) -> None:
        written, batch = self._meant("batch", how), WriteBatch()
        for table, *write in writes:
            self._write(written, batch.table(table) if table else batch, table, *write)
        seqno = self.store.commit(batch, meta=written.meta or None)
        self._commit(written, seqno if written.count else None)

    def _do_txn(self, writes: list[Any], how: str) -> None:
        written = self._meant("txn", how)
        with self.store.transaction(meta=written.meta or None) as txn:
            for table, what, number, other in writes:
                made = written.of_key(table, KEYS[number])
                expected = made[1] if made else self.model.state.get((table, KEYS[number]))
                equal("a read in a transaction", txn.get(KEYS[number]), expected)
                self._write(written, txn, table, what, number, other)
        self._commit(written, None)

    def _do_revert(self, table: int, number: int, moment: float) -> None:
        """Bring back what a key was at a moment of the window."""
        oldest = self.store.window.oldest
        to = oldest + round(moment * (self.model.last - oldest))
        state = next(state for seqno, state in self.model.states(to) if seqno == to)
        written = Written({})
        written.put(table, KEYS[number], state.get((table, KEYS[number])))
        self._commit(written, self.store.revert(KEYS[number], to=to, table=table))

    def _meant(self, who: str, how: str) -> Written:
        return Written({"who": who, "why": str(self.model.last)} if how else {})

    # -- upkeep, and the ends of a process ----------------------------------------------------

    def _do_sync(self) -> None:
        self.store.sync()

    def _do_checkpoint(self) -> None:
        self.store.checkpoint()

    def _do_prepare(self) -> None:
        self.store.engine._log.prepare_next()

    def _do_idle(self) -> None:
        self.store.sync()
        self.store.engine._log.mark_idle()

    def _do_reopen(self) -> None:
        self._close_consumers()
        self._end(self.store.close)

    def _do_kill(self) -> None:
        self._end(self.disk.kill)

    def _do_cut(self, survivors: int) -> None:
        def cut() -> None:
            found = self.disk.crash(Random(survivors))
            self.disk.kill()
            self.disk = found

        self._end(cut, durable=self.store.durable_seqno)

    def _do_read_only(self) -> None:
        """What a store opened with flag "r" tells."""
        self._close_consumers()
        self._end(self.store.close, "r")
        self._do_look(1)
        self._end(self.store.close)

    def _end(self, end: Callable[[], None], flag: str = "w", *, durable: int | None = None) -> None:
        """End the process and open the store again. `durable`: the first commit that may not be missing."""
        position = self._live.position
        least = self.model.last if durable is None else durable
        end()
        self.store = None
        self.store = self._opened(flag)
        self._consumers, self._base = {}, None
        if not least <= self.store.last_seqno <= self.model.last:
            raise Violation(f"commit {self.store.last_seqno} is the last of {self.model.last}; {least} are durable")
        self.model.cut(self.store.last_seqno)
        # Of a commit that was begun, all is told again.
        self._live_told = [told for told in self._live_told if told[0] <= position]
        self._follow(position)

    def _do_look(self, seed: int) -> None:
        self.look(Random(seed), few=True)
        self._compare_sum()

    # -- feeds and consumers ------------------------------------------------------------------

    def _follow(self, position: int) -> None:
        follow = not self.store.read_only
        try:
            self._live = self.store.changes(position, follow=follow, timeout_s=0)
        except kvwal.FeedGap:
            # Between two feeds the log is kept only for as long as it is to be.
            if self.keeps_all:
                raise
            self._live = self.store.changes(follow=follow, timeout_s=0)
            self._live_start, self._live_told = self._live.position, []

    def _do_live(self, most: int) -> None:
        """Read on in the feed that goes on all the time."""
        while most and (change := next(self._live, None)) is not None:
            self._live_told.append((change.seqno, plain(change)))
            most -= 1
        if most:
            equal("the position of a feed that was read to its end", self._live.position, self.store.durable_seqno)
            told = [(seqno, change) for seqno, changes in self.told(self._live_start, b"", None) for change in changes]
            equal_told("a feed that goes on", by_commit(self._live_told), by_commit(told))

    def _do_base(self) -> None:
        """A snapshot, and what came since: the second of two such steps compares them with the newest state."""
        if self._base is None:
            self._base = self.store.bootstrap()
            return
        self.store.sync()
        with self._base as base:
            copy = {(0, key): value for key, value in base.snapshot.scan()}
            for change in base.changes(tables=[0]):
                written = Written({})
                if change.kind == "delete_range":
                    written.delete_range(0, change.key, change.stop)
                else:
                    written.put(0, change.key, change.value)
                written.apply(copy)
        equal("a snapshot with what came since", pairs_of(copy, 0), pairs_of(self.model.state, 0))
        self._base = None

    def _consumer(self, number: int) -> Any:
        consumer = self._consumers.get(number)
        if consumer is None:
            (prefix, tables), start = CONSUMERS[number]
            before, oldest = self.model.last, self.store.changes().position
            if start is None:
                start = before
            consumer = self.store.consumer(
                name(number), prefix=prefix, tables=tables, start=start, ack_interval_s=0, timeout_s=0
            )
            self.model.add_own(self.store.last_seqno)
            if number not in self._began:
                equal("where a consumer begins", consumer.position, oldest if start == "oldest" else before)
                self._began[number] = self._acked[number] = consumer.position
            self._consumers[number] = consumer
            self._compare_position(number)
            self._read[number] = consumer.position
        return consumer

    def _told_to(self, number: int, after: int, until: int) -> list[ToldOf]:
        (prefix, tables), _ = CONSUMERS[number]
        return self.model.told(after, until, prefix, tables, but=name(number))

    def _compare_position(self, number: int) -> None:
        """It is where it acknowledged, or beyond commits of which it is told nothing."""
        position, acked = self._consumers[number].position, self._acked[number]
        between = self._told_to(number, acked, position)
        if position < acked or between:
            raise Violation(f"consumer {number} had come to {acked} and is at {position}; between are {between[:1]}")
        self._acked[number] = position

    def _do_consume(self, number: int, most: int, ack: int | None) -> None:
        """Read some batches, and acknowledge this one of them, or the last that there is."""
        consumer, batches = self._consumer(number), []
        while len(batches) < most:
            durable, after = self.store.durable_seqno, self._read[number]
            batch = next(consumer)
            self.model.add_own(self.store.last_seqno)
            equal("the first commit of a batch", batch.first, after + 1)
            found = by_commit((change.seqno, plain(change)) for change in batch.changes)
            equal_told("a batch", found, self._told_to(number, after, batch.last))
            self._read[number] = batch.last
            batches.append(batch)
            if not found:
                if batch.last < durable:
                    raise Violation(f"consumer {number} is told nothing after {batch.last}, and {durable} is durable")
                break
        if ack is not None:
            batch = batches[min(ack, len(batches) - 1)]
            consumer.ack(batch)
            self.model.add_own(self.store.last_seqno)
            # What only the store itself has committed since is no reason to store a position.
            if any(self.model.commits[consumer.position : batch.last]):
                raise Violation(f"consumer {number} has acknowledged {batch.last} and is at {consumer.position}")
            self._acked[number] = max(self._acked[number], min(batch.last, consumer.position))
        self._compare_position(number)

    def _do_project(self) -> None:
        """Keep how much the consumer was told, and a checksum over it, in a row of table 0."""
        consumer, durable, before = self._consumer(PROJECTS), self.store.durable_seqno, self.model.last
        written: list[Written] = []

        def keep(txn: Any, changes: Any) -> None:
            if changes[-1].seqno > before:
                raise Violation(f"a projection was told of commit {changes[-1].seqno}, which is its own")
            value = txn.get(SUM, b"0 0 0")
            for change in changes:
                value = summed(value, change.seqno, plain(change))
            meta = {"who": "project"}
            txn[SUM], txn.meta = value, meta
            written.append(Written(meta, name(PROJECTS), writes={(0, SUM): value}))

        position = consumer.project(keep, timeout_s=0)
        for each in written:
            self.model.add(each)
        self.model.add_own(self.store.last_seqno)
        if self._told_to(PROJECTS, position, durable):
            raise Violation(f"the projection stopped at {position}, and {durable} was durable")
        # Of what it handled the position says.
        self._acked[PROJECTS] = max(position, self._acked[PROJECTS])
        self._compare_position(PROJECTS)

    def _compare_sum(self) -> None:
        """What the projection keeps is what the model tells up to its position, each change once."""
        value = b"0 0 0"
        if PROJECTS in self._began:
            for seqno, changes in self._told_to(PROJECTS, self._began[PROJECTS], self._acked[PROJECTS]):
                for change in changes:
                    value = summed(value, seqno, change)
        equal("the projection", self.store.get(SUM, b"0 0 0"), value)

    def _close_consumers(self) -> None:
        for number, consumer in self._consumers.items():
            consumer.close()
            self.model.add_own(self.store.last_seqno)
            self._compare_position(number)


class _With:
    """A store whose writes are given further arguments."""

    def __init__(self, store: Any, **options: Any) -> None:
        self.put = partial(store.put, **options)
        self.delete = partial(store.delete, **options)
        self.delete_range = partial(store.delete_range, **options)


def name(number: int) -> str:
    return f"consumer {number}"


def summed(value: bytes, seqno: int, told: Told) -> bytes:
    """One more change: the number of them, a sum of checksums (since a commit promises no order), the last seqno."""
    number, checksum, last = map(int, value.split())
    if seqno < last:
        raise Violation(f"a projection was told of commit {seqno} after {last}")
    return b"%d %d %d" % (number + 1, checksum + crc32(repr((seqno, told)).encode()), seqno)
