"""`stats`, `verify`, `checkpoint`, `compact`, `salvage`: looking after a whole store."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click
from rich.console import Console

import kvwal
from kvwal.cli.picture import LEGEND, Extent, drawing
from kvwal.cli.terminal import (
    EXIT_DAMAGED,
    PathType,
    complain,
    count,
    human_bytes,
    print_facts,
    print_json,
    progress_bar,
    store_path,
    when,
)
from kvwal.following.status import running_status

__all__ = ["checkpoint", "compact", "salvage", "stats", "verify"]


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def stats(path: str, as_json: bool) -> None:
    """Show how large the store is, what it holds, who holds what of it, and what opening it found.

    Beside a running writer these are its own figures, with its process id and how old they are, and how each archive is
    doing that it keeps: what cannot be restored is named.
    """
    running, said = running_status(path)
    if running:
        _running_stats(path, said, as_json=as_json)
        return
    with kvwal.open(path, "r") as db:
        # No archive is kept without a process that writes.
        numbers = db.stats().as_dict()
        report = db.recovery
        # Of the moment that the figures are of: reads go on from a newer one where pages are gone.
        entries, position = len(db), str(kvwal.Position(db.position.line, numbers["last_seqno"]))
        pins = db.pins()
        log_start = first_in_log(db)
    if as_json:
        print_json({"entries": entries, "position": position, **numbers, "recovery": report, "pins": pins})
        return
    del numbers["archives"]
    print_facts(str(path), [("entries", entries), ("position", position), *numbers.items()])
    print_facts("What is held", [_held(pin) for pin in pins], prefix="held.")
    print_facts("What opening it found", dataclasses.asdict(report).items(), prefix="recovery.")
    if sys.stdout.isatty():
        console = Console()
        extent = Extent.of(report, log_start)
        for line in drawing(extent, max(20, min(60, console.width - 50))):
            console.print(line)
        console.print(LEGEND, style="dim")


def _running_stats(path: str, said: dict[str, Any] | None, *, as_json: bool) -> None:
    """Of the process that has the store open; of its files where it does not answer."""
    if said is None:
        complain("the process that has the store open did not answer; this is what its files say")
        with kvwal.follow(path) as live:
            said = {"entries": len(live), "position": str(live.position), "lag": live.lag()}
    numbers = dict(said.get("stats", {}))
    archives = numbers.pop("archives", [])
    for archive in archives:
        for first, last in archive["gaps"]:
            complain(f"the archive in {archive['destination']} has a gap: commits {first}..{last} cannot be restored")
    if as_json:
        if "stats" in said:
            numbers["archives"] = [
                {**archive, "gaps": [{"first": first, "last": last} for first, last in archive["gaps"]]}
                for archive in archives
            ]
        # The names are those of a store that is not in use.
        print_json({**{name: value for name, value in said.items() if name != "stats"}, **numbers})
        return
    # Not the values that have tables of their own.
    parts = ("stats", "pins", "consumers", "recovery", "version")
    facts = [(name, value) for name, value in said.items() if name not in parts]
    print_facts(path, [*facts, *numbers.items()])
    known = {field.name for field in dataclasses.fields(kvwal.Pin)}
    # A newer version may say more.
    pins = [kvwal.Pin(**{name: pin[name] for name in known & pin.keys()}) for pin in said.get("pins", [])]
    print_facts("What is held", [_held(pin) for pin in pins], prefix="held.")
    for consumer in said.get("consumers", []):
        print_facts(f"consumer {consumer['name']}", consumer.items(), prefix=f"consumer.{consumer['name']}.")
    for n, archive in enumerate(archives):
        gaps = ",".join(f"{first}..{last}" for first, last in archive["gaps"])
        print_facts(f"archive {archive['destination']}", {**archive, "gaps": gaps}.items(), prefix=f"archive.{n}.")
    print_facts("What opening it found", said.get("recovery", {}).items(), prefix="recovery.")


def _held(pin: kvwal.Pin) -> tuple[str, str]:
    # A name may have anything in it.
    called = pin.name.encode("unicode_escape").decode("ascii")
    name = f"{pin.purpose} {called}" if called else pin.purpose
    name += f" (process {pin.pid})" if pin.pid else ""
    pages = f" of generation {pin.generation}" if pin.generation else ""
    return name, f"{human_bytes(pin.held_bytes)}{pages}, after commit {pin.seqno}, since {when(pin.since_us)}"


def first_in_log(db: kvwal.Store) -> int:
    """The first commit that the log still holds; the next one to come if it holds none."""
    first = next(db.history(), None)
    return db.last_seqno + 1 if first is None else int(first.seqno)


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def verify(path: str, as_json: bool) -> None:
    """Read everything and prove it: checksums, order, no page lost or used twice, log against pages.

    The whole log is read. Of its keys those are compared with the pages that commits between the two newest checkpoints
    wrote: none, where there are no such commits. Exit code 3 if anything does not hold. What is derived, and will be
    made again, is shown as "not lost".
    """
    with kvwal.open(path, "r") as db, progress_bar("verify") as progress:
        task = progress.add_task("verify", total=None)
        report = db.verify(progress=lambda done, total: progress.update(task, completed=done, total=total))
    if as_json:
        print_json(report)
    else:
        for problem in report.problems:
            click.echo(str(problem))
        for finding in report.derived:
            click.echo(f"not lost: {finding}")
        verdict = "everything holds" if report.ok else count(len(report.problems), "problem")
        read = f"{count(report.pages, 'page')} and the log, of which {count(report.compared, 'key')} compared with them"
        click.echo(f"{verdict}: {read}, in {report.seconds:.2f} s")
    if not report.ok:
        complain(f"save what verifies with: kvwal salvage {path} NEW_PATH")
        click.get_current_context().exit(EXIT_DAMAGED)


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def checkpoint(path: str, as_json: bool) -> None:
    """Merge the log into the pages now, so that the next open has nothing to replay."""
    with kvwal.open(path, "w") as db:
        db.checkpoint()
        numbers = db.stats().as_dict()
        seqno = db.last_seqno
    if as_json:
        print_json({"last_seqno": seqno, **numbers})
    else:
        click.echo(f"every commit up to {seqno} is in the pages")


@click.command()
@store_path
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def compact(path: str, as_json: bool) -> None:
    """Give the space of deleted and replaced data back to the system.

    It happens by itself, bit by bit, while the store is in use; this has it done now.
    """
    with kvwal.open(path, "w") as db:
        freed = db.compact()
        numbers = db.stats().as_dict()
    if as_json:
        print_json({"freed_bytes": freed, **numbers})
    else:
        # What was in the log alone is in the pages now, and may take more than was given back.
        grew = f"the pages grew by {human_bytes(-freed)} from the log"
        done = grew if freed < 0 else f"{human_bytes(freed)} given back"
        click.echo(f"{done}; the pages take {human_bytes(numbers['data_bytes'])}")


@click.command()
@store_path
@click.argument("into", type=PathType())
@click.option("--json", "as_json", is_flag=True, help="Print one object.")
def salvage(path: str, into: str, as_json: bool) -> None:
    """Save all that verifies in the damaged store PATH into a new store INTO.

    PATH is not changed. Exit code 3 if something could not be saved; it is listed.
    """
    with progress_bar("salvage") as progress:
        progress.add_task("salvage", total=None)
        report = kvwal.salvage(path, into)
    if as_json:
        print_json(report)
    else:
        for damage in report.damages:
            click.echo(str(damage))
        saved = count(report.saved_keys, "key")
        click.echo(f"{saved} saved into {into}, of all tables; {count(len(report.damages), 'finding')} of damage")
    if report.damages:
        click.get_current_context().exit(EXIT_DAMAGED)
