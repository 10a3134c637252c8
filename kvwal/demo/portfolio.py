"""The projection of the third demo: what a portfolio holds and what that cost, kept from the trades exactly once.

    portfolio/cash                  cents
    portfolio/holding/<symbol>      shares, what they cost, the profit that sales took; the last two in cents
    portfolio/through               the last commit whose trade is in it

The average cost of a share is the cost divided by the shares. A sale takes the average cost of what it sells off the
cost, rounded down to a cent. So the rows depend on each trade, and on the order of the trades.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvwal.db.transaction import Transaction
    from kvwal.feed.change import Change

__all__ = ["CONSUMER", "keep"]

CONSUMER = "portfolio"
_CASH = b"portfolio/cash"


def keep(txn: Transaction, changes: Sequence[Change]) -> None:
    """Bring the portfolio up to these trades: the function for `Consumer.project`."""
    cash = int(txn.get(_CASH, b"0"))
    holdings: dict[bytes, tuple[int, int, int]] = {}
    for change in changes:
        if change.value is None:
            raise ValueError(f"a trade was taken out of the books: {change}")
        kind, *words = change.value.split()
        if kind == b"deposit":
            cash += int(words[0])
            continue
        key = b"portfolio/holding/" + words[0]
        one, other = int(words[1]), int(words[2])
        if key not in holdings:
            shares, cost, profit = map(int, txn.get(key, b"0 0 0").split())
        else:
            shares, cost, profit = holdings[key]
        if kind == b"buy":
            shares, cost = shares + one, cost + one * other
            cash -= one * other
        elif kind == b"sell":
            sold_cost = cost * one // shares
            shares, cost, profit = shares - one, cost - sold_cost, profit + one * other - sold_cost
            cash += one * other
        elif kind == b"split":
            shares = shares * one // other
        else:
            raise ValueError(f"what is the trade {change.value!r}?")
        holdings[key] = shares, cost, profit
    for key, row in holdings.items():
        txn.put(key, b"%d %d %d" % row)
    txn.put(_CASH, b"%d" % cash)
    txn.put(b"portfolio/through", b"%d" % changes[-1].seqno)
