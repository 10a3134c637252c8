"""The fourth demo: the bank, archived while it is killed again and again, and then restored as it was at past moments.

Beside the threads that move money an archive is kept in another directory, and killed with them. Hence, whatever the
moment of a kill: what is restored from the archive is what the transfers up to one commit make of the first balances,
that commit is not before a mark of which the archive has told, and every transfer acknowledged up to it is there. And
what is restored at a time is the bank after the last commit at or before it.
"""

from __future__ import annotations

import random
import shutil
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar

import kvwal
from kvwal.demo import bank
from kvwal.demo.bank import ACCOUNTS, FIRST_BALANCE, Bank, balances_after
from kvwal.demo.promise import KEPT, Answer, BrokenPromise

if TYPE_CHECKING:
    from kvwal.api.store import Store

__all__ = ["Archived", "work"]

# What a loss of the disk may cost, in seconds.
_RPO_S = 0.1
_MARK_EVERY_S = 0.02
# Past moments that are restored at the end.
_MOMENTS = 5
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def archive_of(path: str) -> str:
    """Where the archive of the store at this path is."""
    return f"{path}.archive"


def work(arguments: list[str], say: Callable[[str], None]) -> None:
    """A life of the writing process: as of the bank. Says each mark of the archive, too."""

    @contextmanager
    def archived(db: Store) -> Iterator[None]:
        over = threading.Event()
        with kvwal.archive(db, archive_of(arguments[0]), rpo_s=_RPO_S) as archive:
            thread = threading.Thread(target=_tell_marks, args=(archive, say, over), daemon=True)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()
            if not archive.flush(timeout_s=30.0):
                raise BrokenPromise(f"the archive does not come to its end: {archive.status().error}")
            _tell(archive, say, None)

    bank.work(arguments, say, KEPT, archived)


def _tell_marks(archive: kvwal.Archive, say: Callable[[str], None], over: threading.Event) -> None:
    told: int | None = None
    while not over.wait(_MARK_EVERY_S):
        told = _tell(archive, say, told)


def _tell(archive: kvwal.Archive, say: Callable[[str], None], told: int | None) -> int | None:
    mark = archive.status().mark
    if mark is not None and mark != told:
        say(f"ack mark {int(mark)}")
    return mark


@dataclass(slots=True)
class Archived(Bank):
    """What the watching process knows: which transfers were acknowledged, and the archive's last mark."""

    mark: int = 0
    restored: int = 0

    options: ClassVar[dict[str, Any]] = KEPT

    def describe(self) -> str:
        """What is going to happen, in one sentence."""
        return f"{Bank.describe(self)} It is archived in {archive_of(self.path)}."

    def arguments(self, last: bool) -> list[str]:
        """Of the writing process; each life has its number, which keeps the notes apart."""
        return ["restore", *Bank.arguments(self, last)[1:]]

    def heard(self, words: list[str]) -> None:
        """Take note of an acknowledgement, or of a mark."""
        if words[0] == "mark":
            self.mark = max(self.mark, int(words[1]))
        else:
            Bank.heard(self, words)

    def answers(self, db: Store) -> Iterator[Answer]:
        """Questions to the archive. The store itself says which commit each transfer was, and when."""
        yield from Bank.answers(self, db)
        if not self.mark:
            raise BrokenPromise("the archive told of no mark")
        commits = [(commit.time_us, int(commit.seqno)) for commit in db.commits(0)]
        transfers = {change.key: (int(change.seqno), change.value) for change in db.changes(0, prefix=b"transfer/")}
        lines = [self._compare("the newest", "latest", None, transfers)]
        yield Answer("what does the archive have if the disk is lost now?", lines)
        rng = random.Random(self.seed)
        lines = []
        for i in sorted(rng.sample(range(len(commits)), min(_MOMENTS, len(commits)))):
            following = commits[i + 1 : i + 2] or commits[i : i + 1]
            time_us = rng.randint(commits[i][0], following[0][0])
            at = _EPOCH + timedelta(microseconds=time_us)
            expected = commits[bisect_right(commits, (time_us, 1 << 64)) - 1][1]
            lines.append(self._compare(f"{at:%H:%M:%S.%f}"[:-3], at, expected, transfers))
        yield Answer("what did the bank hold at random past moments (UTC)?", lines)

    def _compare(
        self,
        name: str,
        at: str | datetime,
        expected: int | None,
        transfers: dict[bytes, tuple[int, bytes | None]],
    ) -> str:
        """Restore a moment and compare it. `expected`: its commit; None: the mark, or one behind it."""
        began = time.monotonic()
        into = f"{self.path}.restored"
        commit = int(kvwal.restore(archive_of(self.path), into, at=at).restored)
        if (commit != expected) if expected is not None else commit < self.mark:
            raise BrokenPromise(
                f"{name}: commit {commit} was restored, not {expected if expected is not None else self.mark}"
            )
        with kvwal.open(into, "r") as db:
            noted = dict(db.scan(prefix=b"transfer/"))
            balances = [int(value) for value in db.values(prefix=b"account/")]
            verified = db.verify()
        took = time.monotonic() - began
        if not verified.ok:
            raise BrokenPromise(f"{name}: verify of what was restored: {verified.problems[0]}")
        if noted != {note: content for note, (seqno, content) in transfers.items() if seqno <= commit}:
            raise BrokenPromise(f"{name}: what was restored has not the transfers up to commit {commit}")
        # The accounts are made by the first commit.
        if balances != (balances_after(noted.values()) if noted or balances else []):
            raise BrokenPromise(f"{name}: the balances are not what the noted transfers make of the first ones")
        shutil.rmtree(into)
        self.restored += 1
        return f"{name:>12}  commit {commit:>7,}, {len(noted):>6,} transfers, {sum(balances):,} in all, {took:.1f} s"

    def proved(self) -> str:
        """What the checks amount to."""
        return (
            f"{Bank.proved(self)}; {self.restored} restored banks held {ACCOUNTS * FIRST_BALANCE:,} each and had every "
            f"transfer up to their commit, and no more"
        )
