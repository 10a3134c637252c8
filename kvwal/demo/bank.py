"""The second demo: several threads move money between accounts.

    account/<number>                      the balance
    transfer/<life>/<thread>/<number>     from, to, amount

A transfer is one transaction that reads two balances, writes both and notes itself down. Hence, whatever the
moment of a kill: the sum of all balances is what it was at the beginning; the balances are exactly what the noted
transfers make of the first ones; every acknowledged transfer is noted; a thread's transfers have no gap; and of
those that were not acknowledged, at most one for each thread is there.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import kvwal
from kvwal.demo.promise import OPTIONS, Answer, BrokenPromise, Recount

if TYPE_CHECKING:
    from kvwal.api.store import Store
    from kvwal.db.transaction import Transaction

__all__ = ["ACCOUNTS", "FIRST_BALANCE", "Bank", "balances_after", "work"]

ACCOUNTS = 24
THREADS = 4
FIRST_BALANCE = 1_000
# Transfers before a kill, on average.
_GAP = 300
_LAST_LIFE_TRANSFERS = 100


def _account(number: int) -> bytes:
    return b"account/%04d" % number


def balances_after(transfers: Iterable[bytes]) -> list[int]:
    """What transfers make of the first balances."""
    balances = [FIRST_BALANCE] * ACCOUNTS
    for content in transfers:
        payer, payee, moved = map(int, content.split())
        balances[payer] -= moved
        balances[payee] += moved
    return balances


def work(
    arguments: list[str],
    say: Callable[[str], None],
    options: dict[str, Any] = OPTIONS,
    beside: Callable[[Store], AbstractContextManager[object]] = nullcontext,
) -> None:
    """A life of the writing process: PATH SEED LIFE TRANSFERS, the last for each thread (0: until killed).

    What `beside` returns is entered before money is moved, and left behind it.
    """
    path, seed, life, transfers = arguments[0], *map(int, arguments[1:])
    say("start")
    with kvwal.open(path, "c", **options) as db, beside(db):
        if _account(0) not in db:
            with db.batch() as batch:
                for number in range(ACCOUNTS):
                    batch.put(_account(number), b"%d" % FIRST_BALANCE)
        say("open")
        failures: list[BaseException] = []
        threads = [
            threading.Thread(target=_thread, args=(db, seed, life, thread, transfers, say, failures), daemon=True)
            for thread in range(THREADS)
        ]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        if failures:
            raise failures[0]
    say("done")


def _move(txn: Transaction, *, payer: int, payee: int, asked: int, note: bytes) -> int:
    """One transfer: as much as was asked for, or as much as there is. Returns what was moved."""
    paying, paid = int(txn[_account(payer)]), int(txn[_account(payee)])
    moved = min(asked, paying)
    txn.put(_account(payer), b"%d" % (paying - moved))
    txn.put(_account(payee), b"%d" % (paid + moved))
    txn.put(note, b"%d %d %d" % (payer, payee, moved))
    return moved


def _thread(
    db: Store,
    seed: int,
    life: int,
    thread: int,
    transfers: int,
    say: Callable[[str], None],
    failures: list[BaseException],
) -> None:
    rng = random.Random(f"{seed}:{life}:{thread}")
    number = 0
    try:
        while not failures and (transfers == 0 or number < transfers):
            payer, payee = rng.sample(range(ACCOUNTS), 2)
            amount = rng.randint(1, 100)
            note = b"transfer/%04d/%d/%08d" % (life, thread, number)
            moved = db.run(partial(_move, payer=payer, payee=payee, asked=amount, note=note))
            say(f"ack {note.decode()} {payer} {payee} {moved}")
            number += 1
    except BaseException as error:  # noqa: BLE001  # handed to the main thread, which raises it
        failures.append(error)


@dataclass(slots=True)
class Bank:
    """What the watching process knows: which transfers were acknowledged."""

    path: str
    seed: int
    kills: int
    found: int = 0
    life: int = 0
    transfers: dict[bytes, bytes] = field(default_factory=dict)

    unit = "transfers"
    options: ClassVar[dict[str, Any]] = {}

    @property
    def acked(self) -> int:
        """Transfers acknowledged so far."""
        return len(self.transfers)

    def describe(self) -> str:
        """What is going to happen, in one sentence."""
        return (
            f"{THREADS} threads move money between {ACCOUNTS} accounts in {self.path}; "
            f"{ACCOUNTS * FIRST_BALANCE:,} in all, now and for ever."
        )

    def gap(self, kills_left: int) -> float:
        """Acknowledgements to wait for before a kill, on average."""
        del kills_left
        return _GAP

    def is_finished(self) -> bool:
        """Whether there is nothing left to do: never, money always moves."""
        return False

    def arguments(self, last: bool) -> list[str]:
        """Of the writing process; each life has its number, which keeps the notes apart."""
        self.life += 1
        return ["bank", self.path, str(self.seed), str(self.life), str(_LAST_LIFE_TRANSFERS if last else 0)]

    def heard(self, words: list[str]) -> None:
        """Take note of an acknowledgement."""
        self.transfers[words[0].encode()] = " ".join(words[1:]).encode()

    def check(self, db: Store) -> Recount:
        """Compare the books with the balances. BrokenPromise says what is wrong."""
        balances = [int(value) for value in db.values(prefix=b"account/")]
        noted = dict(db.scan(prefix=b"transfer/"))
        if not balances and not noted and not self.transfers:
            return Recount(0, 0, "no bank yet, and nothing acknowledged")
        if len(balances) != ACCOUNTS or sum(balances) != ACCOUNTS * FIRST_BALANCE:
            raise BrokenPromise(f"{len(balances)} accounts hold {sum(balances):,}, not {ACCOUNTS * FIRST_BALANCE:,}")
        for note, content in self.transfers.items():
            if noted.get(note) != content:
                raise BrokenPromise(f"the acknowledged {note.decode()} is not in the books as it was")
        counts: Counter[bytes] = Counter()
        for note in noted:
            series, _, number = note.rpartition(b"/")
            if int(number) != counts[series]:
                raise BrokenPromise(f"{series.decode()} has a gap before {number.decode()}")
            counts[series] += 1
        if balances_after(noted.values()) != balances:
            raise BrokenPromise("the balances are not what the noted transfers make of the first ones")
        extra = noted.keys() - self.transfers.keys()
        for series, count in Counter(note.rpartition(b"/")[0] for note in extra).items():
            if count > 1:
                raise BrokenPromise(f"{count} transfers of {series.decode()} are there and were not acknowledged")
        # This check has read what is there now, so it counts as acknowledged from here on.
        self.transfers |= {note: noted[note] for note in extra}
        self.found = len(noted)
        return Recount(len(noted), len(noted), f"{len(noted):,} transfers recounted, {sum(balances):,} in all")

    def answers(self, db: Store) -> Iterator[Answer]:
        """Questions to the finished store."""
        balances = {key.decode(): int(value) for key, value in db.scan(prefix=b"account/")}
        richest = sorted(balances.items(), key=lambda item: -item[1])[:3]
        yield Answer("who has the most?", [", ".join(f"{name}: {balance:,}" for name, balance in richest)])
        last = next(iter(db.scan(prefix=b"transfer/", reverse=True, limit=1)))
        yield Answer("what was the last transfer of the last thread?", [f"{last[0].decode()}: {last[1].decode()}"])

    def proved(self) -> str:
        """What the checks amount to."""
        return (
            f"after every kill the accounts held {ACCOUNTS * FIRST_BALANCE:,} in all, and every one of the "
            f"{self.acked:,} transfers acknowledged was in the books"
        )
