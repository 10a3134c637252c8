"""What the trades of the feed amount to, for the third demo: an account to hold the projection against.

It shares no line with the projection (`portfolio.py`) and reads none of its rows. It goes from one moment to a later
one, and says on its way which trade broke a rule of the trade: no sale of more shares than are held, no cash below
zero, no split that changes what the shares are worth, no trade without its trader and reason.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvwal.demo.promise import BrokenPromise

if TYPE_CHECKING:
    from kvwal.db.mapping import OrderedMapping
    from kvwal.feed.change import Change

__all__ = ["Replay", "Stock", "compare"]

_KEY = re.compile(rb"trade/(\d+)/(\d+)/\d+")
_DEPOSIT = re.compile(rb"deposit (\d+)")
_ORDER = re.compile(rb"(buy|sell|split) ([A-Z]+) ([1-9]\d*) ([1-9]\d*)")


@dataclass(slots=True)
class Stock:
    """The shares of one company."""

    held: int = 0
    price: int = 0  #: of a share, at the last trade
    cost: int = 0  #: of those that are held
    taken: int = 0  #: profit of the sales

    @property
    def value(self) -> int:
        """What the shares are worth, at the price of the last trade."""
        return self.held * self.price


@dataclass(slots=True)
class Replay:
    """The account after the first `count` of the trades. In cents and shares."""

    trades: Sequence[Change]
    count: int = 0
    deposits: int = 0
    desks: dict[int, int] = field(default_factory=dict)
    stocks: dict[str, Stock] = field(default_factory=dict)
    #: Profit, or loss, after each trade.
    profits: list[int] = field(default_factory=list)

    @property
    def cash(self) -> int:
        """Of all traders."""
        return sum(self.desks.values())

    def go_to(self, seqno: int) -> None:
        """Take in the trades up to this commit. BrokenPromise says which one must not be."""
        while self.count < len(self.trades) and self.trades[self.count].seqno <= seqno:
            change = self.trades[self.count]
            self.count += 1
            wrong = self._wrong_with(change)
            if wrong:
                text = (change.value or b"").decode(errors="replace")
                raise BrokenPromise(f"{change.key.decode(errors='replace')} of commit {change.seqno}, {text}: {wrong}")
            worth = sum(stock.value for stock in self.stocks.values())
            self.profits.append(self.cash + worth - self.deposits)

    def _wrong_with(self, change: Change) -> str | None:
        """Book one trade; what is wrong with it."""
        key = _KEY.fullmatch(change.key)
        if key is None or change.value is None or change.kind != "put":
            return f"a {change.kind} is no trade"
        trader = int(key[2])
        deposit = _DEPOSIT.fullmatch(change.value)
        if deposit:
            self.deposits += int(deposit[1])
            self.desks[trader] = self.desks.get(trader, 0) + int(deposit[1])
            return None if change.meta.get("who") == "treasury" else "only the treasury makes deposits"
        order = _ORDER.fullmatch(change.value)
        if order is None:
            return "that is no order"
        if change.meta.get("who") != f"trader {trader}" or not change.meta.get("why"):
            return f"the commit says {dict(change.meta)}, and not who traded and why"
        stock = self.stocks.setdefault(order[2].decode(), Stock())
        if order[1] == b"split":
            return _split(stock, new=int(order[3]), old=int(order[4]))
        shares, stock.price = int(order[3]), int(order[4])
        if order[1] == b"buy":
            stock.held += shares
            stock.cost += shares * stock.price
            self.desks[trader] -= shares * stock.price
            return "the trader has less cash" if self.desks[trader] < 0 else None
        if shares > stock.held:
            return f"only {stock.held} shares are held"
        self.desks[trader] += shares * stock.price
        # What is left of the cost, rounded up, so that what was sold had its part rounded down.
        left = -(-stock.cost * (stock.held - shares) // stock.held)
        stock.taken += shares * stock.price - (stock.cost - left)
        stock.held, stock.cost = stock.held - shares, left
        return None


def _split(stock: Stock, *, new: int, old: int) -> str | None:
    before = stock.value
    stock.held, odd_shares = divmod(stock.held * new, old)
    stock.price, odd_cents = divmod(stock.price * old, new)
    if odd_shares or odd_cents or stock.value != before:
        return f"the shares were worth {before} and are worth {stock.value}"
    return None


def compare(then: OrderedMapping, seqno: int, booked: Replay, projected: Replay) -> None:
    """Hold a moment, opened at commit `seqno`, against two replays that have come to none later; they go on to it.

    `booked` goes to the moment itself and is what the traders' own rows must say; `projected` goes as far as the
    projection says it had come, and is what its rows must say. BrokenPromise where they do not.
    """
    booked.go_to(seqno)
    through = int(then.get(b"portfolio/through", b"0"))
    if through > seqno:
        raise BrokenPromise(f"at commit {seqno} the portfolio is already through commit {through}")
    projected.go_to(through)
    found: dict[str, tuple[int, ...]] = {
        key.decode(): tuple(map(int, value.split()))
        for prefix in (b"desk/", b"portfolio/", b"stock/")
        for key, value in then.scan(prefix=prefix)
    }
    if not projected.count:
        # There are no rows before the first commit of the projection.
        projection: dict[str, tuple[int, ...]] = {}
    else:
        projection = {
            f"portfolio/holding/{symbol}": (stock.held, stock.cost, stock.taken)
            for symbol, stock in projected.stocks.items()
        }
        projection |= {"portfolio/cash": (projected.cash,), "portfolio/through": (through,)}
    books: dict[str, tuple[int, ...]] = {f"desk/{trader}": (cash,) for trader, cash in booked.desks.items()}
    books |= {f"stock/{symbol}": (stock.held, stock.price) for symbol, stock in booked.stocks.items()}
    for key, row in (books | projection).items():
        if found.pop(key, None) != row:
            raise BrokenPromise(f"at commit {seqno} {key} is not what the trades make of it, which is {row}")
    for key, row in found.items():
        # Of a company whose shares were never traded only the first price is known.
        if not key.startswith("stock/") or row[0] != 0:
            raise BrokenPromise(f"at commit {seqno} {key} is {row}, and no trade is the reason")
    for trade in booked.trades[max(0, booked.count - 1) : booked.count + 1]:
        if then.get(trade.key) != (trade.value if trade.seqno <= seqno else None):
            raise BrokenPromise(f"at commit {seqno} {trade.key.decode()} of commit {trade.seqno} is not as it must be")
    cost = sum(stock.cost for stock in projected.stocks.values())
    taken = sum(stock.taken for stock in projected.stocks.values())
    if projected.cash + cost != projected.deposits + taken:
        raise BrokenPromise(f"at commit {seqno} the books do not balance")
