"""The third demo: several threads trade for one portfolio, and a consumer keeps what it holds and what that cost.

    desk/<trader>                       cash of a trader, in cents
    stock/<symbol>                      shares held, and the price of one, in cents
    trade/<life>/<trader>/<number>      "buy" or "sell" with symbol, shares and price; "split" with symbol, new and old
                                        shares; "deposit" with an amount
    portfolio/...                       the projection's (`portfolio.py`)

A trade is one transaction that looks at the trader's cash and the stock, changes both, notes itself down and says of
its commit who traded and why. The consumer is killed with the traders. Hence, whatever the moment of a kill: the
traders' rows are what all trades of the feed make of the deposits; the portfolio's rows are what the trades up to one
commit make of them, each counted once; and each acknowledged trade is in the feed as it was.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import kvwal
from kvwal.demo.chart import chart, money
from kvwal.demo.portfolio import CONSUMER, keep
from kvwal.demo.promise import KEPT, Answer, BrokenPromise, Recount
from kvwal.demo.replay import Replay, compare

if TYPE_CHECKING:
    from kvwal.api.store import Store
    from kvwal.db.transaction import Transaction

__all__ = ["MAX_THREADS", "MAX_TRADES", "Trades", "work"]

MAX_TRADES = 200_000
MAX_THREADS = 64

_FIRST_CASH = 10_000_00
_FIRST_PRICES = {b"TEA": 12_50, b"MILK": 48_00, b"SALT": 7_20, b"JAM": 96_00, b"RICE": 150_00, b"OATS": 33_30}
# Shares of this price or more may be split, and those of this price or less merged: new shares for old ones.
_DEAR, _SPLITS = 80_00, ((2, 1), (3, 1), (5, 2))
_CHEAP, _MERGERS = 20_00, ((1, 2), (1, 5), (1, 10))
_WHY = {
    b"buy": ("dividend", "new-client", "rebalancing", "tip"),
    b"sell": ("client-leaves", "stop-loss", "rebalancing", "tax"),
    b"split": ("dear", "cheap"),
}
# Trades of each thread in the last life, at least.
_LAST_TRADES = 10
# Past moments that are compared at the end.
_MOMENTS = 1000


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a trader would like to do, drawn before the transaction, which may run again."""

    symbol: bytes
    shares: int
    drift: float
    turn: float
    reason: float

    @classmethod
    def draw(cls, rng: random.Random) -> _Wish:
        symbol = rng.choice(list(_FIRST_PRICES))
        return cls(symbol, rng.randint(1, 40), rng.uniform(-0.02, 0.0203), rng.random(), rng.random())


