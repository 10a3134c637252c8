"""`kvwal demo`: a store that is killed again and again while real work goes on, and what is left of it each time.

The writing process is a child; this one only watches. It collects the acknowledgements, kills, opens the store
(sometimes for reading only, so that the next child has to recover it, and may be killed while it does),
and compares. A kill takes away a process and nothing else: what a power cut does to a disk's caches is
tried elsewhere, on a simulated disk (`crashtests/`).
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from typing import Any

import click

import kvwal
from kvwal.cli.picture import Extent
from kvwal.cli.reports import first_in_log
from kvwal.cli.terminal import PathType, print_json
from kvwal.demo.archived import Archived, archive_of
from kvwal.demo.bank import Bank
from kvwal.demo.killing import ChildFailed, Death, live, plan
from kvwal.demo.library import Library
from kvwal.demo.promise import Answer, BrokenPromise
from kvwal.demo.screen import Inspection, Screen
from kvwal.demo.trades import MAX_THREADS, MAX_TRADES, Trades

__all__ = ["demo"]

_EXIT_BROKEN = 3
_MAX_KILLS = 10_000

Work = Library | Bank | Trades


@click.command()
@click.argument("job", type=click.Choice(["library", "bank", "trades", "restore"]), default="library")
@click.option(
    "--kills",
    type=click.IntRange(0, _MAX_KILLS),
    help="How often to kill the writer.  [default: 20; of trades 10]",
)
@click.option("--trades", type=click.IntRange(1, MAX_TRADES), help="Of trades: how many, at least.  [default: 3,000]")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="Of trades: how many threads trade.  [default: 4]")
@click.option("--seed", type=int, help="Repeat the random choices of an earlier run (not its timing).")
@click.option("--path", type=PathType(), help="Keep the store here. It must not exist yet.")
@click.option("--seconds", type=float, default=40.0, show_default=True, help="Hurry after so long.")
@click.option("--json", "as_json", is_flag=True, help="Print one object, at the end.")
def demo(
    job: str,
    kills: int | None,
    trades: int | None,
    threads: int | None,
    seed: int | None,
    path: str | None,
    seconds: float,
    as_json: bool,
) -> None:
    """Kill a writing process again and again, and compare what is left with what was acknowledged.

    library (the default) indexes the sources of Python's standard library. bank moves money between accounts from
    several threads. trades books trades from several threads, while a consumer keeps the portfolio. restore archives
    the bank meanwhile, and then restores it as it was at random past moments. Exit code 3 if a single promise was
    broken; the store is kept then.
    """
    for taken in () if path is None else (path, archive_of(path), f"{path}.restored") if job == "restore" else (path,):
        if os.path.lexists(taken):
            raise click.UsageError(f"{taken} exists; the demo makes a store of its own")
    for option, given in (("--trades", trades), ("--threads", threads)):
        if given is not None and job != "trades":
            raise click.UsageError(f"{option} is for the job trades; the job is {job}")
    if not seconds >= 0:
        raise click.BadParameter(f"{seconds} is no number of seconds", param_hint="--seconds")
    if path is not None:
        _refuse_without_place(path)
    if kills is None:
        kills = 10 if job == "trades" else 20
    if seed is None:
        seed = random.SystemRandom().getrandbits(32)
    place = path or os.path.join(tempfile.mkdtemp(prefix="kvwal-demo-"), "store.kv")
    work: Work
    if job == "trades":
        work = Trades(place, seed, kills, trades or 3_000, threads or 4)
    else:
        work = {"library": Library, "bank": Bank, "restore": Archived}[job](place, seed, kills)
    screen = Screen(quiet=as_json, unit=work.unit)
    result: dict[str, Any] = {"job": job, "seed": seed, "path": path, "kills": []}
    broken: str | None = None
    try:
        _run(work, kills, seconds, random.Random(seed), screen, result)
    except (BrokenPromise, ChildFailed, kvwal.CorruptionError) as error:
        broken = str(error)
    finally:
        # It is kept for who looks into what was broken.
        if path is None and broken is None:
            shutil.rmtree(os.path.dirname(place), ignore_errors=True)
    result["ok"] = broken is None
    result["broken"] = broken
    if as_json:
        print_json(result)
    if broken is not None:
        screen.broken(broken, place, seed)
        click.get_current_context().exit(_EXIT_BROKEN)


def _refuse_without_place(path: str) -> None:
    """Raise what `kvwal.open` does where no store can be made: in a child it would look like a broken promise."""
    try:
        os.mkdir(path)
    except OSError:
        kvwal.open(path).close()
    else:
        os.rmdir(path)


def _run(work: Work, kills: int, seconds: float, rng: random.Random, screen: Screen, result: dict[str, Any]) -> None:
    began = time.monotonic()
    screen.introduce(work.describe(), kills, result["seed"])
    killed = 0
    while killed < kills:
        spent = time.monotonic() - began
        if spent > 3 * seconds:
            break
        # When time runs short, the kills follow each other quickly, and the work is finished after the last one.
        gap = work.gap(kills - killed) if spent <= seconds * (killed + 1) / kills else 1.0
        death = live(work.arguments(last=False), plan(rng, gap), work.heard)
        # A child that was faster than its kill is started again: only kills count.
        killed += death.moment != "finished"
        inspection = _inspect(work, death, read_only=rng.random() < 0.5)
        screen.row(killed, inspection)
        result["kills"].append(inspection)
        if death.moment == "finished" and work.is_finished():
            break
    death = live(work.arguments(last=True), None, work.heard)
    inspection = _inspect(work, death, read_only=False)
    screen.row(None, inspection)
    screen.last_picture(inspection)
    with kvwal.open(work.path, "r") as db:
        verified = db.verify()
        if not verified.ok:
            raise BrokenPromise(f"verify: {verified.problems[0]} (and {len(verified.problems) - 1} more)")
        answers: list[Answer] = []
        for answer in work.answers(db):
            screen.answer(answer)
            answers.append(answer)
    took = time.monotonic() - began
    screen.proved(killed, work.proved(), verified, took)
    result |= {"killed": killed, "acked": work.acked, "answers": answers, "verify": verified, "seconds": took}
    if killed < kills:
        screen.note(f"only {killed} of {kills} kills: the work or the time was over before the others")


def _inspect(work: Work, death: Death, *, read_only: bool) -> Inspection:
    """Open the store, note what recovery found, and compare."""
    acked = work.acked
    try:
        db = kvwal.open(work.path, "r" if read_only else "w", **work.options)
    except kvwal.StoreNotFoundError:
        if acked:
            raise BrokenPromise(f"{acked} transactions were acknowledged, and there is no store") from None
        return Inspection(death, acked)
    with db:
        extent = Extent.of(db.recovery, first_in_log(db))
        finding = work.check(db)
        return Inspection(death, acked, db.recovery, extent, finding, read_only)
