"""The demo of trades: that a small run agrees with itself, and that each thing that could be wrong is noticed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

import kvwal
from kvwal.api.store import Store
from kvwal.demo import demo
from kvwal.demo.chart import chart, money
from kvwal.demo.killing import Plan, live
from kvwal.demo.portfolio import keep
from kvwal.demo.promise import BrokenPromise
from kvwal.demo.replay import Replay, compare
from kvwal.demo.trades import Trades, _trade, _Wish, work
from kvwal.feed.change import Change
from kvwal.keys import Seqno

TRADER_0 = {"who": "trader 0", "why": "tip"}


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Trades:
    """Trades of a life that was killed, all of them in the portfolio."""
    trades = Trades(str(tmp_path_factory.mktemp("killed") / "trades.kv"), seed=3, kills=1, trades=400, threads=3)
    death = live(trades.arguments(last=False), Plan(80, 0.0), trades.heard)
    assert death.moment == "writing"
    with opened(trades) as db:
        trades.check(db)
        with db.consumer("portfolio", prefix=b"trade/") as consumer:
            consumer.project(keep, timeout_s=0)
        assert trades.check(db).text.endswith(", 0 not yet projected")
    assert trades.found >= 80
    return trades


@pytest.fixture
def trades(killed: Trades, tmp_path: Path) -> Trades:
    """A copy of them."""
    path = shutil.copytree(killed.path, tmp_path / "trades.kv")
    return replace(killed, path=str(path), notes=killed.notes.copy())


def opened(trades: Trades) -> kvwal.Store:
    return kvwal.open(trades.path, "w", **trades.options)


def test_what_is_printed_fits_80_columns_and_is_plain_in_a_pipe() -> None:
    arguments = ["--kills", "2", "--trades", "200", "--threads", "3", "--seed", "2"]
    command = [sys.executable, "-m", "kvwal", "demo", "trades", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len([line for line in lines if line[:4].strip().isdigit()]) == 2
    assert all(len(line) <= 80 for line in lines if not line.startswith(("3 threads", "The writing"))), lines
    assert "Proved with 2 kills" in result.stdout
    assert "┼──" in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["bank", "--trades", "5"], "--trades is for the job trades; the job is bank"),
        (["--threads", "2"], "--threads is for the job trades; the job is library"),
        (["trades", "--trades", "0"], "0 is not in the range 1<=x<=200000"),
        (["trades", "--trades", "200001"], "200001 is not in the range 1<=x<=200000"),
        (["trades", "--threads", "65"], "65 is not in the range 1<=x<=64"),
        (["trades", "--kills", "10001"], "10001 is not in the range 0<=x<=10000"),
    ],
)
def test_sizes_have_limits(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(demo, arguments)
    assert result.exit_code == 2
    assert complaint in result.output


# -- what a check would notice -----------------------------------------------------------------


def add(key: bytes, amount: int) -> Callable[[kvwal.Store], None]:
    def change(db: kvwal.Store) -> None:
        first, *rest = db[key].split()
        db[key] = b" ".join([b"%d" % (int(first) + amount), *rest])

    return change


def note(order: bytes, meta: dict[str, str] | None = TRADER_0) -> Callable[[kvwal.Store], None]:
    """A trade in the books, and nothing of it anywhere else."""
    return lambda db: db.put(b"trade/0002/0/00000000", order, meta=meta) and None


def project_again(db: kvwal.Store) -> None:
    """Each trade in the portfolio twice: what a consumer without a position would do."""
    with db.consumer("again", prefix=b"trade/", start="oldest") as consumer:
        consumer.project(keep, timeout_s=0)


def position_without_portfolio(db: kvwal.Store) -> None:
    note(b"split OATS 1 1")(db)
    with db.consumer("portfolio", prefix=b"trade/", timeout_s=0) as consumer:
        consumer.ack(next(consumer))


def portfolio_without_position(db: kvwal.Store) -> None:
    seqno = db.put(b"trade/0002/0/00000000", b"split OATS 1 1", meta=TRADER_0)
    db[b"portfolio/through"] = b"%d" % seqno


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add(b"portfolio/cash", 1), "portfolio/cash is not what the trades make of it"),
        (add(b"portfolio/holding/OATS", 1), "portfolio/holding/OATS is not"),
        (lambda db: db.put(b"portfolio/holding/NONE", b"1 2 3"), "portfolio/holding/NONE is .*, and no trade is"),
        (lambda db: db.delete(b"portfolio/holding/OATS"), "portfolio/holding/OATS is not"),
        (add(b"portfolio/through", 10_000), "the portfolio is already through commit"),
        (project_again, "portfolio/.* is not what the trades make of it"),
        (position_without_portfolio, "but the consumer's position is"),
        (portfolio_without_position, "but the consumer's position is"),
        (add(b"desk/1", -1), "desk/1 is not"),
        (add(b"stock/OATS", 1), "stock/OATS is not"),
        (lambda db: db.put(b"stock/GOLD", b"5 1"), "stock/GOLD is .*, and no trade is"),
        (note(b"buy OATS 1 1"), "desk/0 is not"),
        (note(b"buy OATS 1 100", None), "not who traded and why"),
        (note(b"buy OATS 1 100", {"who": "trader 1", "why": "tip"}), "not who traded and why"),
        (note(b"buy OATS 1 100", {"who": "trader 0"}), "not who traded and why"),
        (note(b"buy OATS 1 9999999"), "the trader has less cash"),
        (note(b"sell OATS 99999 1"), "shares are held"),
        (note(b"split OATS 7919 1"), "the shares were worth"),
        (note(b"deposit 5"), "only the treasury"),
        (note(b"lend OATS 1 1"), "that is no order"),
        (lambda db: db.put(b"trade/x/0/00000000", b"buy OATS 1 1", meta=TRADER_0), "a put is no trade"),
        (lambda db: db.delete_range(b"trade/0001/0", b"trade/0001/1"), "a delete_range is no trade"),
        (lambda db: db.put(b"other", b"", meta={"who": "trader 0"}), "the list of commits say different things"),
    ],
)
def test_the_check_notices_what_is_wrong(trades: Trades, change: Callable[[kvwal.Store], object], reason: str) -> None:
    with opened(trades) as db:
        change(db)
        # What was acknowledged is looked at first, and is in the feed as it was in all of these.
        with pytest.raises(BrokenPromise, match=reason):
            trades.check(db)


def test_an_acknowledged_trade_that_is_not_there_is_noticed(trades: Trades) -> None:
    trades.heard(["trade/0001/0/99999999", "tip", "buy", "OATS", "1", "100"])
    with opened(trades) as db, pytest.raises(BrokenPromise, match="the acknowledged trade/0001/0/99999999"):
        trades.check(db)


@pytest.mark.parametrize(
    ("forget", "reason"),
    [
        (lambda notes: notes.pop(max(notes)), None),
        (lambda notes: [notes.pop(key) for key in sorted(notes)[-2:]], "2 trades of trade/0001/2 are there"),
    ],
)
def test_one_trade_of_a_thread_may_be_there_unacknowledged(
    trades: Trades, forget: Callable[[dict[bytes, object]], object], reason: str | None
) -> None:
    forget(trades.notes)  # type: ignore[arg-type]
    with opened(trades) as db:
        if reason is None:
            trades.check(db)
        else:
            with pytest.raises(BrokenPromise, match=reason):
                trades.check(db)


def test_a_portfolio_that_stayed_behind_is_noticed_at_the_end(trades: Trades) -> None:
    with opened(trades) as db:
        db.run(partial(_trade, trader=0, wish=_Wish(b"OATS", 1, 0.0, 0.5, 0.0), note=b"trade/0002/0/00000000"))
        assert trades.check(db).text.endswith(", 1 not yet projected")
        with pytest.raises(BrokenPromise, match="not all trades are in the portfolio"):
            list(trades.answers(db))


def test_a_trade_that_is_there_too_early_or_not_at_all_is_noticed(trades: Trades) -> None:
    with opened(trades) as db, db.snapshot() as now:
        feed = list(db.changes(0, prefix=b"trade/"))
        # As if the last commit had not been told of, or had been told of before it was made.
        late = [*feed[:-1], feed[-1]._replace(key=feed[-1].key + b"9")]
        early = [*feed, feed[-1]._replace(seqno=Seqno(now.seqno + 1))]
        for wrong in (late, early):
            with pytest.raises(BrokenPromise, match="is not as it must be"):
                compare(now, now.seqno, Replay(wrong), Replay(wrong))


def test_past_moments_are_held_against_the_replay(trades: Trades, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(trades) as db:
        trades.check(db)
        text = "\n".join(line for answer in trades.answers(db) for line in answer.lines)
        assert f"as worked out, at {db.last_seqno} moments from commit 1 to {db.last_seqno}," in text
        # A store that shows the moment before the one that it was asked for.
        snapshot = Store.snapshot
        monkeypatch.setattr(Store, "snapshot", lambda self, at: snapshot(self, at=at - 1))
        with pytest.raises(BrokenPromise, match="at commit 1 "):
            list(trades.answers(db))


def test_a_window_that_begins_after_the_first_trade_is_noticed(trades: Trades) -> None:
    with kvwal.open(trades.path, keep_history_s=0) as db:
        trades.check(db)
        with pytest.raises(BrokenPromise, match="past moments begin with commit"):
            list(trades.answers(db))


# -- moments -----------------------------------------------------------------------------------


def test_each_moment_agrees_with_the_replay_of_its_trades(tmp_path: Path, rng: random.Random) -> None:
    path = str(tmp_path / "trades.kv")
    heard: list[str] = []
    work([path, "1", "1", "2", "5"], heard.append)
    assert len(heard) == 2 + 2 * 5 + 1
    with kvwal.open(path, history_base_bytes=4 << 10) as db, db.consumer("portfolio", prefix=b"trade/") as consumer:
        moments = []
        for number in range(200):
            trader = rng.randrange(2)
            key = b"trade/0002/%d/%08d" % (trader, number)
            db.run(partial(_trade, trader=trader, wish=_Wish.draw(rng), note=key))
            if rng.random() < 0.2:
                consumer.project(keep, timeout_s=0)
            moments.append(db.snapshot())
        feed = list(db.changes(0, prefix=b"trade/"))
        booked, projected = Replay(feed), Replay(feed)
        for then in moments:
            compare(then, then.seqno, booked, projected)
        assert booked.count == len(feed) == len(booked.profits)
        booked, projected = Replay(feed), Replay(feed)
        for seqno in range(feed[0].seqno, db.last_seqno + 1):
            with db.snapshot(at=seqno) as past:
                compare(past, seqno, booked, projected)
        assert {change.value.split()[0] for change in feed if change.value} == {b"deposit", b"buy", b"sell", b"split"}
        # A moment that is taken for its neighbour is noticed.
        booked, projected = Replay(feed), Replay(feed)
        with pytest.raises(BrokenPromise):
            for then in moments:
                compare(then, then.seqno - 1, booked, projected)
        for then in moments:
            then.close()


def trade(seqno: int, order: bytes) -> Change:
    meta = {"who": "treasury"} if order.startswith(b"deposit") else TRADER_0
    return Change(Seqno(seqno), 0, meta, 0, "put", b"trade/1/0/%d" % seqno, None, order, True)


def test_a_replay_says_average_cost_and_profit() -> None:
    orders = ["deposit 1000", "buy TEA 3 100", "buy TEA 1 101", "sell TEA 2 110", "split TEA 5 1", "sell TEA 10 20"]
    replay = Replay([trade(number, order.encode()) for number, order in enumerate(orders, 1)])
    replay.go_to(4)
    tea = replay.stocks["TEA"]
    # Two of four shares for 401 cents cost 200, rounded down.
    assert (replay.cash, tea.held, tea.cost, tea.taken) == (819, 2, 201, 20)
    replay.go_to(6)
    assert (replay.cash, tea.held, tea.cost, tea.taken) == (1019, 0, 0, 19)
    # At the price of the last trade: four shares at 101; two sold at 110, two held; then those for 200 together.
    assert replay.profits == [0, 0, 3, 39, 39, 19]


# -- the chart ---------------------------------------------------------------------------------


def test_amounts_are_printed_to_the_cent() -> None:
    assert [money(cents) for cents in (0, 5, -5, 123_456_789)] == ["0.00", "0.05", "-0.05", "1,234,567.89"]


def test_a_chart_has_bars_from_zero_up_and_down() -> None:
    assert chart([100, 200, -100], height=3) == [
        "          2.00 │ █",
        "               │██",
        "          0.00 ┼───",
        "         -1.00 │  ▒",
        "                1 3",
    ]
    assert chart([]) == []
    assert chart([0]) == ["          0.00 ┼─"]


def test_a_chart_has_the_size_it_was_asked_for(rng: random.Random) -> None:
    for _ in range(300):
        scale = 10 ** rng.randrange(1, 9)
        amounts = [rng.randint(-scale, scale // rng.choice([1, 9])) for _ in range(rng.randrange(1, 400))]
        lines = chart(amounts, 60, 12)
        assert len(lines) <= 12 + 3
        assert all(len(line) <= 76 for line in lines)
        drawn = {char for line in lines for char in line} & {"█", "▒"}
        shown = amounts if len(amounts) <= 60 else [amounts[(i + 1) * len(amounts) // 60 - 1] for i in range(60)]
        # What is too small for half a line is not drawn; the largest is.
        assert drawn <= {"█" for amount in shown if amount > 0} | {"▒" for amount in shown if amount < 0}
        largest = max(shown, key=abs)
        assert not largest or ("█" if largest > 0 else "▒") in drawn or -largest in shown
