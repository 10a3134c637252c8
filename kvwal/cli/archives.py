"""`archive`: what a backup or an archive holds, whether it holds, and what is kept of it."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Any

import click

from kvwal.backup.chain import held_lines, list_held
from kvwal.backup.checking import DestinationStatus, KnownGap, accept_gap, status_of, verify
from kvwal.backup.choosing import Moment, as_moment, choose
from kvwal.backup.identity import known_store
from kvwal.backup.keeping import Keep, plan_pruning, prune
from kvwal.backup.port import DirectoryDestination
from kvwal.backup.state import identity_of
from kvwal.cli.backups import WHEN, earlier
from kvwal.cli.terminal import (
    EXIT_DAMAGED,
    PathType,
    complain,
    count,
    human_bytes,
    print_facts,
    print_json,
    progress_bar,
    when,
)
from kvwal.keys import Seqno
from kvwal.times import us_of

__all__ = ["archive"]

_dest = click.argument("dest", type=PathType())
_as_json = click.option("--json", "as_json", is_flag=True, help="Print one object.")


def _now_us() -> int:
    return time.time_ns() // 1000  # a program's clock, and no store's


@click.group()
def archive() -> None:
    """Look after the archive, or the backups, in a directory DEST."""


@archive.command()
@_dest
@_as_json
def status(dest: str, as_json: bool) -> None:
    """Show which moments can be restored from DEST, and what is missing.

    Of each line of commits: the ranges of moments that can be restored, gaps, how many bases and units, bytes. mark is
    what kvwal.archive has put there and read back. Exit code 3 if moments are lost, between others or up to the
    mark, and that was not accepted, if a unit does not follow the one before it, if kvwal archive verify found damage
    and has not seen it mended since, or if no moment can be restored.
    """
    found = status_of(DirectoryDestination(dest))
    if as_json:
        print_json(found)
    else:
        _print_status(found)
    for line in found.lines:
        for gap in line.gaps:
            if gap.state == "lost":
                complain(f"commits {_range(gap)} cannot be restored: {gap.reason}; see kvwal archive accept-gap")
    for problem in found.problems:
        complain(str(problem))
    if not any(line.moments for line in found.lines):
        complain("no moment can be restored")
    if not found.ok:
        click.get_current_context().exit(EXIT_DAMAGED)


def _range(gap: KnownGap) -> str:
    return f"{gap.first}..{gap.last}"


def _print_status(found: DestinationStatus) -> None:
    facts: list[tuple[str, Any]] = [("store", found.store_id.hex()), ("epoch", found.epoch)]
    if found.mark is not None:
        facts.append(("mark", f"{found.mark[0].hex()}:{found.mark[1]}"))
    facts.append(("unverified", found.unverified))
    facts.append(("verified", _time(found.verified_time)))
    print_facts("archive", facts)
    for line in found.lines:
        facts = [
            ("moments", ",".join(f"{each.first}..{each.last}" for each in line.moments)),
            ("gaps", ",".join(f"{_range(gap)} {gap.state}" for gap in line.gaps)),
            ("thinned_before", line.thinned_before),
            ("bases", line.bases),
            ("units", line.units),
            ("bytes", line.bytes),
            ("oldest", _time(line.oldest_time)),
            ("newest", _time(line.newest_time)),
        ]
        print_facts(f"line {line.line.hex()}", facts, prefix=f"{line.line.hex()}.")


def _time(moment: datetime | None) -> str:
    return "" if moment is None else when(us_of("time", moment))


@archive.command("verify")
@_dest
@click.option("--since-last", is_flag=True, help="Only objects that were not proved before.")
@click.option("--deep", is_flag=True, help="Also replay the commits in their order, and compare digests.")
@click.option("--budget", type=float, metavar="SECONDS", help="At most so long; what was proved longest ago first.")
@click.option("--quiet", is_flag=True, help="Say nothing if all of it holds.")
@_as_json
def verify_command(
    dest: str, since_last: bool, deep: bool, budget: float | None, quiet: bool, as_json: bool
) -> None:
    """Read what is in DEST and prove it. The results are remembered there. Exit code 3 if something does not hold.

    Something in DEST is damaged, or moments behind the oldest one are lost, up to the mark, and that was not accepted.
    """
    if budget is not None and not budget >= 0:
        raise click.BadParameter(f"{budget} is no number of seconds", param_hint="--budget")
    with progress_bar("verify", quiet=quiet or as_json) as progress:
        task = progress.add_task("verify", total=None)
        report = verify(
            DirectoryDestination(dest),
            deep=deep,
            since_last=since_last,
            budget_s=budget,
            now_us=_now_us,
            monotonic_s=time.monotonic,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    if as_json:
        print_json(report)
    for problem in report.problems:
        complain(str(problem))
    for gap in report.gaps:
        complain(f"commits {_range(gap)} cannot be restored: {gap.reason}; see kvwal archive accept-gap")
    if report.unsaved is not None:
        complain(f"the results cannot be remembered in {dest} ({report.unsaved}), so the next check begins anew")
    if not report.ok:
        click.get_current_context().exit(EXIT_DAMAGED)
    if not quiet and not as_json:
        more = f", {report.skipped} proved before" if report.skipped else ""
        more += f", {report.left} left" if report.left else ""
        click.echo(f"{count(report.checked, 'object')} proved{more}: everything holds")


@archive.command()
@_dest
@click.option("--at", type=WHEN, default="latest", help="As for kvwal restore. Otherwise the newest moment.")
@_as_json
def plan(dest: str, at: Moment, as_json: bool) -> None:
    """Show the objects that a restore would read, in their order: name and size in bytes.

    If a consumer of that moment is behind the base, a restore also reads the units that it has not handled. Which these
    are, only the pages tell: how many there can be is said.
    """
    destination = DirectoryDestination(dest)
    # As a restore does: it names a destination that has no backup.
    known_store(destination)
    chosen = choose(destination, as_moment(at))
    names = [str(name) for name in (*chosen.plan.bases, *chosen.plan.units)]
    before = chosen.held.units_before(chosen.plan)
    before_bytes = sum(chosen.held.sizes[str(name)] for name in before)
    if as_json:
        objects = {"bytes": chosen.plan.bytes, "objects": names}
        print_json({"at": chosen.plan.at, **objects, "earlier_units": len(before), "earlier_bytes": before_bytes})
        return
    for name in names:
        click.echo(f"{name}\t{chosen.held.sizes[name]}")
    complain(f"commit {chosen.plan.at}: {count(len(names), 'object')}, {human_bytes(chosen.plan.bytes)}")
    if before:
        complain(earlier(len(before), before_bytes))


_KEEP = Keep()
_MANY = click.IntRange(min=0)


@archive.command("prune")
@_dest
@click.option("--pitr-days", type=float, default=_KEEP.pitr_s / 86400, show_default=True, help="Each moment.")
@click.option("--daily", type=_MANY, default=_KEEP.daily, show_default=True, help="Then one for each day, this many.")
@click.option("--monthly", type=_MANY, default=_KEEP.monthly, show_default=True, help="And one for each month.")
@click.option("--dry-run", is_flag=True, help="Only say what could not be restored any more.")
@_as_json
def prune_command(dest: str, pitr_days: float, daily: int, monthly: int, dry_run: bool, as_json: bool) -> None:
    """Delete what is older than wanted, by the times of commits. The newest moment always stays.

    What a killed backup has left goes as well.

    Prints, for each stretch of moments that cannot be restored any more: line, first and last commit.
    """
    if not pitr_days >= 0:
        raise click.BadParameter(f"{pitr_days} is no number of days", param_hint="--pitr-days")
    keep = Keep(pitr_days * 86400, daily, monthly)
    destination = DirectoryDestination(dest)
    identity_of(destination)  # an empty one is not pruned, it is no archive
    plans = [
        plan_pruning(destination, list_held(destination, line), keep, _now_us()) for line in held_lines(destination)
    ]
    if as_json:
        print_json({"lines": [each._asdict() for each in plans]})
    for each in plans:
        for lost in () if as_json else each.unreachable:
            click.echo(f"{each.line.hex()}\t{lost.first}\t{lost.last}")
        if not dry_run:
            prune(destination, each)
    if not dry_run:
        destination.sweep()
    objects, size = sum(len(each.delete) for each in plans), sum(each.bytes for each in plans)
    what = f"{count(objects, 'object')}, {human_bytes(size)}"
    complain(f"{what}: nothing was done" if dry_run else f"{what} deleted")


@archive.command("accept-gap")
@_dest
@click.argument("gap", metavar="FIRST..LAST")
@click.option("--reason", required=True, help="Why, and who says so; it is kept with the gap.")
def accept_gap_command(dest: str, gap: str, reason: str) -> None:
    """Accept that the moments of the commits FIRST to LAST are lost: status and verify complain of it no more."""
    found = re.fullmatch(r"(\d+)\.\.(\d+)", gap)
    if found is None:
        said = f"{gap!r} is no range such as 151..299; kvwal archive status shows the gaps"
        raise click.BadParameter(said, param_hint="FIRST..LAST")
    if not reason.strip():
        raise click.BadParameter("it is empty, and is kept with the gap", param_hint="--reason")
    try:
        accept_gap(DirectoryDestination(dest), Seqno(int(found[1])), Seqno(int(found[2])), reason, _now_us())
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    complain(f"gap {gap} is accepted")