def _trade(txn: Transaction, *, trader: int, wish: _Wish, note: bytes) -> tuple[bytes, str] | None:
    """One trade, as near to the wish as cash, shares and price allow. Returns order and reason; None: it cannot be."""
    desk, stock = b"desk/%d" % trader, b"stock/" + wish.symbol
    cash = int(txn[desk])
    held, price = map(int, txn[stock].split())
    order = _order(wish, cash, held, price)
    if order is None:
        return None
    kind, one, other = order
    if kind == b"split":
        txn.put(stock, b"%d %d" % (held * one // other, price * other // one))
    else:
        sign = 1 if kind == b"buy" else -1
        txn.put(desk, b"%d" % (cash - sign * one * other))
        txn.put(stock, b"%d %d" % (held + sign * one, other))
    text = b"%s %s %d %d" % (kind, wish.symbol, one, other)
    why = _WHY[kind][int(wish.reason * len(_WHY[kind]))]
    txn.put(note, text)
    txn.meta = {"who": f"trader {trader}", "why": why}
    return text, why


def _order(wish: _Wish, cash: int, held: int, price: int) -> tuple[bytes, int, int] | None:
    """Kind, shares and price; of a split new and old shares."""
    if held and wish.turn < 0.3:
        for new, old in _SPLITS if price >= _DEAR else _MERGERS if price <= _CHEAP else ():
            if held * new % old == 0 and price * old % new == 0:
                return b"split", new, old
    price = max(1_00, round(price * (1 + wish.drift)))
    sold, bought = min(wish.shares, held), min(wish.shares, cash // price)
    if sold and (wish.turn > 0.6 or not bought):
        return b"sell", sold, price
    return (b"buy", bought, price) if bought else None


def work(arguments: list[str], say: Callable[[str], None]) -> None:
    """A life of the writing process: PATH SEED LIFE THREADS TRADES, the last for each thread (0: until killed)."""
    path, (seed, life, threads, trades) = arguments[0], map(int, arguments[1:])
    say("start")
    with kvwal.open(path, "c", **KEPT) as db:
        if b"desk/0" not in db:
            with db.batch(meta={"who": "treasury", "why": "opening"}) as batch:
                for trader in range(threads):
                    batch.put(b"desk/%d" % trader, b"%d" % _FIRST_CASH)
                    batch.put(b"trade/0000/%d/00000000" % trader, b"deposit %d" % _FIRST_CASH)
                for symbol, price in _FIRST_PRICES.items():
                    batch.put(b"stock/" + symbol, b"0 %d" % price)
        say("open")
        failures: list[BaseException] = []
        over = threading.Event()
        traders = [
            partial(_trader, db, random.Random(f"{seed}:{life}:{trader}"), life, trader, trades, say, over)
            for trader in range(threads)
        ]
        consumer = _start(partial(_consumer, db, over), over, failures)
        for thread in [_start(each, over, failures) for each in traders]:
            thread.join()
        over.set()
        consumer.join()
        if failures:
            raise failures[0]
    say("done")


def _start(function: Callable[[], None], over: threading.Event, failures: list[BaseException]) -> threading.Thread:
    def run() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001  # handed to the main thread, which raises it
            failures.append(error)
            over.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def _trader(
    db: Store,
    rng: random.Random,
    life: int,
    trader: int,
    trades: int,
    say: Callable[[str], None],
    over: threading.Event,
) -> None:
    number = 0
    while not over.is_set() and (trades == 0 or number < trades):
        note = b"trade/%04d/%d/%08d" % (life, trader, number)
        noted = db.run(partial(_trade, trader=trader, wish=_Wish.draw(rng), note=note))
        if noted is not None:
            say(f"ack {note.decode()} {noted[1]} {noted[0].decode()}")
            number += 1


def _consumer(db: Store, over: threading.Event) -> None:
    """Keep the portfolio until the traders are through, and then what is left."""
    with db.consumer(CONSUMER, prefix=b"trade/", start="oldest") as consumer:
        while not over.is_set():
            consumer.project(keep, timeout_s=0.05)
        consumer.project(keep, timeout_s=0)


@dataclass(slots=True)
class Trades:
    """What the watching process knows: which trades were acknowledged."""

    path: str
    seed: int
    kills: int
    trades: int
    threads: int
    found: int = 0
    life: int = 0
    #: Of each acknowledged trade: the reason and the order.
    notes: dict[bytes, tuple[str, bytes]] = field(default_factory=dict)
    #: The account after all trades that were found.
    booked: Replay = field(default_factory=lambda: Replay(()))

    unit = "trades"
    options: ClassVar[dict[str, Any]] = KEPT

    @property
    def acked(self) -> int:
        """Trades acknowledged so far."""
        return len(self.notes)

    def describe(self) -> str:
        """What is going to happen, in one sentence."""
        return (
            f"{self.threads} threads book {self.trades:,} trades in {self.path}; a consumer keeps the portfolio, "
            "exactly once."
        )

    def gap(self, kills_left: int) -> float:
        """Acknowledgements to wait for before a kill, on average, so that the trades last for all of them."""
        return max(1.0, (self.trades - self.found) / (kills_left + 1))

    def is_finished(self) -> bool:
        """Whether there is nothing left to do: never, there are always trades."""
        return False

    def arguments(self, last: bool) -> list[str]:
        """Of the writing process; each life has its number, which keeps the notes apart."""
        self.life += 1
        trades = max(_LAST_TRADES, -(-(self.trades - self.found) // self.threads)) if last else 0
        return ["trades", self.path, *map(str, (self.seed, self.life, self.threads, trades))]

    def heard(self, words: list[str]) -> None:
        """Take note of an acknowledgement."""
        self.notes[words[0].encode()] = words[1], " ".join(words[2:]).encode()

    def check(self, db: Store) -> Recount:
        """Compare books, feed and portfolio. BrokenPromise says what is wrong."""
        trades = list(db.changes(0, prefix=b"trade/"))
        if not trades and not self.notes and db.first() is None:
            return Recount(0, 0, "no portfolio yet, and nothing acknowledged")
        self._compare_with_acknowledged({trade.key: (trade.meta.get("why"), trade.value) for trade in trades})
        self.booked, projected = Replay(trades), Replay(trades)
        with db.snapshot() as now:
            compare(now, now.seqno, self.booked, projected)
        self._compare_positions(db)
        self._compare_commits(db)
        self.found = self.booked.count - self.threads
        behind = self.booked.count - projected.count
        return Recount(self.found, self.booked.count, f"{self.found:,} trades replayed, {behind:,} not yet projected")

    def _compare_with_acknowledged(self, there: dict[bytes, tuple[str | None, bytes | None]]) -> None:
        for note, content in self.notes.items():
            if there.get(note) != content:
                raise BrokenPromise(f"the acknowledged {note.decode()} is not in the feed as it was")
        counts: Counter[bytes] = Counter()
        for note in sorted(there):
            series, _, number = note.rpartition(b"/")
            if int(number) != counts[series]:
                raise BrokenPromise(f"{series.decode()} has a gap before {number.decode()}")
            counts[series] += 1
        extra = there.keys() - self.notes.keys()
        for series, count in Counter(note.rpartition(b"/")[0] for note in extra).items():
            if count > 1:
                raise BrokenPromise(f"{count} trades of {series.decode()} are there and were not acknowledged")
        # This check has read what is there now, so it counts as acknowledged from here on.
        for note in extra:
            why, order = there[note]
            if not note.startswith(b"trade/0000/") and why is not None and order is not None:
                self.notes[note] = why, order

    def _compare_positions(self, db: Store) -> None:
        """Between the last commit that the portfolio is through and the consumer's position there is no trade."""
        position = next((each.position for each in db.consumers() if each.name == CONSUMER), 0)
        through = int(db.get(b"portfolio/through", b"0"))
        between = [trade.seqno for trade in self.booked.trades if through < trade.seqno <= position]
        if position < through or between:
            raise BrokenPromise(f"the portfolio is through commit {through}, but the consumer's position is {position}")

    def _compare_commits(self, db: Store) -> None:
        """The list of the commits says of each trade who made it and why, and of nothing else."""
        told = {trade.seqno: trade.meta for trade in self.booked.trades}
        listed = {commit.seqno: commit.meta for commit in db.commits(0) if commit.meta}
        if told != listed:
            wrong = min(seqno for seqno in told.keys() | listed if told.get(seqno) != listed.get(seqno))
            raise BrokenPromise(f"of commit {wrong} the feed and the list of commits say different things")

    def answers(self, db: Store) -> Iterator[Answer]:
        """Questions to the finished store."""
        if int(db[b"portfolio/through"]) != self.booked.trades[-1].seqno:
            raise BrokenPromise("the consumer has come to its end, and not all trades are in the portfolio")
        lines = []
        for key, row in db.scan(prefix=b"portfolio/holding/"):
            symbol = key.rpartition(b"/")[2]
            shares, cost, profit = map(int, row.split())
            average, price = money(cost // shares if shares else 0), money(int(db[b"stock/" + symbol].split()[1]))
            lines.append(
                f"{symbol.decode():<5} {shares:>5,} shares, average cost {average:>7}, price {price:>7}, "
                f"profit {money(profit):>9}"
            )
        yield Answer("what is held, and what did it cost?", [*lines, f"cash  {money(int(db[b'portfolio/cash']))}"])
        who = Counter(commit.meta["who"] for commit in db.commits(0) if commit.meta)
        trader, most = who.most_common(1)[0]
        why = Counter(commit.meta["why"] for commit in db.commits(0, meta={"who": trader}))
        if most != sum(why.values()):
            raise BrokenPromise(f"{most} commits are of {trader}, and {sum(why.values())} are found by that name")
        reasons = ", ".join(f"{reason} {number:,}" for reason, number in why.most_common(5))
        yield Answer("who traded most, and why?", [f"{trader}: {most:,} trades", reasons])
        yield self._moments(db)
        yield Answer("what was the profit or loss after each trade?", chart(self.booked.profits))

    def _moments(self, db: Store) -> Answer:
        """Past moments, opened, against replays of the trades up to each. BrokenPromise says what is wrong."""
        began = time.monotonic()
        booked, projected = Replay(self.booked.trades), Replay(self.booked.trades)
        moments = range(self.booked.trades[0].seqno, db.last_seqno + 1)
        if db.window.oldest > moments[0]:
            raise BrokenPromise(f"past moments begin with commit {db.window.oldest}, and trades with {moments[0]}")
        chosen = sorted(random.Random(self.seed).sample(moments, min(_MOMENTS, len(moments))))
        for seqno in chosen:
            with db.snapshot(at=seqno) as then:
                compare(then, seqno, booked, projected)
        took = time.monotonic() - began
        text = f"as worked out, at {len(chosen):,} moments from commit {chosen[0]:,} to {chosen[-1]:,}, in {took:.1f} s"
        return Answer("what was in the books and the portfolio in the past?", [text])

    def proved(self) -> str:
        """What the checks amount to."""
        return (
            f"after every kill all {self.acked:,} acknowledged trades were in the feed and kept the rules, and the "
            "portfolio had each of those up to the consumer's position exactly once"
        )
